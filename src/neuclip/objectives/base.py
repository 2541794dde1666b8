"""The contract between a method and a training loop."""

from __future__ import annotations

import enum
import math
from argparse import Namespace, _ArgumentGroup
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neuclip import distributed
from neuclip.stopwatch import NORMALIZER, OBJECTIVE, Stopwatch


class TemperatureLearning(enum.Enum):
    """Who changes the temperature during training."""

    OUTER = "a parameter of the outer optimizer, with its own learning rate and schedule"
    CONSTANT = "nobody"
    OBJECTIVE = "the objective itself"


@dataclass(frozen=True)
class RunShape:
    """The sizes of a run that an objective may need.

    Attributes:
        embed_dim: d, width of the features.
        batch_size: B, samples per rank and step.
        world_size: K, number of ranks.
        steps_per_epoch, epochs: length of the whole run (not of the part until --stop_epochs).
    """

    embed_dim: int
    batch_size: int
    world_size: int
    steps_per_epoch: int
    epochs: int

    @property
    def global_batch_size(self) -> int:
        """N = K·B."""
        return self.batch_size * self.world_size


@dataclass
class Output:
    """What an objective returns for one batch.

    Attributes:
        loss: 0-dim; its gradient, averaged over the ranks, is the gradient of the objective on the global batch.
        metrics: 0-dim tensors without gradient, on the features' device. To be averaged over the ranks, except names that
            end in `_max`, of which the maximum counts. Empty while `Objective.report` is False.
        log_normalizers: the method's α of the batch, without gradient, of any shape; None where a method has none or does
            not form them. There in every step, for whoever looks into one that went wrong.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    log_normalizers: Tensor | None = None


@dataclass(frozen=True)
class Recollection:
    """What an objective knows of a batch's anchors before it has seen the batch.

    Attributes:
        log_normalizers: [2, B], its α of this rank's anchors, image side and text side; NaN for anchors it knows nothing of.
        logit_scale: 1/τ that these α are for: 0-dim, or [2, B] with one for each anchor.
    """

    log_normalizers: Tensor
    logit_scale: Tensor


ArgumentAdder = Callable[[_ArgumentGroup], None]


class Objective(nn.Module):
    """A contrastive objective: features in, loss out; owns its state, its flags and its schedules.

    Subclasses fill in the class attributes, `compute`, `from_args`, and where needed `add_arguments`, `resolve_args`.

    Class attributes:
        name: the value of --objective.
        summary: one line for --help.
        synonyms: sets of published boolean flags, each of which selects this objective.
        shared_arguments: (title, function) pairs that add flags which several objectives share.
        needs_keys: whether `compute` needs the samples' integer keys.
        initial_temperature, initial_logit_bias: starting point; a bias of None means that the model has none.
        sums_over_batch: whether what the method remembers stands for sums over a global batch, so that it means nothing at
            another batch size.
        temperature_schedule: how the learning rate of the temperature changes unless the user says: const, cosine, or
            step_thresh.

    Instance attributes:
        temperature_learning: who changes the temperature.
        temperature_lr: learning rate of the temperature for an objective that changes it itself; a loop sets it before each
            step.
        report: whether `forward` fills in `Output.metrics`; a loop sets it to False between its logging steps.
        chunk_rows: rows of a rank's B×N block of pairs that are formed at a time; None for the method's own choice.
        step, epoch: optimizer steps taken so far; current epoch, from 0. Part of the state dict.
        log_eps: log ε of α = log(ε + g); −inf where the method has none.
        stopwatch: times `forward` as "objective" and, within it, what the method does for its normalizers as "normalizer"; a
            loop reads and restarts it. Not in it is the backward pass, which is one with that of the towers: here it only
            multiplies gradients that `forward` has formed, except in losses of open_clip, which autograd differentiates.
            Metrics, which are formed in steps that report, are in it. No part of the state dict.

    Parameters with requires_grad are for the outer optimizer, with weight decay `outer_weight_decay`; their gradient is the
    same on every rank when `backward` returns. On several ranks `state_dict` is a collective: all call it, all get the
    same; buffers may differ, so an objective is never wrapped in DistributedDataParallel, which would overwrite them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    synonyms: ClassVar[tuple[frozenset[str], ...]] = ()
    shared_arguments: ClassVar[tuple[tuple[str, ArgumentAdder], ...]] = ()
    needs_keys: ClassVar[bool] = False
    initial_temperature: ClassVar[float] = 0.07
    initial_logit_bias: ClassVar[float | None] = None
    sums_over_batch: ClassVar[bool] = False
    temperature_schedule: ClassVar[str] = "cosine"
    outer_weight_decay: float = 0.0
    log_eps: float = -math.inf

    def __init__(self, learn_temperature: bool = True) -> None:
        super().__init__()
        self.temperature_learning = TemperatureLearning.OUTER if learn_temperature else TemperatureLearning.CONSTANT
        self.temperature_lr = 0.0
        self.report = True
        self.chunk_rows: int | None = None
        self.step = 0
        self.epoch = 0
        self.stopwatch = Stopwatch()
        self._share: int | None = None

    @classmethod
    def add_arguments(cls, group: _ArgumentGroup) -> None:
        """Add this method's own flags to its group of the command line."""

    @classmethod
    def resolve_args(cls, args: Namespace) -> None:
        """Fill in this method's defaults in `args` and check what the user asked for, before any GPU is touched.

        Raises:
            ValueError: a value or a combination is wrong; the message names the flag, the value and the remedy.
        """

    @classmethod
    def from_args(cls, args: Namespace, shape: RunShape) -> Objective:
        """Build the objective from resolved arguments."""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """To be called before the first step of each epoch, counted from 0."""
        self.epoch = epoch

    def check_keys(self, keys: Tensor) -> None:
        """Check a batch's keys, on the host and before they go to the device: there, looking at them would wait for it.

        Args:
            keys: [B] int64 on the host.

        Raises:
            ValueError: this objective has no place for a key; the message names it.
        """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Output:
        """Loss and metrics of one batch; updates the objective's own state. Always in float32 or better.

        Args:
            image_features, text_features: [B, d], L2-normalised, row i of both is one sample; the same B on every rank.
            logit_scale: 0-dim, 1/τ (not its logarithm).
            logit_bias: 0-dim, for objectives that have one.
            keys: [B] int64, the samples' integer keys in the data set, for objectives that need them.

        Raises:
            ValueError: shapes differ, or ranks hold shares of different size.
        """
        self._check_shares(image_features, text_features)
        device = image_features.device
        with self.stopwatch.section(OBJECTIVE, device), torch.autocast(device.type, enabled=False):
            output = self.compute(
                _at_least_float32(image_features),
                _at_least_float32(text_features),
                _at_least_float32(logit_scale.reshape(())),
                None if logit_bias is None else _at_least_float32(logit_bias.reshape(())),
                keys,
            )
        self.step += 1
        return output

    def _check_shares(self, image_features: Tensor, text_features: Tensor) -> None:
        """Raises ValueError unless both modalities and all ranks have equally many samples."""
        if image_features.shape != text_features.shape:
            shapes = tuple(image_features.shape), tuple(text_features.shape)
            raise ValueError(f"image features of shape {shapes[0]} for text features of shape {shapes[1]}: give pairs")
        size = image_features.shape[0]
        if size == self._share or not distributed.is_distributed():
            return
        if self._share is not None:
            # Asking the others would need them to ask too, and they may have no reason to.
            raise ValueError(f"rank {distributed.rank()} has {size} samples after {self._share}: keep shares equal")
        sizes = distributed.all_gather(torch.tensor([size], device=image_features.device), dim=0).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(f"the ranks hold {sizes} samples: every rank needs an equal share of the global batch")
        self._share = size

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        """The method itself. Same arguments as `forward`, in float32 or float64, with autocast off."""
        raise NotImplementedError

    def normalizer_section(self, device: torch.device) -> AbstractContextManager[None]:
        """To be put around what `compute` does for its normalizers: remember, train, predict."""
        return self.stopwatch.section(NORMALIZER, device)

    @torch.no_grad()
    def recall(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Recollection | None:
        """The method's own log-normalizers of a batch's anchors, from what it has learnt or remembers; changes nothing.

        The whole of a batch takes part only as far as a method's definition needs it (its size, say). Arguments as for
        `forward`.

        Returns:
            None for a method without normalizers of its own: the batch's estimate is all it has.
        """
        return None

    def get_extra_state(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.epoch = state["epoch"]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
