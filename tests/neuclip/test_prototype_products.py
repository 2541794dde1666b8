"""--npn_precision bf16: matrix products of rounded numbers, summed in float32; everything around them as before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip import RunShape, make_objective
from neuclip.normalizers.prototypes import _product
from neuclip.objectives.neuclip import NeuCLIP
from neuclip.pairwise import GlobalBatch, gather_batch

N, DIM, M = 64, 48, 40
# A number rounded to bfloat16 is off by at most 2⁻⁹ of itself (half a unit of the 8th bit).
ROUNDING = 2.0**-9


def make(precision: str) -> NeuCLIP:
    flags = f"--objective neuclip --npn_num_protos {M} --npn_precision {precision}"
    objective = make_objective(flags, RunShape(DIM, N, 1, 5, 2))
    assert isinstance(objective, NeuCLIP)
    return objective


def batch(seed: int) -> GlobalBatch:
    generator = torch.Generator().manual_seed(seed)
    shared, *noise = torch.randn(3, N, DIM, generator=generator)
    return gather_batch(*(F.normalize(shared + part, dim=1) for part in noise))


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 300, generator=generator), torch.randn(2, 300, 5, generator=generator)
    rounded = _product(a.bfloat16(), b.bfloat16(), a)
    exact = a.bfloat16().double() @ b.bfloat16().double()
    assert rounded.dtype == torch.float32
    # Sums in bfloat16 would be off by a hundredth and more.
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-4)
    assert (rounded - a @ b).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_predictions_are_off_by_rounded_cosines_only(temperature: float) -> None:
    predictions: list[Tensor] = []
    for precision in ("fp32", "bf16"):
        normalizer = make(precision).normalizer
        normalizer.restart(batch(0))
        predictions.append(normalizer.predict(batch(1), torch.tensor(1 / temperature)))
    gap = (predictions[0] - predictions[1]).abs()
    # Both factors of each product are rounded; Σ|a_k·b_k| ≤ 1 for unit vectors. α is no more off than its worst logit.
    assert 0 < gap.max() <= 2.1 * ROUNDING / temperature
    assert gap.square().mean().sqrt() < 0.25 * ROUNDING / temperature


def test_learning_is_off_by_little() -> None:
    """Prototypes learn what they would: after ten updates α is much nearer to α of fp32 than to where it began."""
    scale = torch.tensor(20.0)
    found = {}
    for precision in ("fp32", "bf16"):
        normalizer = make(precision).normalizer
        normalizer.restart(batch(0))
        before = normalizer.predict(batch(1), scale)
        normalizer.fit(batch(1), before + 1.0, scale, 10)
        found[precision] = normalizer.predict(batch(1), scale)
        assert normalizer.prototypes.dtype == torch.float32
    learnt = (found["fp32"] - before).abs().mean()
    assert learnt > 0.05
    assert (found["fp32"] - found["bf16"]).abs().mean() < 0.1 * learnt


def test_a_float64_network_keeps_its_state_in_float64() -> None:
    objective = make("bf16").double()
    data = torch.randn(2, N, DIM, generator=torch.Generator().manual_seed(3)).double()
    images, texts = F.normalize(data, dim=2)
    objective(images, texts, torch.tensor(10.0).double())
    state = objective.state_dict()
    assert state["normalizer.prototypes"].dtype == state["normalizer.optimizer.accumulator"].dtype == torch.float64


def test_an_mlp_has_no_such_products() -> None:
    with pytest.raises(ValueError, match="--npn_precision bf16 has no meaning for --npn_arch mlp"):
        make_objective("--objective neuclip --npn_arch mlp --npn_precision bf16", RunShape(DIM, N, 1, 5, 2))
