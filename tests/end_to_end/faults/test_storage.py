"""Disks that are full, fail or lose files: they cost checkpoints and lines of the log, never the run or what it learns."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from end_to_end.corpus import Corpus
from end_to_end.faults import disturbances
from end_to_end.faults.outcomes import WAIT, Whole, flags, outcome, same, undisturbed
from end_to_end.processes import Run
from training.atomic_files import verify
from training.preemption import EXIT_INTERRUPTED

EPOCHS = 2
OBJECTIVE = ("--objective", "fastclip", "--temperature_scheme", "individual_learnable", "--data_size", "1000")
# Two checkpoints and one that is being written, the tiny model's taking 10 MB each.
SMALL_DISK = "48m"


def words(corpus: Corpus, logs: Path, *more: str) -> list[str]:
    """The command line of all runs here."""
    saving = ("--val-data", corpus.validation, "--save-every-n-steps", "4", "--resume", "latest", "--workers", "1")
    return flags(corpus, logs, *saving, *OBJECTIVE, *more, epochs=EPOCHS)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run on a disk that is well."""
    logs = tmp_path_factory.mktemp("whole") / "logs"
    return undisturbed(2, words(corpus, logs), logs, EPOCHS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """logs/, with the run's folder on a file system of its own of 48 MB."""
    logs = tmp_path / "logs"
    folder = logs / "run"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield logs
    # Lazily: a loader's worker outlives its rank, which ends without the interpreter's way out, by some seconds.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("more", [(), ("--save-in-background",)], ids=["at once", "in the background"])
def test_full_disk_costs_no_step(more: tuple[str, ...], small_disk: Path, corpus: Corpus, whole: Whole) -> None:
    first, last = 6, 11
    full = partial(disturbances.full_disk, small_disk / "run", first, last)
    with Run(2, words(corpus, small_disk, "--keep-last", "1", *more), small_disk.parent, full) as run:
        assert run.wait(WAIT) == [0, 0], run.said_by_all()
        said = run.said(0)
    found = outcome(small_disk, EPOCHS)
    assert "Traceback" not in said
    # iter_8.pt: the only one due while there was no room.
    (line,) = [line for line in said.splitlines() if "cannot save" in line]
    assert "iter_8.pt: No space left on device; the last whole checkpoint is" in line
    assert "training goes on" in line
    assert said.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert "is written again" in said
    # Lines of some steps are missing, those that are there are right.
    missing = [entry for entry in whole.metrics if entry not in found.metrics]
    assert 0 < len(missing) <= last - first
    assert {entry["step"] for entry in missing} <= set(range(first, last))
    found.metrics = whole.metrics
    same(found, whole)


def test_writing_that_fails_goes_on_and_is_strict_if_asked(corpus: Corpus, whole: Whole, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    fails = partial(disturbances.failing_writes, 2, errno.ENOSPC, errno.EROFS, errno.EIO)
    strict = words(corpus, logs, "--strict-save")
    with Run(2, strict, tmp_path, fails) as run:
        assert run.wait(WAIT) == [1, 1], run.said_by_all()
        assert "Traceback" not in run.said_by_all()
        last = run.said(0).splitlines()[-1]
        assert "a checkpoint could not be written and --strict-save is given: ended with status 1" in last
        assert "iter_8.pt: No space left on device; the last whole checkpoint is" in run.said(0)
    folder = logs / "run" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {
        *("iter_4.pt", "iter_4.pt.json", "epoch_latest.pt", "epoch_latest.pt.json"),
    }
    assert verify(folder / "epoch_latest.pt") is None
    # From there on without --strict-save, on a disk that fails three times more.
    with Run(2, words(corpus, logs), tmp_path, fails) as run:
        assert run.wait(WAIT) == [0, 0], run.said_by_all()
        assert run.said(0).count("cannot save") == 4, "one of the first run, three of this one"
        assert "Read-only file system" in run.said(0)
    same(outcome(logs, EPOCHS), whole)


def stopped_at(step: int, run_words: list[str], output: Path) -> None:
    """A run that ends after so many steps or so; after 14 it leaves iter_4.pt to iter_12.pt, epoch_1.pt, epoch_latest.pt."""
    hours = partial(disturbances.hours_over_at_step, step)
    with Run(2, [*run_words, "--max-hours", "1"], output, hours) as run:
        assert run.wait(WAIT) == [EXIT_INTERRUPTED] * 2, run.said_by_all()


def test_damaged_checkpoints_are_passed_over(corpus: Corpus, whole: Whole, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    stopped_at(14, words(corpus, logs), tmp_path)
    folder = logs / "run" / "checkpoints"
    latest, epoch, newest = (folder / name for name in ("epoch_latest.pt", "epoch_1.pt", "iter_12.pt"))
    latest.write_bytes(latest.read_bytes()[:-1000])
    content = bytearray(epoch.read_bytes())
    assert epoch.samefile(newest)  # two names of one file
    content[len(content) // 2] ^= 1
    epoch.write_bytes(bytes(content))
    with Run(2, words(corpus, logs), tmp_path / "resumed") as run:
        assert run.wait(WAIT) == [0, 0], run.said_by_all()
        said = run.said(0)
    assert said.count("passed over") == 3
    assert "epoch_latest.pt: it is " in said
    assert "epoch_1.pt: its checksum differs" in said
    assert "iter_8.pt: epoch 0, step 8" in said
    same(outcome(logs, EPOCHS), whole)


@pytest.mark.parametrize("left", ["nothing", "damaged", "older"])
def test_remote_copy_is_as_good_as_the_folder(left: str, corpus: Corpus, whole: Whole, tmp_path: Path) -> None:
    logs, older, checkpoints = tmp_path / "logs", tmp_path / "older", tmp_path / "logs" / "run" / "checkpoints"
    more = ("--remote-sync", f"file://{tmp_path}/elsewhere", "--save-in-background", "--keep-last", "1")
    if left == "older":
        stopped_at(6, words(corpus, logs, *more), tmp_path / "before")
        shutil.copytree(logs, older)
    stopped_at(8 if left == "older" else 14, words(corpus, logs, *more), tmp_path)
    sent = {path.name for path in checkpoints.glob("*.pt")}
    if left == "damaged":
        for path in checkpoints.glob("*.pt"):
            path.write_bytes(path.read_bytes()[:-1000])
    else:
        shutil.rmtree(logs)
    if left == "older":
        # As on a machine where the run was before it went on elsewhere.
        shutil.copytree(older, logs)
    with Run(2, words(corpus, logs, *more), tmp_path / "resumed") as run:
        assert run.wait(WAIT) == [0, 0], run.said_by_all()
        assert re.search(
            r"older than \w+\.pt, fetched" if left == "older" else r"fetched epoch_latest\.pt", run.said(0)
        )
    same(outcome(logs, EPOCHS), whole)
    here = {path.name for path in checkpoints.glob("*.pt")}
    there = {path.name for path in (tmp_path / "elsewhere" / "run" / "checkpoints").iterdir() if path.suffix != ".json"}
    assert here == {"iter_24.pt", "epoch_2.pt", "epoch_latest.pt"}
    # What this start had sent or fetched and --keep-last removed is gone there too; what an earlier one had sent stays.
    assert there == here | ({"iter_12.pt", "epoch_1.pt"} if left != "older" else there & sent)
