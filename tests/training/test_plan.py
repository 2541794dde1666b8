"""The plan that a run prints before its first step."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from neuclip import OBJECTIVES
from small_training import ALONE, make_args, make_batches, make_training
from training import plan
from training.distributed import World


def _plan(*flags: str, world: World = ALONE) -> dict[str, str]:
    args = make_args("--name", "run", "--logs", "here", *flags)
    training = make_training(args, make_batches(5, 4))
    state = training.state
    lines = plan.plan_lines(args, world, state.towers, state.objective, training.loader)
    assert all("\n" not in line for line in lines)
    width = len("samples seen")
    assert all(line[width : width + 2] == "  " for line in lines), "the lines are aligned"
    return {line[:width].rstrip(): line[width + 2 :] for line in lines}


def test_rows() -> None:
    rows = _plan("--objective", "siglip", "--epochs", "3", "--model", "ViT-B-32", "--lr", "1e-3", "--warmup", "7")
    assert rows["run"] == "run in here"
    assert rows["objective"] == "siglip: pairwise sigmoid loss"
    assert rows["ranks"].startswith("1 on cpu")
    assert rows["batch"] == "4 per rank, 4 in all"
    assert rows["data"] == "made up"
    assert rows["epoch"] == "5 steps, 20 samples"
    assert rows["samples seen"] == "60 in 3 epochs, 15 steps"
    assert rows["precision"] == "fp32"
    assert "lr 0.001 (cosine, 7 steps of warmup)" in rows["optimizer"]
    assert rows["optimizer"].endswith("betas 0.9 0.98, eps 1e-06")
    # 12·6 + 6 of the linear layer, 6 + 6 of the norm, 20·6 of the embedding, logit_scale, logit_bias
    assert rows["model"] == "ViT-B-32, 212 parameters, 212 trainable"
    for package in ("torch", "open_clip_torch", "webdataset"):
        assert f"{package} {version(package)}" in rows["versions"]
    assert rows["git"]


def test_what_depends_on_the_optimizer() -> None:
    assert _plan("--model", "RN50")["optimizer"].endswith("betas 0.9 0.999, eps 1e-08")
    clipped = _plan("--optimizer", "sgd", "--momentum", "0.8", "--grad-clip-norm", "1.0")["optimizer"]
    assert clipped.endswith("momentum 0.8, gradients clipped at 1")
    assert _plan("--optimizer", "lion", "--beta2", "0.99")["optimizer"].endswith("betas 0.9 0.99")


def test_batch_over_several_ranks() -> None:
    rows = _plan("--batch-size", "4", world=World(0, 3, ALONE.device))
    assert rows["ranks"].startswith("3 on cpu")
    assert rows["batch"] == "4 per rank, 12 in all"


def test_batch_in_micro_batches() -> None:
    rows = _plan("--accum-freq", "2", world=World(0, 3, ALONE.device))
    assert rows["batch"] == "2 per rank × 2 micro-batches, 12 in all"


def test_early_stop_is_told() -> None:
    assert _plan("--epochs", "3", "--stop_epochs", "2")["samples seen"].endswith("stops after epoch 2")


def test_temperature_tells_who_learns_it() -> None:
    flags = ("--objective", "neuclip", "--npn_num_protos", "4")
    assert "outer optimizer" in _plan(*flags)["temperature"]
    assert "nobody" in _plan(*flags, "--temperature_scheme", "global_constant")["temperature"]


def test_frozen_parameters_are_not_counted_as_trainable() -> None:
    rows = _plan("--objective", "neuclip", "--npn_num_protos", "4", "--temperature_scheme", "global_constant")
    assert rows["model"].endswith("211 parameters, 210 trainable")


def test_git_revision_outside_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*command: Any, **options: Any) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fail)
    assert plan.git_revision() == "unknown"


def test_git_revision_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plan.git_revision() == "unknown"


def test_flags_of_other_objectives_are_told() -> None:
    given = ("--npn_lr", "3", "--local-loss", "--no-fit_w_prev")
    rows = _plan("--objective", "siglip", *given)
    expected = {"--npn_lr (neuclip)", "--local-loss (openclip)", "--fit_w_prev (amorlip)"}
    assert set(rows["no effect"].removesuffix(": flags of other objectives").split(", ")) == expected
    for objective in OBJECTIVES:
        assert "no effect" not in _plan("--objective", objective)


def test_gradients_tell_how_they_travel() -> None:
    two = World(0, 2, ALONE.device)
    assert _plan()["gradients"] == "of one rank"
    assert _plan("--grad-compression", "bf16")["gradients"] == "of one rank; --grad-compression has no effect"
    assert _plan(world=two)["gradients"] == "averaged over the ranks"
    rows = _plan("--grad_compression", "bf16", "--ddp-static-graph", world=two)
    assert rows["gradients"] == "averaged over the ranks, travelling in bf16, static graph"
