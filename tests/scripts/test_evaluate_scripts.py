"""The shell scripts around evaluation, with stand-ins for the environment, the public code and slurm's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation.run_folder import MODEL_PARAMETERS

ROOT = Path(__file__).resolve().parents[2]

# pip has nothing to do; everything else is Python.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then echo "pip $*" >> "$PIP_LOG"; exit 0; fi
if [ -n "$ECHO" ] && [ "$1" != -c ]; then echo "RUN $*"; exit 0; fi
exec {python} "$@"
"""

FORK = """import json, os, sys
print("FORK", json.dumps(sys.argv[1:]), os.environ.get("PYTHONPATH"))
"""


def program(path: Path, text: str) -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run with epoch 2, a data folder, the public code, and an environment."""
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("epoch_2.pt", "epoch_latest.pt", "iter_50.pt"):
        (run / "checkpoints" / name).write_bytes(b"x")
    (run / "params.txt").write_text("model: ViT-B-32\nmodel_config: None\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "fork").mkdir()
    (tmp_path / "fork" / "evaluate.py").write_text(FORK)
    program(tmp_path / "venv" / "bin" / "python", PYTHON.format(python=sys.executable))
    return tmp_path


def call(place: Path, script: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script, called from the folder of the fixture."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "NEUCLIP_"))}
    environment = {
        **{name: value for name, value in kept.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")},
        "PIP_LOG": str(place / "pip.log"),
        "ECHO": "",
        **variables,
    }
    command = [str(ROOT / "scripts" / script), *flags]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=60, check=False)


def public_code(place: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    variables = {"DATACOMP_FORK": str(place / "fork"), "DATACOMP_VENV": "venv"}
    return call(place, "evaluate_datacomp.sh", *flags, **variables)


REQUIRED = ("--train_output_dir", "logs/run", "--data_dir=data")


def test_public_code_gets_the_checkpoint_asked_for(place: Path) -> None:
    done = public_code(place, *REQUIRED, "--epoch", "2", "--batch_size", "32")
    assert done.returncode == 0, done.stderr
    wanted = ["--train_output_dir", "logs/run", "--data_dir", "data", "--epoch", "2", "--arch", "ViT-B-32"]
    assert "FORK [" + ", ".join(f'"{word}"' for word in [*wanted, "--batch_size", "32"]) + "] None" in done.stdout
    done = public_code(place, *REQUIRED, "--iter=50", "--arch", "RN50")
    assert '"--iter", "50", "--arch", "RN50"]' in done.stdout
    # The environment is made once.
    assert (place / "pip.log").read_text().count("requirements-eval.txt") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epoch", "3"), "epoch_3.pt does not exist; there is: epoch_2.pt epoch_latest.pt iter_50.pt"),
        (("--iter", "2"), "iter_2.pt does not exist"),
        ((), "which checkpoint?"),
        (("--epoch", "latest"), "which checkpoint?"),
        (("--epoch", "2", "--iter", "50"), "give one of them"),
        (("--epoch",), "--epoch needs a value"),
        (("--epoch", "2", "--data_dir", "gone"), "--data_dir gone does not exist"),
        (("--epoch", "2", "--train_output_dir", "logs/gone"), "logs/gone does not exist"),
        (("--epoch", "2", "--arch", "tiny"), "a configuration of its own"),
    ],
)
def test_public_code_is_not_given_what_it_would_get_wrong(place: Path, flags: tuple[str, ...], message: str) -> None:
    (place / "logs" / "run" / "model_configs").mkdir()
    (place / "logs" / "run" / "model_configs" / "tiny.json").write_text("{}")
    done = public_code(place, *REQUIRED, *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "FORK" not in done.stdout


@pytest.mark.parametrize("name", MODEL_PARAMETERS)
def test_a_model_that_the_public_code_would_build_otherwise_is_refused(name: str, place: Path) -> None:
    params = place / "logs" / "run" / "params.txt"
    before = params.read_text()
    params.write_text(f"{before}{name}: None\n")
    assert public_code(place, *REQUIRED, "--epoch", "2").returncode == 0
    params.write_text(f"{before}{name}: 7\n")
    done = public_code(place, *REQUIRED, "--epoch", "2")
    assert done.returncode == 1
    assert f"params.txt says {name}: 7, which the public code does not know" in done.stderr
    assert "FORK" not in done.stdout


def test_public_code_does_not_reuse_results_of_a_replaced_checkpoint(place: Path) -> None:
    results = place / "logs" / "run" / "eval_results" / "epoch_2_eval_results.jsonl"
    results.parent.mkdir()
    results.write_text('{"key": "mnist"}\n')
    done = public_code(place, *REQUIRED, "--epoch", "2")
    assert "1 results in" in done.stdout
    assert "FORK" in done.stdout
    results.write_text('{"key": "mnist"}\n{"key": "ci')
    done = public_code(place, *REQUIRED, "--epoch", "2")
    assert "was cut off: moved to" in done.stdout
    assert "1 results in" in done.stdout
    assert "FORK" in done.stdout
    assert results.read_text() == '{"key": "mnist"}\n'
    assert results.with_name(f"{results.name}.cut-off").read_text() == '{"key": "ci\n'
    os.utime(results, (1, 1))
    assert "is newer than" in public_code(place, *REQUIRED, "--epoch", "2").stderr


def test_public_code_is_cloned_once(place: Path) -> None:
    source = place / "source"
    source.mkdir()
    (source / "evaluate.py").write_text(FORK)
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *words], cwd=source, check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=True
    ).stdout.strip()
    # What comes later is not taken.
    (source / "evaluate.py").write_text("print('NEWER')")
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "y"], cwd=source, check=True
    )
    checkout = place / "checkout"
    for name in ("scripts/environment.sh", "scripts/evaluate_datacomp.sh", "requirements-eval.txt"):
        program(checkout / name, (ROOT / name).read_text())
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "DATACOMP_FORK")},
        "DATACOMP_FORK_URL": f"file://{source}",
        "DATACOMP_FORK_COMMIT": commit,
        "DATACOMP_VENV": str(place / "venv"),
        "PIP_LOG": str(place / "pip.log"),
        "ECHO": "",
    }
    command = [str(checkout / "scripts" / "evaluate_datacomp.sh"), *REQUIRED, "--epoch", "2"]
    outputs = [
        subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=60, check=True)
        for _ in range(2)
    ]
    assert [done.stdout.count("cloning") for done in outputs] == [1, 0]
    assert all("FORK" in done.stdout for done in outputs)
    assert [path.name for path in (checkout / ".datacomp").iterdir()] == [f"fork-{commit}"]


@pytest.mark.parametrize("script", ["evaluate.sh", "evaluate_datacomp.sh"])
def test_help(place: Path, script: str) -> None:
    done = call(place, script, "--help")
    assert done.returncode == 0
    assert f"./scripts/{script} --train_output_dir" in done.stdout
    assert "#" not in done.stdout


def test_own_suite_on_one_process_and_on_several(place: Path) -> None:
    variables = {"VIRTUAL_ENV": str(place / "venv"), "ECHO": "1"}
    done = call(place, "evaluate.sh", *REQUIRED, EVAL_PROCESSES="1", **variables)
    assert (
        done.stdout.splitlines()[-1]
        == f"RUN -u {ROOT}/src/evaluation/main.py --train_output_dir logs/run --data_dir=data"
    )
    done = call(place, "evaluate.sh", *REQUIRED, EVAL_PROCESSES="3", **variables)
    assert "RUN -m torch.distributed.run --standalone --nproc-per-node 3 -- " in done.stdout
    done = call(place, "evaluate.sh", *REQUIRED, EVAL_PROCESSES="many", **variables)
    assert (done.returncode, "EVAL_PROCESSES=many" in done.stderr) == (1, True)


@pytest.fixture
def slurm(place: Path) -> dict[str, str]:
    """Variables of a batch job, with stand-ins for slurm's commands that write down how they were called."""
    folder = place / "slurm"
    program(
        folder / "srun", '#!/bin/sh\necho "srun $*" >> "$CALLS"\nsleep "${SECONDS_OF_WORK:-0}"\nexit "${STATUS:-0}"\n'
    )
    program(folder / "scontrol", '#!/bin/sh\necho "scontrol $*" >> "$CALLS"\n[ "$1" != show ] || echo node1\n')
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(place / "calls"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node1",
        "VIRTUAL_ENV": str(place / "no-venv"),
        "RUN": "logs/run",
        "DATA_DIR": "data",
    }


