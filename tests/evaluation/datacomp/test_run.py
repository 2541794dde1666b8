"""The suite's run around the measuring: finished tasks, replaced checkpoints, missing data, failures, kills, ranks."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.datacomp.aggregate import GROUPS
from evaluation.datacomp.results import Identity, ResultsFile
from evaluation.datacomp.tasks import TASKS
from evaluation.main import main

from . import fake_suite

PROGRAM = Path(__file__).with_name("fake_suite.py")
SOURCE = Path(__file__).resolve().parents[3] / "src"
THREE = ("vtab/dtd", "mnist", "fairness/utkface")

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_suite.install(monkeypatch)


def lines_of(folder: Path, name: str = "epoch_1_eval_results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(row) for row in (folder / "eval_results" / name).read_text().splitlines()]


def evaluate(folder: Path, data: Path, *more: str) -> int:
    flags = ["--train_output_dir", str(folder), "--data_dir", str(data), "--device", "cpu"]
    return main([*flags, *([] if "--epoch" in more or "--iter" in more else ["--epoch", "1"]), *more])


def environment(**orders: Any) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "FAKE"))}
    return {**kept, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "FAKE": json.dumps(orders)}


def test_all_tasks_and_their_summary(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data")
    assert evaluate(folder, data) == 0
    lines = lines_of(folder)
    assert [line["key"] for line in lines] == list(TASKS)
    assert all(line["dataset"] == TASKS[line["key"]].name for line in lines)
    assert all(line["precision"] == "fp32" and line["model"] == {"model": "tiny-for-tests"} for line in lines)
    assert len({line["checkpoint_sha256"] for line in lines}) == 1
    summary = json.loads((folder / "eval_results" / "epoch_1_summary.json").read_text())
    average = summary["aggregates"]["DataComp Average"]
    scores = [fake_suite.score(task) for task in TASKS.values() if task.main_metric]
    assert average["value"] == pytest.approx(sum(scores) / 38)
    assert len(average["tasks"]) == 38
    assert summary["epoch"] == 1
    out = capsys.readouterr().out
    assert f"DataComp Average          {100 * sum(scores) / 38:6.2f} %  (38 tasks)" in out
    assert "[ 1/40] Caltech-101 " in out
    assert "39 left, less than 1 min" in out


def test_finished_tasks_are_kept_and_the_rest_is_made_up_for(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", *THREE)
    assert evaluate(folder, data, "--tasks", "vtab,MNIST") == 0
    first = lines_of(folder)
    assert [line["key"] for line in first] == ["vtab/dtd", "mnist"]
    out = capsys.readouterr().out
    # At the beginning and at the end, with the folder that was looked for.
    assert out.count(f"missing: vtab/pets: {data}/wds_vtab-pets_test does not exist") == 2
    # A half-written line, as a kill leaves it.
    path = folder / "eval_results" / "epoch_1_eval_results.jsonl"
    path.write_text(path.read_text() + '{"key": "cifar10", "dataset": "CIF')
    assert evaluate(folder, data) == 0
    assert lines_of(folder)[:2] == first
    assert [line["key"] for line in lines_of(folder)] == list(THREE)
    out = capsys.readouterr().out
    assert "line 3, is not whole" in out
    assert "tasks: 1 to do, 2 finished before, 37 without data" in out
    assert "mean of the 2 of 38 tasks at hand: " in out
    # Nothing left to do: the model is not even loaded.
    monkeypatch.setattr("evaluation.run_folder.RunFolder.load_checkpoint", lambda *_: pytest.fail("loaded"))
    assert evaluate(folder, data) == 0


def test_redo_replaces_lines(make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", *THREE)
    assert evaluate(folder, data) == 0
    monkeypatch.setattr(fake_suite, "score", lambda task: 0.875)
    assert evaluate(folder, data, "--redo", "--tasks", "dtd") == 0
    scores = {line["key"]: line["metrics"]["acc1"] for line in lines_of(folder)}
    assert scores == {"mnist": 0.19, "fairness/utkface": 0.4, "vtab/dtd": 0.875}


def test_results_of_a_replaced_checkpoint_are_set_aside(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", *THREE)
    assert evaluate(folder, data) == 0
    before = lines_of(folder)
    checkpoint = folder / "checkpoints" / "epoch_1.pt"
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "name": "another"}, checkpoint)
    capsys.readouterr()
    assert evaluate(folder, data, "--tasks", "mnist") == 0
    after = lines_of(folder)
    assert [line["key"] for line in after] == ["mnist"]
    assert after[0]["checkpoint_sha256"] != before[0]["checkpoint_sha256"]
    backup = f"epoch_1_eval_results.checkpoint-{before[0]['checkpoint_sha256'][:12]}.jsonl"
    assert lines_of(folder, backup) == before
    out = capsys.readouterr().out
    assert "3 results in" in out
    assert "of a checkpoint that has been replaced: not used, moved to" in out


def test_lines_of_the_public_code_are_set_aside(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", "mnist")
    path = folder / "eval_results" / "epoch_1_eval_results.jsonl"
    path.parent.mkdir()
    foreign = {"key": "mnist", "dataset": "MNIST", "metrics": {"acc1": 0.9, "main_metric": 0.9}}
    path.write_text(json.dumps(foreign) + "\n")
    assert evaluate(folder, data) == 0
    assert lines_of(folder)[0]["metrics"]["acc1"] == 0.19
    assert lines_of(folder, "epoch_1_eval_results.unknown-checkpoint.jsonl") == [foreign]
    assert "do not say which checkpoint" in capsys.readouterr().out


def test_another_precision_is_measured_again_when_asked_for(make_run: Make, tmp_path: Path) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", "mnist")
    assert evaluate(folder, data, "--precision", "bf16") == 0
    assert evaluate(folder, data) == 0
    assert [line["precision"] for line in lines_of(folder)] == ["bf16"]
    assert evaluate(folder, data, "--precision", "fp32") == 0
    assert [line["precision"] for line in lines_of(folder)] == ["fp32"]
    assert [line["precision"] for line in lines_of(folder, "epoch_1_eval_results.bf16.jsonl")] == ["bf16"]


def test_only_what_is_measured_again_in_another_precision_is_set_aside(make_run: Make, tmp_path: Path) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", *THREE)
    assert evaluate(folder, data, "--precision", "bf16") == 0
    assert evaluate(folder, data, "--precision", "fp32", "--tasks", "mnist") == 0
    assert {line["key"]: line["precision"] for line in lines_of(folder)} == {
        "vtab/dtd": "bf16",
        "mnist": "fp32",
        "fairness/utkface": "bf16",
    }
    assert [line["key"] for line in lines_of(folder, "epoch_1_eval_results.bf16.jsonl")] == ["mnist"]
    summary = json.loads((folder / "eval_results" / "epoch_1_summary.json").read_text())
    assert summary["precision"] == ["bf16", "fp32"]
    assert evaluate(folder, data, "--precision", "fp32") == 0
    assert {line["precision"] for line in lines_of(folder)} == {"fp32"}


def test_two_processes_with_different_tasks_lose_nothing(tmp_path: Path) -> None:
    identity = Identity("a" * 64, {"model": "x"}, "fp32")
    path = tmp_path / "eval_results" / "epoch_1_eval_results.jsonl"
    one, other = ResultsFile(path, identity), ResultsFile(path, identity)
    for file in (one, other):
        file.open()
    facts = {"checkpoint_sha256": "a" * 64, "model": {"model": "x"}, "precision": "fp32", "dataset": "x"}
    lines = [{"key": key, "metrics": {"acc1": score}, **facts} for score, key in enumerate(("mnist", "cars", "mnist"))]
    for file, line in zip((one, other, one), lines):
        file.record(line)
    assert [json.loads(row)["key"] for row in path.read_text().splitlines()] == ["cars", "mnist"]
    assert one.open().lines == {line["key"]: line for line in lines}


def test_a_recording_process_waits_for_the_other_and_goes_on_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ResultsFile(tmp_path / "epoch_1_eval_results.jsonl", Identity("a" * 64, {}))
    line = {"key": "mnist", "metrics": {}, "checkpoint_sha256": "a" * 64, "model": {}}
    recording = threading.Thread(target=file.record, args=(line,))
    with open(tmp_path / ".epoch_1_eval_results.jsonl.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recording.start()
        recording.join(0.2)
        assert recording.is_alive()
        assert not file.path.exists()
    recording.join(10)
    assert file.path.exists()

    def no_locks(*_: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    file.record({**line, "key": "cars"})
    assert len(file.open().lines) == 2


def test_results_of_a_checkpoint_of_unknown_epoch_are_called_latest(make_run: Make, tmp_path: Path) -> None:
    folder, data = make_run("run", epochs=(1,)), fake_suite.make_data(tmp_path / "data", "mnist")
    checkpoint = folder / "checkpoints" / "epoch_1.pt"
    torch.save({"state_dict": torch.load(checkpoint, weights_only=True)["state_dict"]}, checkpoint)
    checkpoint.rename(checkpoint.with_name("epoch_latest.pt"))
    assert main(["--train_output_dir", str(folder), "--data_dir", str(data), "--device", "cpu"]) == 0
    assert lines_of(folder, "latest_eval_results.jsonl")[0]["key"] == "mnist"
    assert (folder / "eval_results" / "latest_summary.json").is_file()


def test_the_newest_checkpoint_and_an_iteration(make_run: Make, tmp_path: Path) -> None:
    folder, data = make_run("run", epochs=(1, 2)), fake_suite.make_data(tmp_path / "data", "mnist")
    assert main(["--train_output_dir", str(folder), "--data_dir", str(data), "--device", "cpu"]) == 0
    assert lines_of(folder, "epoch_2_eval_results.jsonl")[0]["checkpoint"] == "epoch_2.pt"
    (folder / "checkpoints" / "epoch_2.pt").rename(folder / "checkpoints" / "iter_500.pt")
    assert evaluate(folder, data, "--iter", "500") == 0
    assert lines_of(folder, "iter_500_eval_results.jsonl")[0]["checkpoint"] == "iter_500.pt"
    assert json.loads((folder / "eval_results" / "iter_500_summary.json").read_text())["iteration"] == 500


def test_a_folder_without_parameters_needs_the_architecture(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", "mnist")
    (folder / "params.txt").unlink()
    assert evaluate(folder, data) == 2
    assert "--arch MODEL" in capsys.readouterr().err
    assert evaluate(folder, data, "--arch", "tiny-for-tests") == 0
    assert lines_of(folder)[0]["model"] == {"model": "tiny-for-tests"}
    assert evaluate(make_run("other"), data, "--arch", "ViT-B-32") == 2
    assert "params.txt says model: tiny-for-tests" in capsys.readouterr().err


def test_mistakes_are_known_before_the_model_is_loaded(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", "mnist")
    monkeypatch.setattr("evaluation.run_folder.RunFolder.load_checkpoint", lambda *_: pytest.fail("loaded"))
    for flags, message in (
        (["--data_dir", str(tmp_path / "none")], "none does not exist"),
        (["--data_dir", str(tmp_path / "logs")], "none of 40 sets can be used"),
        (["--data_dir", str(data), "--tasks", "imagnet"], "--tasks imagnet: no task or group"),
        (["--data_dir", str(data), "--epoch", "7"], "has no epoch_7.pt; there is: epoch_1.pt, epoch_2.pt."),
        (["--tasks", "mnist", "--pairs", "x.tar"], "give --data_dir DIR too"),
        (["--data_dir", str(data), "--pairs", str(tmp_path / "gone.tar")], "gone.tar does not exist"),
    ):
        assert main(["--train_output_dir", str(folder), *flags]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert message in error
        assert "\n" not in error
    assert not (folder / "eval_results").exists()


def test_a_damaged_checkpoint_is_one_line(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", "mnist")
    checkpoint = folder / "checkpoints" / "epoch_1.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert evaluate(folder, data) == 2
    assert "epoch_1.pt does not load into model tiny-for-tests" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["broken", "crash"])
def test_a_failing_task_does_not_stop_the_others(
    how: str, make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", *THREE)
    monkeypatch.setenv("FAKE", json.dumps({how: "mnist"}))
    assert evaluate(folder, data) == 1
    assert [line["key"] for line in lines_of(folder)] == ["vtab/dtd", "fairness/utkface"]
    out = capsys.readouterr().out
    message = {"broken": "sample 7 of", "crash": "RuntimeError: out of memory"}[how]
    assert f"FAILED: mnist: {message}" in out
    # What failed is tried again.
    monkeypatch.delenv("FAKE")
    assert evaluate(folder, data) == 0
    assert len(lines_of(folder)) == 3


def test_held_out_sets_and_datacomp_together(
    make_run: Make, classification_shards: Path, pair_shards: str, tmp_path: Path
) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", "mnist")
    more = ["--pairs", pair_shards, "--zeroshot", str(classification_shards), "--workers", "0"]
    assert evaluate(folder, data, *more) == 0
    assert "zeroshot/top1" in json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert len(lines_of(folder)) == 1


def test_killed_and_started_again(make_run: Make, tmp_path: Path) -> None:
    folder, data = make_run("run"), fake_suite.make_data(tmp_path / "data", *GROUPS["VTAB"])
    command = [sys.executable, str(PROGRAM), "--train_output_dir", str(folder), "--data_dir", str(data), "--epoch", "1"]
    command += ["--device", "cpu"]
    process = subprocess.Popen(command, env=environment(slow=0.3), stdout=subprocess.DEVNULL)
    path = folder / "eval_results" / "epoch_1_eval_results.jsonl"
    try:
        end = time.monotonic() + 60
        while not (path.is_file() and path.read_text().count("\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = path.read_text()
    kept = len(before.splitlines())
    assert 3 <= kept < 13
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"tasks: {13 - kept} to do, {kept} finished before" in done.stdout
    assert path.read_text().startswith(before)
    assert sorted(line["key"] for line in lines_of(folder)) == sorted(GROUPS["VTAB"])
    assert "VTAB                       " in done.stdout


def torchrun(flags: list[str], **orders: Any) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    command = [*launcher, str(PROGRAM), *flags, "--device", "cpu", "--workers", "0"]
    return subprocess.run(command, env=environment(**orders), capture_output=True, text=True, timeout=150, check=False)


def test_two_ranks(make_run: Make, pair_shards: str, classification_shards: Path, tmp_path: Path) -> None:
    """One line per task; the same held-out numbers as one process; a crash of one ends both."""
    folder, data = make_run("run", epochs=(1,)), fake_suite.make_data(tmp_path / "data", *THREE)
    held_out = ["--pairs", pair_shards, "--zeroshot", str(classification_shards)]
    flags = ["--train_output_dir", str(folder), "--data_dir", str(data), *held_out]
    began = time.monotonic()
    done = torchrun(flags, crash="mnist", crash_on_rank=1)
    assert done.returncode != 0
    assert "RuntimeError: out of memory" in done.stderr
    assert time.monotonic() - began < 100
    assert [line["key"] for line in lines_of(folder)] == ["vtab/dtd"]

    done = torchrun(flags)
    assert done.returncode == 0, done.stderr
    assert [line["key"] for line in lines_of(folder)] == list(THREE)
    assert done.stdout.count("tasks: 2 to do, 1 finished before") == 1
    shared = json.loads((folder / "evaluation.json").read_text())
    assert main(["--train_output_dir", str(folder), *held_out, "--device", "cpu", "--workers", "0"]) == 0
    alone = json.loads((folder / "evaluation.json").read_text())
    assert shared["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
    assert shared["counts"] == alone["counts"]
