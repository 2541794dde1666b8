"""Writing keys into shards: which, by what, and that nothing is lost however it ends."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from evaluation.sample_json import parse_key
from training.data.index import main
from training.data.key_set import LARGEST_KEY
from training.data.key_writer import with_key
from training.data.keys import NO_KEY, NO_OBJECT, read_shard_keys
from training.data.shard_pool import LOOK


def unkeyed(kit, number: int, facts: object = None) -> list[tuple[str, bytes]]:
    """A sample without a key, with a .json only where facts are given."""
    members = kit.members_of(number)[:2]
    if facts is not None:
        # In the middle, as img2dataset writes it.
        content = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
        members.insert(1, (f"{number:06d}.json", content))
    return members


def members_in(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def keys_in(path: Path) -> list[int]:
    return read_shard_keys(str(path)).keys.tolist()


def test_keys_are_numbered_through_all_shards(kit, tmp_path: Path, capsys) -> None:
    kit.write_tar(
        tmp_path / "00000.tar", [unkeyed(kit, 0), unkeyed(kit, 1, {"caption": "ä", "n": 1.50}), unkeyed(kit, 2)]
    )
    kit.write_tar(tmp_path / "00001.tar", [])
    kit.write_tar(tmp_path / "00002.tar", [unkeyed(kit, 3), [*unkeyed(kit, 4), ("000004.JSON", b"{}\n")]])
    before = {path.name: members_in(path) for path in tmp_path.iterdir()}
    (tmp_path / "00002.tar").chmod(0o640)
    assert main([str(tmp_path), "--add-keys"]) == 0
    out = capsys.readouterr().out
    assert "5 keys written, 0 were there" in out
    assert out.endswith("flags of training: --train-num-samples 5 --data_size 5\n")
    assert keys_in(tmp_path / "00000.tar") == [0, 1, 2]
    assert keys_in(tmp_path / "00002.tar") == [3, 4]
    for name, members in before.items():
        after = members_in(tmp_path / name)
        pairs = {key: value for key, value in after.items() if not key.lower().endswith("json")}
        assert pairs == {key: value for key, value in members.items() if not key.lower().endswith("json")}
    # What was there is there as it was written.
    assert members_in(tmp_path / "00000.tar")["000001.json"] == b'{"caption": "\\u00e4", "n": 1.5, "key": 1}'
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 0, "00002.tar": 2}
    assert (tmp_path / "00002.tar").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", "sizes.json"]
    loader = kit.open_ranks(kit.config(tmp_path, batch_size=5, data_size=5), 1)[0]
    assert sorted(kit.seen_keys(loader, 0)) == list(range(5))


def test_keys_that_exist_are_kept_and_a_second_call_changes_nothing(kit, tmp_path: Path, capsys) -> None:
    kit.write_tar(tmp_path / "0.tar", [unkeyed(kit, 0), *(kit.members_of(number) for number in (70, 71))])
    kit.write_tar(tmp_path / "1.tar", [kit.members_of(72)])
    kept = (tmp_path / "1.tar").stat()
    assert main([str(tmp_path), "--add-keys", "--workers", "2"]) == 0
    assert "1 keys written, 3 were there" in capsys.readouterr().out
    assert keys_in(tmp_path / "0.tar") == [0, 70, 71]
    assert (tmp_path / "1.tar").stat().st_ino == kept.st_ino
    inode = (tmp_path / "0.tar").stat().st_ino
    assert main([str(tmp_path), "--add-keys"]) == 0
    assert "0 keys written, 4 were there" in capsys.readouterr().out
    assert (tmp_path / "0.tar").stat().st_ino == inode


def test_keys_that_clash_are_refused(kit, tmp_path: Path, capsys) -> None:
    kit.write_tar(tmp_path / "0.tar", [unkeyed(kit, 0), unkeyed(kit, 1)])
    kit.write_tar(tmp_path / "1.tar", [kit.members_of(1), kit.members_of(9)])
    content = (tmp_path / "0.tar").read_bytes()
    assert main([str(tmp_path), "--add-keys"]) == 1
    error = capsys.readouterr().err
    assert "a sample has the key 1 already" in error
    assert "--first-key 10" in error
    assert (tmp_path / "0.tar").read_bytes() == content
    assert main([str(tmp_path), "--add-keys", "--first-key", "10"]) == 0
    assert capsys.readouterr().out.endswith("--train-num-samples 4 --data_size 12\n")
    assert keys_in(tmp_path / "0.tar") == [10, 11]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("same key", "has the key 1, which another sample has too"),
        ("large key", f"more than {LARGEST_KEY}"),
        ("cut", "is damaged"),
        ("gz", "is compressed"),
    ],
)
def test_what_cannot_be_numbered_is_refused(kit, tmp_path: Path, second: str, message: str, capsys) -> None:
    kit.write_tar(tmp_path / "0.tar", [unkeyed(kit, 0), kit.members_of(1)])
    path = tmp_path / "1.tar"
    large = unkeyed(kit, 5, {"key": LARGEST_KEY + 1})
    kit.write_tar(path, [large if second == "large key" else kit.members_of(1 if second == "same key" else 7)])
    if second == "cut":
        path.write_bytes(path.read_bytes()[:700])
    if second == "gz":
        packed = subprocess.run(["gzip", "-c", str(path)], check=True, capture_output=True).stdout
        path.unlink()
        path = tmp_path / "1.tar.gz"
        path.write_bytes(packed)
    content = (tmp_path / "0.tar").read_bytes()
    assert main([f"{tmp_path}/0.tar::{path}", "--add-keys"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (tmp_path / "0.tar").read_bytes() == content
    assert not (tmp_path / "sizes.json").exists()


def test_json_that_is_no_object_is_left_alone(kit, tmp_path: Path, capsys) -> None:
    kit.write_tar(tmp_path / "0.tar", [unkeyed(kit, 0, b"[1]"), unkeyed(kit, 1, b"{"), unkeyed(kit, 2, {"key": "a"})])
    assert keys_in(tmp_path / "0.tar") == [NO_OBJECT, NO_OBJECT, NO_KEY]
    assert main([str(tmp_path), "--add-keys"]) == 0
    assert "2 samples are left without a key" in capsys.readouterr().out
    assert keys_in(tmp_path / "0.tar") == [NO_OBJECT, NO_OBJECT, 2]
    assert json.loads(members_in(tmp_path / "0.tar")["000002.json"]) == {"key": 2, "original_key": "a"}


@pytest.mark.parametrize(
    "facts",
    [b"{}", b' { "a" : {} } \n', '{"é": "é"}'.encode("utf-16"), b'\xef\xbb\xbf{"a": 1}', b'{"key": null, "a": [NaN]}'],
)
def test_a_key_is_added_to_any_object(facts: bytes) -> None:
    changed = with_key(facts, 2**33)
    assert parse_key(changed) == 2**33
    before, after = json.loads(facts), json.loads(changed)
    assert after.keys() - {"key", "original_key"} == before.keys() - {"key"}


def test_other_members_long_names_and_links(kit, tmp_path: Path) -> None:
    names = ["l" * 120 + "/é.png", "l" * 120 + "/é.txt", "__meta__", "a.b/1.seg.png", "a.b/1.png", "a.b/1.txt"]
    os.mkdir(tmp_path / "real")
    path = kit.write_tar(tmp_path / "real" / "0.tar", [[(name, name.encode() * 99) for name in names]])
    (tmp_path / "link.tar").symlink_to(path)
    assert main([str(tmp_path / "link.tar"), "--add-keys"]) == 0
    assert (tmp_path / "link.tar").is_symlink()
    after = members_in(path)
    assert {name: after[name] for name in names} == {name: name.encode() * 99 for name in names}
    assert list(after)[2] == "l" * 120 + "/é.json"
    assert keys_in(path) == [0, 1]
    assert (tmp_path / "sizes.json").exists()


def test_all_that_is_no_json_stays_byte_for_byte(kit, tmp_path: Path) -> None:
    """Folders, links, pax headers, owners, times, and what lies behind the end."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as tar:
        add_entry(tar, "a", kind=tarfile.DIRTYPE)
        add_entry(tar, "a/0.png", kit.image_bytes(0), mode=0o600, uid=7, uname="somebody", mtime=1234.5)
        add_entry(tar, "a/0.json", b'{"n": 1}', mode=0o640, pax_headers={"path": "a/0.json", "comment": "x" * 600})
        add_entry(tar, "a/0.txt", b"x")
        add_entry(tar, "a/1.png", kind=tarfile.LNKTYPE, linkname="a/0.png")
        add_entry(tar, "a/1.txt", b"y" * 512)
        add_entry(tar, "a/2.png", kind=tarfile.SYMTYPE, linkname="0.png")
    with path.open("ab") as file:
        file.write(b"behind the end")
    old = path.read_bytes()
    with tarfile.open(path) as tar:
        before = {member.name: facts_of(member) for member in tar}
    assert main([str(path), "--add-keys", "--first-key", "40"]) == 0
    with tarfile.open(path) as tar:
        after = {member.name: facts_of(member) for member in tar}
        assert list(after) == ["a", "a/0.png", "a/0.json", "a/0.txt", "a/1.png", "a/1.txt", "a/1.json", "a/2.png"]
        assert {name: after[name] for name in before} == before
        assert tar.extractfile("a/0.json").read() == b'{"n": 1, "key": 40}'
        assert tar.extractfile("a/1.json").read() == b'{"key": 41}'
    new = path.read_bytes()
    place = old.index(b'{"n": 1}')
    # But for the size and the checksum in the header of the .json.
    assert new[: place - 400] == old[: place - 400]
    assert new.endswith(b"behind the end")
    assert len(new) == len(old) + 1024


