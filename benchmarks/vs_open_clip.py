"""Our training step against open_clip's own, in turn: same model, batches, precision, ranks; the ratio of their times.

    PYTHONPATH=src python benchmarks/vs_open_clip.py --model ViT-B-32 --batch-size 512 --precision amp_bf16
    PYTHONPATH=src python benchmarks/vs_open_clip.py --ranks 2 --device cpu --batch-size 16 --precision fp32 --steps 5

Theirs is open_clip_train.train.train_one_epoch, with arguments from its own parser, its model, its loss, its default
DistributedDataParallel and its AdamW with its parameter groups. Ours is training.loop.train_one_epoch. Both start from the
same weights and take the same batches from memory, each as its own loader would deliver them. A block is an epoch of --steps
steps of one of them, both log at its first and last step; blocks alternate, and which of a pair comes first alternates too.
Block times are those of the device (events) on a GPU. `loss difference` is the largest difference of the two losses on any
rank, over all steps: both compute the same, to rounding and what rounding grows to.
"""

from __future__ import annotations

import logging
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]

import measure
import open_clip
import torch
from measure import Stopwatch, spread
from open_clip_train.params import parse_args as their_parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch as their_epoch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_run import build_training, resolve

from training.data import Batch
from training.distributed import World
from training.errors import UserError
from training.loop import Training, train_one_epoch

Block = Callable[[int], None]


