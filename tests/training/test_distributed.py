"""Who a process is among the ranks, and failing together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from end_to_end.runs import LAUNCHER_VARIABLES
from ranks import run_on_ranks
from training.distributed import World, connect, disconnect, environment
from training.errors import OtherRankError, UserError
from training.reporting import reduce_metrics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "2", "SLURM_NTASKS": "4"}
JOB = {"SLURM_JOB_ID": "4711"}
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}
# The shell of a job has the variables of a first task, without being one.
BATCH_SHELL = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 0, 1)),
        (TORCHRUN, (5, 1, 8)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1)),
        (SRUN, (3, 2, 4)),
        ({**SRUN, **JOB, **STEP}, (3, 2, 4)),
        (BATCH_SHELL, (0, 0, 1)),
        ({**SRUN, **JOB, **STEP, **TORCHRUN}, (5, 1, 8)),
        ({**BATCH_SHELL, **TORCHRUN}, (5, 1, 8)),
        # A job's script may export the size for others to use; without a rank it says nothing about this process.
        ({"WORLD_SIZE": "8", **SRUN}, (3, 2, 4)),
        ({"WORLD_SIZE": "8"}, (0, 0, 1)),
    ],
    ids=[
        "bare",
        "torchrun",
        "one",
        "srun",
        "srun in a job",
        "batch shell",
        "torchrun in srun",
        "torchrun in shell",
        "size",
        "no",
    ],
)
def test_environment(variables: dict[str, str], place: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment() == place


def test_missing_master_address_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_ADDR is not set and there are 4 ranks.*scontrol"):
        connect("cpu", None, "env://", 10)


def test_alone_needs_no_group() -> None:
    world = connect("cpu", None, "env://", 10)
    assert (world.rank, world.size, world.device, world.is_main) == (0, 1, CPU, True)
    assert not dist.is_initialized()
    assert world.from_main("x") == "x"
    assert world.check_together(lambda: 3) == 3
    disconnect()


def test_absent_cuda_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        connect("cuda", None, "env://", 10)
    assert connect("auto", None, "env://", 10).device == CPU


def test_group_of_one_rank_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert connect("cpu", None, "env://", 10).size == 1


def test_other_errors_of_a_check_pass_through() -> None:
    with pytest.raises(ZeroDivisionError):
        World(0, 1, CPU).check_together(lambda: 1 // 0)


def together() -> dict[str, object]:
    """What each rank does: collectives of a World, and metrics."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, CPU)

    def complain_on(*ranks: int) -> str:
        def check() -> str:
            if rank in ranks:
                raise UserError(f"--flag of rank {rank} is wrong")
            return f"fine on {rank}"

        try:
            return world.check_together(check)
        except UserError as error:
            return f"refused: {error}"

    metrics = {
        "loss": torch.tensor(float(rank + 1)),
        "gap_max": torch.tensor(float(rank + 1)),
        "double": torch.tensor(1e-12 * (rank + 1), dtype=torch.float64),
        "not_a_number": torch.tensor(float("nan") if rank else 1.0),
    }
    found = {
        "none": complain_on(),
        "second": complain_on(1),
        "both": complain_on(0, 1),
        "from_main": world.from_main({"rank": rank}),
        "metrics": reduce_metrics(metrics, world),
        "main": world.is_main,
    }
    return found


def test_two_ranks_agree() -> None:
    first, second = run_on_ranks(together, 2)
    assert (first["none"], second["none"]) == ("fine on 0", "fine on 1")
    for rank in (first, second):
        assert rank["second"] == "refused: --flag of rank 1 is wrong (on rank 1)"
        assert rank["both"].startswith("refused: --flag of rank 0 is wrong")
        assert rank["from_main"] == {"rank": 0}
        metrics = rank["metrics"]
        assert metrics["loss"] == 1.5
        assert metrics["gap_max"] == 2.0
        assert metrics["double"] == pytest.approx(1.5e-12)
        assert metrics["not_a_number"] != metrics["not_a_number"]
        assert list(metrics) == sorted(metrics)
    assert (first["main"], second["main"]) == (True, False)


def test_metrics_of_one_rank() -> None:
    metrics = {"loss": torch.tensor(2.0, requires_grad=True), "b_max": torch.tensor(3.0)}
    assert reduce_metrics(metrics, World(0, 1, CPU)) == {"b_max": 3.0, "loss": 2.0}


def one_fails() -> tuple[str, str]:
    """What each rank learns when only rank 1 meets a bug, and when the ranks see different files."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU)

    def check() -> int:
        return 1 // (1 - world.rank)

    outcome = "none"
    try:
        world.check_together(check)
    except (OtherRankError, ZeroDivisionError) as error:
        outcome = f"{type(error).__name__}: {error}"
    same = "none"
    try:
        world.check_same(world.rank, "--train-data x")
    except UserError as error:
        same = str(error)
    return outcome, same


def test_a_bug_on_one_rank_reaches_the_others() -> None:
    (first, same_first), (second, same_second) = run_on_ranks(one_fails, 2)
    assert second.startswith("ZeroDivisionError")
    # Not a user's mistake: the rank where it happened tells of it, with its traceback.
    assert first.startswith("OtherRankError: ZeroDivisionError")
    assert "on rank 1" in first
    assert same_first == same_second
    assert "--train-data x: rank 0 has 0, rank 1 has 1" in same_first


def test_an_interactive_step_of_slurm_counts_its_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    variables = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment() == (0, 0, 1)
