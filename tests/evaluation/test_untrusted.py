"""Evaluation data from strangers: nothing is written, followed, run or unpickled, and damage is one clear error."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from evaluation.datasets import PairDataset, ShardClassification, decode_image, open_classification
from evaluation.errors import UserError

from .conftest import image_bytes, pair, write_shard

BLOCK = 512


def test_names_and_links_lead_nowhere(tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    secret = tmp_path / "secret.png"
    secret.write_bytes(image_bytes(1))
    with tarfile.open(inside / "0.tar", "w") as tar:
        for name in ("../../x", "/tmp/../x"):
            for suffix, content in (("png", image_bytes(2)), ("txt", b"text")):
                entry = tarfile.TarInfo(f"{name}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo("9.png")
            entry.type, entry.linkname = kind, str(secret)
            tar.addfile(entry)
        entry = tarfile.TarInfo("9.txt")
        tar.addfile(entry)
    before = sorted(tmp_path.rglob("*"))
    pairs = PairDataset(str(inside / "0.tar"), lambda image: image.size)
    assert [pairs[i]["index"] for i in range(len(pairs))] == [0, 1]
    assert pairs.skipped == 1
    assert sorted(tmp_path.rglob("*")) == before


def bomb() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 16) + b"IDAT" + bytes(16)


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", image_bytes(1)[:60], image_bytes(1, 64, "JPEG")[:300], bomb(), b"%!PS-Adobe-3.0 EPSF-3.0\n"],
)
def test_pictures_that_are_none(data: bytes) -> None:
    with pytest.raises(UserError, match="sample 3: the image cannot be decoded"):
        decode_image(data, "sample 3")


def test_json_that_is_a_bomb(tmp_path: Path) -> None:
    for facts in (b"[" * 100_000, b'{"concept": ' + b"7" * 5000 + b"}", b"\xff", b"{"):
        write_shard(tmp_path / "0.tar", [("0", pair(0) | {"json": facts})])
        with pytest.raises(UserError, match=r"sample 0 of .*rebuild the sample"):
            PairDataset(str(tmp_path / "0.tar")).concept(0)


def test_numbers_that_are_bombs(classification_shards: Path) -> None:
    write_shard(classification_shards / "test" / "0.tar", [("0", {"png": image_bytes(0), "cls": b"9" * 5000})])
    shards = ShardClassification([classification_shards / "test" / "0.tar"], 6)
    with pytest.raises(UserError, match="it must be a number in 0 … 5"):
        shards[0]
    for number in ("9" * 5000, "999999999", "0"):
        (classification_shards / "test" / "nshards.txt").write_text(number)
        with pytest.raises(UserError, match=r"nshards\.txt says"):
            open_classification(classification_shards)


def with_header(data: bytes, at: int, begin: int, value: bytes) -> bytes:
    """The tar file with a value in the header at a byte, whose checksum is made to fit."""
    header = bytearray(data[at : at + BLOCK])
    header[begin : begin + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + BLOCK :]


def test_damaged_shards_are_refused_and_not_read_in_part(tmp_path: Path) -> None:
    """A figure over the pairs before the damage would look like one over all."""
    path = tmp_path / "0.tar"
    write_shard(path, [(str(i), {"png": image_bytes(i)[:400].ljust(400), "txt": b"x"}) for i in range(4)])
    data = path.read_bytes()
    third = 4 * 2 * BLOCK
    end = max(at for at, byte in enumerate(data) if byte) // BLOCK * BLOCK + BLOCK
    assert len(PairDataset(str(path))) == 4
    harmed = {
        "header": data[:third] + b"\xff" + data[third + 1 :],
        "no end mark": data[:end],
        "cut between members": data[:third],
        "cut in a header": data[: third + 100],
        "cut in a member": data[: third + BLOCK + 9],
        "huge": with_header(data, third, 124, b"77777777777\0"),
        "negative": with_header(data, third, 124, b"\xff" * 11 + b"\x00"),
        "huge header of headers": with_header(with_header(data, third, 156, b"x"), third, 124, b"\x80" + b"\x7f" * 11),
        "empty": b"",
    }
    for how, content in harmed.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"0\.tar is not an uncompressed tar file") as caught:
            PairDataset(str(path))
        assert "\n" not in str(caught.value), how
