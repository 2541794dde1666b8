"""What a network that amortises log-normalizers is trained on: how far its prediction is from a target.

For one anchor with the logits x_k of the batch, Z = Σ_k exp(x_k), a prediction P and a target T of log Z, the two unnormalised
distributions q_k = exp(x_k − P) and p_k = exp(x_k − T) have one ratio for all k, q_k/p_k = exp(−δ) with δ = P − T. Sums over k
therefore need no pairs: with the masses  |p| = Σ_k p_k = exp(log Z − T)  and  |q| = Σ_k q_k = exp(log Z − P) = |p|·exp(−δ),

    log_l2        δ²
    kl_div_asym   D(q‖p) = Σ_k [q_k·log(q_k/p_k) − q_k + p_k]      = |p| − |q| − δ·|q|
    kl_div_sym    D(q‖p) + D(p‖q)                                  = δ·(|p| − |q|)
    js_div        ½·[D(p‖m) + D(q‖m)],  m = (p + q)/2              = ½·[|p|·log(2|p|/(|p|+|q|)) + |q|·log(2|q|/(|p|+|q|))]

Each is 0 at P = T and positive elsewhere, because D is the divergence of unnormalised distributions: without its mass terms
the asymmetric form would be smallest at P = T + 1.

Every function takes δ, |p| and |q|, any shape, and returns the value and its derivative by P (δ' = 1, |q|' = −|q|).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip.pairwise import LOG_WEIGHT_CEILING

Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _kl_asymmetric(delta: Tensor, mass_p: Tensor, mass_q: Tensor) -> tuple[Tensor, Tensor]:
    return mass_p - mass_q - delta * mass_q, delta * mass_q


def _kl_symmetric(delta: Tensor, mass_p: Tensor, mass_q: Tensor) -> tuple[Tensor, Tensor]:
    return delta * (mass_p - mass_q), mass_p - mass_q + delta * mass_q


def _jensen_shannon(delta: Tensor, mass_p: Tensor, mass_q: Tensor) -> tuple[Tensor, Tensor]:
    # |q|/|p| = exp(−δ), so that 2|p|/(|p|+|q|) = 2/(1 + exp(−δ)) and 2|q|/(|p|+|q|) = 2/(1 + exp(δ)).
    log_p, log_q = (math.log(2.0) + F.logsigmoid(signed) for signed in (delta, -delta))
    return 0.5 * (mass_p * log_p + mass_q * log_q), -0.5 * mass_q * log_q


DIVERGENCES: dict[str, Divergence | None] = {
    "log_l2": None,
    "kl_div_asym": _kl_asymmetric,
    "kl_div_sym": _kl_symmetric,
    "js_div": _jensen_shannon,
}


def fit_loss(
    kind: str, predicted: Tensor, log_targets: Tensor, log_sums: Tensor, regularisation: float
) -> tuple[Tensor, Tensor]:
    """The loss of every prediction, and its derivative by the prediction.

    An anchor with a mass above exp(LOG_WEIGHT_CEILING) counts as much less as brings it down to that: a prediction hundreds
    below its target has a finite loss and is still drawn upwards.

    Args:
        kind: a key of DIVERGENCES.
        predicted, log_targets, log_sums: P, T and log Z, of one shape.
        regularisation: factor of the (P − T)² that is added to a divergence.
    """
    delta = predicted - log_targets
    square, slope_of_square = delta.square(), 2.0 * delta
    divergence = DIVERGENCES[kind]
    if divergence is None:
        return square, slope_of_square
    log_p, log_q = log_sums - log_targets, log_sums - predicted
    # Taken off both, so that their ratio stays what it is: the divergence is divided by some number, not another function.
    excess = (torch.maximum(log_p, log_q) - LOG_WEIGHT_CEILING).clamp(min=0.0)
    value, slope = divergence(delta, (log_p - excess).exp(), (log_q - excess).exp())
    return torch.add(value, square, alpha=regularisation), torch.add(slope, slope_of_square, alpha=regularisation)
