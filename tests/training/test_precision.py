"""What --precision means."""

from __future__ import annotations

import pytest
import torch

from training.params import PRECISIONS
from training.precision import Precision

AUTOCAST = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}
INPUT = {
    "bf16": torch.bfloat16,
    "pure_bf16": torch.bfloat16,
    "fp16": torch.float16,
    "pure_fp16": torch.float16,
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_formats(name: str) -> None:
    precision = Precision(name, "cpu")
    assert precision.input_dtype == INPUT.get(name, torch.float32)
    product = torch.ones(2, 2)
    with precision.autocast():
        product = product @ product
    assert product.dtype == AUTOCAST.get(name, torch.float32)
    assert precision.grad_scaler().is_enabled() == (name == "amp")


def test_autocast_ends_with_its_block() -> None:
    with Precision("amp_bf16", "cpu").autocast():
        pass
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
