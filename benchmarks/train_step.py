"""Where the time of a training step goes, samples per second, and the share of the device's peak (MFU).

    PYTHONPATH=src python benchmarks/train_step.py -- --model ViT-B-32 --batch-size 512 --objective neuclip
    PYTHONPATH=src python benchmarks/train_step.py --ranks 2 --device cpu --repeats 10 -- --batch-size 16 --precision fp32

What follows -- are flags of src/training/main.py. Without --train-data the first batches of made-up data are kept in memory,
so `data` is then only their way to the device.

A round is three steps of the same run: one without marks (`total`, samples/s and MFU), one with marks at the boundaries of its
parts, and on several ranks one whose gradients stay on their rank. Nothing waits in between: on a GPU the marks are events.

    data        until the batch is there
    forward     both towers, both passes with --accum-freq
    loss        forward of the objective without its normalizer
    normalizer  what the objective's normalizer does: fitting, predicting, restarting (the NPN, for example)
    backward    the rest of the step
    optimizer   clipping, update, clearing gradients, clamping the temperature, learning rates

`exposed communication` is what ranks cost in waiting, a part of the numbers above and no further one: the time within the
collectives of the objective (in its forward and backward pass), and what backward takes longer with averaging gradients than
without. Copies of buffers before a forward pass are not among it.

FLOPs are those of matrix products and convolutions in both towers, counted on one sample; backward counts twice a forward.
What is computed again in backward is not counted, nor is the objective.
"""

from __future__ import annotations

import copy
import functools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]

import measure
import torch
import torch.distributed as dist
from measure import Stopwatch, spread
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from training_run import add_training_flags, build_training, resolve

from training.data import Batch
from training.distributed import World
from training.errors import UserError
from training.loop import Training, training_step
from training.prefetch import Prefetcher

PARTS = ("data", "forward", "loss", "normalizer", "backward", "optimizer")

# Dense, in FLOP/s, by a part of the device's name and the format of the matrix products (NVIDIA's data sheets).
PEAKS = {
    "H100": {"half": 989e12, "float32": 67e12},
    "H200": {"half": 989e12, "float32": 67e12},
    "A100": {"half": 312e12, "float32": 19.5e12},
}

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_to_all", "all_to_all_single", "batch_isend_irecv"),
)


class Marks:
    """Times the parts of marked steps; between them it passes every call on."""

    def __init__(self, device: torch.device) -> None:
        self.watch = Stopwatch(device)
        self.active = False
        self.open: set[str] = set()

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as `name`; a call within a call of the same name is part of that one."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.active or name in self.open:
                return function(*args, **kwargs)
            self.open.add(name)
            try:
                with self.watch.part(name):
                    return function(*args, **kwargs)
            finally:
                self.open.discard(name)

        return timed

    def put_on(self, owner: Any, attribute: str, name: str) -> None:
        """Time a function or method under `name` from now on, where the owner has it."""
        if hasattr(owner, attribute):
            setattr(owner, attribute, self.within(name, getattr(owner, attribute)))


def mark(training: Training) -> Marks:
    """Put marks on the parts of a step."""
    marks, state = Marks(training.world.device), training.state
    marks.put_on(training, "encode", "forward")
    marks.put_on(state.objective, "forward", "objective")
    normalizer = getattr(state.objective, "normalizer", None)
    if isinstance(normalizer, nn.Module):
        own = {name for cls in type(normalizer).__mro__ if cls.__module__.startswith("neuclip") for name in vars(cls)}
        for name in sorted(own):
            if not name.startswith("_") and callable(getattr(normalizer, name)) and "state" not in name:
                marks.put_on(normalizer, name, "normalizer")
    for owner, names in (
        (state.scaler, ("unscale_", "step", "update")),
        (state.optimizer, ("zero_grad",)),
        (state.towers, ("clamp_logit_scale",)),
        (training.rates, ("set",)),
        (nn.utils, ("clip_grad_norm_",)),
    ):
        for name in names:
            marks.put_on(owner, name, "optimizer")
    for name in COLLECTIVES:
        marks.put_on(dist, name, "collectives")
    return marks


def take_step(training: Training, batches: Prefetcher, marks: Marks) -> None:
    """What the loop does between two logging steps."""
    timed_next: Callable[[], Batch] = marks.within("data", batches.__next__)
    batch = timed_next()
    training.rates.set(training.state.step)
    training.state.objective.temperature_lr = training.rates.temperature(training.state.step)
    marks.within("step", training_step)(training, batch)
    marks.within("data", batches.fetch)()
    training.state.step += 1


def endless(training: Training) -> Iterator[Batch]:
    """The batches of epoch after epoch."""
    epoch = 0
    while True:
        yield from training.loader.epoch(epoch)
        epoch += 1


def flops_of_a_sample(training: Training, batch: Batch) -> int:
    """Of one forward pass through both towers, without computing anything."""
    model = copy.deepcopy(training.state.towers.model).to("meta")
    image = torch.empty(1, *batch.image.shape[1:], dtype=training.precision.input_dtype, device="meta")
    text = torch.empty(1, *batch.text.shape[1:], dtype=torch.int64, device="meta")
    # As plain matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode_image(image)
        model.encode_text(text)
    return counter.get_total_flops()


def peak_flops(device_name: str, precision: str) -> float | None:
    """Of one device, in FLOP/s; None where it is not known."""
    kind = "float32" if precision == "fp32" else "half"
    return next((peaks[kind] for name, peaks in PEAKS.items() if name in device_name), None)