def add_entry(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **facts) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = len(content), kind
    for fact, value in facts.items():
        setattr(entry, fact, value)
    tar.addfile(entry, io.BytesIO(content))


def facts_of(member: tarfile.TarInfo) -> tuple:
    return member.type, member.linkname, member.mode, member.uid, member.uname, member.mtime, member.pax_headers


def test_compressed_shards_are_known_by_their_content(kit, tmp_path: Path, capsys) -> None:
    """One that is compressed in spite of its name is refused; one that is not, in spite of its name, gets keys."""
    plain = kit.write_tar(tmp_path / "0.tar.gz", [unkeyed(kit, 0)])
    assert main([str(plain), "--add-keys"]) == 0
    packed = tmp_path / "1.tar"
    packed.write_bytes(gzip.compress(kit.write_tar(packed, [unkeyed(kit, 1)]).read_bytes()))
    content = packed.read_bytes()
    assert main([f"{plain}::{packed}", "--add-keys"]) == 1
    assert "1.tar is compressed; decompress it first" in capsys.readouterr().err
    assert packed.read_bytes() == content


def test_damage_of_compressed_shards_is_told_wherever_it_is(kit, tmp_path: Path) -> None:
    """Nothing is raised, be it inside a .json that is being read."""
    generator = random.Random(0)
    facts = [{"key": number, "x": generator.randbytes(700).hex()} for number in range(4)]
    path = kit.write_tar(tmp_path / "0.tar.gz", [unkeyed(kit, number, facts[number]) for number in range(4)])
    packed = gzip.compress(path.read_bytes())
    told = []
    for place in range(20, len(packed) - 20, 5):
        path.write_bytes(packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :])
        told.append(read_shard_keys(str(path)).damage is not None)
    # The others only changed some content: what is wrong behind the end of the archive, its checksum too, is of no concern.
    assert sum(told) > len(told) / 2