def test_batch_job_has_the_status_of_its_ranks(place: Path, slurm: dict[str, str]) -> None:
    script = ROOT / "scripts" / "slurm" / "evaluate.sbatch"
    for status in (0, 1):
        done = subprocess.run(
            ["bash", str(script), "--epoch", "2"], env={**slurm, "STATUS": str(status)}, timeout=60, check=False
        )
        assert done.returncode == status
    calls = (place / "calls").read_text()
    assert (
        "srun --kill-on-bad-exit=1 python -u src/evaluation/main.py --train_output_dir logs/run --data_dir data"
        in calls
    )
    assert "--epoch 2" in calls
    assert "requeue" not in calls


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("20", False)])
def test_batch_job_near_its_time_limit_goes_back_into_the_queue(
    restarts: str, requeued: bool, place: Path, slurm: dict[str, str]
) -> None:
    script = ROOT / "scripts" / "slurm" / "evaluate.sbatch"
    variables = {**slurm, "SECONDS_OF_WORK": "2", "SLURM_RESTART_COUNT": restarts}
    process = subprocess.Popen(["bash", str(script)], env=variables, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while not ((place / "calls").exists() and "srun" in (place / "calls").read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    # The ranks were left alone: they had their two seconds, and their status counts.
    assert process.returncode == 0
    assert ("scontrol requeue 77" in (place / "calls").read_text()) == requeued


def test_batch_job_of_the_public_code(place: Path, slurm: dict[str, str]) -> None:
    """It hands everything to evaluate_datacomp.sh, whose status is the job's: here there is no such epoch."""
    script = ROOT / "scripts" / "slurm" / "evaluate_datacomp.sbatch"
    variables = {**slurm, "RUN": str(place / "logs" / "run"), "DATA_DIR": str(place / "data")}
    done = subprocess.run(
        ["bash", str(script), "--epoch", "77"], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert f"{place}/logs/run/checkpoints/epoch_77.pt does not exist" in done.stderr
