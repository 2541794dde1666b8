"""How long a loader's worker takes to come back to its place in an epoch.

    PYTHONPATH=src python benchmarks/loader_resume.py --json resume.json

The shards are made on the spot, of random bytes in the place of pictures, and lie in the page cache when they are read. With
known sizes the shuffle buffer is followed on slot numbers alone and only what it still holds is read; with unknown sizes
everything is read. The last table is another layout: what a billion samples have left, found by each rank before it starts.
"""

from __future__ import annotations

import random
import tarfile
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from measure import Spread, machine, spread, table, write_json

from training.data.plan import DealtOrder, ExactOrder, Layout, Place
from training.data.progress import Progress
from training.data.samples import Tally
from training.data.segments import DataIdentity, Segment, begin, resume
from training.data.shards import Shard
from training.data.shuffle import pass_over
from training.data.sources import ShardSource
from training.data.stream import Slots

SHARD_SAMPLES = 5000
SHUFFLE_BUFFER = 5000
BATCH = 512


def write_shards(folder: Path, shards: int, sample_bytes: int) -> list[str]:
    """Shards of samples with an image of that many bytes, a caption and a key."""
    image = random.Random(0).randbytes(sample_bytes)
    paths = []
    for index in range(shards):
        paths.append(str(folder / f"{index:05d}.tar"))
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(index * SHARD_SAMPLES, (index + 1) * SHARD_SAMPLES):
                for suffix, content in (("jpg", image), ("txt", b"a caption"), ("json", b'{"key": %d}' % number)):
                    entry = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, BytesIO(content))
    return paths


def seconds(call: Callable[[], object], repeats: int) -> Spread:
    """Of several calls."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return spread(found)


def first_slot(urls: list[str], known: bool, taken: int) -> None:
    """All that a worker does before it decodes its first sample again."""
    shards = [Shard(url, 0, SHARD_SAMPLES if known else None) for url in urls]
    layout = Layout(len(urls) * SHARD_SAMPLES // BATCH, BATCH, 1, 1, seed=0)
    order = ExactOrder(shards, layout) if known else DealtOrder(shards, layout)
    slots = Slots(ShardSource(order), layout, Place(0, 0, 0), SHUFFLE_BUFFER, Tally(), Progress(0, 0, taken, 1))
    next(iter(slots))


def relayout(samples: int) -> None:
    """Half an epoch of 8 ranks with 6 workers, to go on with 4 ranks and 4 workers."""
    identity = DataIdentity("exact", 0, "")
    whole = Segment.whole(Layout(samples // (8 * BATCH), BATCH, 8, 6, 0), samples, SHUFFLE_BUFFER)
    taken = torch.tensor([0, 0, whole.steps // 12 * BATCH, 1]).expand(8, 6, 4)
    state = begin(0, whole).entry(identity, taken, whole.steps // 2)
    resume(state, 0, Segment.whole(Layout(samples // (4 * BATCH), BATCH, 4, 4, 0), samples, SHUFFLE_BUFFER), identity)


def rows(urls: list[str], repeats: int) -> Iterator[tuple[str, int, Spread]]:
    """What was measured: name, slots, seconds."""
    for million in (1, 10):
        count = million * 10**6
        call = partial(pass_over, 2 * count, count, SHUFFLE_BUFFER)
        yield "shuffle buffer on numbers alone", count, seconds(lambda call=call: call(random.Random(0)), repeats)
    for known in (True, False):
        for share in (0.25, 0.5, 0.75):
            taken = int(share * len(urls) * SHARD_SAMPLES)
            name = f"worker, sizes {'known' if known else 'unknown'}"
            yield name, taken, seconds(partial(first_slot, urls, known, taken), repeats)
    for samples in (10**7, 10**9):
        yield "rank, another layout", samples // 2, seconds(partial(relayout, samples), repeats)


def main() -> None:
    """Measure, print, write."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--shards", type=int, default=20, help=f"of {SHARD_SAMPLES} samples, all for one worker")
    add("--sample-bytes", type=int, default=16_000, help="size of a picture's file")
    add("--repeats", type=int, default=3)
    add("--json", type=Path, help="file for every number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        urls = write_shards(Path(folder), args.shards, args.sample_bytes)
        found = list(rows(urls, args.repeats))
    lines = [[name, f"{slots:,}", f"{took:.3f}", f"{slots / took.median:,.0f}"] for name, slots, took in found]
    print(table(["what", "slots passed over", "seconds", "slots/s"], lines))
    results = [{"what": name, "slots": slots, "seconds": took.median} for name, slots, took in found]
    write_json(
        args.json,
        {"machine": machine(torch.device("cpu")), "arguments": vars(args) | {"json": None}, "results": results},
    )


if __name__ == "__main__":
    main()
