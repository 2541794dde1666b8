"""Training data from strangers: nothing of it is written, followed, run or unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from training.data import check_train_data
from training.data.plan import ShardSlice
from training.data.read import Group, read_groups, read_slots
from training.data.samples import parse_key, read_labels
from training.data.shards import Shard
from training.data.sizes import read_sizes_file
from training.data.streams import Patience
from training.errors import UserError

NAMES = ["../../x", "/etc/x", "//x", "./x", "a/../../x", "..//x", "x\0y", "\n", "C:\\x", "~/x", "$(touch x)", "-rf"]


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, len(content)
    tar.addfile(entry, io.BytesIO(content))


def groups_of(path: Path) -> list[Group]:
    items = list(read_groups(ShardSlice(Shard(str(path), 0)), Patience()))
    assert all(isinstance(item, Group) for item in items)
    return items


def everything_below(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_is_a_name_and_no_place(kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: int) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with tarfile.open(inside / "0.tar", "w", format=form) as tar:
        for name in NAMES:
            for suffix, content in kit.members_of(3):
                add(tar, f"{name}.{suffix.split('.')[1]}", content)
    monkeypatch.chdir(inside)
    before = everything_below(tmp_path)
    found = groups_of(inside / "0.tar")
    assert everything_below(tmp_path) == before
    assert len(found) >= len(NAMES) - 4
    assert all(group.members["png"] == kit.image_bytes(3) for group in found if "png" in group.members)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_are_not_followed(kit, tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "0.png", kit.image_bytes(0))
        add(tar, "0.txt", kind=kind, link=str(secret))
        add(tar, "0.json", kind=kind, link="0.png")
        add(tar, "1.txt", b"text")
    before = everything_below(tmp_path)
    found = groups_of(tmp_path / "0.tar")
    assert everything_below(tmp_path) == before
    assert [(group.name, sorted(group.members)) for group in found] == [("0", ["png"]), ("1", ["txt"])]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled_or_decoded_by_its_suffix(kit, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    samples = []
    for number in range(8):
        traps = [
            (f"{number:06d}.{suffix}", trap) for suffix in ("pyd", "pkl", "pt", "pth", "npz", "npy", "pickle", "cbor")
        ]
        samples.append(kit.members_of(number) + traps)
    kit.write_tar(tmp_path / "0.tar", samples)
    check_train_data(kit.config(tmp_path))
    assert sorted(kit.seen_keys(kit.open_ranks(kit.config(tmp_path), 1)[0], 0)) == list(range(8))
    found = groups_of(tmp_path / "0.tar")
    assert all(group.members.keys() == {"png", "txt", "json"} for group in found)
    # In the places of what is read they are bytes as well.
    kit.write_tar(tmp_path / "0.tar", [[(f"0.{suffix}", trap) for suffix in ("png", "txt", "json")]])
    assert len(list(read_slots(ShardSlice(Shard(str(tmp_path / "0.tar"), 0))))) == 1
    assert parse_key(trap) is None
    (tmp_path / "sizes.json").write_bytes(trap)
    with pytest.raises(UserError, match=r"sizes\.json cannot be read"):
        read_sizes_file(str(tmp_path))
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists()  # The trap works.


@pytest.mark.parametrize("text", ["[" * 100_000, '{"0.tar": ' + "7" * 5000 + "}", '{"0.tar": 1e400}', '{"0.tar": NaN}'])
def test_a_sizes_file_is_json_and_no_bomb(tmp_path: Path, text: str) -> None:
    (tmp_path / "sizes.json").write_text(text)
    with pytest.raises(UserError, match=r"sizes\.json .*python -m training.data.index"):
        read_sizes_file(str(tmp_path))


def test_commands_come_from_the_flag_alone(kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever in the data looks like a URL or a command is text."""
    monkeypatch.chdir(tmp_path)
    command = "pipe:touch ran"
    facts = json.dumps({"key": 1, "url": command, "__url__": command, "caption": command}).encode()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (
            (f"{command}.png", kit.image_bytes(1)),
            (f"{command}.txt", b"x 1"),
            (f"{command}.json", facts),
        ):
            add(tar, name, content)
        add(tar, "1.__url__", command.encode())
        add(tar, "1.png", kit.image_bytes(1))
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 1, command: 5}))
    (tmp_path / "rows.csv").write_text(f"filepath\ttitle\n{command}\t{command}\n")
    assert kit.seen_keys(kit.open_ranks(kit.config(tmp_path / "0.tar", batch_size=1), 1)[0], 0) == [1]
    with pytest.raises(UserError, match="the first images do not exist"):
        check_train_data(kit.config(tmp_path / "rows.csv", batch_size=1))
    assert not (tmp_path / "ran").exists()
    sample = groups_of(tmp_path / "0.tar")[0].sample("0.tar")
    assert read_labels(sample, True) == ("x 1", 1)
