#!/usr/bin/env python3
"""A look inside a run, as one HTML page: searches both ways, the hardest negatives, and what prototypes stand for.

    python src/evaluation/gallery.py --train_output_dir logs/NAME --pairs 'data/test/{00000..00001}.tar' \
        --query "a red bicycle" --images cat.jpg --random 8 --out gallery.html
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script, Python puts this folder first on the path; its modules would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from evaluation import ranks
from evaluation.csv_pairs import CsvPairs
from evaluation.datasets import IMAGE_FORMATS, PairDataset, decode_image
from evaluation.errors import UserError
from evaluation.features import PairFeatures, evaluating, normalized
from evaluation.gallery_content import (
    Collection,
    find_negatives,
    search_captions,
    search_images,
    view_prototypes,
)
from evaluation.gallery_markup import file_key, pair_key
from evaluation.gallery_page import Content, Heading, build_page, shown_pairs
from evaluation.prototype_usage import read_prototypes
from evaluation.run_folder import LoadedModel, RunFolder, Subject
from evaluation.search import Query, read_query_file
from evaluation.suite import Measured, Setting, encode_queries, measure_pairs
from evaluation.thumbnails import Sprite
from evaluation.whole_files import write_whole

# Bounds the size of the page, with the number of images per search.
MOST_SEARCHES = 32


class Given(NamedTuple):
    """What the user asks about: texts, and images with their names."""

    queries: list[Query]
    images: list[Image.Image]
    names: list[str]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags → namespace. `-` and `_` inside a flag's name mean the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_output_dir", required=True, metavar="DIR", help="the run's folder, logs/NAME")
    parser.add_argument("--epoch", type=int, help="look at epoch_N.pt (default: the newest checkpoint)")
    parser.add_argument("--iter", type=int, help="look at iter_S.pt instead of an epoch")
    parser.add_argument(
        "--pairs", metavar="SHARDS", help="pairs to search: webdataset shards (default: the run's validation pairs)"
    )
    parser.add_argument("--query", nargs="+", default=[], metavar="TEXT", help="texts to search images for")
    parser.add_argument("--queries", metavar="JSON", help='more of them: a list of strings or {"text", "concept"}')
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="images to search captions for")
    parser.add_argument(
        "--random", type=int, default=6, metavar="K", help="also K captions and K images of the pairs (default: 6)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of --random (default: 0)")
    parser.add_argument("--out", metavar="HTML", help="the page (default: gallery.html in the run's folder)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 …")
    parser.add_argument("--batch_size", type=int, default=256, help="samples encoded at a time")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    args = parser.parse_args([_underscored(argument) for argument in argv])
    if args.batch_size < 1 or args.workers < 0:
        raise UserError(f"--batch_size {args.batch_size} --workers {args.workers}: at least 1 and at least 0, please.")
    for flag, number in (("query", len(args.query)), ("images", len(args.images)), ("random", args.random)):
        if not 0 <= number <= MOST_SEARCHES:
            raise UserError(f"--{flag}: {number} is too many or too few, one page shows 0 to {MOST_SEARCHES}.")
    return args


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + separator + value


def read_given(args: argparse.Namespace) -> Given:
    """The queries and images that the flags name.

    Raises:
        UserError: for a file that is missing or broken.
    """
    if not all(text.strip() for text in args.query):
        raise UserError('--query "" is blank: give a text to search for, or leave it out.')
    queries = [Query(text) for text in args.query]
    if args.queries:
        more = read_query_file(args.queries)
        room = MOST_SEARCHES - len(queries)
        if len(more) > room:
            print(f"--queries {args.queries}: the first {room} of {len(more)}; one page shows {MOST_SEARCHES}.")
        queries += more[:room]
    images = []
    for path in map(Path, args.images):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"--images {path} cannot be read ({error.strerror}); correct the path.") from None
        try:
            images.append(decode_image(content, str(path)))
        except UserError:
            # What is said of a sample of a data set is no remedy here.
            kinds = ", ".join(IMAGE_FORMATS)
            raise UserError(f"--images {path} is broken or no image; give a whole file of {kinds}.") from None
    return Given(queries, images, [Path(path).name for path in args.images])


def open_pairs(run: RunFolder, pattern: str | None, loaded: LoadedModel | None = None) -> tuple[PairDataset, str]:
    """The pairs of --pairs, or else those the run was validated on, as params.txt says.

    Args:
        pattern: of --pairs.
        loaded: gives transform and tokenizer; without it there are only images and captions.

    Returns:
        The pairs, and where they are from.

    Raises:
        UserError: if there are none.
    """
    transforms = (loaded.preprocess_val, loaded.tokenizer) if loaded else (None, None)
    if pattern:
        return PairDataset(pattern, *transforms), pattern
    own = run.params.get("val_data")
    if not own:
        raise UserError(
            f"{run.path}/params.txt says val_data: {own}, so there is nothing to search: give --pairs SHARDS."
        )
    own, limit = str(own), run.params.get("val_num_samples")
    try:
        if run.params.get("dataset_type") == "csv" or own.lower().endswith((".csv", ".tsv")):
            keys = {"image_key": "csv_img_key", "caption_key": "csv_caption_key", "separator": "csv_separator"}
            columns = {name: str(run.params[key]) for name, key in keys.items() if run.params.get(key)}
            return CsvPairs(own, *transforms, limit=limit, **columns), own
        return PairDataset(own, *transforms, limit=limit), own
    except UserError as error:
        raise UserError(f"val_data of {run.path}/params.txt: {error} Or give --pairs SHARDS.") from None


def chosen_output(run: RunFolder, path: str | None) -> Path:
    """The file to write.

    Raises:
        UserError: if it is a folder, or its folder is missing or cannot be written to.
    """
    chosen = Path(path) if path else run.path / "gallery.html"
    if chosen.is_dir():
        raise UserError(f"--out {chosen} is a folder; give the name of a file, gallery.html.")
    if not chosen.parent.is_dir() or not os.access(chosen.parent, os.W_OK):
        raise UserError(f"--out {chosen}: {chosen.parent} is no folder that can be written to; make it first.")
    return chosen


def build_content(
    subject: Subject, args: argparse.Namespace, given: Given, device: torch.device, prototypes: Tensor | str
) -> Content:
    """Load the checkpoint, encode the pairs, search.

    Args:
        prototypes: of the same checkpoint, or the reason for their absence.

    Raises:
        UserError: the checkpoint has been replaced since `subject` was made; what is asked for cannot be read.
    """
    run, checkpoint = subject.run, subject.checkpoint
    loaded = run.load_checkpoint(checkpoint, device)
    subject.check_unchanged()
    setting = Setting(device=device, batch_size=args.batch_size, workers=args.workers)
    pairs, source = open_pairs(run, args.pairs, loaded)
    print(f"{run.name}, {checkpoint.label}: {pairs.total:,} pairs …", flush=True)
    measured, features = measure_pairs(loaded.model, pairs, setting)
    temperature = (-loaded.model.logit_scale.detach().double()).exp().item()  # type: ignore[attr-defined]
    collection = Collection(pairs, features)
    chosen = random.Random(args.seed)
    own = [sorted(chosen.sample(range(pairs.total), min(args.random, pairs.total))) for _ in range(2)]
    queries = [*given.queries, *map(collection.query, own[0])]
    texts = [query.text for query in queries]
    query_features = (
        encode_queries(loaded.model, loaded.tokenizer, texts, setting) if texts else features.text_features[:0]
    )
    return Content(
        heading=_heading(run, checkpoint.label, source, temperature, measured, args),
        collection=collection,
        texts=search_images(collection, queries, query_features, [*(None for _ in given.queries), *own[0]]),
        images=search_captions(collection, own[1], encode_files(loaded, given.images, features, device)),
        file_names=given.names,
        negatives=find_negatives(collection),
        prototypes=prototypes if isinstance(prototypes, str) else view_prototypes(collection, prototypes, temperature),
    )


def encode_files(
    loaded: LoadedModel, images: Sequence[Image.Image], features: PairFeatures, device: torch.device
) -> Tensor:
    """Features of a few images: [F, d] float32, L2-normalised, on the device."""
    if not images:
        return features.image_features[:0]
    with evaluating(loaded.model):
        batch = torch.stack([loaded.preprocess_val(image) for image in images])
        return normalized(loaded.model.encode_image(batch.to(device)))


def _heading(
    run: RunFolder, label: str, source: str, temperature: float, measured: Measured, args: argparse.Namespace
) -> Heading:
    return Heading(
        run=run.name,
        objective=run.objective,
        model=str(run.params["model"]),
        checkpoint=label,
        # Where the rest of the path leads on this machine is nobody's business.
        data=" + ".join("/".join(Path(part).parts[-2:]) for part in source.split("::")),
        temperature=temperature,
        metrics=measured.metrics,
        chance=measured.chance,
        made=f"Random captions and images: {args.random} each, seed {args.seed}.",
    )


def make_gallery(args: argparse.Namespace) -> None:
    """Do what the command line says: look, build the page, write it."""
    if ranks.environment()[2] > 1:
        raise UserError("gallery.py is one process: start it with python, not with torchrun or several srun tasks.")
    run = RunFolder(args.train_output_dir)
    checkpoint = run.checkpoint(args.epoch, args.iter)
    out, given = chosen_output(run, args.out), read_given(args)
    open_pairs(run, args.pairs)
    # While a run goes on its newest checkpoint may become another one: label, weights and prototypes are of this file.
    subject = Subject.of(run, checkpoint)
    with ranks.joined(args.device) as place:
        content = build_content(subject, args, given, place.device, read_prototypes(checkpoint.path))
    sprite = Sprite()
    for i in shown_pairs(content):
        sprite.add(pair_key(i), content.collection.pairs.image(i))
    for number, image in enumerate(given.images):
        sprite.add(file_key(number), image)
    page = build_page(content, sprite)
    try:
        write_whole(out, page)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose another place.") from None
    print(f"wrote {out} ({len(page.encode()) / 1e6:.2f} MB, {len(sprite)} images inside)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line tool; returns the exit status. A user's mistake is one line on stderr and status 2."""
    try:
        make_gallery(parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        # From a loader process the message arrives under that process's traceback: the last line is ours.
        message = str(error).strip().splitlines()[-1].removeprefix("evaluation.errors.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
