"""A loss or a gradient that is not finite: found on the device, its update left out, the host told when it is convenient.

Whether an update may be applied is decided by the gradient after its average over the ranks, so all ranks decide alike and no
message is needed; a loss that is not finite makes its rank's gradient so. The fused optimizers look at the decision on the
device and leave weights, moments and step counts as they were. The host learns of it one or two steps later, from a few
numbers copied to it without waiting. Optimizers of other kinds (lamb, lion) wait for the decision in every step.

With a gradient scaler (--precision amp on GPUs) gradients that overflow are the scaler's business, as ever: they are no
finding here, only losses and features are.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

# Steps whose numbers may be on their way to the host before it waits for the oldest.
_TRAVELLING = 16
# So many steps in a row without an update: nothing will come right any more.
HOPELESS_STEPS = 100
_LINES = 1000
_KEYS_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """A step that went wrong, as one rank saw it.

    Attributes:
        what: "features" (of this rank), "loss" (of this rank) or "gradient" (averaged over the ranks), whichever came first.
        loss, temperature: of that step. log_normalizers: least and largest α of this rank's batch, None without any.
        keys: of this rank's batch, None where samples have none.
    """

    step: int
    rank: int
    what: str
    loss: float
    temperature: float
    log_normalizers: tuple[float, float] | None
    keys: list[int] | None


@dataclass
class _Step:
    """What a step leaves for the host: `probe` [4] on its way, the rest looked at only if something is wrong."""

    number: int
    probe: Tensor
    arrived: torch.cuda.Event | None
    loss: Tensor
    temperature: Tensor
    log_normalizers: Tensor | None
    keys: Tensor | None


class FiniteGuard:
    """Watches the steps of one rank.

    Args:
        optimizer: the outer one.
        has_scaler: whether a gradient scaler decides about gradients.

    Attributes:
        in_a_row: steps without an update up to the last one that the host knows of.
    """

    def __init__(self, rank: int, optimizer: Optimizer, has_scaler: bool) -> None:
        self.in_a_row = 0
        self._rank = rank
        self._optimizer = optimizer
        self._has_scaler = has_scaler
        self._is_fused = bool(optimizer.param_groups and optimizer.param_groups[0].get("fused"))
        self._steps: deque[_Step] = deque()
        self._sums: list[Tensor] = []
        self._loss: Tensor | None = None
        self._bad: Tensor | None = None

    def gradient_of_loss(self, loss: Tensor, image_features: Tensor, text_features: Tensor) -> Tensor:
        """What the backward pass begins with: 1, or NaN where the loss is not finite, so that every rank gets to know.

        Args:
            loss: 0-dim. image_features, text_features: [B, d], this rank's.
        """
        with torch.no_grad():
            self._loss = loss.detach()
            # A sum is finite just if all are: features have length 1.
            self._sums = [image_features.sum(dtype=torch.float32), text_features.sum(dtype=torch.float32)]
            return torch.where(self._loss.isfinite(), 1.0, math.nan).to(loss.dtype)

    @torch.no_grad()
    def may_update(self, gradient_norm: Tensor | None) -> bool:
        """Tell the optimizer to leave its next update out if the gradient is not finite; False if the host must leave it out.

        Args:
            gradient_norm: 0-dim, that of all gradients, where clipping has computed it already.
        """
        assert self._loss is not None
        if self._has_scaler:
            self._bad = torch.zeros_like(self._loss)
            return True
        if gradient_norm is None:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters if p.grad is not None]
            gradient_norm = _largest(gradients).to(self._loss.device)
        self._bad = 1.0 - gradient_norm.isfinite().to(torch.float32).reshape(())
        if self._is_fused:
            self._optimizer.found_inf = self._bad  # type: ignore[attr-defined]
            return True
        return not self._bad.item()

    @torch.no_grad()
    def step_done(self, step: int, temperature: Tensor, log_normalizers: Tensor | None, keys: Tensor | None) -> None:
        """Send what was found to the host.

        Args:
            step: counted from 1, as in metrics.jsonl. keys: [B] int64, those of this rank's batch.
        """
        assert self._loss is not None
        assert self._bad is not None
        probe = torch.stack([self._loss.float(), *self._sums, self._bad.float()])
        arrived = None
        if probe.is_cuda:
            probe = torch.empty(4, pin_memory=True).copy_(probe, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._steps.append(_Step(step, probe, arrived, self._loss, temperature, log_normalizers, keys))

    def findings(self, wait: bool = False) -> list[Finding]:
        """What has arrived since the last call; with `wait` everything up to the last step."""
        found = []
        while self._steps:
            oldest = self._steps[0]
            if oldest.arrived is not None and not oldest.arrived.query():
                if not wait and len(self._steps) < _TRAVELLING:
                    break
                oldest.arrived.synchronize()
            self._steps.popleft()
            finding = self._judge(oldest)
            if finding is None:
                self.in_a_row = 0
            else:
                self.in_a_row += 1
                found.append(finding)
        return found

    def _judge(self, step: _Step) -> Finding | None:
        loss, image, text, bad_gradient = step.probe.tolist()
        if not (math.isfinite(image) and math.isfinite(text)):
            what = "features"
        elif not math.isfinite(loss):
            what = "loss"
        elif bad_gradient:
            what = "gradient"
        else:
            return None
        alpha = step.log_normalizers
        return Finding(
            step.number,
            self._rank,
            what,
            step.loss.item(),
            step.temperature.item(),
            None if alpha is None else (alpha.min().item(), alpha.max().item()),
            None if step.keys is None else step.keys.tolist(),
        )


def _largest(gradients: Sequence[Tensor]) -> Tensor:
    """The largest absolute value, 0-dim; NaN if there is one. It cannot overflow by itself, as a sum of squares can.

    PyTorch's maximum norm is one launch for many tensors on a GPU, but on a CPU it takes 20 times as long as their extremes.
    """
    if not gradients or any(gradient.is_cuda for gradient in gradients):
        return get_total_norm(gradients, norm_type=math.inf)
    return torch.stack([extreme for gradient in gradients for extreme in torch.aminmax(gradient)]).abs().max()


class NonFiniteLog:
    """Rank 0's account of such steps: a bounded number of log lines, and nonfinite.jsonl in the run folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps = 0
        self._lines = 0

    def add(self, findings: Sequence[Finding]) -> None:
        """All ranks' findings of some steps."""
        for step in sorted({finding.step for finding in findings}):
            there = [finding for finding in findings if finding.step == step]
            self._steps += 1
            if self._steps & (self._steps - 1) == 0:
                logging.warning(
                    "%s; update left out (%d so far); keys in %s", describe(there), self._steps, self._path.name
                )
            self._write(culprits(there))

    def _write(self, findings: Sequence[Finding]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                for finding in findings[: max(0, _LINES - self._lines)]:
                    values = asdict(finding)
                    values["loss"] = repr(finding.loss)  # JSON has no NaN
                    values["log_normalizers"] = repr(finding.log_normalizers)
                    file.write(json.dumps(values) + "\n")
                    self._lines += 1
        except OSError as error:
            logging.error("%s cannot be written: %s", self._path, error.strerror)


def culprits(findings: Sequence[Finding]) -> list[Finding]:
    """Of one step's findings those that tell where it began: features are gathered, so one rank's spoil every loss."""
    for what in ("features", "loss"):
        there = [finding for finding in findings if finding.what == what]
        if there:
            return there
    return list(findings)


def describe(findings: Sequence[Finding]) -> str:
    """One line about one step, from all ranks' findings."""
    there = culprits(findings)
    first = there[0]
    ranks = ", ".join(str(finding.rank) for finding in there)
    alpha = first.log_normalizers
    keys = first.keys
    parts = [
        f"step {first.step}: {first.what} not finite on rank {ranks}",
        f"loss {first.loss:g}",
        f"τ {first.temperature:.4g}",
        "no α" if alpha is None else f"α {alpha[0]:.4g} to {alpha[1]:.4g}",
        "no keys"
        if keys is None
        else f"keys {', '.join(map(str, keys[:_KEYS_SHOWN]))}{', …' if len(keys) > _KEYS_SHOWN else ''}",
    ]
    return ", ".join(parts)
