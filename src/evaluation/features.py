"""Features of a whole evaluation set, in the order of the set whatever the number of ranks and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.collectives import gather_rows
from evaluation.errors import UserError

Batch = dict[str, Any]
AutocastContext = Callable[[], AbstractContextManager[Any]]


class DualEncoder(Protocol):
    """What evaluation asks of a model: every open_clip model has it."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation mode."""

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] → embeddings [B, d]."""

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens [B, context_length] → embeddings [B, d]."""


class PairFeatures(NamedTuple):
    """Features of N pairs in global order: image_features and text_features [N, d] float32, L2-normalised."""

    image_features: Tensor
    text_features: Tensor


class LabelledFeatures(NamedTuple):
    """Features of n labelled images: image_features [n, d] float32, L2-normalised; labels [n] int64."""

    image_features: Tensor
    labels: Tensor


@contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode without gradients; the mode the model was in comes back afterwards."""
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def normalized(embeddings: Tensor) -> Tensor:
    """[B, d] of any float dtype → [B, d] float32, L2-normalised in float32."""
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.normalize(embeddings.float(), dim=-1)


def encode_batch(
    model: DualEncoder,
    batch: Batch,
    device: torch.device | str,
    autocast_context: AutocastContext,
    image_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Image and text features, [B, d] float32, L2-normalised, of a batch's `image` and `text`; within `evaluating`."""
    with autocast_context():
        image = model.encode_image(batch["image"].to(device, image_dtype, non_blocking=True))
        text = model.encode_text(batch["text"].to(device, non_blocking=True))
    return normalized(image), normalized(text)


class PairShare(NamedTuple):
    """One rank's share of encoded pairs: image and text features [n, d] (n may be 0), global indices [n] int64."""

    image_features: Tensor
    text_features: Tensor
    index: Tensor


def encode_share(
    model: DualEncoder,
    loader: Iterable[Batch],
    device: torch.device | str = "cpu",
    autocast_context: AutocastContext = nullcontext,
    *,
    image_dtype: torch.dtype = torch.float32,
) -> PairShare:
    """Encode this rank's images and captions. Nothing is gathered: a rank may fail here without the others waiting.

    Args:
        model: has `encode_image` and `encode_text`, as open_clip models do; not wrapped in DDP. Its train or eval mode is
            the same afterwards.
        loader: batches with `image`, `text` (tokens) and `index` (global index of each sample), of this rank's share.
        device: where the model is, and the features will be.
        autocast_context: called for every forward, e.g. `lambda: torch.autocast("cuda", torch.bfloat16)`.
        image_dtype: what the image tower takes: another one for a model whose weights are not float32.
    """
    images, texts, indices = [], [], [torch.empty(0, dtype=torch.int64)]
    with evaluating(model):
        for batch in loader:
            image, text = encode_batch(model, batch, device, autocast_context, image_dtype)
            images.append(image)
            texts.append(text)
            indices.append(batch["index"])
    return PairShare(_stacked(images, device), _stacked(texts, device), torch.cat(indices))


def gather_pairs(share: PairShare, world_size: int = 1) -> PairFeatures:
    """Gather the shares of all ranks; all must call this together.

    Returns:
        The features of all ranks' samples, ordered by global index; the same on every rank.

    Raises:
        UserError: if there is no sample on any rank.
        ValueError: if one global index occurs twice.
    """
    order = _global_order(share.index, world_size)
    gathered = [gather_rows(rows, world_size) for rows in (share.image_features, share.text_features)]
    return PairFeatures(*(rows[order.to(rows.device)] for rows in gathered))


def encode_images(
    model: DualEncoder,
    loader: Iterable[Batch],
    device: torch.device | str = "cpu",
    autocast_context: AutocastContext = nullcontext,
    *,
    image_dtype: torch.dtype = torch.float32,
) -> LabelledFeatures:
    """Encode this rank's labelled images. Nothing is gathered: `zero_shot_metrics` sums counts over the ranks instead.

    Args:
        model: has `encode_image`; not wrapped in DDP. Its train or eval mode is the same afterwards.
        loader: batches with `image` and `label`, of this rank's share; may be empty.
        device, autocast_context, image_dtype: as in `encode_share`.

    Returns:
        Features on `device` and labels on the CPU, in the order of the loader ([0, 0] and [0] for an empty share).
    """
    images, labels = [], [torch.empty(0, dtype=torch.int64)]
    with evaluating(model):
        for batch in loader:
            with autocast_context():
                image = model.encode_image(batch["image"].to(device, image_dtype, non_blocking=True))
            images.append(normalized(image))
            labels.append(batch["label"])
    return LabelledFeatures(_stacked(images, device), torch.cat(labels))


def _stacked(blocks: list[Tensor], device: torch.device | str) -> Tensor:
    return torch.cat(blocks) if blocks else torch.empty(0, 0, device=device)


def _global_order(local: Tensor, world_size: int) -> Tensor:
    """The permutation that brings the gathered rows into the order of their global indices, [N] int64 on the CPU."""
    index = gather_rows(local[:, None], world_size)[:, 0]
    order = index.argsort()
    if not len(index):
        raise UserError("there is no pair to encode; check the path of the pairs.")
    if bool((index[order].diff() == 0).any()):
        raise ValueError("a sample was loaded twice: give each rank's loader its own share (rank, world_size).")
    return order