def without_averaging(training: Training) -> AbstractContextManager[None]:
    """Gradients stay on their rank. The ranks' weights go apart by it, which changes no time."""
    model = training.model
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def measure_steps(world: World, args: Namespace) -> dict[str, Any]:
    """All rounds on this rank: milliseconds of each part in each of them."""
    training_args = resolve(args.flags, args.device, world.size)
    in_memory = training_args.dataset_type == "synthetic"
    training = build_training(training_args, world, args.repeats * 3 if in_memory else None)
    training.model.train()
    training.state.objective.start_epoch(0)
    training.state.objective.report = False
    host_batches = endless(training)
    sample = next(host_batches)
    flops = flops_of_a_sample(training, sample)
    batches = training.batches(host_batches)
    marks, total = mark(training), Stopwatch(world.device)
    local = Stopwatch(world.device)
    for number in range(args.warmup + args.repeats):
        if number == args.warmup:
            total.rounds, local.rounds, marks.watch.rounds = [], [], []
        total.next_round()
        with total.part("total"):
            take_step(training, batches, marks)
        marks.watch.next_round()
        marks.active = True
        take_step(training, batches, marks)
        if world.size > 1:
            with_averaging, marks.watch = marks.watch, local
            local.next_round()
            with without_averaging(training):
                take_step(training, batches, marks)
            marks.watch = with_averaging
        marks.active = False
    parts = split(marks.watch.milliseconds(), args.repeats)
    parts["total"] = total.milliseconds()["total"]
    if world.size > 1:
        alone = split(local.milliseconds(), args.repeats)
        parts["exposed communication"] = [
            gathering + max(0.0, backward - kept)
            for gathering, backward, kept in zip(parts.pop("collectives"), parts["backward"], alone["backward"])
        ]
    parts.pop("collectives", None)
    return {
        "machine": measure.machine(world.device),
        "parts": parts,
        "flops_per_sample": 3 * flops,
        "samples_per_rank": training_args.batch_size * training_args.accum_freq,
        "flags": {key: str(value) for key, value in sorted(vars(training_args).items())},
    }


def split(found: dict[str, list[float]], rounds: int) -> dict[str, list[float]]:
    """The parts by their names, in milliseconds, from nested times; collectives are those called from Python."""
    nothing = [0.0] * rounds
    get = {name: found.get(name, nothing) for name in ("data", "forward", "objective", "normalizer", "optimizer")}
    step = found["step"]
    # Learning rates are set just before the step, so a little of the optimizer's time is outside of it.
    return {
        "data": get["data"],
        "forward": get["forward"],
        "loss": [whole - part for whole, part in zip(get["objective"], get["normalizer"])],
        "normalizer": get["normalizer"],
        "backward": [
            max(0.0, s - f - o - u) for s, f, o, u in zip(step, get["forward"], get["objective"], get["optimizer"])
        ],
        "optimizer": get["optimizer"],
        "collectives": found.get("collectives", nothing),
    }


def report(ranks: list[dict[str, Any]], args: Namespace) -> dict[str, Any]:
    """Numbers of the whole group. A step is as slow as its slowest rank, so each part's time is the largest over the ranks."""
    names = [*PARTS, *([] if len(ranks) == 1 else ["exposed communication"]), "total"]
    parts = {name: spread([max(values) for values in zip(*(rank["parts"][name] for rank in ranks))]) for name in names}
    seconds = parts["total"].median / 1000
    samples, flops = ranks[0]["samples_per_rank"], ranks[0]["flops_per_sample"]
    peak = args.peak_tflops * 1e12 if args.peak_tflops else None
    if peak is None:
        peak = peak_flops(ranks[0]["machine"]["device"], ranks[0]["flags"]["precision"])
    achieved = samples * flops / seconds
    return {
        "machine": ranks[0]["machine"],
        "ranks": len(ranks),
        "milliseconds": parts,
        "samples_per_second": samples * len(ranks) / seconds,
        "gflops_per_sample": flops / 1e9,
        "tflops_per_rank": achieved / 1e12,
        "mfu": None if peak is None else achieved / peak,
        "flags": ranks[0]["flags"],
        "every_round": [rank["parts"] for rank in ranks],
    }


def parse_args(argv: Sequence[str] | None) -> Namespace:
    """The benchmark's own flags, and those of the run after --."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common_arguments(parser)
    parser.add_argument("--peak-tflops", type=float, help="of one device, where the table here does not have it")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.warmup < 0:
        parser.error("--repeats must be 1 or more, --warmup 0 or more")
    try:
        resolve(args.flags, args.device, args.ranks)
    except UserError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parse_args(argv)
    ranks = measure.on_ranks(measure_steps, args)
    if ranks is None:
        return 0
    found = report(ranks, args)
    total = found["milliseconds"]["total"].median
    rows = [
        [name, f"{value:.2f}", f"{100 * value.median / total:.0f} %"] for name, value in found["milliseconds"].items()
    ]
    print(f"# {found['machine']}, {found['ranks']} ranks, flags: {' '.join(args.flags)}\n")
    print(measure.table(("part", "ms, median (quartiles)", "of the step"), rows))
    mfu = "unknown" if found["mfu"] is None else f"{100 * found['mfu']:.1f} %"
    print(
        f"\n{found['samples_per_second']:.1f} samples/s, {found['gflops_per_sample']:.3g} GFLOP per sample, "
        f"{found['tflops_per_rank']:.3g} TFLOP/s per rank, MFU {mfu}"
    )
    measure.write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
