"""Batches too large for the towers: they see a micro-batch at a time, the objective all features of the batch at once.

The gradient of a contrastive loss on a batch is no mean over its parts, so it is not enough to add up the gradients of
micro-batches. The chain rule is cut at the features instead:

1. The towers encode every micro-batch without a graph; k·B features are kept.
2. The objective is called once, on all of them; its backward pass ends at the features, logit_scale and logit_bias.
3. The towers encode every micro-batch again, with the same dropout, and pass its share of those gradients on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neuclip.objectives import Output
from training.data import Batch

if TYPE_CHECKING:
    from training.loop import Training


def backward_in_micro_batches(training: Training, batch: Batch) -> Output:
    """Add to every parameter's .grad what one backward pass through the whole batch would, up to rounding.

    Batch normalisation is the exception: it normalises by the statistics of a micro-batch, and its running statistics are
    those of one pass over the micro-batches. Gradients are averaged over the ranks once. The random numbers that follow are
    those that follow one pass. On a GPU nothing here waits for the device.

    Args:
        batch: [k·B, …] in host memory, k being --accum-freq. B samples at a time are moved to the device.

    Returns:
        The objective's output on the whole batch; its loss has been differentiated.
    """
    state, device = training.state, training.world.device
    micro_batches = split_batch(batch, training.args.accum_freq)
    keys = training.keys_of(batch)
    inputs, random_states = _encode_without_graph(training, micro_batches)
    output = state.objective(*inputs, keys)
    start = training.guard.gradient_of_loss(output.loss, *inputs[:2])
    state.scaler.scale(output.loss).backward(start)
    # An objective may draw random numbers too; the next step goes on after those.
    afterwards = _random_state(device)
    gradients = _shares([None if leaf is None else leaf.grad for leaf in inputs], len(micro_batches))
    for index, micro_batch in enumerate(micro_batches):
        is_last = index + 1 == len(micro_batches)
        _set_random_state(random_states[index], device)
        # What is to be added up without the other ranks must be forward and backward inside.
        with nullcontext() if is_last else _without_synchronisation(training.model):
            _backward(training.encode(training.model, micro_batch), gradients[index])
    _set_random_state(afterwards, device)
    return output


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into consecutive micro-batches of equal size (up to one sample). Nothing is copied."""
    keys = [None] * parts if batch.keys is None else batch.keys.tensor_split(parts)
    pieces = zip(batch.image.tensor_split(parts), batch.text.tensor_split(parts), keys)
    return [Batch(*piece) for piece in pieces]


def _encode_without_graph(
    training: Training, micro_batches: list[Batch]
) -> tuple[list[Tensor | None], list[list[Tensor]]]:
    """What the objective takes, as leaves of a graph of its own, and the random state that each micro-batch began with."""
    # Not through DistributedDataParallel: after a pass without a graph it does not hand out rank 0's running statistics.
    towers = training.state.towers
    encoded, random_states = [], []
    with torch.no_grad(), running_statistics_kept(towers):
        for micro_batch in micro_batches:
            random_states.append(_random_state(training.world.device))
            encoded.append(training.encode(towers, micro_batch))
    image_features, text_features = (torch.cat(part) for part in list(zip(*encoded))[:2])
    _, _, logit_scale, logit_bias = encoded[-1]
    inputs = [image_features, text_features, logit_scale, logit_bias]
    # Detached even without a graph behind them: the bias may be the parameter itself, whose .grad is for the second pass.
    return [None if x is None else x.detach().requires_grad_() for x in inputs], random_states


def _shares(gradients: Sequence[Tensor | None], parts: int) -> list[list[Tensor | None]]:
    """Each micro-batch's gradients in its features, and with the last one those in logit_scale and logit_bias.

    Args:
        gradients: in image features and text features [k·B, d], logit_scale and logit_bias 0-dim; None where there is none.
    """
    images, texts = ([None] * parts if g is None else g.tensor_split(parts) for g in gradients[:2])
    scalars = [[None, None]] * (parts - 1) + [list(gradients[2:])]
    return [[image, text, *scalar] for image, text, scalar in zip(images, texts, scalars)]


def _backward(outputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """From the outputs to the parameters; what is frozen, absent or without influence on the loss is passed over."""
    pairs = [(x, g) for x, g in zip(outputs, gradients) if x is not None and g is not None and x.requires_grad]
    if pairs:
        tensors, grad_tensors = zip(*pairs)
        torch.autograd.backward(tensors, grad_tensors)


def _without_synchronisation(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch normalisation goes on as in training, by the statistics of the batch, but remembers nothing of it."""
    tracking = [part for part in module.modules() if part.training and getattr(part, "track_running_stats", False)]
    for part in tracking:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """What is drawn inside does not change what is drawn afterwards."""
    before = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _random_state(device: torch.device) -> list[Tensor]:
    """What decides the next random numbers on the host and on the device; both are kept in host memory."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
