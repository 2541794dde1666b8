"""What a normalizer-prediction network is trained on, as a function of its predictions α and the batch's own T = log(ε + g).

    unified    ½·mean_i τ·[exp(T1_i − α1_i) + α1_i] + the same for text anchors
    separate   mean_i (α1_i − T1_i)² + the same for text anchors

*unified* is the part of the encoders' own objective (NeuCLIP, arXiv 2511.08417, eq. 12, halved) that depends on α. Over many
batches its minimum is log E[ε + g_i], the quantity wanted. *separate* is the log_l2 objective of AmorLIP, an ablation of the
paper; its minimum is E[log(ε + g_i)], which lies below by Jensen's inequality.
"""

from __future__ import annotations

from torch import Tensor

from neuclip.pairwise import LOG_WEIGHT_CEILING


class InnerObjective:
    """A sum over both modalities of means over anchors."""

    def value(self, log_normalizers: Tensor, log_targets: Tensor, temperature: Tensor) -> Tensor:
        """The objective F over the anchors given.

        Args:
            log_normalizers, log_targets: [2, B], α and T.
            temperature: 0-dim, τ.

        Returns:
            0-dim.
        """
        raise NotImplementedError

    def derivative(self, log_normalizers: Tensor, log_targets: Tensor, temperature: Tensor) -> Tensor:
        """N·dF/dα_i where the mean runs over N anchors; arguments as for `value`, result [2, B]."""
        raise NotImplementedError


class Unified(InnerObjective):
    """½·mean τ·[exp(T − α) + α], in units of the encoders' loss."""

    def value(self, log_normalizers: Tensor, log_targets: Tensor, temperature: Tensor) -> Tensor:
        # The sum over both modalities, halved, is the mean over the stack of the two.
        return temperature * (_ratio(log_normalizers, log_targets) + log_normalizers).mean()

    def derivative(self, log_normalizers: Tensor, log_targets: Tensor, temperature: Tensor) -> Tensor:
        return 0.5 * temperature * (1.0 - _ratio(log_normalizers, log_targets))


class Separate(InnerObjective):
    """mean (α − T)², in squared natural logarithms."""

    def value(self, log_normalizers: Tensor, log_targets: Tensor, temperature: Tensor) -> Tensor:
        return 2.0 * (log_normalizers - log_targets).square().mean()

    def derivative(self, log_normalizers: Tensor, log_targets: Tensor, temperature: Tensor) -> Tensor:
        return 2.0 * (log_normalizers - log_targets)


INNER_OBJECTIVES: dict[str, type[InnerObjective]] = {"unified": Unified, "separate": Separate}


def _ratio(log_normalizers: Tensor, log_targets: Tensor) -> Tensor:
    """exp(T − α), finite however far off a prediction is."""
    return (log_targets - log_normalizers).clamp_max(LOG_WEIGHT_CEILING).exp()
