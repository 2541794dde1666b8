"""Small things that take the place of an open_clip model and a data set in the tests of the loop."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from neuclip.objectives import OBJECTIVES, RunShape, build_objective
from training.checkpoint import TrainingState
from training.data import Batch
from training.distributed import World
from training.finite import FiniteGuard
from training.loop import Training
from training.model import TwoTowers, wrap
from training.optim import build_optimizer, parameter_groups
from training.params import parse_args
from training.pixels import Pixels
from training.precision import Precision
from training.schedules import LearningRates

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
EMBED_DIM = 6
VOCABULARY = 20


class SmallModel(nn.Module):
    """Two tiny towers with the interface of an open_clip model; weights are the same in every process."""

    def __init__(self, logit_bias: float | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.visual = nn.Linear(12, EMBED_DIM)
        self.norm = nn.LayerNorm(EMBED_DIM)
        self.token_embedding = nn.Embedding(VOCABULARY, EMBED_DIM)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        if logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(logit_bias))
        with torch.no_grad():
            for parameter in (self.visual.weight, self.token_embedding.weight):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.visual.bias.zero_()

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """[B, 3, 2, 2] → [B, d]."""
        features = self.norm(self.visual(image.flatten(1)))
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """[B, L] → [B, d]."""
        features = self.token_embedding(text).mean(1)
        return nn.functional.normalize(features, dim=-1) if normalize else features


class FrozenImage(SmallModel):
    """An image tower that does not learn."""

    def __init__(self, logit_bias: float | None = None) -> None:
        super().__init__(logit_bias)
        self.visual.requires_grad_(False)
        self.norm.requires_grad_(False)


class FrozenTowers(FrozenImage):
    """Only the temperature learns."""

    def __init__(self, logit_bias: float | None = None) -> None:
        super().__init__(logit_bias)
        self.token_embedding.requires_grad_(False)


class FixedLoader:
    """The same batches in every epoch: this rank's share of a global batch a step."""

    data_description = "made up"

    def __init__(self, batches: list[Batch], world: World) -> None:
        self.batches = batches
        self.world = world
        self.steps_per_epoch = len(batches)
        self.num_samples = sum(len(batch.image) for batch in batches)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        for batch in self.batches:
            size = len(batch.image) // self.world.size
            mine = slice(self.world.rank * size, (self.world.rank + 1) * size)
            yield Batch(*(part[mine] for part in batch))


class Recorder:
    """Takes the reporter's place and keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def training(self, step: int, values: dict[str, float]) -> None:
        """Numbers of an interval."""
        self.lines.append((step, values))


def make_batches(count: int, size: int, seed: int = 0) -> list[Batch]:
    """Global batches of random pictures and tokens with keys."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randn(size, 3, 2, 2, generator=generator),
            torch.randint(VOCABULARY, (size, 4), generator=generator),
            torch.arange(number * size, (number + 1) * size),
        )
        for number in range(count)
    ]


def make_args(*flags: str) -> Namespace:
    """Resolved flags of a run without warmup, in plain float32."""
    common = ["--dataset-type", "synthetic", "--warmup", "0", "--precision", "fp32", "--data_size", "1000"]
    return parse_args([*common, *flags])


def make_training(
    args: Namespace,
    batches: list[Batch],
    world: World = ALONE,
    towers_class: Callable[[nn.Module, float | None], TwoTowers] = TwoTowers,
    model_class: Callable[..., nn.Module] = SmallModel,
    **model: Any,
) -> Training:
    """A run of a small model, assembled from the parts that a real one has; --batch-size follows from the batches."""
    loader = FixedLoader(batches, world)
    objective_class = OBJECTIVES[args.objective]
    shape = RunShape(EMBED_DIM, len(batches[0].image) // world.size, world.size, len(batches), args.epochs)
    args.batch_size = shape.batch_size // args.accum_freq
    objective = build_objective(args, shape)
    towers = towers_class(model_class(**model), objective_class.initial_logit_bias)
    wrapped = wrap(args, towers, objective, world)
    optimizer = build_optimizer(args, parameter_groups(towers, towers.model.logit_scale, args.wd, objective))
    precision = Precision(args.precision, "cpu")
    scaler = precision.grad_scaler()
    return Training(
        args=args,
        world=world,
        state=TrainingState(towers, objective, optimizer, scaler),
        model=wrapped,
        loader=loader,  # type: ignore[arg-type]
        rates=LearningRates(optimizer, args, len(batches), towers.model.logit_scale),
        precision=precision,
        reporter=Recorder(),  # type: ignore[arg-type]
        pixels=Pixels(world.device, precision.input_dtype),
        guard=FiniteGuard(world.rank, optimizer, scaler.is_enabled()),
    )
