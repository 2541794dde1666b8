"""What is read of sound shards is what webdataset reads; damage costs what it touches, and moves nothing."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from training.data.plan import ShardSlice
from training.data.read import LARGEST_MEMBER, Group, read_groups, read_slots
from training.data.samples import Problem, RawSample
from training.data.shards import Shard
from training.data.streams import Patience
from training.data.tar_headers import count_samples
from training.data.tar_members import BLOCK, Damage, parse_header

READ = {"jpg", "json", "txt"}


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


def slice_of(path: Path | str, **part: int) -> ShardSlice:
    size = part.pop("size", None)
    return ShardSlice(Shard(str(path), 0, size), **part)


def read(path: Path, **part: int) -> tuple[list[Group], list[Damage]]:
    items = list(read_groups(slice_of(path, **part), Patience()))
    return [i for i in items if isinstance(i, Group)], [i for i in items if isinstance(i, Damage)]


def slots(path: Path, samples: int, **part: object) -> list[RawSample]:
    return list(read_slots(ShardSlice(Shard(str(path), 0, samples), stop=samples, **part)))


def outcome(slot: RawSample) -> tuple:
    """All but the name, which for a place without a sample says the position."""
    return slot.image, slot.caption, slot.key, slot.problem


LONG = "folder/" + "n" * 120
FORMS = {
    "plain": (names_of(9), tarfile.USTAR_FORMAT, 0),
    "gnu": (names_of(9), tarfile.GNU_FORMAT, 0),
    "exact times": (names_of(9), tarfile.PAX_FORMAT, 1699999999.123456),
    "folders and others": (
        ["a/", *names_of(3), "__meta__", "b/__skip__/x.jpg", "b/0.jpg", "noending", "c/.txt", *names_of(5)[9:]],
        0,
        0,
    ),
    "long names, ustar": ([*names_of(3), f"{LONG[:90]}/1.jpg", f"{LONG[:90]}/1.txt", *names_of(6)[9:]], 0, 0),
    "long names, gnu": ([*names_of(3), f"{LONG}1.jpg", f"{LONG}1.txt", *names_of(6)[9:]], tarfile.GNU_FORMAT, 0),
    "long names, pax": ([*names_of(3), f"{LONG}1.jpg", f"{LONG}1.txt", *names_of(6)[9:]], tarfile.PAX_FORMAT, 0.5),
    "letters": (["ä.jpg", "ä.txt", "日本.jpg", *names_of(2)], tarfile.GNU_FORMAT, 0),
    "letters, pax": (["ä.jpg", "ä.txt", "日本.jpg", *names_of(2)], tarfile.PAX_FORMAT, 0.5),
    "other suffixes": ([*names_of(2), "2.pkl", "2.txt", "2.jpg.npz", *names_of(4)[9:]], 0, 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_as_webdataset_reads_it(form: str, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write(path, *FORMS[form])
    with open(path, "rb") as stream:
        theirs = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    groups, damage = read(path)
    assert damage == []
    assert [group.name for group in groups] == [sample["__key__"] for sample in theirs]
    assert [group.position for group in groups] == list(range(len(theirs)))
    for group, sample in zip(groups, theirs):
        assert group.suffixes == {suffix for suffix in sample if not suffix.startswith("__")}
        assert group.members == {suffix: sample[suffix] for suffix in READ & sample.keys()}
    assert count_samples(str(path)).samples == len(theirs) > 2
    for part in ({"start": 2, "stop": 6}, {"start": 1, "step": 3}, {"stop": 40}):
        assert read(path, **part) == ([g for g in groups if slice_of(path, **part).has(g.position)], [])


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_compressed_shards(packing: str, tmp_path: Path) -> None:
    write(tmp_path / "plain.tar", names_of(5))
    with tarfile.open(tmp_path / "plain.tar") as source, tarfile.open(tmp_path / "0.tar", f"w:{packing}") as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
    assert read(tmp_path / "0.tar") == read(tmp_path / "plain.tar")
    assert count_samples(str(tmp_path / "0.tar")).samples == 5


def test_what_is_not_asked_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "0.tar", [*names_of(9)[:-1], "008.npz", "008.json"])
    wanted = []

    class Watched(io.BufferedReader):
        def read(self, size: int = -1) -> bytes:
            wanted.append(size)
            return super().read(size)

    monkeypatch.setattr("training.data.streams.open", lambda path, _mode: Watched(io.FileIO(path)), raising=False)
    groups, _ = read(tmp_path / "0.tar", start=8, stop=9)
    assert groups[0].suffixes == READ | {"npz"}
    # The other size is that of the search for a header after the end-of-archive mark.
    assert sum(size not in (BLOCK, 2**18) for size in wanted) == 3


def member_at(data: bytes, name: str) -> int:
    """The byte at which a member's header begins."""
    return next(at for at in range(0, len(data), BLOCK) if data[at : at + 100].rstrip(b"\0") == name.encode())


