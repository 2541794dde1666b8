"""The number format of the towers in an evaluation."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch

from evaluation.features import AutocastContext

NAMES = ("auto", "fp32", "bf16")


class Precision(NamedTuple):
    """`fp32` or `bf16`, and the context for every forward. Scores are float32 either way."""

    name: str
    autocast_context: AutocastContext


def chosen_precision(name: str, device: torch.device) -> Precision:
    """The format of a name of NAMES; `auto` is bf16 on a GPU that computes in it, else fp32."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if fast else "fp32"
    if name == "bf16":
        return Precision(name, partial(torch.autocast, device.type, torch.bfloat16))
    return Precision(name, nullcontext)
