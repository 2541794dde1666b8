"""What the prototypes of a NeuCLIP run's normalizer-prediction network stand for, and how many of them are used.

The network (arXiv 2511.08417) predicts the normalizer of image anchor i as a mean over prototypes W1, which stand for the
texts of the data set, and that of text anchor i over W2, which stand for its images:

    α1_i = log( ε + 1/m Σ_j exp((cos(e1_i, W1_j) − s_ii)/τ) )

The share of prototype j in the sum of anchor i is p_ij = softmax_j(cos(e1_i, W1_j)/τ); s_ii cancels. Its share in all is
u_j = 1/n Σ_i p_ij over n anchors. The u_j sum to 1, and m equally used prototypes have 1/m each.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.collectives import exact_float32
from evaluation.errors import UserError, reason_of

# Elements of a block of anchors × prototypes in float64.
_BLOCK_ELEMENTS = 1 << 22


class PrototypeUsage(NamedTuple):
    """How one matrix of prototypes is used by n anchors.

    Attributes:
        shares: [m] float64, u_j, on the CPU.
        effective: exp of the entropy of the shares: as many equally used prototypes would have this entropy; 1 … m.
        effective_per_anchor: the same for one anchor's p_i, averaged over the anchors.
    """

    shares: Tensor
    effective: float
    effective_per_anchor: float


def read_prototypes(path: Path) -> Tensor | str:
    """The prototypes in a checkpoint, or one line that says why there are none.

    Args:
        path: a checkpoint of training: `objective` → `state_dict` with a tensor [2, rows, d] called `prototypes`, of which
            as many rows are in use as `active` of the same module says.

    Returns:
        [2, m, d] float32 of unit length, on the CPU: side 0 is W1, side 1 W2. Or the reason for their absence.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {reason_of(error)}); ask for another epoch."
        ) from error
    objective = content.get("objective") if isinstance(content, dict) else None
    if not isinstance(objective, dict) or not isinstance(objective.get("state_dict"), dict):
        return "The checkpoint holds no state of an objective, so there are no prototypes to look at."
    state = objective["state_dict"]
    for name, value in state.items():
        if name.split(".")[-1] == "prototypes" and isinstance(value, Tensor) and value.dim() == 3 and len(value) == 2:
            extra = state.get(f"{name.removesuffix('prototypes')}_extra_state")
            active = extra.get("active", value.shape[1]) if isinstance(extra, dict) else value.shape[1]
            if not active:
                return "No prototype was in use yet when the checkpoint was written."
            return F.normalize(value[:, :active].float(), dim=2)
    return f"Objective {objective.get('name', 'of this run')} keeps no prototypes; NeuCLIP with --npn_arch prototypes does."


def prototype_usage(anchors: Tensor, prototypes: Tensor, temperature: float) -> PrototypeUsage:
    """The shares u_j of the prototypes of one side, as the module's docstring defines them.

    Args:
        anchors: [n, d] float32, L2-normalised: images for W1, texts for W2.
        prototypes: [m, d] float32, L2-normalised.
        temperature: τ.

    Raises:
        ValueError: without anchors or prototypes.
    """
    if not len(anchors) or not len(prototypes):
        raise ValueError(f"{len(anchors)} anchors and {len(prototypes)} prototypes: at least one of each, please.")
    rows = max(1, _BLOCK_ELEMENTS // len(prototypes))
    shares = torch.zeros(len(prototypes), dtype=torch.float64, device=anchors.device)
    per_anchor = 0.0
    with torch.no_grad(), exact_float32(anchors.device):
        unit = prototypes.to(anchors.device)
        for block in anchors.split(rows):
            part = ((block @ unit.T).double() / temperature).softmax(dim=1)
            shares += part.sum(dim=0)
            per_anchor += effective_number(part).sum().item()
    shares = (shares / len(anchors)).cpu()
    return PrototypeUsage(shares, effective_number(shares).item(), per_anchor / len(anchors))


def effective_number(shares: Tensor) -> Tensor:
    """exp of the entropy of shares [..., m] that sum to 1: m where they are equal, 1 where one has all."""
    return torch.special.entr(shares).sum(dim=-1).exp()


def usage_histogram(shares: Tensor, doublings: int = 5) -> list[int]:
    """How many prototypes have how much more or less than an equal share.

    Args:
        shares: [m], u_j.
        doublings: D.

    Returns:
        2D counts: of log2(m·u_j) below −D+1, then in steps of 1 up to D−1, then from D−1 on. They sum to m.
    """
    logs = (shares * len(shares)).log2()
    edges = torch.arange(-doublings + 1, doublings, dtype=shares.dtype)
    return torch.bincount(torch.bucketize(logs, edges, right=True), minlength=2 * doublings).tolist()