class Theirs:
    """open_clip's training of the same model on the same batches.

    Attributes:
        losses: of every step, 0-dim on the device.
    """

    def __init__(self, args: Namespace, world: World, batches: list[Batch], epochs: int) -> None:
        words = ["--model", args.model, "--precision", args.precision, "--batch-size", str(args.batch_size)]
        words += ["--lr", str(args.lr), "--wd", str(args.wd), "--warmup", "0", "--epochs", str(epochs)]
        words += ["--log-every-n-steps", str(args.steps), "--local-loss", "--gather-with-grad"]
        words += [flag for flag, given in (("--siglip", args.siglip), ("--grad-checkpointing", args.ckpt)) if given]
        self.args = their_parse_args(words)
        place = {"device": str(world.device), "rank": world.rank, "local_rank": 0, "world_size": world.size}
        vars(self.args).update(place, distributed=world.size > 1, horovod=False, wandb=False, distill=False)
        torch.manual_seed(0)
        # Their main() gives --siglip a bias and its starting values; the model is otherwise the configuration's.
        start = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if args.siglip else {}
        model = open_clip.create_model(
            args.model, precision=args.precision, device=world.device, output_dict=True, **start
        )
        model = model.to(world.device)
        if args.ckpt:
            model.set_grad_checkpointing()
        pixels = [(as_floats(batch.image, model.visual), batch.text) for batch in batches]
        on_gpu = world.device.type == "cuda"
        self.batches = [tuple(x.pin_memory() if on_gpu else x for x in pair) for pair in pixels]
        self.num_batches, self.num_samples = args.steps, args.steps * args.batch_size * world.size
        self.dataloader = self
        device_ids = [world.device] if on_gpu else None
        self.model = DistributedDataParallel(model, device_ids=device_ids) if world.size > 1 else model
        self.optimizer = torch.optim.AdamW(
            their_groups(self.model, args.wd),
            lr=args.lr,
            betas=(self.args.beta1, self.args.beta2),
            eps=self.args.eps,
        )
        self.scaler = torch.amp.GradScaler(world.device.type) if args.precision == "amp" else None
        self.schedule = cosine_lr(self.optimizer, args.lr, 0, epochs * args.steps)
        self.loss = open_clip.create_loss(self.args)
        self.losses: list[Tensor] = []
        self.loss.register_forward_hook(lambda module, given, output: self.losses.append(_total(output)))

    def set_epoch(self, epoch: int) -> None:
        """Of their data's interface."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self.batches[step % len(self.batches)] for step in range(self.num_batches))

    def block(self, number: int) -> None:
        """An epoch of theirs."""
        their_epoch(
            self.model, {"train": self}, self.loss, number, self.optimizer, self.scaler, self.schedule, None, self.args
        )


class Ours:
    """Our training.

    Attributes:
        losses: of every step, 0-dim on the device.
    """

    def __init__(self, args: Namespace, world: World, epochs: int) -> None:
        flags = our_flags(args, epochs)
        self.training: Training = build_training(resolve(flags, args.device, world.size), world, args.steps)
        self.losses: list[Tensor] = []
        self.training.state.objective.register_forward_hook(
            lambda module, given, output: self.losses.append(output.loss.detach())
        )

    def block(self, number: int) -> None:
        """An epoch of ours."""
        train_one_epoch(self.training, number)


def our_flags(args: Namespace, epochs: int) -> list[str]:
    """The same run in our flags."""
    objective = ["siglip"] if args.siglip else ["openclip", "--local-loss", "--gather-with-grad"]
    flags = ["--model", args.model, "--precision", args.precision, "--batch-size", str(args.batch_size)]
    flags += ["--lr", str(args.lr), "--lr_tau", str(args.lr), "--lr_tau_scheduler", "cosine", "--wd", str(args.wd)]
    flags += ["--epochs", str(epochs), "--log-every-n-steps", str(args.steps), "--objective", *objective]
    for config in args.model_config:
        flags += ["--model-config", config]
    return [*flags, *(["--grad-checkpointing"] if args.ckpt else []), *args.ours.split()]


def their_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Their rule: no weight decay where a name speaks of a norm, a bias or logit_scale, nor on vectors."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        is_plain = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        if parameter.requires_grad:
            (plain if is_plain else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": decay}]


def as_floats(image: Tensor, image_tower: nn.Module) -> Tensor:
    """Images as their loader delivers them: normalised float32, [B, 3, H, W] in plain strides."""
    if image.is_floating_point():
        return image.contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image_tower.image_mean, image_tower.image_std))
    return ((image.float() / 255 - mean) / std).contiguous()


def _total(output: dict[str, Tensor]) -> Tensor:
    return sum(value.detach() for value in output.values())  # type: ignore[return-value]


def measure_blocks(world: World, args: Namespace) -> dict[str, Any]:
    """Milliseconds per step of each block of both, in order, and the losses of both on this rank."""
    # Only one of them says anything, and the other at the same steps into nothing.
    logging.getLogger().setLevel(logging.WARNING)
    blocks = args.warmup + args.repeats
    ours = Ours(args, world, blocks)
    theirs = Theirs(args, world, ours.training.loader.batches, blocks)  # type: ignore[attr-defined]
    watch = Stopwatch(world.device)
    pair: list[tuple[str, Block]] = [("ours", ours.block), ("theirs", theirs.block)]
    for number in range(blocks):
        watch.next_round()
        for name, block in pair if number % 2 else reversed(pair):
            if world.size > 1:
                torch.distributed.barrier()
            with watch.part(name):
                block(number)
    times = watch.milliseconds()
    return {
        "machine": measure.machine(world.device),
        "ours": [value / args.steps for value in times["ours"][args.warmup :]],
        "theirs": [value / args.steps for value in times["theirs"][args.warmup :]],
        "losses": [torch.stack(who.losses).double().tolist() for who in (ours, theirs)],
    }


def report(ranks: list[dict[str, Any]], args: Namespace) -> dict[str, Any]:
    """Numbers of the group: a block lasts as long as on its slowest rank."""
    ours, theirs = ([max(values) for values in zip(*(rank[who] for rank in ranks))] for who in ("ours", "theirs"))
    differences = [abs(a - b) for rank in ranks for a, b in zip(*rank["losses"], strict=True)]
    return {
        "machine": ranks[0]["machine"],
        "ranks": len(ranks),
        "flags": {name: value for name, value in vars(args).items() if name != "json"},
        "ours_ms": spread(ours),
        "theirs_ms": spread(theirs),
        "ratio": spread([a / b for a, b in zip(ours, theirs)]),
        "loss_difference": max(differences),
        "first_loss_difference": differences[0],
        "every_block": {"ours": ours, "theirs": theirs},
        "losses": ranks[0]["losses"],
    }


def parse_args(argv: Sequence[str] | None) -> Namespace:
    """The benchmark's flags."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common_arguments(parser)
    add = parser.add_argument
    add("--model", default="ViT-B-32", help="open_clip's name")
    add("--model-config", action="append", default=[], help="json file with a model named by its stem")
    add("--batch-size", type=int, default=64, help="samples per rank")
    add("--precision", default="amp_bf16", choices=("amp_bf16", "amp", "bf16", "fp16", "fp32"))
    add("--steps", type=int, default=10, help="steps of a block; --repeats pairs of blocks count")
    add("--lr", type=float, default=1e-4)
    add("--wd", type=float, default=0.2)
    add("--siglip", action="store_true", help="the sigmoid loss instead of the contrastive one")
    add("--grad-checkpointing", dest="ckpt", action="store_true", help="in both")
    add("--ours", default="", help="further flags of our side: --ours='--torchcompile'")
    args = parser.parse_args(argv)
    if min(args.steps, args.repeats, args.batch_size) < 1 or args.warmup < 0:
        parser.error("--steps, --repeats and --batch-size must be 1 or more, --warmup 0 or more")
    try:
        resolve(our_flags(args, 1), args.device, args.ranks)
    except UserError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parse_args(argv)
    ranks = measure.on_ranks(measure_blocks, args)
    if ranks is None:
        return 0
    found = report(ranks, args)
    head = ("ours, ms per step", "open_clip's, ms per step", "ours / theirs, paired", "loss difference")
    row = (
        f"{found['ours_ms']:.2f}",
        f"{found['theirs_ms']:.2f}",
        f"{found['ratio']:.3f}",
        f"{found['loss_difference']:.2g}",
    )
    print(f"# {found['machine']}, {found['ranks']} ranks, {args.model}, batch {args.batch_size}, {args.precision}")
    print(f"\nmedian (quartiles) of {args.repeats} pairs of blocks of {args.steps} steps\n")
    print(measure.table(head, [row]))
    measure.write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
