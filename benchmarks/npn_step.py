"""Time of the normalizer-prediction network of NeuCLIP within one step: T_u updates and the prediction, and a restart.

    PYTHONPATH=src python benchmarks/npn_step.py --ranks 2 --batch 1024 --prototypes 1024 --dim 512
    PYTHONPATH=src python benchmarks/npn_step.py --batch 4096 --prototypes 4096 --dim 512 --one-of 8     # a GPU of 8, alone

Features are random unit vectors whose pairs resemble each other. `update` is a T_u-th of all updates, which run as they do in
training: on GPUs as a recorded CUDA graph (the first two steps, in which that is made, are warm-up). With several ranks
times contain the messages. `--one-of K` runs one of K ranks alone, m/K prototypes against all N anchors,
without messages. TFLOP/s count the matrix products only, 8·N·m·d an update and 4·N·m·d the prediction over all ranks.

Every precision of `--precisions` has a row; they are measured in turn. `α differs` says how far the predictions of the first
step are from those of the first precision after the same updates: root mean square and largest, in natural logarithms.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import Stopwatch, add_common_arguments, machine, on_ranks, spread, table, write_json
from torch import Tensor

from neuclip import RunShape, make_objective
from neuclip.distributed import all_gather
from neuclip.pairwise import GlobalBatch, batch_log_means, gather_batch
from training.distributed import World

PARTS = ("restart", "updates", "prediction")


def make_batch(args: Namespace, world: World) -> tuple[GlobalBatch, Tensor, Tensor]:
    """The gathered batch, its own log-normalizers T [2, N] and 1/τ."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(args.batch, args.dim, generator=generator)
    noise = torch.randn(2, args.batch, args.dim, generator=generator)
    share = args.batch // world.size
    own = slice(world.rank * share, (world.rank + 1) * share)
    images, texts = (F.normalize(shared + part, dim=1)[own].to(world.device) for part in noise)
    logit_scale = torch.tensor(1 / args.temperature, device=world.device)
    batch = gather_batch(images, texts)
    return batch, all_gather(batch_log_means(batch, logit_scale), dim=1), logit_scale


def make_network(args: Namespace, world: World, precision: str | None) -> Any:
    """The NPN as training builds it."""
    flags = f"--objective neuclip --npn_num_protos {args.prototypes // args.one_of} {args.flags}"
    if precision is not None:
        flags += f" --npn_precision {precision}"
    shape = RunShape(args.dim, args.batch // world.size, world.size, steps_per_epoch=1000, epochs=10)
    return make_objective(flags, shape).to(world.device).normalizer


def measure(world: World, args: Namespace) -> dict[str, Any]:
    """On one rank: milliseconds of every part by precision, and how predictions differ."""
    batch, targets, logit_scale = make_batch(args, world)
    networks = {precision: make_network(args, world, precision) for precision in args.precisions}
    for network in networks.values():
        for _ in range(args.prototypes // args.batch):  # m > N: as many batches as make m prototypes
            network.observe(batch)
    stopwatches = {precision: Stopwatch(world.device) for precision in networks}
    first_predictions = {}
    for repetition in range(args.warmup + args.repeats):
        for precision, network in networks.items():
            if repetition == args.warmup:
                stopwatches[precision] = Stopwatch(world.device)
            stopwatch = stopwatches[precision]
            stopwatch.next_round()
            if world.size > 1:
                dist.barrier()
            with stopwatch.part("restart"):
                network.observe(batch)
                network.restart(batch)
            with stopwatch.part("updates"):
                network.fit(batch, targets, logit_scale, args.updates)
            with stopwatch.part("prediction"):
                predicted = network.predict(batch, logit_scale)
            first_predictions.setdefault(str(precision), predicted)
    reference = next(iter(first_predictions.values()))
    gaps = {name: predicted - reference for name, predicted in first_predictions.items()}
    return {
        "machine": machine(world.device),
        "milliseconds": {str(precision): watch.milliseconds() for precision, watch in stopwatches.items()},
        "alpha_gap_rms": {name: float(gap.square().mean().sqrt()) for name, gap in gaps.items()},
        "alpha_gap_max": {name: float(gap.abs().max()) for name, gap in gaps.items()},
    }


def report(args: Namespace, found: dict[str, Any], ranks: int) -> str:
    """Markdown, one row per precision."""
    shares = ranks * args.one_of
    per_update = 8 * args.batch * args.prototypes * args.dim / shares
    rows = []
    for name, parts in found["milliseconds"].items():
        step = spread([sum(both) for both in zip(parts["updates"], parts["prediction"])])
        flops = per_update * (args.updates + 0.5)
        rows.append(
            [
                "default" if name == "None" else name,
                f"{step:.3f}",
                f"{spread([ms / max(1, args.updates) for ms in parts['updates']]):.3f}",
                f"{spread(parts['prediction']):.3f}",
                f"{spread(parts['restart']):.3f}",
                f"{flops / step.median / 1e9:.3g}",
                f"{found['alpha_gap_rms'][name]:.2g} / {found['alpha_gap_max'][name]:.2g}",
            ]
        )
    head = (
        "products",
        "NPN of a step, ms",
        "update, ms",
        "prediction, ms",
        "restart, ms",
        "TFLOP/s of a rank",
        "α differs",
    )
    return table(head, rows)


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    add = parser.add_argument
    add("--batch", type=int, default=4096, help="N, the global batch")
    add("--prototypes", type=int, default=4096, help="m per modality, over all ranks")
    add("--dim", type=int, default=512, help="d, width of the features")
    add("--updates", type=int, default=10, help="T_u")
    add("--temperature", type=float, default=0.03, help="τ")
    add("--one-of", type=int, default=1, help="K: run the share of one of K ranks, on one rank")
    add("--precisions", default="fp32,bf16", help="of the matrix products; empty: whatever is the default")
    add("--flags", default="", help="further flags: --flags='--npn_optimizer adagrad'")
    args = parser.parse_args(argv)
    args.precisions = args.precisions.split(",") if args.precisions else [None]
    if args.warmup < 2:
        parser.error("--warmup must be 2 or more: the second step records the first one's work")
    if args.one_of > 1 and args.ranks > 1:
        parser.error("--one-of goes with one rank: drop --ranks")
    if args.prototypes % args.one_of or args.batch % args.ranks:
        parser.error("--prototypes must be a multiple of --one-of, --batch one of --ranks")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    results = on_ranks(measure, args)
    if results is None:
        return 0
    sizes = f"N {args.batch}, m {args.prototypes}, d {args.dim}, T_u {args.updates}"
    kind = f"one of {args.one_of} ranks, no messages" if args.one_of > 1 else f"{len(results)} ranks"
    print(f"NPN, {sizes}, {kind}; {results[0]['machine']}; median (quartiles) of {args.repeats}, rank 0\n")
    print(report(args, results[0], len(results)))
    asked = {name: value for name, value in vars(args).items() if name != "json"}
    write_json(args.json, {"benchmark": "npn_step", "arguments": asked, "ranks": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
