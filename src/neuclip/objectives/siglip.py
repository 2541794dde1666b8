"""The pairwise sigmoid loss (SigLIP, arXiv 2303.15343): by open_clip's own SigLipLoss, or in chunks of rows."""

from __future__ import annotations

from argparse import Namespace, _ArgumentGroup

import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from neuclip import distributed
from neuclip.objectives.base import Objective, Output, RunShape
from neuclip.objectives.global_flags import TITLE, add_global_arguments, check_mini_batch_args, learns_one_temperature
from neuclip.objectives.reporting import mini_batch_metrics
from neuclip.pairwise import gather_batch, with_gradients
from neuclip.sigmoid_pairs import sigmoid_pairs

VARIANTS = ("bidir", "shift", "reduce", "gather")


class SigLIP(Objective):
    """−1/N Σ_ij log sigmoid(±(logit_scale·s_ij + logit_bias)), + on matching pairs.

    With `chunk_rows` set, features are gathered once and the loss needs memory for that many rows of pairs; value and gradient
    stay the same.

    Args:
        loss_dist_impl: how text features travel between ranks; all variants give the same loss and gradient. Without effect
            when `chunk_rows` is set.
        rho: enters the reported global_loss only.
        learn_temperature: whether τ is learnt.
    """

    name = "siglip"
    summary = "pairwise sigmoid loss"
    synonyms = (frozenset({"siglip"}),)
    shared_arguments = ((TITLE, add_global_arguments),)
    initial_temperature = 0.1
    initial_logit_bias = -10.0

    def __init__(self, loss_dist_impl: str = "bidir", rho: float = 8.0, learn_temperature: bool = True) -> None:
        super().__init__(learn_temperature)
        self.rho = rho
        self.loss = SigLipLoss(rank=distributed.rank(), world_size=distributed.world_size(), dist_impl=loss_dist_impl)

    @classmethod
    def add_arguments(cls, group: _ArgumentGroup) -> None:
        group.add_argument(
            "--loss-dist-impl",
            choices=VARIANTS,
            default=None,
            help="how text features travel between ranks (bidir unless given; with --loss-chunk-size they are gathered)",
        )

    @classmethod
    def resolve_args(cls, args: Namespace) -> None:
        check_mini_batch_args(args)
        if args.loss_chunk_size is None:
            args.loss_dist_impl = args.loss_dist_impl or "bidir"
        elif args.loss_dist_impl is not None:
            raise ValueError(
                f"--loss-dist-impl {args.loss_dist_impl} has no meaning with --loss-chunk-size {args.loss_chunk_size}, which "
                "gathers all features once: drop one of the two"
            )

    @classmethod
    def from_args(cls, args: Namespace, shape: RunShape) -> SigLIP:
        variant = args.loss_dist_impl or "bidir"
        return cls(loss_dist_impl=variant, rho=args.rho, learn_temperature=learns_one_temperature(args))

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        if logit_bias is None:
            raise ValueError("objective siglip needs a logit_bias: give the model one (open_clip: init_logit_bias=-10)")
        inputs = (image_features, text_features, logit_scale, logit_bias)
        loss = self.loss(*inputs) if self.chunk_rows is None else self._chunked_loss(*inputs)
        if not self.report:
            return Output(loss)
        metrics = mini_batch_metrics(image_features, text_features, logit_scale, self.rho, self.chunk_rows)
        return Output(loss, {**metrics, "logit_bias": logit_bias.detach()})

    def _chunked_loss(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> Tensor:
        with torch.no_grad():
            batch = gather_batch(image_features, text_features, self.chunk_rows)
            pairs = sigmoid_pairs(batch, logit_scale, logit_bias)
        inputs = (image_features, text_features, logit_scale, logit_bias)
        return with_gradients(pairs.loss, inputs, (*pairs.features, pairs.logit_scale, pairs.logit_bias))
