"""Interrupted on a real slurm: the run goes on, and ends to the bit as the one that nothing disturbed.

The batch script is the one that people submit, on two nodes with one task each, its sizes made small by flags at the end.
Skipped where no slurm answers. FAULT_LONG=1 also runs recipes of all methods and a chain of jobs, and waits for a time limit
and for preemptions, which need partitions `low` and `high`, the jobs of the first making room for those of the second.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from end_to_end.corpus import Corpus
from end_to_end.faults.outcomes import Whole, outcome, same
from end_to_end.runs import ROOT, clean_environment, read_lines
from training.atomic_files import verify
from training.preemption import EXIT_INTERRUPTED

SLURM = ROOT / "scripts" / "slurm"
SCRIPT = SLURM / "dfn14m" / "neuclip.sbatch"
EPOCHS = 2
STEPS_PER_EPOCH = 60
# Well before the end of an epoch: signals need a while to be sent.
INTERRUPTED_AT = STEPS_PER_EPOCH + 10
SECONDS = 240.0
RESOURCES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none", "--mem=1G")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def call(*words: str) -> str:
    """What a command of slurm's prints."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def why_not() -> str | None:
    """What is missing for these tests."""
    if not all(map(shutil.which, ("sbatch", "scontrol", "scancel", "sinfo"))):
        return "there is no slurm here"
    if "is UP" not in subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60).stdout:
        return "slurm's controller does not answer"
    tried = subprocess.run(
        ["sbatch", "--test-only", *RESOURCES, "--wrap", "true"], capture_output=True, text=True, timeout=60
    )
    return None if tried.returncode == 0 else f"slurm has no two nodes for a job: {tried.stderr.strip()}"


REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
long = pytest.mark.skipif(not os.environ.get("FAULT_LONG"), reason="takes minutes: FAULT_LONG=1 runs it")


class Job:
    """A batch job that trains the tiny model.

    Args:
        options: of sbatch.
        submitted: the batch script, and what submits it and prints its number.
        more: further flags of the training, which have the last word.
        variables: further environment variables.
    """

    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        *options: str,
        submitted: tuple[Path, list[str]] = (SCRIPT, ["sbatch", "--parsable"]),
        more: tuple[str, ...] = (),
        **variables: str,
    ) -> None:
        self.logs = folder / "logs"
        self._output = folder / "output.txt"
        environment = {
            **clean_environment(),
            "NEUCLIP_ROOT": str(ROOT),
            "VIRTUAL_ENV": sys.prefix,
            "TRAIN_DATA": "::".join([corpus.train] * 4),
            "NAME": "run",
        }
        flags = (
            *(*corpus.model, "--logs", str(self.logs), "--epochs", str(EPOCHS), "--warmup", "2", "--lr", "1e-3"),
            *(
                "--train-num-samples",
                str(8 * STEPS_PER_EPOCH),
                "--data_size",
                "1000",
                "--batch-size",
                "4",
                "--workers",
                "1",
            ),
            *("--precision", "fp32", "--device", "cpu", "--log-every-n-steps", "1", "--shuffle-buffer", "20"),
            *("--npn_num_protos", "24", "--npn_restart_iter", "7", *more),
        )
        script, submit = submitted
        command = [*submit, *RESOURCES, f"--output={self._output}", *options, str(script), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**environment, **variables})
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip().partition(";")[0]

    def shown(self, what: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{what}=(\S*)", call("scontrol", "show", "job", self.number))
        assert found is not None
        return found[1]

    def links(self) -> dict[str, str]:
        """The states of an array's jobs by number; all that have not started are one, with any number."""
        records = call("scontrol", "show", "job", self.number).split("\n\n")
        found = [re.search(r"ArrayTaskId=(\d+)\b.*?JobState=(\w+)", record, re.DOTALL) for record in records]
        return {match[1]: match[2] for match in found if match is not None}

    @property
    def output(self) -> str:
        """What the job has printed, over all its starts."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def until(self, what: Callable[[], bool], seconds: float = SECONDS) -> float:
        """Wait; returns time.monotonic()."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"{self.shown('JobState')}: {self.output[-3000:]}"
            time.sleep(0.05)
        return time.monotonic()

    def until_step(self, step: int) -> None:
        """Until so many steps have been done."""
        metrics = self.logs / "run" / "metrics.jsonl"
        self.until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= step)

    def end(self) -> str:
        """Wait for the job's end; returns its last state."""
        self.until(lambda: self.shown("JobState") in ENDED)
        return self.shown("JobState")


