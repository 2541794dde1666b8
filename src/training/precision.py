"""What --precision means for the towers, their inputs and the gradient scaler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

_AUTOCAST = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}
_INPUT = {"bf16": torch.bfloat16, "pure_bf16": torch.bfloat16, "fp16": torch.float16, "pure_fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Number formats of a run. Losses and normalizers are float32 whatever this says.

    Attributes:
        name: the value of --precision.
        device_type: "cuda" or "cpu".
    """

    name: str
    device_type: str

    @property
    def input_dtype(self) -> torch.dtype:
        """dtype of the images handed to the model."""
        return _INPUT.get(self.name, torch.float32)

    def autocast(self) -> AbstractContextManager:
        """The context for the towers' forward pass."""
        if self.name not in _AUTOCAST:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=_AUTOCAST[self.name])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, which does nothing unless the towers run in autocast float16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "amp")
