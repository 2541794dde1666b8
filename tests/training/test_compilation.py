"""--torchcompile: the towers are one graph each way, and what they learn is what they learn without it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from open_clip import factory
from torch._dynamo.utils import counters

from end_to_end.corpus import MODEL_CONFIG
from neuclip.objectives import OBJECTIVES
from ranks import run_on_ranks
from small_training import ALONE, CPU, FixedLoader, Recorder, make_args
from training.assembly import assemble, objective_of_run
from training.checkpoint import read_checkpoint
from training.data import Batch
from training.distributed import World
from training.loop import Training, train_one_epoch
from training.model import build_model, register_model_configs

RANKS = 2
SIZE = 8
STEPS = 3


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """open_clip remembers models and dynamo remembers graphs for the whole process."""
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A tiny model of which half of the patches are dropped at random, so that both passes of --accum-freq can go apart."""
    vision = {**MODEL_CONFIG["vision_cfg"], "patch_dropout": 0.5}
    (tmp_path / "tiny.json").write_text(json.dumps({**MODEL_CONFIG, "vision_cfg": vision}))
    return str(tmp_path / "tiny.json")


def _args(config: str, *flags: str) -> Namespace:
    common = ("--model", "tiny", "--model-config", config, "--objective", "openclip")
    return make_args(*common, "--epochs", "2", "--lr", "1e-2", "--log-every-n-steps", "1", *flags)


def _training(args: Namespace, world: World = ALONE) -> Training:
    register_model_configs(args.model_config)
    generator = torch.Generator().manual_seed(2)
    batches = [
        Batch(
            torch.randn(SIZE * world.size, 3, 32, 32, generator=generator),
            torch.randint(1, 1000, (SIZE * world.size, 12), generator=generator),
            None,
        )
        for _ in range(STEPS)
    ]
    args.batch_size = SIZE // args.accum_freq
    bundle = build_model(args, OBJECTIVES[args.objective], CPU)
    loader = FixedLoader([], world)
    loader.batches, loader.steps_per_epoch = batches, STEPS
    loader.epoch = lambda epoch: iter(  # type: ignore[method-assign]
        [Batch(*(x if x is None else x.tensor_split(world.size)[world.rank] for x in batch)) for batch in batches]
    )
    objective = objective_of_run(args, world, bundle, loader)  # type: ignore[arg-type]
    return assemble(args, world, bundle, loader, Recorder(), objective)  # type: ignore[arg-type]


def _losses(training: Training) -> list[float]:
    return [values["loss"] for _, values in training.reporter.lines]  # type: ignore[attr-defined]


def _one_epoch(args: Namespace, world: World = ALONE) -> list[float]:
    training = _training(args, world)
    train_one_epoch(training, 0)
    return _losses(training)


def _graphs() -> tuple[int, int]:
    """Graphs that were compiled, and places where a graph broke."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_micro_batches_draw_what_the_whole_batch_would(config: str) -> None:
    """Two passes, two graphs, the same patches dropped: those that the uncompiled towers drop."""
    flags = ("--accum-freq", "2", "--grad-checkpointing")
    expected = _one_epoch(_args(config, *flags))
    found = _one_epoch(_args(config, *flags, "--torchcompile"))
    assert _graphs() == (2, 0)
    assert found == pytest.approx(expected, rel=2e-4)
    assert len(set(expected)) == STEPS


def test_a_run_goes_on_bit_for_bit_and_evaluation_compiles_nothing(config: str, tmp_path: Path) -> None:
    args = _args(config, "--torchcompile")
    whole = _training(args)
    train_one_epoch(whole, 0)
    whole.state.epoch = 1
    torch.save(whole.state.to_checkpoint("run", "tiny"), tmp_path / "epoch_1.pt")
    for size in (2, 3, 5):
        # As the evaluator does it: through the model inside, in batches whose last one is smaller.
        with torch.no_grad():
            whole.state.towers.model.eval().encode_image(torch.randn(size, 3, 32, 32))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_one_epoch(whole, 1)
    assert _graphs() == (1, 0)
    operators = {event.key for event in profile.key_averages()}
    assert {"aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_log_softmax"} <= operators
    assert "aten::_softmax" not in operators, "attention within the graph is no longer the fused kernel"

    saved = read_checkpoint(tmp_path / "epoch_1.pt")
    assert saved["state_dict"].keys() == _training(_args(config)).state.towers.model.state_dict().keys()
    resumed = _training(args)
    resumed.state.load(saved, tmp_path / "epoch_1.pt", "tiny")
    train_one_epoch(resumed, 1)
    assert _losses(resumed) == _losses(whole)[STEPS:]
    # A run without the flag goes on from the same file.
    eager = _training(_args(config))
    eager.state.load(saved, tmp_path / "epoch_1.pt", "tiny")
    assert eager.state.step == STEPS


def _compiled_and_not(config: str) -> list[list[float]]:
    """Losses of this rank without and with --torchcompile."""
    world = World(torch.distributed.get_rank(), RANKS, CPU)
    flags = ("--ddp-static-graph", "--grad-compression", "bf16", "--force-patch-dropout", "0")
    return [_one_epoch(_args(config, *flags, *compiled), world) for compiled in ((), ("--torchcompile",))]


def test_two_ranks(config: str) -> None:
    for plain, compiled in run_on_ranks(_compiled_and_not, RANKS, config):
        assert compiled == pytest.approx(plain, rel=1e-3)
        assert len(set(plain)) == STEPS
