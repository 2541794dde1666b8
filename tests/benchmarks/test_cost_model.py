"""The cost model counts what the running objective does: FLOPs of its matrix products, kernels and every message."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "benchmarks", ROOT / "tests", ROOT / "tests" / "distributed"):
    sys.path.insert(0, str(folder))

import cost_model  # noqa: E402
from programs import recorded_messages  # noqa: E402

from neuclip import RunShape, make_objective  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

SIZES = [(12, 8, 16, 3), (4, 24, 40, 2)]  # B, m, d, T_u; a restart fills all m from one batch on two ranks


class Kernels(TorchDispatchMode):
    """Counts operators that do something: no views, no bare allocations, no collectives (c10d)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        nothing = func.is_view or name.startswith(("empty", "new_empty", "detach", "alias"))
        self.count += not (nothing or func.namespace == "c10d")
        return func(*args, **(kwargs or {}))


def count(
    batch: int, prototypes: int, dim: int, updates: int, precision: str
) -> tuple[int, int, dict[str, dict[int, int]]]:
    """FLOPs, kernels and messages, by kind and bytes, of this rank's part of one step without a restart."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    flags = f"--objective neuclip --npn_num_protos {prototypes} --npn_repetition {updates} "
    flags += f"--npn_precision {precision}"
    objective = make_objective(flags, RunShape(dim, batch, ranks, 10, 2))
    objective.report = False
    generator = torch.Generator().manual_seed(0)
    steps = max(1, -(-prototypes // (batch * ranks)))
    for _ in range(steps + 1):
        images, texts = F.normalize(torch.randn(2, batch, dim, generator=generator), dim=2).requires_grad_()
        with Kernels() as kernels, FlopCounterMode(display=False) as flops, recorded_messages() as found:
            objective(images, texts, torch.tensor(14.0))
    kinds: dict[str, Counter[int]] = {"all_gather": Counter(), "all_reduce": Counter()}
    for name, _, num_bytes in found:
        kinds[name.removesuffix("_into_tensor")][num_bytes] += 1
    return flops.get_total_flops(), kernels.count, {kind: dict(+counts) for kind, counts in kinds.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("batch", "prototypes", "dim", "updates"), SIZES)
def test_flops_kernels_and_messages_are_those_of_a_step(
    ranks: int, precision: str, batch: int, prototypes: int, dim: int, updates: int
) -> None:
    sizes = (batch, prototypes, dim, updates, precision)
    results = [count(*sizes)] if ranks == 1 else run_on_ranks(count, ranks, *sizes)
    run = cost_model.Run(ranks, batch, prototypes, dim, updates, precision)
    parts = (cost_model.pairs(run), cost_model.normalizer(run))
    expected: dict[str, Counter[int]] = {"all_gather": Counter(), "all_reduce": Counter()}
    for part in parts:
        for message in part.messages:
            expected[message.kind][message.num_bytes] += message.times
    for flops, kernels, messages in results:
        assert kernels == sum(part.kernels for part in parts)
        assert flops == sum(part.flops for part in parts)
        assert messages == ({"all_gather": {}, "all_reduce": {}} if ranks == 1 else expected)


def test_more_ranks_share_the_work_of_the_prototypes() -> None:
    one, eight = (cost_model.normalizer(cost_model.Run(ranks=k, batch=4096 // k)) for k in (1, 8))
    assert one.flops == 8 * eight.flops
    assert one.flops == (8 * 10 + 4) * 4096 * 4096 * 512
    before = cost_model.data_parallel_normalizer(cost_model.Run())
    assert before.messages[0].num_bytes == 2 * 4096 * 512 * 4


def test_the_table_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_model.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Worked out, not measured.")
    assert len(printed.splitlines()) == 4 + 12


@pytest.mark.parametrize("model", cost_model.MODELS)
def test_the_towers_flops_and_parameters_are_those_of_the_models(model: str) -> None:
    import open_clip

    towers = open_clip.create_model(model)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        towers.encode_image(torch.zeros(1, 3, 224, 224))
        towers.encode_text(torch.zeros(1, 77, dtype=torch.long))
    expected_flops, parameters = cost_model.MODELS[model]
    assert flops.get_total_flops() == pytest.approx(expected_flops, rel=1e-3)
    assert sum(parameter.numel() for parameter in towers.parameters()) == parameters
