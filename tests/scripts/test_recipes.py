"""The recipes in scripts/slurm, with stand-ins for slurm and torchrun: what training is told is what was published."""

from __future__ import annotations

import os
import re
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest

from end_to_end.published import published_flags
from neuclip.objectives import OBJECTIVES, flags_without_effect
from training.params import parse_args

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "scripts" / "slurm"


@dataclass(frozen=True)
class Published:
    """A column of the papers' tables of hyperparameters; samples in millions."""

    model: str
    pairs: float
    global_batch: int
    seen: float
    epochs: int
    lr: float
    lr_tau: float
    wd: float
    warmup: int
    rho: float
    eps: float


# NeuCLIP (arXiv 2511.08417) and FastCLIP (arXiv 2407.01445). Epochs: samples seen / pairs, rounded; DFN-14M: the sample's.
TABLE = {
    "cc3m": Published("RN50", 2.7, 1024, 100, 37, 1e-3, 1.25e-4, 0.1, 10000, 6.5, 1e-14),
    "cc12m": Published("ViT-B-32", 9.2, 2048, 300, 33, 4e-4, 5e-5, 0.1, 10000, 8.5, 1e-14),
    "dfn14m": Published("ViT-B-32", 13.7, 4096, 320, 24, 5e-4, 6.25e-5, 0.2, 500, 11.0, 1e-6),
    "dfn192m": Published("ViT-B-16", 192, 5120, 1300, 7, 3.125e-4, 3.9e-5, 0.2, 500, 11.0, 1e-6),
    "dfn1b": Published("ViT-B-16", 1000, 5120, 1000, 1, 3.125e-4, 3.9e-5, 0.2, 500, 11.0, 1e-6),
}
# Samples and keys, where they are known.
KEYS = {
    "cc3m": (2723840, 3318333),
    "cc12m": (9187328, 12423374),
    "dfn14m": (13710637, 19270000),
    "dfn192m": (192160462, 255020000),
}
METHODS = ("openclip", "fastclip", "siglip", "amorlip", "neuclip")
RECIPES = [(dataset, method) for dataset in TABLE for method in METHODS]
SHARDS = "/data/{00000..00009}.tar"

# Each call a line, its words separated by a character that none has.
STAND_IN = """#!/bin/sh
name="${0##*/}"
[ "$name $1" != "scontrol show" ] || { echo node1; exit 0; }
{ printf '%s' "$name"; printf '\\037%s' "$@"; printf '\\n'; } >> "$CALLS"
[ "$name" != sbatch ] || echo "4711 chain=$NEUCLIP_CHAIN"
case "$name" in srun | python) exit "${STATUS:-0}" ;; esac
"""


@dataclass(frozen=True)
class Launched:
    """A script that has ended: its status, what it said, and its calls of other programs."""

    status: int
    output: str
    error: str
    calls: list[list[str]]

    def words(self, *launcher: str) -> list[str]:
        """The flags that training was given by the only call, which begins with these words."""
        assert self.status == 0, self.error
        (call,) = self.calls
        beginning = [*launcher, "src/training/main.py"]
        assert call[: len(beginning)] == beginning
        return call[len(beginning) :]

    @property
    def args(self) -> Namespace:
        """What these flags mean, by srun."""
        return parse_args(self.words("srun", "--kill-on-bad-exit=1", "python", "-u"))