Submit = Callable[..., Job]


@pytest.fixture
def submit(corpus: Corpus, tmp_path: Path) -> Iterator[Submit]:
    """submit(*options, more=…, **variables): a job of this test, which does not outlive it."""
    jobs: list[Job] = []

    def start(*options: str, **more: Any) -> Job:
        jobs.append(Job(corpus, tmp_path, *options, **more))
        return jobs[-1]

    yield start
    for job in jobs:
        subprocess.run(["scancel", job.number], capture_output=True, timeout=60, check=False)
    for job in jobs:
        job.until(lambda job=job: job.shown("JobState") in ENDED)  # type: ignore[misc]


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A job that nothing disturbed."""
    job = Job(corpus, tmp_path_factory.mktemp("whole"))
    try:
        assert job.end() == "COMPLETED", job.output
    finally:
        subprocess.run(["scancel", job.number], capture_output=True, timeout=60, check=False)
    return outcome(job.logs, EPOCHS)


def came_back(job: Job, signalled: float, expected: Whole) -> None:
    """The job was interrupted once, within an epoch, and has gone on to its end; prints how long that took."""
    saved = job.until(lambda: "ended with status 75" in job.output)
    pending = job.until(lambda: job.shown("JobState") == "PENDING")
    running = job.until(lambda: job.shown("JobState") == "RUNNING")
    resumed = job.until(lambda: "resumed from" in job.output)
    found = re.search(r"resumed from .*/epoch_latest\.pt: epoch \d+, step (\d+)", job.output)
    assert found is not None
    step = int(found[1])
    job.until_step(step + 1)
    moments = {
        "saved": saved,
        "in the queue": pending,
        "running": running,
        "resumed": resumed,
        "next step": time.monotonic(),
    }
    assert job.end() == "COMPLETED", job.output
    assert job.shown("Restarts") == "1"
    assert step % STEPS_PER_EPOCH > 0
    assert f"step 1/{STEPS_PER_EPOCH} " in job.output  # the first start's lines are still there
    assert "starting anew" in job.output
    assert job.output.count("resumed from") == 1
    same(outcome(job.logs, EPOCHS), expected)
    print(f"step {step};", ", ".join(f"{name} after {at - signalled:.1f} s" for name, at in moments.items()))


@pytest.fixture
def slow_controller(tmp_path: Path) -> dict[str, str]:
    """Variables with which `scontrol requeue` takes seconds, as on a busy cluster."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1" != requeue ] || sleep 3\nexec {shutil.which("scontrol")} "$@"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def test_warned_job_requeues_itself(submit: Submit, whole: Whole, slow_controller: dict[str, str]) -> None:
    job = submit(**slow_controller)
    job.until_step(INTERRUPTED_AT)
    signalled = time.monotonic()
    call("scancel", "-s", "USR1", job.number)
    came_back(job, signalled, whole)


def test_cancelled_job_is_saved_and_stays_away(submit: Submit) -> None:
    job = submit()
    job.until_step(INTERRUPTED_AT - STEPS_PER_EPOCH)
    call("scancel", job.number)
    assert job.end() == "CANCELLED"
    assert job.shown("Restarts") == "0"
    assert "ended with status 75" in job.output
    assert "goes back into the queue" not in job.output
    assert verify(job.logs / "run" / "checkpoints" / "epoch_latest.pt") is None
    assert len(read_lines(job.logs / "run" / "metrics.jsonl")) >= INTERRUPTED_AT - STEPS_PER_EPOCH


def test_job_ended_by_termination_alone_fails_with_its_status(submit: Submit) -> None:
    job = submit()
    job.until_step(1)
    call("scancel", "-s", "TERM", job.number)
    assert job.end() == "FAILED", job.output
    assert job.shown("ExitCode") == f"{EXIT_INTERRUPTED}:0"
    assert job.shown("Restarts") == "0"
    assert "submit it again to go on" in job.output


@long
@pytest.mark.parametrize("warning", ["USR1", "TERM"])
@pytest.mark.timeout(600)
def test_preempted_job_comes_back(warning: str, submit: Submit, whole: Whole) -> None:
    """TERM with a time of grace is what slurm preempts with unless its configuration has preempt_send_user_signal."""
    partitions = call("sinfo", "-h", "-o", "%R").split()
    if not {"low", "high"} <= set(partitions):
        pytest.skip("there are no partitions low and high")
    job = submit("--partition=low", "--exclusive", "--time=60", f"--signal={warning}@300")
    job.until_step(INTERRUPTED_AT)
    signalled = time.monotonic()
    room = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--time=5", "--wrap", "sleep 1")
    call("sbatch", *room)
    came_back(job, signalled, whole)