def with_header(data: bytes, at: int, **fields: bytes) -> bytes:
    """The tar file with other values in a header, whose checksum is made to fit."""
    places = {"name": (0, 100), "size": (124, 136), "kind": (156, 157), "link": (157, 257)}
    header = bytearray(data[at : at + BLOCK])
    for field, value in fields.items():
        begin, end = places[field]
        header[begin:end] = value.ljust(end - begin, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + BLOCK :]


def names_read(path: Path) -> list[str]:
    """Names of the samples of which all three parts are there."""
    return [group.name for group in read(path)[0] if group.members.keys() == READ and not group.problem]


@pytest.mark.parametrize("harm", ["flipped", "zeroed", "garbage before it", "size beyond the end", "negative size"])
@pytest.mark.parametrize("name", ["003.jpg", "003.TXT", "003.json"])
def test_a_damaged_header_costs_its_sample_only(tmp_path: Path, name: str, harm: str) -> None:
    path = tmp_path / "0.tar"
    data = write(path, names_of(9))
    at = member_at(data, name)
    harmed = {
        "flipped": data[: at + 7] + b"\xff" + data[at + 8 :],
        "zeroed": data[:at] + bytes(BLOCK) + data[at + BLOCK :],
        "garbage before it": data[:at] + b"garbage" * 31 + data[at:],
        "size beyond the end": with_header(data, at, size=b"77777777777"),
        "negative size": with_header(data, at, size=b"\xff" * 12),
    }[harm]
    path.write_bytes(harmed)
    groups, damage = read(path)
    everything = [f"{number:03d}" for number in range(9)]
    assert [d.kind for d in damage] == [Problem.BAD_HEADER]
    assert [group.name for group in groups] == everything
    whole = everything if harm == "garbage before it" else [other for other in everything if other != "003"]
    assert names_read(path) == whole
    count = count_samples(str(path))
    assert count.samples == 9
    assert count.damage == damage[0].detail
    if harm != "garbage before it" and name != "003.json":
        # A sample that the damage took a part of is counted for the damage, not for the part.
        assert [slot.problem for slot in slots(path, 9)] == [None] * 3 + [Problem.BAD_HEADER] + [None] * 5


def test_joined_tar_files_are_read_to_the_end_and_told(tmp_path: Path) -> None:
    data = write(tmp_path / "0.tar", names_of(3)) + write(tmp_path / "1.tar", ["x.jpg", "x.txt", "x.json"])
    (tmp_path / "2.tar").write_bytes(data)
    assert names_read(tmp_path / "2.tar") == ["000", "001", "002", "x"]
    assert "the archive goes on" in (count_samples(str(tmp_path / "2.tar")).damage or "")
    # What follows an archive without being one is no part of it.
    (tmp_path / "0.tar").write_bytes(write(tmp_path / "0.tar", names_of(3)) + b"trailer" * 100)
    assert read(tmp_path / "0.tar")[1] == []


def test_a_shard_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    data = write(path, names_of(9))
    path.write_bytes(data[: member_at(data, "004.json") + 600])
    assert names_read(path) == ["000", "001", "002", "003"]
    assert count_samples(str(path)).samples == 4
    found = slots(path, 9)
    # Of the fifth sample only the key is lost, which not everybody needs.
    assert [slot.problem for slot in found] == [None] * 5 + [Problem.TRUNCATED] * 4
    path.write_bytes(data[: member_at(data, "004.TXT") + 600])
    assert [slot.problem for slot in slots(path, 9)] == [None] * 4 + [Problem.TRUNCATED] * 5
    assert [slot.problem for slot in read_slots(slice_of(path))] == [None] * 4 + [Problem.TRUNCATED] * 2