def test_a_json_that_would_become_too_long_gets_no_key(kit, tmp_path: Path, capsys) -> None:
    """The loader reads none of more than 16 MiB; with a key a .json is longer."""
    long = json.dumps({"key": None, "x": "é" * 2**20}, ensure_ascii=False).encode()
    kit.write_tar(tmp_path / "0.tar", [unkeyed(kit, 0, long), unkeyed(kit, 1, {"x": "e" * 2**20})])
    assert main([str(tmp_path), "--add-keys"]) == 0
    assert "1 samples are left without a key" in capsys.readouterr().out
    assert keys_in(tmp_path / "0.tar") == [NO_OBJECT, 1]


def test_leftovers_are_removed_but_not_other_files(kit, tmp_path: Path) -> None:
    kit.write_tar(tmp_path / "0.tar", [unkeyed(kit, 0)])
    names = [".0.tar.4999999.tmp", f".0.tar.{10**30}.tmp", f".0.tar.{os.getppid()}.tmp", ".1.tar.4999999.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    assert main([str(tmp_path / "0.tar"), "--add-keys"]) == 0
    assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(names[1:])


def test_out_leaves_the_source_alone(kit, tmp_path: Path, capsys) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    kit.write_tar(source / "0.tar", [unkeyed(kit, 0), unkeyed(kit, 1)])
    kit.write_tar(source / "1.tar", [kit.members_of(5)])
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert main([str(source), "--add-keys", "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert [keys_in(out / name) for name in ("0.tar", "1.tar")] == [[0, 1], [5]]
    assert json.loads((out / "sizes.json").read_text()) == {"0.tar": 2, "1.tar": 1}
    done = {path.name: path.stat().st_ino for path in out.iterdir() if path.suffix == ".tar"}
    # What is there is not written again; what is missing, or has other keys, is.
    (out / "1.tar").unlink()
    capsys.readouterr()
    assert main([str(source), "--add-keys", "--out", str(out)]) == 0
    assert "2 keys" not in capsys.readouterr().out.splitlines()[0]
    assert (out / "0.tar").stat().st_ino == done["0.tar"]
    assert keys_in(out / "1.tar") == [5]
    assert main([str(source), "--add-keys", "--out", str(out), "--first-key", "8"]) == 0
    assert keys_in(out / "0.tar") == [8, 9]
    assert main([str(source), "--add-keys", "--out", str(source)]) == 1
    assert main([f"{source}::{out}", "--add-keys", "--out", str(tmp_path / "both")]) == 1


def test_a_full_disk_loses_nothing(kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for number in range(3):
        kit.write_tar(tmp_path / f"{number}.tar", [unkeyed(kit, number)])
    flushed = os.fsync
    calls = iter([None, None, OSError(28, "No space left on device")])

    def fsync(file: int) -> None:
        if (error := next(calls, None)) is not None:
            raise error
        flushed(file)

    monkeypatch.setattr("os.fsync", fsync)
    content = (tmp_path / "1.tar").read_bytes()
    assert main([str(tmp_path), "--add-keys", "--workers", "1"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert keys_in(tmp_path / "0.tar") == [0]
    assert (tmp_path / "1.tar").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar", "2.tar"]


def test_killed_at_random_moments_and_started_again(kit, tmp_path: Path) -> None:
    """Whenever it is killed every shard is the old one or the new one; in the end all is as if nothing had happened."""
    images = random.Random(5)
    for shard in range(12):
        samples = [
            [(f"{n:06d}.png", images.randbytes(30_000)), (f"{n:06d}.txt", b"x")]
            for n in range(shard * 60, shard * 60 + 60)
        ]
        kit.write_tar(tmp_path / "data" / f"{shard:05d}.tar", samples)
    before = {path.name: members_in(path) for path in (tmp_path / "data").iterdir()}
    command = [str(tmp_path / "data"), "--add-keys", "--workers", "2"]
    statuses = []
    for shards_done in (0, 3, 7, None):
        process = multiprocessing.get_context("fork").Process(target=_run_command, args=(command,))
        process.start()
        if shards_done is not None:
            while _keyed(tmp_path / "data") <= shards_done and process.is_alive():
                time.sleep(0.001)
            process.kill()
        process.join(60)
        statuses.append(process.exitcode)
        for path in (tmp_path / "data").glob("*.tar"):
            after = members_in(path)
            assert {name: after[name] for name in before[path.name]} == before[path.name]
    # A kill may come too late on a machine that is busy, but not every time.
    assert -signal.SIGKILL in statuses[:-1]
    assert set(statuses[:-1]) <= {0, -signal.SIGKILL}
    assert statuses[-1] == 0
    keys = np.concatenate([read_shard_keys(str(path)).keys for path in sorted((tmp_path / "data").glob("*.tar"))])
    assert keys.tolist() == list(range(720))
    time.sleep(2 * LOOK)  # Until the processes of the killed ones have noticed that they are alone.
    assert main([str(tmp_path / "data"), "--add-keys", "--workers", "1"]) == 0
    assert not [path.name for path in (tmp_path / "data").iterdir() if path.name.startswith(".")]


def _run_command(command: list[str]) -> None:
    sys.exit(main(command))


def _keyed(folder: Path) -> int:
    """Shards that have been written."""
    return sum(b".json" in path.read_bytes() for path in folder.glob("*.tar"))
