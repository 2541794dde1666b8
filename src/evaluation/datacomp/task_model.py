"""The model under evaluation: what encodes images and texts, and its class heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from evaluation.collectives import gather_rows
from evaluation.errors import UserError
from evaluation.features import DualEncoder, evaluating, normalized
from evaluation.suite import Setting
from evaluation.zero_shot import Template, build_class_head

T = TypeVar("T")

DIVERGED = "features are not finite: the model has diverged, evaluate an earlier checkpoint."


class TaskModel:
    """A model with its image transform and tokenizer, and how to run them.

    Class heads are kept: ImageNet, its sketches and ImageNet-V2 have one set of names and templates.

    Args:
        model: an open_clip model, not wrapped in DDP; its train or eval mode is the same afterwards.
        preprocess_val: PIL image of any mode → tensor [3, H, W].
        tokenizer: list of B strings → tokens [B, context_length].
        setting: device, batch size, precision and this process among the ranks.

    Attributes:
        samples: task key → number of images (of instances for WinoGAViL) that the measured set had, over all ranks.
    """

    def __init__(
        self,
        model: DualEncoder,
        preprocess_val: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        setting: Setting,
    ) -> None:
        self.model, self.preprocess_val, self.tokenizer, self.setting = model, preprocess_val, tokenizer, setting
        self.samples: dict[str, int] = {}
        self._heads: dict[tuple[tuple[str, ...], tuple[Template, ...]], Tensor] = {}

    def encode_images(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, d] float32 on the setting's device, L2-normalised."""
        with evaluating(self.model), self.setting.autocast_context():
            image = image.to(self.setting.device, self.setting.image_dtype, non_blocking=True)
            return normalized(self.model.encode_image(image))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), d] float32 on the setting's device, L2-normalised; [0, 0] without texts."""
        size = self.setting.batch_size
        blocks = [
            normalized(self._encode_tokens(self.tokenizer(list(texts[start : start + size])).to(self.setting.device)))
            for start in range(0, len(texts), size)
        ]
        return torch.cat(blocks) if blocks else torch.empty(0, 0, device=self.setting.device)

    def head(self, names: Sequence[str], templates: Sequence[Template]) -> Tensor:
        """The class head [len(names), d] float32 of names and templates, built once; all ranks call this together.

        Raises:
            UserError: for a template without {c}, or features that are not finite.
        """
        key = tuple(names), tuple(templates)
        if key not in self._heads:
            setting = self.setting
            own = names[setting.rank :: setting.world_size]
            rows = self.together(lambda: self._head_rows(own, templates))
            self._heads[key] = gather_share(rows, len(names), setting.world_size)
        return self._heads[key]

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank, so that a failure on one is a failure on all; see `Place.together`."""
        result: T = self.setting.together(work)
        return result

    def _head_rows(self, names: Sequence[str], templates: Sequence[Template]) -> Tensor:
        if not names:
            return torch.empty(0, 0, device=self.setting.device)
        setting = self.setting
        rows = build_class_head(
            self._encode_tokens, self.tokenizer, names, templates, setting.device, setting.batch_size
        )
        return finite(rows)

    def _encode_tokens(self, tokens: Tensor) -> Tensor:
        with evaluating(self.model), self.setting.autocast_context():
            return self.model.encode_text(tokens)


def finite(features: Tensor) -> Tensor:
    """The features themselves.

    Raises:
        UserError: if any is not finite.
    """
    if not bool(torch.isfinite(features).all()):
        # Every comparison with NaN is false, so a diverged model would get some number.
        raise UserError(DIVERGED)
    return features


def gather_share(rows: Tensor, total: int, world_size: int) -> Tensor:
    """Rows of all ranks in global order, where rank r holds those of the samples r, r + world_size, …

    Args:
        rows: [n, d] of this rank; n may be 0, and d then too.
        total: number of samples of all ranks, at least 1.
        world_size: number of ranks.

    Returns:
        [total, d], the same on every rank.
    """
    gathered = gather_rows(rows, world_size)
    order = torch.tensor([i for rank in range(world_size) for i in range(rank, total, world_size)])
    return gathered[order.argsort().to(gathered.device)]
