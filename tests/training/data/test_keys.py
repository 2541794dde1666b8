"""Writing keys into shards: which, by what, and that nothing is lost however it ends."""

from __future__ import annotations

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
    assert list(after)[3] == "l" * 120 + "/é.json"
    assert keys_in(path) == [0, 1]
    assert (tmp_path / "sizes.json").exists()


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
