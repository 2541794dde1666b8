"""Counting samples by tar headers, and the command that writes the counts down."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from training.data.index import main
from training.data.plan import ShardSlice
from training.data.read import Group, read_groups
from training.data.shards import Shard
from training.data.streams import Patience
from training.data.tar_headers import count_samples


def read_keys(path: Path, **part: int) -> list[str]:
    groups = list(read_groups(ShardSlice(Shard(str(path), 0), **part), Patience()))
    assert all(isinstance(group, Group) for group in groups)
    return [group.name for group in groups]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_counts_agree_with_reading(tmp_path: Path, tar_format: int) -> None:
    names = ["a/0.png", "a/0.txt", "a.b/1.png", "a.b/1.txt", "nodot", "__meta__", "__x__/3.txt", "2.SEG.png", "2.txt"]
    names += ["l/" * 60 + f"{i}.{e}" for i in range(3) for e in ("png", "txt")]
    # 40 two-byte letters still fit into ustar's fields, 60 do not.
    letters = "é" * (40 if tar_format == tarfile.USTAR_FORMAT else 60)
    names += ["l" * 90 + "/" + letters + f"{i}.{e}" for i in range(2) for e in ("png", "txt")]
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = (number * 300) % 1100
            if tar_format == tarfile.PAX_FORMAT and number % 3 == 0:
                entry.pax_headers = {"comment": "path=none of this"}
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
        link = tarfile.TarInfo("z/9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a/0.png"
        tar.addfile(link)
    keys = read_keys(path)
    assert len(keys) == 8
    count = count_samples(str(path))
    assert (count.samples, count.damage) == (8, None)
    for start in range(8):
        for stop in range(start, 9):
            assert read_keys(path, start=start, stop=stop) == keys[start:stop]
    assert read_keys(path, start=1, step=3) == keys[1::3]


def test_compressed_shards_are_counted(kit, tmp_path: Path) -> None:
    plain = kit.write_shards(tmp_path, [7])[0]
    packed = tmp_path / "packed.tar.gz"
    with tarfile.open(plain) as source, tarfile.open(packed, "w:gz") as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
    assert count_samples(str(packed)).samples == 7


def test_index_makes_epochs_exact(kit, tmp_path: Path, sizes_unknown: None, capsys) -> None:
    kit.write_shards(tmp_path / "a", [5, 8])
    kit.write_shards(tmp_path / "b", [3], first=13)
    (tmp_path / "a" / "sizes.json").write_text('{"00000.tar": 99, "gone.tar": 4}')
    data = f"{tmp_path}/a::{tmp_path}/b/00000.tar"
    assert main([data]) == 0
    assert "2 shards, 13 samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "sizes.json").read_text()) == {"00000.tar": 5, "00001.tar": 8}
    assert json.loads((tmp_path / "b" / "sizes.json").read_text()) == {"00000.tar": 3}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00000.tar", "00001.tar", "sizes.json"]
    loader = kit.open_ranks(kit.config(data), 1)[0]
    assert sorted(kit.seen_keys(loader, 0)) == list(range(16))


def test_index_keeps_other_entries(kit, tmp_path: Path) -> None:
    paths = kit.write_shards(tmp_path, [5, 8])
    assert main([str(paths[0])]) == 0
    assert main([str(paths[1])]) == 0
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"00000.tar": 5, "00001.tar": 8}


@pytest.mark.parametrize("harm", ["cut in a member", "cut between members", "no tar", "flipped header"])
def test_index_names_damaged_shards(kit, tmp_path: Path, harm: str, capsys) -> None:
    path = kit.write_shards(tmp_path, [4, 4])[1]
    data = path.read_bytes()
    second_sample = 6 * 512
    flipped = data[:second_sample] + b"\x01" + data[second_sample + 1 :]
    path.write_bytes(
        {
            "cut in a member": data[: second_sample + 512 + 9],
            "cut between members": data[:second_sample],
            "no tar": b"nothing",
            "flipped header": flipped,
        }[harm]
    )
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "1 of 2 shards are damaged" in error
    assert "00001.tar" in error
    assert "00000.tar" not in error
    assert not (tmp_path / "sizes.json").exists()


def test_index_refuses_what_is_not_there_or_not_local(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "x.tar")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["https://example.org/0.tar"]) == 1
    assert "is not a local file" in capsys.readouterr().err
