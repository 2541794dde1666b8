"""A training run for the benchmarks: the parts that main.py puts together, batches that wait in memory, no files."""

from __future__ import annotations

import itertools
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence

from neuclip.objectives import OBJECTIVES
from training.assembly import assemble, objective_of_run, open_data
from training.data import Batch, TrainLoader
from training.distributed import World
from training.loop import Training
from training.model import build_model, check_model
from training.params import parse_args

KEPT_BATCHES = 4


class Silent:
    """Takes the reporter's place."""

    def training(self, step: int, values: dict[str, float]) -> None:
        """Numbers of an interval; nobody reads them."""


class MemoryLoader:
    """Takes the loader's place: the first batches that it delivered, again and again.

    Attributes:
        steps_per_epoch: as many as the benchmark wants in an epoch.
        batches: on the host, in page-locked memory for a GPU.
    """

    def __init__(self, loader: TrainLoader, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.batches = list(itertools.islice(loader.epoch(0), min(KEPT_BATCHES, loader.steps_per_epoch)))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        return itertools.islice(itertools.cycle(self.batches), self.steps_per_epoch)


def add_training_flags(parser: ArgumentParser) -> None:
    """What follows -- on the command line: flags of src/training/main.py."""
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags of src/training/main.py")


def resolve(flags: Sequence[str], device: str, ranks: int) -> Namespace:
    """Resolved flags of a run on made-up data, unless the flags name some.

    Raises:
        UserError: a flag is wrong.
    """
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    made_up = [] if "--train-data" in given else ["--dataset-type", "synthetic", "--data-size", str(2**31)]
    args = parse_args(["--device", device, "--warmup", "0", *made_up, *flags])
    if made_up:
        args.workers = 0
        args.train_num_samples = KEPT_BATCHES * args.batch_size * args.accum_freq * ranks
        args.data_size = args.train_num_samples
    return args


def build_training(args: Namespace, world: World, steps_per_epoch: int | None) -> Training:
    """Everything as in a run of main.py, but for its folder and its reports.

    Args:
        steps_per_epoch: epochs of that many steps, on batches kept in memory; None for the loader as it is.
    """
    check_model(args)
    bundle = build_model(args, OBJECTIVES[args.objective], world.device)
    loader = open_data(args, world, bundle)
    if steps_per_epoch is not None:
        loader = MemoryLoader(loader, steps_per_epoch)  # type: ignore[assignment]
    objective = objective_of_run(args, world, bundle, loader)
    logging.getLogger().setLevel(logging.WARNING)
    return assemble(args, world, bundle, loader, Silent(), objective)  # type: ignore[arg-type]
