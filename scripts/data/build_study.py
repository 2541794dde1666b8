#!/usr/bin/env python3
"""Build the study's data: about 204,000 image-text pairs for training, with tests of new names and of new styles.

    pip install -r requirements-study.txt
    python scripts/data/build_study.py

Icons of about 160 openly licensed sets with the names their authors gave them, out of one npm package of 104 MB, which is
fetched once and kept beside the result. The result, 64 x 64 pixels on white:

    train/00000.tar … sizes.json    KEY.png, KEY.txt, KEY.json; keys 0 … n-1
    test_concept/                   names that were never trained, in the same layout as all that follow
    test_combo/                     trained names, in families of sets from which they were not trained
    test_set/                       whole sets, that is drawing styles, that were not trained
    retrieval_concept/              test_concept with one picture per name, for retrieval one to one
    retrieval_combo/                test_combo likewise: for choices such as a learning rate
    retrieval_set/                  test_set likewise
    emoji/SET/                      colour emoji of six makers, none of them trained, one picture per name
    zeroshot/                       pictures of test_set as a classification set in clip_benchmark's layout
    zeroshot_concept/               test_concept likewise
    zeroshot_emoji/                 the emoji that all six makers draw, likewise
    manifest.json                   counts, licences and authors of the sets, near-duplicates, what guessing would score
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from building import BuildError
from building.flags import add_flags, check_flags
from building.folder import build_and_rename, is_complete
from icons import BUILDER_VERSION
from icons.dataset import Options, build, require_packages
from icons.download import fetch_package
from icons.package import INTEGRITY, VERSION, Package, integrity


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; BuildError for a value that makes no sense."""
    parser = argparse.ArgumentParser(
        description="Build image-text shards from the icon sets in one npm package.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_flags(parser, out=Path("data/study"))
    parser.add_argument("--package", type=Path, default=None, help="the npm package as a file; default: fetched")
    args = parser.parse_args(argv)
    check_flags(args)
    if args.package is not None and not args.package.is_file():
        raise BuildError(f"--package {args.package} is no file; name a tarball made by npm pack")
    return args


def print_summary(out: Path, manifest: dict) -> None:
    """Print which licences the icons are under and how many there are of them."""
    print(f"{len(manifest['sets'])} icon sets; their authors and licences are in {out / 'manifest.json'}")
    for license_name, count in manifest["licenses"]["train"].items():
        print(f"  {count:7,} pairs of train under {license_name}")
    for name, split in manifest["splits"].items():
        print(f"{out / name}: {split['samples']:,} pairs of {split['concepts']:,} concepts")
    for name, classification in manifest["classification"].items():
        print(f"{out / name}: {classification['images']:,} images of {classification['classes']:,} classes")


def main(argv: list[str] | None = None) -> int:
    """Run the builder; returns the exit status."""
    started = time.monotonic()
    try:
        args = parse_args(argv)
        require_packages()
        options = Options(
            size=args.size,
            samples_per_shard=args.samples_per_shard,
            limit=args.limit,
            package=integrity(args.package) if args.package else INTEGRITY,
        )
        if is_complete(args.out, "study", BUILDER_VERSION, asdict(options)):
            return 0
        file = args.package or fetch_package(args.out.absolute().parent / f"iconify-json-{VERSION}.tgz")
        package = Package(file)
        manifest = build_and_rename(args.out, lambda folder: build(folder, package, options, args.workers))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A full disk, say: the unfinished folder has been removed, and what stood at --out is still there.
        print(f"error: --out {args.out} cannot be built ({error}); mend that and run again", file=sys.stderr)
        return 1
    print_summary(args.out, manifest)
    print(f"built in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