@pytest.mark.parametrize("packed", [False, True])
def test_slots_do_not_depend_on_what_else_is_read(tmp_path: Path, packed: bool) -> None:
    """Cut anywhere, overwritten anywhere: every subset has in its places what the whole has there."""
    path, rng = tmp_path / "0.tar", random.Random(0)
    sound = write(path, names_of(9))
    end = max(index for index, byte in enumerate(sound) if byte) + 1
    kinds = set()
    for _ in range(150):
        damaged = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            place = BLOCK * rng.randrange(end // BLOCK) + rng.choice((0, 3, 124, 130, 148, 156, 200, 345))
            damaged[place : place + 3] = rng.randbytes(3)
        data = bytes(damaged) if rng.random() < 0.7 else bytes(damaged)[: rng.randrange(end)]
        if packed:
            data = bytearray(gzip.compress(data, 1))
            if rng.random() < 0.7:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        whole = slots(path, 9)
        assert len(whole) == 9
        kinds |= {slot.problem for slot in whole}
        for _ in range(4):
            chosen = frozenset(rng.sample(range(9), rng.randrange(0, 9)))
            part = slots(path, 9, chosen=chosen)
            assert list(map(outcome, part)) == [outcome(whole[place]) for place in sorted(chosen)]
        start, stop = sorted(rng.sample(range(10), 2))
        part = list(read_slots(ShardSlice(Shard(str(path), 0, 9), start, stop)))
        assert list(map(outcome, part)) == list(map(outcome, whole[start:stop]))
    assert kinds >= {None, Problem.TRUNCATED, Problem.BAD_HEADER} - ({Problem.TRUNCATED} if packed else set())
    assert (Problem.BAD_COMPRESSION in kinds) == packed


def test_a_member_of_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.tar"
    names = names_of(3)
    data = write(path, names)
    monkeypatch.setitem(LARGEST_MEMBER, "txt", 800)
    assert [group.problem for group in read(path)[0]] == [None, None, Problem.HUGE_MEMBER]
    # A sparse file of 8 GiB, as tar files of that size say it.
    huge = with_header(data, member_at(data, "001.jpg"), size=b"\x80" + (8 * 2**30).to_bytes(11, "big"))
    with open(path, "wb") as file:
        file.write(huge)
        file.truncate(8 * 2**30 + len(data))
    assert parse_header(huge[member_at(data, "001.jpg") :][:BLOCK]).size == 8 * 2**30
    assert [group.problem for group in read(path, stop=2)[0]] == [None, Problem.HUGE_MEMBER]


@pytest.mark.parametrize(
    "names", [["0.jpg", "0.txt", "0.jpg"], ["0.jpg", "0.JPG", "0.txt"], ["0.jpg", "0.txt", "0.x", "0.x"]]
)
def test_a_suffix_twice_makes_a_sample_ambiguous(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path / "0.tar", [*names, "1.jpg", "1.txt"])
    assert [slot.problem for slot in slots(tmp_path / "0.tar", 2)] == [Problem.TWICE, None]


def test_two_samples_of_one_name_are_two_samples(tmp_path: Path) -> None:
    """A sample is a run of members: each has a place and is judged by what it holds."""
    write(tmp_path / "0.tar", ["0.jpg", "0.txt", "1.jpg", "1.txt", "0.jpg", "0.txt", "1.txt"])
    found = slots(tmp_path / "0.tar", 4)
    assert [slot.problem for slot in found] == [None] * 4
    assert [slot.image is None for slot in found] == [False, False, False, True]


def test_what_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {
        name: tmp_path / name for name in ("gone", "folder", "below/it", "text", "nothing", "empty", "others", "locked")
    }
    paths["folder"].mkdir()
    paths["below/it"] = paths["text"] / "it"
    paths["text"].write_bytes(b"<html>404</html>" * 100)
    paths["nothing"].write_bytes(b"")
    write(paths["empty"], [])
    write(paths["others"], ["README", "__x__", "folder/"])
    write(paths["locked"], names_of(1))

    def locked(path: str, mode: str) -> io.BufferedReader:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr("training.data.streams.open", locked, raising=False)
    kinds = {
        "gone": Problem.GONE,
        "folder": Problem.UNREADABLE,
        "below/it": Problem.GONE,
        "text": Problem.NOT_TAR,
        "nothing": Problem.NOT_TAR,
        "empty": Problem.EMPTY,
        "others": Problem.EMPTY,
        "locked": Problem.UNREADABLE,
    }
    for name, path in paths.items():
        never = Patience(wait=lambda _seconds: pytest.fail("tried again"))
        assert [slot.problem for slot in read_slots(slice_of(path, stop=3), never)] == [kinds[name]] * 3
        unbounded = list(read_slots(slice_of(path), never))
        assert [(slot.problem, slot.shard) for slot in unbounded] == [(kinds[name], str(path))]


def test_fewer_samples_than_counted(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", names_of(3))
    found = slots(tmp_path / "0.tar", 5)
    assert [slot.problem for slot in found] == [None] * 3 + [Problem.FEWER] * 2
    assert "training.data.index" in found[-1].name


def test_a_walk_always_ends(tmp_path: Path) -> None:
    """A negative size would lead back to the same header again and again."""
    path = tmp_path / "0.tar"
    data = write(path, names_of(3))
    for size in (b"-1000", b"\xff" * 11 + b"\x00", b"-777777777", b"0x10", b"1_0", b"\x80" + b"\xff" * 11):
        path.write_bytes(with_header(data, member_at(data, "001.TXT"), size=size))
        assert len(slots(path, 3)) == 3
        assert count_samples(str(path)).samples == 3
