"""The mini-batch contrastive loss (CLIP, arXiv 2103.00020): by open_clip's own ClipLoss, or in chunks of rows."""

from __future__ import annotations

import logging
import math
from argparse import Namespace, _ArgumentGroup

import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from neuclip import distributed
from neuclip.normalizers import add_log_eps
from neuclip.objectives.base import Objective, Output, RunShape
from neuclip.objectives.global_flags import TITLE, add_global_arguments, check_mini_batch_args, learns_one_temperature
from neuclip.objectives.reporting import mini_batch_metrics
from neuclip.pairwise import batch_log_means, gather_batch, pairwise_gradient, with_gradients


class OpenCLIP(Objective):
    """Mean of the image→text and text→image cross-entropies over the global batch.

    With `chunk_rows` set, the loss needs memory for that many rows of pairs and is the one of the global batch on any
    number of ranks: `local_loss` and `gather_with_grad` have no effect then.

    Args:
        local_loss: each rank forms only its own B×N logits.
        gather_with_grad: gradients flow through the gathered features.
        rho: enters the reported global_loss only.
        learn_temperature: whether τ is learnt.
        chunk_rows: see Objective.
    """

    name = "openclip"
    summary = "mini-batch contrastive loss"
    shared_arguments = ((TITLE, add_global_arguments),)

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rho: float = 8.0,
        learn_temperature: bool = True,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__(learn_temperature)
        self.rho = rho
        self.chunk_rows = chunk_rows
        world_size = distributed.world_size()
        if local_loss and not gather_with_grad and world_size > 1 and chunk_rows is None:
            logging.warning(
                "--local-loss without --gather-with-grad drops the gradient on features as negatives of other ranks: "
                "this is NOT the gradient of the contrastive loss; add --gather-with-grad, or --loss-chunk-size"
            )
        self.loss = ClipLoss(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            rank=distributed.rank(),
            world_size=world_size,
        )
        # In this mode every rank differentiates the whole loss, but only by its own features; averaging over K ranks then
        # leaves a K-th of the gradient of the towers (not of logit_scale).
        self.feature_gradient_scale = 1 if local_loss or gather_with_grad else world_size

    @classmethod
    def add_arguments(cls, group: _ArgumentGroup) -> None:
        group.add_argument(
            "--local-loss",
            action="store_true",
            help="compute B×N logits per rank instead of N×N (others always do, and openclip with --loss-chunk-size)",
        )
        group.add_argument(
            "--gather-with-grad",
            action="store_true",
            help="let gradients flow through the gathered features (no effect with --loss-chunk-size: always exact)",
        )

    @classmethod
    def resolve_args(cls, args: Namespace) -> None:
        check_mini_batch_args(args)

    @classmethod
    def from_args(cls, args: Namespace, shape: RunShape) -> OpenCLIP:
        return cls(
            local_loss=args.local_loss,
            gather_with_grad=args.gather_with_grad,
            rho=args.rho,
            learn_temperature=learns_one_temperature(args),
            chunk_rows=args.loss_chunk_size,
        )

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        if self.chunk_rows is None:
            scaled = (_ScaleGradient.apply(x, self.feature_gradient_scale) for x in (image_features, text_features))
            loss = self.loss(*scaled, logit_scale, logit_bias)
        else:
            loss = self._chunked_loss(image_features, text_features, logit_scale, logit_bias)
        if not self.report:
            return Output(loss)
        return Output(loss, mini_batch_metrics(image_features, text_features, logit_scale, self.rho, self.chunk_rows))

    def _chunked_loss(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        """The same loss from the normalizers Z_i = 1 + (N−1)·g_i: the mean of log Z, with exp(h_ij)/Z_i on pair ij."""
        with torch.no_grad():
            batch = gather_batch(image_features, text_features, self.chunk_rows)
            log_negatives = math.log(batch.size - 1)
            log_partitions = add_log_eps(batch_log_means(batch, logit_scale) + log_negatives, log_eps=0.0)
            # pairwise_gradient divides by N−1, and leaves out the factor dh/ds = logit_scale.
            normalizers = distributed.all_gather(log_partitions - log_negatives, dim=1)
            pairwise = pairwise_gradient(batch, normalizers, logit_scale)
            by_features = pairwise.features * logit_scale
            by_scale = pairwise.weighted_logits.mean() / logit_scale
        inputs: tuple[Tensor, ...] = (image_features, text_features, logit_scale)
        gradients: tuple[Tensor, ...] = (*by_features, by_scale)
        if logit_bias is not None:
            # Added to every logit alike, it changes nothing; but a parameter without a gradient would stop DDP.
            inputs, gradients = (*inputs, logit_bias), (*gradients, torch.zeros_like(logit_bias))
        return with_gradients(log_partitions.mean(), inputs, gradients)


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx, tensor: Tensor, factor: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad_output * ctx.factor, None
