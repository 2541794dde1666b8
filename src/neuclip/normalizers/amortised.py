"""Log-normalizers amortised by a network of the anchor alone (AmorLIP): the network, its moving average, its former self.

Unlike the α of the other methods, which are relative to the matching pair, these stand for  log Σ_k exp(x_ik)  with
x_ik = s_ik/τ (+ bias): a sum, with nothing taken off the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuclip import distributed
from neuclip.normalizers.adam import Adam
from neuclip.normalizers.divergences import fit_loss
from neuclip.normalizers.mlp import ResidualMLPs


class AmortisedNormalizer(nn.Module):
    """Predicts log-normalizers of a batch's anchors; data parallel: every rank holds all weights and its own anchors.

    Args:
        dim, hidden: d and h of the networks.
        lr: of Adam.
        loss: a key of DIVERGENCES.
        regularisation: factor of the squared difference that is added to a divergence.
        average_decay: share of the moving average that stays when it takes in the network.
        seed: of the initial weights; those of epoch e come from it and e.

    Attributes:
        current: the network that is trained.
        average: moving average of its weights.
        previous: the average as it was when the epoch started.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        lr: float,
        loss: str = "log_l2",
        regularisation: float = 0.1,
        average_decay: float = 0.92,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.regularisation = regularisation
        self.average_decay = average_decay
        self.seed = seed
        self.current, self.average, self.previous = (ResidualMLPs(dim, hidden, self._seed_of(0)) for _ in range(3))
        self.optimizer = Adam(tuple(self.current.weights.shape), lr)

    @torch.no_grad()
    def start_epoch(self, epoch: int, restart: bool) -> None:
        """Keep the average as `previous`; at a restart begin anew with fresh weights, also of the average, and Adam."""
        self.previous.weights.copy_(self.average.weights)
        if restart:
            self.current.reinitialise(self._seed_of(epoch))
            self.average.weights.copy_(self.current.weights)
            self.optimizer.reset()

    @torch.no_grad()
    def fit(self, anchors: Tensor, log_targets: Tensor, log_sums: Tensor, updates: int) -> None:
        """`updates` steps of Adam on the mean over the global batch's anchors, image side plus text side.

        Args:
            anchors: [2, B, d], this rank's image and text features; B is the same on all ranks.
            log_targets, log_sums: [2, B], T and log Z of this rank's anchors.
        """
        anchors, log_targets, log_sums = self._own_dtype(anchors, log_targets, log_sums)
        anchor_count = anchors.shape[1] * distributed.world_size()
        for _ in range(updates):
            weights = self.current.weights.detach().requires_grad_()
            with torch.enable_grad():
                predicted = self.current(anchors, weights)
            _, slope = fit_loss(self.loss, predicted.detach(), log_targets, log_sums, self.regularisation)
            (gradient,) = torch.autograd.grad(predicted, weights, slope / anchor_count)
            self.optimizer.update_(self.current.weights, distributed.all_reduce_sum_(gradient))

    @torch.no_grad()
    def loss_of_fit(self, anchors: Tensor, log_targets: Tensor, log_sums: Tensor) -> Tensor:
        """This rank's share of what `fit` minimises, 0-dim; its mean over the ranks is the whole. Same arguments."""
        anchors, log_targets, log_sums = self._own_dtype(anchors, log_targets, log_sums)
        values, _ = fit_loss(self.loss, self.current(anchors), log_targets, log_sums, self.regularisation)
        return values.mean(dim=1).sum()

    @torch.no_grad()
    def update_average(self) -> None:
        """Let the moving average take in the network."""
        self.average.weights.lerp_(self.current.weights, 1.0 - self.average_decay)

    @torch.no_grad()
    def predict_average(self, anchors: Tensor) -> Tensor:
        """[2, B] from the moving average, in the dtype of the anchors [2, B, d]."""
        return self.average(*self._own_dtype(anchors)).to(anchors.dtype)

    @torch.no_grad()
    def predict_previous(self, anchors: Tensor) -> Tensor:
        """[2, B] from the average as it was when the epoch started, in the dtype of the anchors [2, B, d]."""
        return self.previous(*self._own_dtype(anchors)).to(anchors.dtype)

    def _own_dtype(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.current.weights.dtype) for tensor in tensors)

    def _seed_of(self, epoch: int) -> int:
        """Different in every epoch and for every seed of a run."""
        return (self.seed << 20) + epoch