@long
@pytest.mark.timeout(600)
def test_job_goes_on_after_its_time_limit(submit: Submit) -> None:
    """Two minutes, warned a minute before (slurm may do so earlier)."""
    job = submit("--time=2", "--signal=USR1@60", more=("--epochs", "1000", "--save-frequency", "0"))
    began = job.until(lambda: job.shown("JobState") == "RUNNING")
    warned = job.until(lambda: "SIGUSR1" in job.output)
    saved = job.until(lambda: "goes back into the queue" in job.output)
    resumed = job.until(lambda: "resumed from" in job.output)
    found = re.search(r"resumed from .*/epoch_latest\.pt: epoch \d+, step (\d+)", job.output)
    assert found is not None
    job.until_step(int(found[1]) + 1)
    assert job.shown("Restarts") == "1"
    moments = {"saved": saved, "resumed": resumed, "next step": time.monotonic()}
    print(
        f"warned after {warned - began:.0f} s;",
        ", ".join(f"{name} {at - warned:.1f} s" for name, at in moments.items()),
    )


def recipe(dataset: str, method: str) -> tuple[Path, list[str]]:
    """Its batch script, and how to submit it."""
    return SLURM / dataset / f"{method}.sbatch", ["sbatch", "--parsable"]


@long
@pytest.mark.parametrize(
    ("dataset", "method"),
    [("cc3m", "openclip"), ("cc12m", "fastclip"), ("dfn192m", "siglip"), ("dfn1b", "neuclip"), ("dfn1b", "amorlip")],
)
def test_recipe_of_every_method(dataset: str, method: str, submit: Submit) -> None:
    began = time.monotonic()
    job = submit(submitted=recipe(dataset, method))
    assert job.end() == "COMPLETED", job.output
    params = (job.logs / "run" / "params.txt").read_text()
    assert f"objective: {method}\n" in params
    lines = read_lines(job.logs / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert all(line["loss"] is not None for line in lines)
    assert "2 on cpu" in job.output
    print(f"{time.monotonic() - began:.0f} s, contrastive_loss {lines[-1]['contrastive_loss']:.3f}")


@long
@pytest.mark.timeout(600)
def test_warned_recipe_of_another_method(submit: Submit, corpus: Corpus, tmp_path: Path) -> None:
    """amorlip: networks that start anew each epoch, and ρ that changes within the run."""
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Job(corpus, tmp_path / "undisturbed", submitted=recipe("dfn14m", "amorlip"))
    assert undisturbed.end() == "COMPLETED", undisturbed.output
    job = submit(submitted=recipe("dfn14m", "amorlip"))
    job.until_step(INTERRUPTED_AT)
    signalled = time.monotonic()
    call("scancel", "-s", "USR1", job.number)
    came_back(job, signalled, outcome(undisturbed.logs, EPOCHS))


@long
@pytest.mark.timeout(600)
def test_dry_run_in_a_job(submit: Submit) -> None:
    job = submit(submitted=recipe("cc12m", "neuclip"), more=("--dry-run",))
    assert job.end() == "COMPLETED", job.output
    assert "dry run: 2 steps of 8 synthetic samples done" in job.output
    assert not job.logs.exists()


@long
@pytest.mark.timeout(600)
def test_chain_goes_on_where_a_link_was_warned(submit: Submit, whole: Whole) -> None:
    """Of four links the first is warned, the second finishes the run, and the others have nothing to do."""
    job = submit("--open-mode=append", submitted=(SCRIPT, [str(SLURM / "chain.sh"), "4"]))
    job.until_step(INTERRUPTED_AT)
    signalled = time.monotonic()
    # Of an array slurm 22.05 signals what it is told to, and answers with a status that is not 0.
    subprocess.run(["scancel", "-s", "USR1", f"{job.number}_1"], capture_output=True, timeout=60, check=False)
    resumed = job.until(lambda: "resumed from" in job.output)
    job.until(lambda: all(state in ENDED for state in job.links().values()))
    links = job.links()
    assert (links.pop("1"), links.pop("2"), *links.values()) == ("FAILED", "COMPLETED", "CANCELLED"), job.output
    assert "back into the queue" not in job.output
    same(outcome(job.logs, EPOCHS), whole)
    print(f"resumed after {resumed - signalled:.1f} s")
