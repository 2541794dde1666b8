"""When a normalizer-prediction network learns: in an inner loop before the encoders' step, or together with the encoders."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuclip.normalizers.network import NormalizerNetwork
from neuclip.pairwise import GlobalBatch


@dataclass(frozen=True)
class LearningStep:
    """What a network's part of a training step yields.

    Attributes:
        log_normalizers: [2, N], the predicted α of all anchors that the encoders' gradient is taken at, on every rank.
        parameters, gradients: what the outer optimizer is to learn, and the gradient over the global batch for each.
        metrics: values of the inner objective over the global batch; empty between logging steps.
    """

    log_normalizers: Tensor
    parameters: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Optimization:
    """How a network is trained on one batch."""

    def learn(
        self, network: NormalizerNetwork, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor, report: bool
    ) -> LearningStep:
        """Predict α, and learn from T before or after.

        Args:
            log_targets: [2, N], T = log(ε + g) of every anchor of the global batch.
            logit_scale: 0-dim, 1/τ.
            report: whether to fill in the metrics. Predictions and gradients do not depend on it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Alternating(Optimization):
    """Algorithm 1 of NeuCLIP (arXiv 2511.08417): `repetitions` (T_u) updates of the network, then α for the encoders.

    Metrics: inner_loss_before, inner_loss_after, the inner objective on this batch before the first and after the last update.
    Their units are those of the inner objective: the loss (unified), squared natural logarithms (separate).
    """

    repetitions: int

    def learn(
        self, network: NormalizerNetwork, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor, report: bool
    ) -> LearningStep:
        metrics = {}
        if report:
            before = network.predict(batch, logit_scale)
            metrics["inner_loss_before"] = _inner_loss(network, before, log_targets, logit_scale)
        network.fit(batch, log_targets, logit_scale, self.repetitions)
        after = network.predict(batch, logit_scale)
        if report:
            metrics["inner_loss_after"] = _inner_loss(network, after, log_targets, logit_scale)
        return LearningStep(after, metrics=metrics)


class Simultaneous(Optimization):
    """The paper's ablation: α is predicted once, and the outer optimizer takes one step on network and encoders together.

    Metrics: inner_loss_before, as for Alternating. The value after the update is not known here: the outer optimizer makes it
    later, and by then the features have moved as well.
    """

    def learn(
        self, network: NormalizerNetwork, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor, report: bool
    ) -> LearningStep:
        log_normalizers, parameters, gradients = network.differentiate(batch, log_targets, logit_scale)
        metrics = {}
        if report:
            metrics["inner_loss_before"] = _inner_loss(network, log_normalizers, log_targets, logit_scale)
        return LearningStep(log_normalizers, parameters, gradients, metrics)


@torch.no_grad()
def _inner_loss(
    network: NormalizerNetwork, log_normalizers: Tensor, log_targets: Tensor, logit_scale: Tensor
) -> Tensor:
    """The inner objective over the global batch, 0-dim, the same on every rank."""
    return network.inner_objective.value(log_normalizers, log_targets, 1.0 / logit_scale)
