"""Members read by ourselves and members read by webdataset are the same, and so is what is said of damage."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from training.data.plan import ShardSlice
from training.data.read import read_groups
from training.data.shards import Shard


def write(path: Path, names: list[str], form: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.mtime = mtime
            if name.endswith("/"):
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
                continue
            content = random.Random(number).randbytes(number * 171 % 1500)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path.read_bytes()


def names_of(samples: int) -> list[str]:
    return [f"{number:03d}.{suffix}" for number in range(samples) for suffix in ("jpg", "TXT", "json")]


def both_ways(path: Path, monkeypatch: pytest.MonkeyPatch, **part: int) -> list[tuple[list, list]]:
    """What is read and what is reported: as it comes, and with everything left to webdataset."""
    found = []
    for own in (True, False):
        with monkeypatch.context() as patch:
            if not own:
                patch.setattr("training.data.read._plain_members", lambda *_: iter(()))
            reports: list[tuple[str, str]] = []
            shard = Shard(str(path), 0, part.get("size"))
            groups = read_groups(
                ShardSlice(shard, part.get("start", 0), part.get("stop"), part.get("step", 1)),
                lambda *report, told=reports: told.append(report),
            )
            found.append((list(groups), reports))
    return found


LONG = "folder/" + "n" * 120
FORMS = {
    "plain": (names_of(9), tarfile.USTAR_FORMAT, 0),
    "gnu": (names_of(9), tarfile.GNU_FORMAT, 0),
    "exact times": (names_of(9), tarfile.PAX_FORMAT, 1699999999.123456),
    "folders and others": (
        ["a/", *names_of(3), "__meta__", "b/__skip__/x.jpg", "b/0.jpg", "noending", *names_of(5)[9:]],
        0,
        0,
    ),
    "long names, gnu": ([*names_of(3), f"{LONG}1.jpg", f"{LONG}1.txt", *names_of(6)[9:]], tarfile.GNU_FORMAT, 0),
    "long names, pax": ([*names_of(3), f"{LONG}1.jpg", f"{LONG}1.txt", *names_of(6)[9:]], tarfile.PAX_FORMAT, 0.5),
    "twice": ([*names_of(3), "002.jpg", *names_of(6)[9:]], tarfile.USTAR_FORMAT, 0),
    "letters": (["ä.jpg", "ä.txt", "日本.jpg", *names_of(2)], tarfile.GNU_FORMAT, 0),
    "empty": ([], tarfile.USTAR_FORMAT, 0),
}


@pytest.mark.parametrize(
    "part", [{}, {"start": 2, "stop": 6, "size": 9}, {"start": 1, "step": 3}, {"stop": 40, "size": 40}]
)
@pytest.mark.parametrize("form", FORMS)
def test_as_webdataset_reads_it(
    form: str, part: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "0.tar", *FORMS[form])
    own, theirs = both_ways(tmp_path / "0.tar", monkeypatch, **part)
    assert own == theirs
    if form in ("plain", "gnu", "exact times") and not part:
        assert [group["__key__"] for group in own[0]] == [f"{number:03d}" for number in range(9)]


@pytest.mark.parametrize("form", ["plain", "exact times"])
def test_plain_members_are_not_left_to_webdataset(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "0.tar", *FORMS[form])
    monkeypatch.setattr("training.data.read.tar_file_expander", lambda *_, **__: pytest.fail("left to webdataset"))
    assert len(list(read_groups(ShardSlice(Shard(str(tmp_path / "0.tar"), 0)), print))) == 9


def test_damage_as_webdataset_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere, overwritten anywhere: the same samples, the same reports."""
    path, rng = tmp_path / "0.tar", random.Random(0)
    whole = write(path, names_of(6))
    end = max(index for index, byte in enumerate(whole) if byte) + 1
    reported = 0
    for trial in range(120):
        if trial % 2:
            damaged = whole[: rng.randrange(end)]
        else:
            place = 512 * rng.randrange(end // 512) + rng.choice((0, 3, 124, 130, 148, 156, 200, 345))
            damaged = whole[:place] + rng.randbytes(3) + whole[place + 3 :]
        path.write_bytes(damaged)
        own, theirs = both_ways(path, monkeypatch, size=6, stop=6)
        assert own == theirs, trial
        reported += bool(own[1])
    assert reported > 60


def test_what_is_not_asked_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "0.tar", names_of(9))
    read = []

    class Watched(io.BufferedReader):
        def read(self, size: int = -1) -> bytes:
            read.append(size)
            return super().read(size)

    monkeypatch.setattr("webdataset.gopen", lambda url: Watched(io.FileIO(url)))
    assert len(list(read_groups(ShardSlice(Shard(str(tmp_path / "0.tar"), 0), start=8, stop=9), print))) == 1
    assert sum(size != 512 for size in read) == 3
