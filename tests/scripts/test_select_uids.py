"""Choosing rows of a pool's metadata by uid."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "data"))

import select_uids  # noqa: E402


def as_uids(numbers: list[int]) -> np.ndarray:
    return np.array([(number >> 64, number & (2**64 - 1)) for number in sorted(numbers)], np.dtype("u8,u8"))


def test_membership_is_that_of_a_plain_set() -> None:
    draw = random.Random(2)
    # Many share their first half, or their second.
    numbers = [(draw.randrange(6) << 64) + draw.randrange(40) for _ in range(200)] + [
        draw.getrandbits(128) for _ in range(50)
    ]
    numbers = list(dict.fromkeys(numbers))
    chosen = set(numbers[::2])
    found = select_uids.Uids(as_uids(list(chosen))).has([f"{number:032x}" for number in numbers])
    assert found.tolist() == [number in chosen for number in numbers]


def test_files_are_full_but_the_last_and_a_second_call_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(select_uids, "ROWS", 10)
    monkeypatch.setattr(select_uids, "ROWS_PER_SHARD", 5)
    (tmp_path / "pool").mkdir()
    for part in range(4):
        rows = list(range(part * 20, part * 20 + 20))
        table = {
            "uid": [f"{row:032x}" for row in rows],
            "text": [str(row) for row in rows],
            "url": ["u"] * 20,
            "x": rows,
        }
        pq.write_table(
            pa.table(table | {"face_bboxes": [[[0.1, 0.2, 0.3, 0.4]]] * 20}), tmp_path / "pool" / f"{part}.parquet"
        )
    kept = [row for row in range(80) if row % 3]
    np.save(tmp_path / "uids.npy", as_uids([*kept, 10**30]))
    flags = ["--uids", "uids.npy", "--metadata", "pool", "--out", "subset"]
    flags = [word if word.startswith("--") else str(tmp_path / word) for word in flags]
    assert select_uids.main(flags) == 0
    assert capsys.readouterr().out == "53 of 54 uids are in the metadata\n"
    files = sorted((tmp_path / "subset").iterdir())
    assert [pq.ParquetFile(path).metadata.num_rows for path in files] == [10, 10, 10, 10, 10, 3]
    table = pa.concat_tables([pq.read_table(path) for path in files])
    assert table.column_names == ["uid", "url", "text", "face_bboxes"]
    assert [int(text) for text in table["text"].to_pylist()] == kept
    assert select_uids.main(["--shards", str(tmp_path / "subset")]) == 0
    assert capsys.readouterr().out == "11\n"
    inodes = [path.stat().st_ino for path in files]
    files[1].unlink()
    assert select_uids.main(flags) == 0
    again = [path.stat().st_ino for path in sorted((tmp_path / "subset").iterdir())]
    assert again[:1] + again[2:] == inodes[:1] + inodes[2:]
    assert pq.read_table(files[1]).num_rows == 10


@pytest.mark.parametrize("wrong", ["unsorted", "integers", "no metadata", "no list", "nothing"])
def test_mistakes(tmp_path: Path, wrong: str, capsys) -> None:
    (tmp_path / "pool").mkdir()
    if wrong != "no metadata":
        pq.write_table(pa.table({"uid": ["0" * 32], "url": ["u"], "text": ["t"]}), tmp_path / "pool" / "0.parquet")
    uids = as_uids([1, 2**64 + 1])
    if wrong != "no list":
        np.save(tmp_path / "uids.npy", {"unsorted": uids[::-1], "integers": np.arange(3)}.get(wrong, uids))
    flags = ["--uids", str(tmp_path / "uids.npy"), "--metadata", str(tmp_path / "pool"), "--out", str(tmp_path / "out")]
    assert select_uids.main([] if wrong == "nothing" else flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
