"""Numbers that are not finite on one rank of a real run: no rank learns from them, and it is told where they came from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from end_to_end.corpus import Corpus
from end_to_end.faults import disturbances
from end_to_end.faults.outcomes import WAIT, flags, outcome, told
from end_to_end.processes import Run
from end_to_end.runs import read_checkpoint_file

PER_SAMPLE = ("--objective", "fastclip", "--temperature_scheme", "individual_learnable", "--data_size", "1000")
NETWORK = ("--objective", "neuclip", "--npn_num_protos", "24")


def words(corpus: Corpus, logs: Path, *more: str) -> list[str]:
    """The command line of a run of one epoch, 12 steps."""
    return flags(corpus, logs, "--workers", "1", "--stop_epochs", "1", *more)


@pytest.mark.parametrize("objective", [PER_SAMPLE, NETWORK], ids=["tables", "network"])
@pytest.mark.parametrize(
    ("poison", "what"),
    [
        (partial(disturbances.poisoned_pictures, 1, 5), "features not finite on rank 1, "),
        (partial(disturbances.poisoned_gradient, 1, 5), "gradient not finite on rank 0, 1, "),
    ],
    ids=["pictures", "gradient"],
)
def test_step_is_left_out(
    objective: tuple[str, ...], poison: Callable[[], None], what: str, corpus: Corpus, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    notes = [partial(disturbances.note_keys, tmp_path), partial(disturbances.note_weights, tmp_path)]
    prepare = partial(disturbances.together, poison, *notes)
    with Run(2, words(corpus, logs, *objective), tmp_path, prepare) as run:
        assert run.wait(WAIT) == [0, 0], run.said_by_all()
        pid = run.ranks[1].pid
        (line,) = [line for line in run.said(0).splitlines() if "not finite" in line]
    assert what in line
    assert "update left out (1 so far)" in line
    for part in ("loss ", "τ 0.0", "α ", "keys "):
        assert part in line
    keys = (tmp_path / f"keys of {pid}").read_text().split()[1::2]
    entry = told(logs, "nonfinite.jsonl")[-1]
    assert (entry["step"], entry["rank"]) == (5, 1)
    assert entry["keys"] == [int(key) for key in keys[4 * 8 : 5 * 8]]
    found = outcome(logs, 1)
    assert [entry["step"] for entry in found.metrics] == list(range(1, 13))
    for name, value in found.checkpoint.items():
        # −∞ is the logarithm of what no sample has added to yet.
        assert not (value.isnan() | value.isposinf()).any(), name
    assert found.metrics[-1]["loss"] is not None
    weights = [read_checkpoint_file(tmp_path / f"weights_{rank}.pt") for rank in (0, 1)]
    for name, value in weights[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("step", [6, 11, 12])
def test_stop_ends_with_the_checkpoint_from_before(step: int, corpus: Corpus, tmp_path: Path) -> None:
    """In a step after which a checkpoint is due, and in the epoch's last two."""
    logs = tmp_path / "logs"
    more = (*PER_SAMPLE, "--on-nonfinite", "stop", "--save-every-n-steps", "3")
    with Run(2, words(corpus, logs, *more), tmp_path, partial(disturbances.poisoned_pictures, 1, step)) as run:
        assert run.wait(WAIT) == [1, 1], run.said_by_all()
        assert "Traceback" not in run.said_by_all()
        lines = run.said(0).splitlines()
    assert "features not finite on rank 1" in lines[-2]
    assert "--on-nonfinite stop is given; the last checkpoint is from before: ended with status 1" in lines[-1]
    folder = logs / "run" / "checkpoints"
    assert {path.name for path in folder.glob("*.pt")} == {
        "epoch_latest.pt",
        *(f"iter_{number}.pt" for number in range(3, step, 3)),
    }
    assert read_checkpoint_file(folder / "epoch_latest.pt")["step"] == (step - 1) // 3 * 3


def test_hundred_in_a_row_end_the_run(corpus: Corpus, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    # 200 steps.
    more = (*NETWORK, "--batch-size", "1", "--stop_epochs", "2")
    with Run(2, words(corpus, logs, *more), tmp_path, partial(disturbances.poisoned_pictures, 0, 3, 1000)) as run:
        assert run.wait(WAIT) == [1, 1], run.said_by_all()
        assert "Traceback" not in run.said_by_all()
        lines = run.said(0).splitlines()
    assert "100 steps in a row had a loss or gradient that is not finite: lower --lr" in lines[-1]
    # The 1st, 2nd, 4th, …, 64th.
    assert sum("update left out" in line for line in lines) == 7
    assert 100 <= len(told(logs, "nonfinite.jsonl")) <= 102
