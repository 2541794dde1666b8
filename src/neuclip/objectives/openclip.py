"""The mini-batch contrastive loss (CLIP, arXiv 2103.00020), by open_clip's own ClipLoss."""

from __future__ import annotations

import logging
from argparse import Namespace, _ArgumentGroup

import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from neuclip import distributed
from neuclip.objectives.base import Objective, Output, RunShape
from neuclip.objectives.global_flags import TITLE, add_global_arguments, check_mini_batch_args, learns_one_temperature
from neuclip.objectives.reporting import mini_batch_metrics


class OpenCLIP(Objective):
    """Mean of the image→text and text→image cross-entropies over the global batch.

    Args:
        local_loss: each rank forms only its own B×N logits.
        gather_with_grad: gradients flow through the gathered features.
        rho: enters the reported global_loss only.
        learn_temperature: whether τ is learnt.
    """

    name = "openclip"
    summary = "mini-batch contrastive loss"
    shared_arguments = ((TITLE, add_global_arguments),)

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, rho: float = 8.0, learn_temperature: bool = True
    ) -> None:
        super().__init__(learn_temperature)
        self.rho = rho
        world_size = distributed.world_size()
        if local_loss and not gather_with_grad and world_size > 1:
            logging.warning(
                "--local-loss without --gather-with-grad drops the gradient on features as negatives of other ranks: "
                "this is NOT the gradient of the contrastive loss; add --gather-with-grad"
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
            "--local-loss", action="store_true", help="compute B×N logits per rank instead of N×N (others always do)"
        )
        group.add_argument(
            "--gather-with-grad", action="store_true", help="let gradients flow through the gathered features"
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
        )

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        scaled = (_ScaleGradient.apply(x, self.feature_gradient_scale) for x in (image_features, text_features))
        loss = self.loss(*scaled, logit_scale, logit_bias)
        if not self.report:
            return Output(loss)
        return Output(loss, mini_batch_metrics(image_features, text_features, logit_scale, self.rho, self.chunk_rows))


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx, tensor: Tensor, factor: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad_output * ctx.factor, None
