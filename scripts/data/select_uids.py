"""From the metadata of a DataComp pool, the rows of a list of uids, as parquet files for download_upstream.py --metadata_dir.

    python scripts/data/select_uids.py --uids uids.npy --metadata pool/metadata --out subset
    python scripts/data/select_uids.py --shards subset        # prints how many shards img2dataset makes of it

Images outside of the list need then not be downloaded: DFN keeps 15 % of the pool. Needs numpy and pyarrow alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Rows of an output file: img2dataset begins a new shard of 10,000 with each, so that only the last one is not full.
ROWS, ROWS_PER_SHARD = 1_000_000, 10_000
COLUMNS = ("uid", "url", "text", "face_bboxes")


class Uids:
    """A sorted list of 128-bit uids in which many are looked up at once."""

    def __init__(self, uids: np.ndarray) -> None:
        """uids: [n] of dtype "u8,u8", ascending, as DataComp's resharder takes it."""
        self.high = np.ascontiguousarray(uids["f0"])
        self.low = np.ascontiguousarray(uids["f1"])
        if np.any(self.high[1:] < self.high[:-1]):
            raise ValueError("the uids are not sorted")

    def has(self, texts: Sequence[str]) -> np.ndarray:
        """Which of them are in the list: [n] bool.

        Args:
            texts: uids of 32 hexadecimal digits.
        """
        numbers = np.frombuffer(bytes.fromhex("".join(texts)), ">u8").reshape(-1, 2).astype(np.uint64)
        begin = np.searchsorted(self.high, numbers[:, 0], "left")
        end = np.searchsorted(self.high, numbers[:, 0], "right")
        found = np.zeros(len(numbers), bool)
        one = end - begin == 1
        found[one] = self.low[begin[one]] == numbers[one, 1]
        # The first half of two uids may be the same.
        for row in np.flatnonzero(end - begin > 1):
            found[row] = numbers[row, 1] in self.low[begin[row] : end[row]]
        return found


def select(uids: Uids, metadata: Path, out: Path) -> int:
    """Writes the rows of the uids, in the order of the files' names, and returns how many there are.

    Files of ROWS rows, each written whole or not at all; those that are there are not written again.
    """
    out.mkdir(parents=True, exist_ok=True)
    held: pa.Table | None = None
    rows = parts = 0
    for table in _selected(uids, metadata):
        rows += table.num_rows
        held = table if held is None else pa.concat_tables([held, table])
        while held.num_rows >= ROWS:
            _write(held.slice(0, ROWS), out / f"{parts:05d}.parquet")
            held, parts = held.slice(ROWS), parts + 1
    if held is not None and held.num_rows:
        _write(held, out / f"{parts:05d}.parquet")
    return rows


def shards_of(folder: Path) -> int:
    """How many shards img2dataset makes of the parquet files of a folder."""
    rows = [pq.ParquetFile(path).metadata.num_rows for path in sorted(folder.glob("*.parquet"))]
    return sum((number + ROWS_PER_SHARD - 1) // ROWS_PER_SHARD for number in rows)


def _selected(uids: Uids, metadata: Path) -> Iterator[pa.Table]:
    for path in sorted(metadata.glob("*.parquet")):
        file = pq.ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        table = file.read(columns=columns)
        yield table.filter(pa.array(uids.has(table["uid"].to_pylist())))


def _write(table: pa.Table, path: Path) -> None:
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _run(args: argparse.Namespace) -> str:
    if args.shards is not None:
        return str(shards_of(args.shards))
    if args.uids is None or args.metadata is None or args.out is None:
        raise ValueError("give --uids, --metadata and --out, or --shards")
    if not any(args.metadata.glob("*.parquet")):
        raise ValueError(
            f"--metadata {args.metadata} holds no *.parquet: give the folder that download_upstream.py wrote"
        )
    uids = np.load(args.uids, mmap_mode="r")
    if uids.dtype != np.dtype("u8,u8"):
        raise ValueError(
            f"--uids {args.uids} is of dtype {uids.dtype}, not u8,u8: give a list as DataComp's resharder takes it"
        )
    rows = select(Uids(uids), args.metadata, args.out)
    return f"{rows:,} of {len(uids):,} uids are in the metadata"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--uids", type=Path, help="a .npy of dtype u8,u8, sorted")
    parser.add_argument("--metadata", type=Path, help="folder of the pool's parquet files")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="only print how many shards will be made of it")
    try:
        print(_run(parser.parse_args(arguments)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
