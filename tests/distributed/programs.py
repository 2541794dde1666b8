"""What the ranks of the distributed tests run. The test process runs the same functions without a process group."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neuclip import Objective, RunShape, make_objective
from neuclip.objectives import TemperatureLearning

GLOBAL_BATCH, INPUT_DIM, EMBED_DIM, DATA_SIZE = 16, 7, 6, 200
STEPS_PER_EPOCH, EPOCHS = 2, 4
STEPS = 5  # then one more after loading a checkpoint


class TwoTowers(nn.Module):
    """A linear tower per modality, and the temperature and bias of the objective."""

    def __init__(self, initial_temperature: float, initial_logit_bias: float | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.image_tower = nn.Parameter(torch.randn(INPUT_DIM, EMBED_DIM, generator=generator))
        self.text_tower = nn.Parameter(torch.randn(INPUT_DIM, EMBED_DIM, generator=generator))
        self.log_logit_scale = nn.Parameter(torch.tensor(-math.log(initial_temperature)))
        self.logit_bias = None if initial_logit_bias is None else nn.Parameter(torch.tensor(initial_logit_bias))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return (
            F.normalize(images @ self.image_tower, dim=1),
            F.normalize(texts @ self.text_tower, dim=1),
            self.log_logit_scale.exp(),
            # A copy, because a model's output is never the parameter itself once it is wrapped.
            None if self.logit_bias is None else self.logit_bias * 1.0,
        )


@dataclass
class Record:
    """What one rank saw of a run.

    Attributes:
        losses, gradients, metrics: one entry per step; gradients by parameter name, after averaging over the ranks. The
            objective's own parameters are among them; nobody averages theirs, they have to be equal when backward returns.
        state: the objective's state dict at the end.
        checkpoint: model, objective and step after STEPS steps, as the bytes of a file.
    """

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    checkpoint: bytes = b""


def world() -> tuple[int, int]:
    """This rank and the number of ranks, independently of the package under test."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of both towers and keys, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    shared = torch.randn(GLOBAL_BATCH, INPUT_DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, GLOBAL_BATCH, INPUT_DIM, generator=generator, dtype=torch.float64)
    # Samples come back after two batches, spread over the whole range of keys.
    chosen = torch.randperm(2 * GLOBAL_BATCH, generator=torch.Generator().manual_seed(step // 2))
    keys = chosen[step % 2 * GLOBAL_BATCH :][:GLOBAL_BATCH] * (DATA_SIZE // (2 * GLOBAL_BATCH)) + step % 3
    return shared + 0.5 * noise[0], shared + 0.5 * noise[1], keys


def local_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    rank, world_size = world()
    size = GLOBAL_BATCH // world_size
    images, texts, keys = global_batch(step)
    own = slice(rank * size, (rank + 1) * size)
    return images[own], texts[own], keys[own]


def build(flags: str) -> tuple[Objective, nn.Module, nn.Module]:
    """The objective, the model, and the model as it is called (wrapped when there is a process group)."""
    world_size = world()[1]
    shape = RunShape(EMBED_DIM, GLOBAL_BATCH // world_size, world_size, STEPS_PER_EPOCH, EPOCHS)
    objective = make_objective(f"{flags} --data_size {DATA_SIZE}", shape).double()
    model = TwoTowers(objective.initial_temperature, objective.initial_logit_bias).double()
    model.log_logit_scale.requires_grad_(objective.temperature_learning is TemperatureLearning.OUTER)
    return objective, model, DistributedDataParallel(model) if dist.is_initialized() else model


def run(flags: str, checkpoint: bytes | None = None) -> Record:
    """STEPS steps from the beginning, or one step from a checkpoint."""
    objective, model, called = build(flags)
    record, first, count = Record(), 0, STEPS
    if checkpoint is not None:
        saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
        model.load_state_dict(saved["model"])
        objective.load_state_dict(saved["objective"])
        first, count = saved["step"], 1
    for step in range(first, first + count):
        if step % STEPS_PER_EPOCH == 0:
            objective.start_epoch(step // STEPS_PER_EPOCH)
        images, texts, keys = local_batch(step)
        image_features, text_features, logit_scale, logit_bias = called(images, texts)
        output = objective(image_features, text_features, logit_scale, logit_bias, keys)
        model.zero_grad()
        objective.zero_grad()
        output.loss.backward()
        record.losses.append(output.loss.detach().clone())
        record.metrics.append({name: value.clone() for name, value in output.metrics.items()})
        learnt = dict(model.named_parameters()) | {f"objective.{name}": p for name, p in objective.named_parameters()}
        record.gradients.append({name: p.grad.clone() for name, p in learnt.items() if p.grad is not None})
        # Plain gradient descent: Adam would turn rounding errors of vanishing gradients into steps.
        with torch.no_grad():
            for parameter in learnt.values():
                if parameter.grad is not None:
                    parameter -= 0.02 * parameter.grad
    record.state = objective.state_dict()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "objective": record.state, "step": first + count}, file)
    record.checkpoint = file.getvalue()
    return record


def run_all(variants: dict[str, str], checkpoints: dict[str, bytes]) -> dict[str, Any]:
    """Every variant from the beginning, those with a checkpoint also from there, and the messages of steps with a state."""
    return {
        "runs": {name: run(flags) for name, flags in variants.items()},
        "continued": {name: run(variants[name], checkpoint) for name, checkpoint in checkpoints.items()},
        "messages": {name: messages(variants[name]) for name in variants if name.startswith(STATEFUL)},
        "rows_held": build("--fastclip")[0].table.num_local_rows,
        "prototypes_held": {
            name: prototypes_held(flags)
            for name, flags in variants.items()
            if name.startswith("neuclip") and "mlp" not in name
        },
    }


def prototypes_held(flags: str) -> dict[str, int]:
    """Rows on this rank of what the prototypes of NeuCLIP consist of; 0 where there is none or none by row."""
    normalizer = build(flags)[0].normalizer
    optimizer = normalizer.optimizer
    by_row = optimizer is not None and optimizer.accumulator.dim() == 3
    return {
        "prototypes": normalizer.prototypes.shape[1],
        "recent": normalizer.recent.shape[1],
        "accumulator": optimizer.accumulator.shape[1] if by_row else 0,
    }


# Beginnings of the names of variants whose objectives remember or learn something.
STATEFUL = ("neuclip", "amorlip", "fastclip", "sogclr", "isogclr")
COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *(
        "barrier",
        "batch_isend_irecv",
        "broadcast",
        "broadcast_object_list",
        "gather",
        "irecv",
        "isend",
        "recv",
        "reduce",
    ),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter", "send"),
)


@contextmanager
def recorded_messages() -> Iterator[list[tuple[str, int, int]]]:
    """(collective, elements and bytes that this rank puts in) of every collective called by its name in torch.distributed."""
    found: list[tuple[str, int, int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def recording(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            # all_gather_into_tensor(output, input): what a rank puts in is the smaller of the two.
            smallest = min(tensors, key=Tensor.numel, default=None)
            sizes = (-1, -1) if smallest is None else (smallest.numel(), smallest.nbytes)
            found.append((name, *sizes))
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, recording(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def messages(flags: str) -> list[list[tuple[str, int, int]]]:
    """The collectives of the objective's forward and of backward to the features, for each of four steps."""
    objective, model, _ = build(flags)
    objective.report = False
    steps = []
    for step in range(4):
        images, texts, keys = local_batch(step)
        image_features, text_features, logit_scale, logit_bias = model(images, texts)
        with recorded_messages() as found:
            objective(image_features, text_features, logit_scale, logit_bias, keys).loss.backward()
        # Before its first step an objective asks every rank for the size of its share.
        sizes = [("all_gather_into_tensor", 1, 8)] if step == 0 and dist.is_initialized() and world()[1] > 1 else []
        assert found[: len(sizes)] == sizes
        steps.append(found[len(sizes) :])
    return steps