class Launch:
    """launch(script, *flags, **variables): run a script in a folder of stand-ins; None takes a variable away."""

    def __init__(self, folder: Path) -> None:
        self._calls = folder / "calls"
        self._programs = folder / "bin"
        self._programs.mkdir()
        for name in ("srun", "sbatch", "scontrol", "scancel", "python"):
            program = self._programs / name
            program.write_text(STAND_IN)
            program.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "NEUCLIP_"))}
        self._job = {
            **{name: value for name, value in kept.items() if name not in ("NAME", "PYTHONPATH")},
            "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self._calls),
            "VIRTUAL_ENV": str(folder / "no-environment"),
            "TRAIN_DATA": SHARDS,
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "8",
        }

    def __call__(self, script: Path, *flags: str, **variables: str | None) -> Launched:
        self._calls.unlink(missing_ok=True)
        environment = {name: value for name, value in {**self._job, **variables}.items() if value is not None}
        done = subprocess.run(
            ["bash", str(script), *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return Launched(done.returncode, done.stdout, done.stderr, [line.split("\037") for line in lines])


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def script(dataset: str, method: str) -> Path:
    return SLURM / dataset / f"{method}.sbatch"


NO_SLURM: dict[str, str | None] = dict.fromkeys(
    ("SLURM_SUBMIT_DIR", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NTASKS")
)


def test_every_method_has_a_recipe_for_every_data_set() -> None:
    assert set(METHODS) == set(OBJECTIVES)
    assert {path.parent.name + "/" + path.stem for path in SLURM.glob("*/*.sbatch")} == {
        f"{dataset}/{method}" for dataset, method in RECIPES
    }


@pytest.mark.parametrize(("dataset", "method"), RECIPES)
def test_recipe_says_what_was_published(dataset: str, method: str, launch: Launch) -> None:
    args, published = launch(script(dataset, method)).args, TABLE[dataset]
    assert args.objective == method
    assert args.name == f"{method}-{dataset}"
    assert (args.train_data, args.seed) == (SHARDS, 2026)
    assert (args.model, args.lr, args.wd, args.warmup, args.rho) == (
        *(published.model, published.lr, published.wd),
        *(published.warmup, published.rho),
    )
    assert args.batch_size * args.accum_freq * 8 == published.global_batch
    assert args.epochs == published.epochs
    assert dataset == "dfn14m" or args.epochs == round(published.seen / published.pairs)
    assert args.epochs * args.train_num_samples == pytest.approx(published.seen * 1e6, rel=0.04)
    assert args.train_num_samples == pytest.approx(published.pairs * 1e6, rel=0.01)
    assert args.data_size >= args.train_num_samples
    assert (args.train_num_samples, args.data_size) == KEYS.get(dataset, (args.train_num_samples, args.data_size))
    # What no recipe says and all releases take from open_clip: betas and epsilon of AdamW, by the kind of model.
    adam = (0.9, 0.999, 1e-8) if published.model == "RN50" else (0.9, 0.98, 1e-6)
    assert (args.optimizer, args.beta1, args.beta2, args.eps) == ("adamw", *adam)
    assert (args.lr_scheduler, args.lr_min, args.accum_freq, args.use_bn_sync) == ("cosine", 0.0, 1, False)
    assert (args.grad_clip_norm, args.aug_cfg, args.dataset_resampled) == (
        1.0 if method == "amorlip" else None,
        {},
        False,
    )
    # The run lives through interruptions, and its epochs stay.
    assert (args.resume, args.requeue_on_signal, args.save_every_minutes) == ("latest", True, 30)
    assert (args.save_frequency, args.stop_epochs) == (1, args.epochs)
    assert args.keep_last >= max(2, args.epochs)
    # A published word that means nothing here.
    allowed = ["--local-loss (openclip)"] if (dataset, method) == ("dfn14m", "neuclip") else []
    assert flags_without_effect(args) == allowed


@pytest.mark.parametrize("dataset", TABLE)
def test_baselines_learn_the_temperature_at_the_rate_of_the_model(dataset: str, launch: Launch) -> None:
    for method in ("openclip", "siglip"):
        args = launch(script(dataset, method)).args
        assert (args.lr_tau, args.temperature, args.lr_tau_scheduler) == (args.lr, None, "cosine")
    args = launch(script(dataset, "openclip")).args
    assert args.local_loss
    assert args.gather_with_grad


@pytest.mark.parametrize("dataset", TABLE)
def test_fastclip(dataset: str, launch: Launch) -> None:
    args, published = launch(script(dataset, "fastclip")).args, TABLE[dataset]
    assert (args.multiply_tau, args.temperature_scheme) == (True, "global_learnable")
    assert (args.lr_tau, args.lr_tau_scheduler, args.fastclip_eps) == (published.lr_tau, "step_thresh", published.eps)
    # FastCLIP's release; on DFN what that of DRRho-CLIP (arXiv 2505.06699) recommends for FastCLIP.
    decay = {"cc3m": 18, "cc12m": 16}.get(dataset, published.epochs)
    gamma = 0.2 if dataset in ("cc3m", "cc12m") else min(1.0, 4.177 * published.epochs**-0.7265)
    assert (args.gamma, args.gamma_schedule, args.gamma_decay_epochs) == (
        pytest.approx(gamma, abs=0.005),
        "cosine",
        decay,
    )


@pytest.mark.parametrize("dataset", TABLE)
def test_neuclip(dataset: str, launch: Launch) -> None:
    args, published = launch(script(dataset, "neuclip")).args, TABLE[dataset]
    assert (args.temperature, args.temperature_scheme) == (0.07, "global_learnable")
    assert (args.lr_tau, args.lr_tau_scheduler, args.fastclip_eps) == (published.lr_tau, "step_thresh", published.eps)
    # By epochs, the weight of the batch's own estimate would stay at 1 for the only epoch.
    schedule = "cosine_step" if published.epochs == 1 else "cosine"
    assert (args.gamma, args.gamma_schedule, args.gamma_decay_epochs) == (0.42, schedule, published.epochs)
    assert (args.npn_num_protos, args.npn_restart_iter, args.npn_repetition, args.npn_lr) == (4096, 500, 10, 1.0)
    assert (args.npn_optimizer, args.npn_wd) == ("adagrad_norm", 0.0)


def test_published_sample_is_followed_flag_for_flag(launch: Launch) -> None:
    ours = vars(launch(script("dfn14m", "neuclip")).args)
    theirs = vars(parse_args(published_flags()))
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {"name", "train_data", "resume", "requeue_on_signal", "save_every_minutes", "keep_last"}


@pytest.mark.parametrize("dataset", TABLE)
def test_amorlip(dataset: str, launch: Launch) -> None:
    """The CC12M command of its release; elsewhere in proportion."""
    args, published = launch(script(dataset, "amorlip")).args, TABLE[dataset]
    assert (args.lambda_lr, args.lambda_update_frequency, args.lambda_loss_type) == (1e-3, "[3]", "log_l2")
    assert (args.pos_coef, args.model_ema_beta, args.update_ema_mlps_every_n_steps) == (1e-3, 0.92, 2)
    assert (args.h_dim_factor, args.calculate_full, args.scale_loss, args.grad_clip_norm) == (1, True, True, 1.0)
    assert (args.lr_tau, args.lr_tau_scheduler) == (pytest.approx(args.lr / 4), "step_thresh")
    signed = [float(rho) for rho in args.rho_list.strip("[]").split()]
    if dataset == "dfn1b":
        # One epoch: no networks of an epoch before, and the present ones must not start anew.
        assert (args.fit_w_prev, args.reinit_lambda_every_n_epochs) == (False, 0)
        assert signed == [published.rho]
        return
    assert (args.fit_w_prev, args.z_beta_max, args.reinit_lambda_every_n_epochs) == (True, 0.8, 1)
    assert args.beta_decay_epochs == published.epochs // 2
    assert signed == [published.rho, -published.rho, -published.rho]


@pytest.mark.parametrize(("dataset", "method"), RECIPES)
def test_lines_for_slurm(dataset: str, method: str) -> None:
    lines = script(dataset, method).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    # sbatch reads such lines up to the first command.
    asked = [line.removeprefix("#SBATCH --").split("=") for line in lines[1 : lines.index("")]]
    assert dict(option if len(option) == 2 else (*option, "") for option in asked) == {
        **{"job-name": f"{method}-{dataset}", "nodes": "2", "ntasks-per-node": "4", "gres": "gpu:4"},
        **{"cpus-per-task": "7", "mem": "120G", "time": "2-00:00:00", "output": "%x-%j.out"},
        **{"open-mode": "append", "signal": "USR1@300", "requeue": ""},
    }
    text = "\n".join(lines)
    assert f"sbatch scripts/slurm/{dataset}/{method}.sbatch [more flags]" in text
    assert f"global batch {TABLE[dataset].global_batch} (8 x {TABLE[dataset].global_batch // 8})" in text


@pytest.mark.parametrize(("dataset", "method"), [recipe for recipe in RECIPES if recipe[0] in KEYS])
def test_example_names_all_shards(dataset: str, method: str) -> None:
    """10,000 rows a shard, as the tools write that fetch these data; DFN-192M's keys have room for one more."""
    found = re.search(r"TRAIN_DATA='[^']*\{0+\.\.(\d+)\}\.tar' sbatch", script(dataset, method).read_text())
    assert found is not None
    assert 0 <= 10000 * (int(found[1]) + 1) - KEYS[dataset][1] + (dataset == "dfn192m") * 10000 < 10000
    # The tools' own names: img2dataset's for some hundred shards, those of DataComp's scripts.
    assert len(found[1]) == (5 if dataset.startswith("cc") else 8)


@pytest.mark.parametrize(
    ("tasks", "flags", "batch_size"),
    [
        ("4", (), 256),
        ("16", (), 64),
        ("1", ("--accum-freq", "8"), 128),
        ("2", ("--accum_freq=4",), 128),
        ("2", ("--accum-freq", "2", "--accum-freq", "8"), 64),
    ],
)
def test_global_batch_stays(tasks: str, flags: tuple[str, ...], batch_size: int, launch: Launch) -> None:
    args = launch(script("cc3m", "siglip"), *flags, SLURM_NTASKS=tasks).args
    assert args.batch_size == batch_size
    assert args.batch_size * args.accum_freq * int(tasks) == 1024


def test_the_caller_has_the_last_word(launch: Launch) -> None:
    flags = ("--batch-size", "5", "--epochs=2", "--train_data", "mine.tar", "--train-num-samples", "99")
    args = launch(script("cc3m", "openclip"), *flags, SLURM_NTASKS="3", TRAIN_DATA=None, NAME="other").args
    assert (args.batch_size, args.epochs, args.train_data, args.train_num_samples) == (5, 2, "mine.tar", 99)
    assert args.name == "other"


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ((), {"SLURM_NTASKS": "3"}, "the global batch of 1024 does not divide by 3 ranks with --accum-freq 1"),
        (("--accum-freq", "3"), {}, "does not divide by 8 ranks with --accum-freq 3"),
        (("--accum-freq", "few"), {}, "--accum-freq few is no number"),
        ((), {"TRAIN_DATA": None}, "set TRAIN_DATA to the shards"),
        ((), {"SLURM_JOB_ID": None}, "there is no slurm job: submit this script"),
        ((), {"SLURM_NTASKS": None}, "SLURM_NTASKS has not been set by slurm: ask for --ntasks-per-node"),
        (
            (),
            {"SLURM_GPUS_ON_NODE": "2", "SLURM_NTASKS_PER_NODE": "4"},
            "4 tasks on a node with 2 GPUs: ask for as many",
        ),
        ((), {"SLURM_ARRAY_TASK_ID": "3"}, "all jobs of an array would train the run neuclip-cc3m: chain them"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    flags: tuple[str, ...], variables: dict[str, str | None], message: str, launch: Launch
) -> None:
    done = launch(script("cc3m", "neuclip"), *flags, **variables)
    assert (done.status, done.calls) == (2, [])
    (line,) = done.error.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_jobs_of_an_array_with_names_of_their_own_are_runs(launch: Launch) -> None:
    args = launch(script("cc3m", "neuclip"), SLURM_ARRAY_TASK_ID="3", NAME="seed-3").args
    assert args.name == "seed-3"


def test_gpus_without_a_task_are_told(launch: Launch) -> None:
    done = launch(script("cc3m", "neuclip"), SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="4")
    assert done.error.splitlines() == ["note: 8 GPUs on a node and 4 tasks, one GPU each: --ntasks-per-node=8 uses all"]
    assert launch(script("cc3m", "neuclip"), SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="4").error == ""


@pytest.mark.parametrize("name", ["dfn14m/neuclip", "evaluate", "evaluate_datacomp"])
@pytest.mark.parametrize("variable", ["SLURM_SUBMIT_DIR", "NEUCLIP_ROOT"])
def test_submitted_from_elsewhere(name: str, variable: str, launch: Launch, tmp_path: Path) -> None:
    done = launch(SLURM / f"{name}.sbatch", **{variable: str(tmp_path)})
    assert (done.status, done.calls) == (2, [])
    assert done.error.splitlines()[-1] == "error: submit from the checkout, or set NEUCLIP_ROOT to its path"


def test_dry_run_needs_no_slurm(launch: Launch, tmp_path: Path) -> None:
    """It is for as many ranks as the top of the script asks for, unless it says otherwise."""
    variables = {**NO_SLURM, "TRAIN_DATA": None}
    words = launch(script("dfn192m", "amorlip"), "--dry-run", **variables).words("python", "-u")
    args = parse_args(words)
    assert (args.dry_run, args.batch_size, args.train_data, args.resume) == (8, 640, None, "latest")
    assert not args.requeue_on_signal
    larger = tmp_path / "larger.sbatch"
    larger.write_text(script("dfn192m", "amorlip").read_text().replace("--nodes=2", "--nodes=4"))
    args = parse_args(launch(larger, "--dry-run", **variables, NEUCLIP_ROOT=str(ROOT)).words("python", "-u"))
    assert (args.dry_run, args.batch_size) == (16, 320)
    larger.write_text(larger.read_text().replace("#SBATCH --nodes=4", "#SBATCH -N 4"))
    done = launch(larger, "--dry-run", "--lr", "1e-3", **variables, NEUCLIP_ROOT=str(ROOT))
    assert (done.status, done.calls) == (2, [])
    assert "say for how many ranks, --dry-run RANKS" in done.error
    args = parse_args(launch(larger, "--dry-run", "4", **variables, NEUCLIP_ROOT=str(ROOT)).words("python", "-u"))
    assert (args.dry_run, args.batch_size) == (4, 1280)
    args = parse_args(launch(script("dfn192m", "amorlip"), "--dry_run", "2", **NO_SLURM).words("python", "-u"))
    assert (args.dry_run, args.batch_size, args.train_data) == (2, 2560, SHARDS)


def test_dry_run_in_a_job_is_by_all_its_tasks(launch: Launch) -> None:
    args = launch(script("cc12m", "neuclip"), "--dry-run", SLURM_NTASKS="4").args
    assert (args.dry_run, args.batch_size, args.resume, args.requeue_on_signal) == (4, 512, "latest", False)


def test_torchrun_runs_the_same_recipe(launch: Launch, tmp_path: Path) -> None:
    environment = tmp_path / "environment" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(STAND_IN)
    (environment / "python").chmod(0o755)
    variables = {"VIRTUAL_ENV": str(environment.parent), "NEUCLIP_PROCESSES": "2"}
    done = launch(ROOT / "scripts" / "torchrun.sh", "cc12m", "fastclip", "--accum-freq", "4", **variables)
    assert done.status == 0, done.error
    call = done.calls[-1]
    launcher = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    assert call[:8] == [*launcher, "src/training/main.py"]
    ours, by_slurm = vars(parse_args(call[8:])), vars(launch(script("cc12m", "fastclip")).args)
    assert ours["batch_size"] * 4 * 2 == 2048
    differing = {name for name in ours if ours[name] != by_slurm[name]}
    assert differing == {"accum_freq", "requeue_on_signal"}
    for words, message in (
        (("cc4m", "fastclip"), "there is no scripts/slurm/cc4m/fastclip.sbatch"),
        (("cc12m",), "give a data set (cc12m cc3m dfn14m dfn192m dfn1b) and a method"),
    ):
        done = launch(ROOT / "scripts" / "torchrun.sh", *words, **variables)
        assert (done.status, message in done.error) == (1, True)


def test_chain_submits_its_links_one_after_the_other(launch: Launch) -> None:
    words = ("--time=60", "--nodes=1", str(script("cc3m", "neuclip")), "--lr", "1e-4")
    done = launch(SLURM / "chain.sh", "4", *words)
    assert done.calls == [["sbatch", "--parsable", "--no-requeue", "--array=1-4%1", *words]]
    assert done.output.split() == ["4711", "chain=1"]
    for wrong, message in (
        ((), "how many links?"),
        (("0", words[2]), "how many links?"),
        (("4", "gone.sbatch"), "which run?"),
        (("4", "--time=60"), "which run?"),
    ):
        done = launch(SLURM / "chain.sh", *wrong)
        assert (done.status, done.calls, message in done.error) == (2, [], True)


@pytest.mark.parametrize(("status", "cancels"), [(0, True), (2, True), (1, False), (75, False)])
def test_a_link_leaves_the_next_one_something_to_do(status: int, cancels: bool, launch: Launch) -> None:
    variables = {"NEUCLIP_CHAIN": "1", "SLURM_ARRAY_JOB_ID": "4711", "STATUS": str(status)}
    done = launch(script("cc3m", "neuclip"), **variables)
    assert done.status == status
    (training, *rest) = done.calls
    args = parse_args(training[5:])
    # The next link, not this job, goes on.
    assert (args.resume, args.requeue_on_signal) == ("latest", False)
    assert rest == ([["scancel", "--state=PENDING", "4711"]] if cancels else [])


def test_an_evaluation_without_slurm_is_one_line(launch: Launch) -> None:
    done = launch(SLURM / "evaluate.sbatch", **NO_SLURM, RUN="logs/run", DATA_DIR="data")
    assert (done.status, done.calls) == (2, [])
    assert re.fullmatch(r"error: there is no slurm job: .*scripts/evaluate.sh needs no slurm\n", done.error)
