"""The study's scripts: flags are training's, tuning is alike for all, what is done stays done, tables hold the figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from study import lanes, measure, report, runs, training, tuning
from study import run as study_run
from study.errors import StudyError
from training.params import parse_args
from training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]

# Stands in for training: its score is highest at a learning rate that depends on the method.
FAKE = """
    import json, os, sys, time
    from pathlib import Path
    flags = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
    folder = Path(flags["logs"]) / flags["name"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "calls", "a") as calls:
        calls.write(os.environ.get("OMP_NUM_THREADS", "") + "\\n")
    if flags["seed"] == "9":
        sys.exit(7)
    if flags["seed"] == "8":
        print("training", flush=True)
        time.sleep(60)
    params = [f"{name.replace('-', '_')}: {value or True}\\n" for name, value in flags.items()]
    (folder / "params.txt").write_text("".join(params))
    best = {"siglip": 8e-3, "amorlip": 5e-4}.get(flags["objective"], 1e-3)
    gamma = {"fastclip": 0.8, "neuclip": 0.42}.get(flags["objective"], 0.0)
    score = 1 - abs(float(flags["lr"]) - best) - 0.1 * abs(float(flags.get("gamma", 0)) - gamma)
    recalls = {f"{way}_R@{k}": score for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    line = {"epoch": int(flags["epochs"]), **recalls}
    (folder / "results.jsonl").write_text(json.dumps(line) + "\\n")
"""


@pytest.fixture
def setup(tmp_path: Path) -> runs.Setup:
    """Paths in a temporary folder, and the sizes of three shards."""
    train = tmp_path / "data" / "train"
    train.mkdir(parents=True)
    (train / "sizes.json").write_text(json.dumps({"00001.tar": 100, "00000.tar": 100, "00002.tar": 30}))
    return runs.Setup(tmp_path / "data", tmp_path / "logs", epochs=4, short_epochs=2, pairs=225)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lanes start the stand-in."""
    main = tmp_path / "checkout" / "src" / "training" / "main.py"
    main.parent.mkdir(parents=True)
    main.write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(lanes, "ROOT", tmp_path / "checkout")


def chosen(method: str, lr: float) -> runs.Choice:
    return runs.Choice(lr, runs.PUBLISHED_GAMMA.get(method))


def some_choices() -> dict[runs.Case, runs.Choice]:
    return {(method, size): chosen(method, 1e-3) for method in runs.METHODS for size in runs.BATCH_SIZES}


def test_all_commands_are_training_s(setup: runs.Setup) -> None:
    all_runs = [*runs.comparison_runs(setup, some_choices()), *runs.ablation_runs(setup, some_choices())]
    all_runs += [
        runs.tuning_run(setup, method, size, chosen(method, 2e-3))
        for method in runs.METHODS
        for size in runs.BATCH_SIZES
    ]
    assert len({run.name for run in all_runs}) == len(all_runs)
    for run in all_runs:
        args = parse_args(run.command())
        assert args.name == run.name
        assert args.train_data == f"{setup.data}/train/{{00000..00001}}.tar"
        # Each method sees the same samples.
        assert args.batch_size in runs.BATCH_SIZES
        assert args.warmup * args.batch_size == 25_600
        assert args.epochs == (2 if run.name.startswith(("tune", "ablation")) else 4)
        if args.objective == "fastclip":
            assert (args.data_size, args.gamma_decay_epochs) == (200, args.epochs / 2)
        if args.objective == "neuclip" and not run.name.startswith("ablation"):
            assert args.npn_restart_iter * args.batch_size == 16_000


def test_every_variant_changes_what_it_says(setup: runs.Setup) -> None:
    plain, *changing = [run for run in runs.ablation_runs(setup, some_choices()) if run.name.endswith("-s0")]
    compared = next(run for run in runs.comparison_runs(setup, some_choices()) if run.name == "neuclip-b32-s0")
    assert plain.name == "ablation-none-s0"
    assert {flag for flag, value in compared.flags.items() if plain.flags[flag] != value} == {"epochs", "keep-last"}
    resolved = vars(parse_args(plain.command()))
    for run in changing:
        changed = {flag for flag in plain.flags | run.flags if plain.flags.get(flag) != run.flags.get(flag)}
        assert changed, run.name
        assert all(flag.startswith(("npn_", "gamma", "rho")) for flag in changed)
        other = vars(parse_args(run.command()))
        assert all(resolved[flag] != other[flag] for flag in changed), (run.name, changed)


def more_shards(setup: runs.Setup) -> runs.Setup:
    """Enough for a part of them to be whole shards."""
    sizes = {f"{shard:05d}.tar": 100 for shard in range(10)}
    (setup.data / "train" / "sizes.json").write_text(json.dumps(sizes))
    return replace(setup, pairs=1000)


def test_visits_are_more_of_fewer_pairs(setup: runs.Setup) -> None:
    setup = more_shards(setup)
    compared = {run.name: parse_args(run.command()) for run in runs.comparison_runs(setup, some_choices())}
    for run in runs.visits_runs(setup, some_choices()):
        args = parse_args(run.command())
        whole = compared[run.name.replace("visits-", "").replace("gamma1", "fastclip").replace("-s", "-b32-s")]
        assert (args.train_data, args.epochs) == (f"{setup.data}/train/{{00000..00001}}.tar", 20)
        differ = {flag for flag, value in vars(whole).items() if getattr(args, flag) != value}
        lengths = {"fastclip": {"gamma_decay_epochs", "data_size"}, "neuclip": {"gamma_decay_epochs"}}
        named = {"name", "train_data", "epochs", "stop_epochs", *lengths.get(args.objective, ())}
        if "gamma1" in run.name:  # FastCLIP without its memory
            assert args.gamma == 1
            named.add("gamma")
        assert differ - {"save_frequency", "keep_last"} == named
        if args.objective == "fastclip":
            assert (args.data_size, args.gamma_decay_epochs) == (200, 10)


def test_memory_differs_in_gamma_alone(setup: runs.Setup) -> None:
    reference, plain, *changed = (run for run in runs.memory_runs(setup, some_choices()) if run.name.endswith("-s0"))
    assert (parse_args(reference.command()).objective, reference.epochs) == ("openclip", setup.short_epochs)
    short = runs.training_run(setup, plain.name, "fastclip", 32, chosen("fastclip", 1e-3), 0, setup.short_epochs)
    assert plain.flags == short.flags
    assert all(run.flags == {**plain.flags, "gamma": run.flags["gamma"]} for run in changed)
    # At 1 nothing is remembered, whatever the schedule.
    assert [parse_args(run.command()).gamma for run in changed] == [0.42, 0.8, 1.0]


def test_data_smaller_than_a_shard_is_refused(setup: runs.Setup) -> None:
    small = runs.Setup(setup.data, setup.logs, 1, 1, pairs=99)
    with pytest.raises(StudyError, match=r"--pairs 99 .* give more"):
        _ = small.shards


@pytest.mark.usefixtures("fake")
def test_tuning_goes_on_beyond_the_ends(setup: runs.Setup) -> None:
    scores = tuning.tune(setup, lambda due: training.train_all(due, setup.logs, lanes=2))
    assert set(scores) == {(method, size) for method in runs.METHODS for size in runs.BATCH_SIZES}
    rates = {case: set(found.rates) for case, found in scores.items()}
    best = {case: found.choice for case, found in scores.items()}
    assert best["siglip", 128] == (8e-3, None)
    assert rates["siglip", 128] == {5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2}
    assert best["amorlip", 32] == (5e-4, None)
    assert rates["amorlip", 32] == {2.5e-4, 5e-4, 1e-3}
    assert best["openclip", 128] == (1e-3, None)
    assert rates["openclip", 128] == {5e-4, 1e-3, 2e-3}
    assert rates["openclip", 32] == {2.5e-4, 5e-4, 1e-3, 2e-3}
    # Each γ at the best learning rate.
    for size in runs.BATCH_SIZES:
        assert best["fastclip", size] == (1e-3, 0.8)
        assert best["neuclip", size] == (1e-3, 0.42)
        assert set(scores["fastclip", size].gammas) == set(scores["neuclip", size].gammas) == {0.2, 0.42, 0.8}
    assert not scores["openclip", 32].gammas


@pytest.mark.usefixtures("fake")
def test_finished_runs_are_not_trained_again(setup: runs.Setup, capsys: pytest.CaptureFixture[str]) -> None:
    due = [runs.tuning_run(setup, "openclip", 128, chosen("openclip", lr)) for lr in (1e-3, 2e-3)]
    training.train_all(due[:1], setup.logs, lanes=2)
    training.train_all(due, setup.logs, lanes=2)
    assert "2 runs, 1 of them finished before" in capsys.readouterr().out
    calls = [(setup.logs / run.name / "calls").read_text().splitlines() for run in due]
    assert [len(called) for called in calls] == [1, 1]
    assert calls[0] == [str(max(1, (os.cpu_count() or 1) // 2))]


@pytest.mark.usefixtures("fake")
def test_a_line_that_a_kill_has_torn_is_not_taken_for_an_evaluation(setup: runs.Setup) -> None:
    run = runs.tuning_run(setup, "openclip", 128, chosen("openclip", 1e-3))
    training.train_all([run], setup.logs, lanes=1)
    results = setup.logs / run.name / "results.jsonl"
    results.write_text(results.read_text()[:-9])
    assert not training.is_finished(run, setup.logs)
    with pytest.raises(StudyError, match=r"tune-openclip-b128-lr0\.001 has no evaluation: its out\.log says why"):
        tuning.score(setup, "openclip", 128, chosen("openclip", 1e-3))


@pytest.mark.parametrize(
    ("there", "chosen", "names"), [(2, None, ["0", "1"]), (1, "3", ["3"]), (0, "0", []), (0, "-1", [])]
)
def test_lanes_get_the_gpus_that_are_there(
    there: int, chosen: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert lanes.gpus() == names


@pytest.mark.usefixtures("fake")
def test_a_folder_with_another_run_is_refused(setup: runs.Setup) -> None:
    run = runs.training_run(setup, "openclip-b128-s0", "openclip", 128, chosen("openclip", 1e-3), 0, 4)
    training.train_all([run], setup.logs, lanes=1)
    other = runs.training_run(setup, "openclip-b128-s0", "openclip", 128, chosen("openclip", 2e-3), 0, 4)
    with pytest.raises(StudyError, match=r"was trained with lr 0\.001, not 0\.002"):
        training.train_all([other], setup.logs, lanes=1)


@pytest.mark.usefixtures("fake")
def test_a_folder_of_other_data_or_of_another_variant_is_refused(setup: runs.Setup) -> None:
    """Runs with fewer pairs, or of an ablation that has been redefined, are not taken for these; moved data is."""
    run = runs.tuning_run(setup, "neuclip", 128, chosen("neuclip", 1e-3))
    training.train_all([run], setup.logs, lanes=1)
    fewer = replace(setup, pairs=100)
    with pytest.raises(StudyError, match=r"train_data .*00001\}\.tar, not .*00000\}\.tar"):
        training.is_finished(runs.tuning_run(fewer, "neuclip", 128, chosen("neuclip", 1e-3)), setup.logs)
    with pytest.raises(StudyError, match=r"was trained with gamma 0\.42, not 0\.4:"):
        training.is_finished(replace(run, flags={**run.flags, "gamma": "0.4"}), setup.logs)
    without = {flag: value for flag, value in run.flags.items() if flag != "lr_tau"}
    with pytest.raises(StudyError, match=r"was trained with lr_tau 0\.000125, not "):
        training.is_finished(replace(run, flags=without), setup.logs)
    moved = setup.data.rename(setup.data.with_name("moved"))
    assert training.is_finished(
        runs.tuning_run(replace(setup, data=moved), "neuclip", 128, chosen("neuclip", 1e-3)), setup.logs
    )
    other = {"workers": "3", "precision": "amp_bf16", "eps": "0.000001", "multiply_tau": ""}
    assert training.is_finished(replace(run, flags={**run.flags, **other}), setup.logs)


def test_a_run_is_known_by_what_training_writes(setup: runs.Setup) -> None:
    """params.txt holds resolved values: 1e-06 for 1e-6, True for a switch, paths of the machine that trained."""
    setup = more_shards(setup)
    all_runs = [*runs.comparison_runs(setup, some_choices()), *runs.ablation_runs(setup, some_choices())]
    all_runs += [*runs.visits_runs(setup, some_choices()), *runs.memory_runs(setup, some_choices())]
    all_runs += [
        runs.tuning_run(setup, method, size, chosen(method, 2e-3))
        for method in runs.METHODS
        for size in runs.BATCH_SIZES
    ]
    for run in all_runs:
        args = parse_args(run.command())
        folder = RunFolder(str(setup.logs), run.name)
        folder.create()
        folder.write_params(args)
        assert not training.is_finished(run, setup.logs)


def test_nothing_is_measured_on_what_chooses_the_learning_rate(setup: runs.Setup) -> None:
    chosen_on = {
        Path(runs.tuning_run(setup, method, size, chosen(method, 1e-3)).flags["val-data"]).name
        for method in runs.METHODS
        for size in runs.BATCH_SIZES
    }
    assert chosen_on == {"retrieval_combo"}
    setup = more_shards(setup)
    all_runs = [*runs.comparison_runs(setup, some_choices()), *runs.ablation_runs(setup, some_choices())]
    all_runs += [*runs.visits_runs(setup, some_choices()), *runs.memory_runs(setup, some_choices())]
    looked_at = {Path(run.flags[flag]).name for run in all_runs for flag in ("val-data", "zeroshot-data")}
    assert not chosen_on & (looked_at | {*measure.PAIRS, *measure.ZEROSHOT})
    assert {name.split("/")[0] for name in all_metrics()} == {*measure.PAIRS, *measure.ZEROSHOT}


def test_methods_differ_in_their_own_flags_alone(setup: runs.Setup) -> None:
    """Data, model, schedule, seed and what is evaluated are the same for all methods of a batch size."""
    for size in runs.BATCH_SIZES:
        plain = runs.training_run(setup, "x", "openclip", size, chosen("openclip", 1e-3), 0, 4).flags
        for method in runs.METHODS:
            flags = runs.training_run(setup, "x", method, size, chosen(method, 1e-3), 0, 4).flags
            own = {flag for flag in flags | plain if flags.get(flag) != plain.get(flag)}
            assert own <= {
                *runs.method_flags(method, size, chosen(method, 1e-3)),
                "gamma_decay_epochs",
                "beta_decay_epochs",
                "data_size",
            }
            assert not own & {"train-data", "epochs", "batch-size", "lr", "wd", "warmup", "seed", "model", "precision"}


@pytest.mark.usefixtures("fake")
def test_a_run_that_cannot_be_begun_is_named(setup: runs.Setup) -> None:
    due = [
        runs.training_run(setup, f"run-s{seed}", "openclip", 128, chosen("openclip", 1e-3), seed, 4) for seed in (0, 1)
    ]
    (setup.logs / "output" / "run-s0.txt").mkdir(parents=True)  # its output cannot be written
    with pytest.raises(StudyError, match="failed: run-s0 "):
        training.train_all(due, setup.logs, lanes=1)
    assert training.is_finished(due[1], setup.logs)


@pytest.mark.usefixtures("fake")
def test_a_failed_run_is_named_and_the_others_are_trained(setup: runs.Setup) -> None:
    due = [
        runs.training_run(setup, f"run-s{seed}", "openclip", 128, chosen("openclip", 1e-3), seed, 4) for seed in (9, 1)
    ]
    with pytest.raises(StudyError, match=r"failed: run-s9 \(see .*run-s9\.txt\)"):
        training.train_all(due, setup.logs, lanes=1)
    assert training.is_finished(due[1], setup.logs)


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_reaches_the_trainings(setup: runs.Setup, fake: None, told: signal.Signals) -> None:
    run = runs.training_run(setup, "run-s8", "openclip", 128, chosen("openclip", 1e-3), 8, 4)
    program = textwrap.dedent(f"""
        import signal, sys
        from pathlib import Path
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as without nohup, under which the tests may have been started
        sys.path.insert(0, {str(ROOT / "scripts")!r})
        from study import lanes
        lanes.ROOT = Path({str(lanes.ROOT)!r})
        try:
            words = {("src/training/main.py", *run.command())!r}
            lanes.work_off([lanes.Job("run", words, Path({str(setup.logs / "out.txt")!r}))], 1)
        except lanes.StudyError as error:
            sys.exit(str(error))
    """)
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (setup.logs / "out.txt").exists() or "training" not in (setup.logs / "out.txt").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(told)
        assert "the same command goes on" in process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert time.monotonic() - began < 20


def test_figures_are_drawn_of_the_runs_that_there_are(
    setup: runs.Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("siglip-b128-s0", "neuclip-b128-s0", "neuclip-b128-s2", "openclip-b32-s1"):
        write_run(setup, name, 0.1)
    (setup.logs / "fastclip-b128-s0").mkdir()  # not measured yet
    for name in ("siglip-b128-s0", "neuclip-b128-s2", "visits-neuclip-s0"):
        write_errors(setup.logs / name)
    called: list[list[str]] = []
    monkeypatch.setattr(report.figures, "main", lambda words: called.append(words) or 0)
    out = tmp_path / "out"
    report.write_figures(setup.logs, out)
    paths = [[Path(word).name for word in words if word.startswith(str(setup.logs))] for words in called]
    assert paths == [["openclip-b32-s1"], ["siglip-b128-s0", "neuclip-b128-s0", "neuclip-b128-s2"]]
    assert [words[-1] for words in called] == [str(out / name) for name in ("curves-b32", "curves-b128")]
    # Errors of the first seed alone.
    tables = [(out / name / "normalizer_error.md").read_text() for name in ("error", "error-visits")]
    assert [sorted(line.split(" | ")[0] for line in table.splitlines()[2:4]) for table in tables] == [
        ["", "| siglip-b128-s0"],
        ["", "| visits-neuclip-s0"],
    ]
    assert (out / "error" / "normalizer_error.png").stat().st_size > 1000
    monkeypatch.setattr(report.figures, "main", lambda _: 2)
    with pytest.raises(StudyError, match="curves: the command failed"):
        report.write_figures(setup.logs, out)


def write_errors(folder: Path) -> None:
    """A measurement of one checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.txt").write_text(f"name: {folder.name}\nmodel: study\nobjective: siglip\nepochs: 4\n")
    sides = {side: {"mse": 0.5, "bias": 0.1, "mean": -3.0} for side in ("image", "text")}
    estimates = {
        "used": {**sides, "mse": 0.5, "unknown": 0.0},
        "batch": {**sides, "mse": 0.5, "unknown": 0.0},
        "own": None,
    }
    record = {
        **{"epoch": 1, "iteration": None, "sha256": "", "data": "train", "batch": 32, "probes": 9, "seed": 0},
        **{"precision": "fp32", "step": 10, "samples_seen": 320, "temperature": 0.07},
        **{"truth": {"image": -3.0, "text": -3.0}, "estimates": estimates},
    }
    (folder / measure.ERRORS).write_text(json.dumps({"records": [record]}))


def write_run(setup: runs.Setup, name: str, value: float) -> None:
    folder = setup.logs / name
    folder.mkdir(parents=True)
    metrics = dict.fromkeys(all_metrics(), value)
    (folder / report.FILE).write_text(json.dumps({"metrics": metrics}))
    times = {"objective_seconds": 0.02, "normalizer_seconds": 0.01, "samples_per_second": 1280.0}
    lines = [
        {"step": step, "seconds_per_step": seconds, **times} for step, seconds in ((50, 9.0), (100, 0.1), (150, 0.3))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_hold_what_was_measured(setup: runs.Setup, tmp_path: Path) -> None:
    for seed, value in ((0, 0.10), (1, 0.12), (2, 0.14)):
        write_run(setup, f"neuclip-b128-s{seed}", value)
        write_run(setup, f"ablation-none-s{seed}", value)
        write_run(setup, f"visits-neuclip-s{seed}", value)
        write_run(setup, f"memory-gamma0.8-s{seed}", value)
        write_run(setup, f"memory-openclip-s{seed}", value - 0.01)
        write_run(setup, f"openclip-b128-s{seed}", value + 0.01)
    write_run(setup, "neuclip-b32-s0", 0.15)
    for seed in (0, 1):
        write_run(setup, f"siglip-b32-s{seed}", 0.16)
    write_run(setup, "ablation-mlp-s0", 0.11)
    entries = [
        {
            **{"method": method, "batch_size": size, "lr": 2e-3, "scores": {"0.001": 0.01, "0.002": 0.05}},
            **{"gamma": choice.gamma, "gamma_scores": {} if choice.gamma is None else {"0.2": 0.03, "0.42": 0.04}},
        }
        for (method, size), choice in some_choices().items()
    ]
    (setup.logs / report.CHOICES).write_text(json.dumps(entries))
    report.write_report(setup.logs, some_choices(), tmp_path / "out")
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    row = next(line for line in lines if "| 128 | neuclip |" in line)
    assert row.startswith("| 128 | neuclip | 0.001 | 0.42 | 3 | 12.0 ± 2.0 |")
    assert "| 128 | openclip | 0.001 | – | 3 | **13.0 ± 2.0** |" in next(
        line for line in lines if "128 | openclip" in line
    )
    assert "| 128 | siglip | 0.001 | – | 0 | – |" in next(line for line in lines if "128 | siglip" in line)
    # One seed against two, three against one: nothing is best.
    assert "| 32 | neuclip | 0.001 | 0.42 | 1 | 15.0 |" in next(line for line in lines if "32 | neuclip" in line)
    assert "| 32 | siglip | 0.001 | – | 2 | 16.0 ± 0.0 |" in next(line for line in lines if "32 | siglip" in line)
    ablations = (tmp_path / "out" / "ablations.md").read_text()
    assert "| none | 3 | 12.0 ± 2.0 |" in ablations
    assert "| mlp | 1 | 11.0 |" in ablations
    assert "| neuclip | 3 | 12.0 ± 2.0 |" in (tmp_path / "out" / "visits.md").read_text()
    memory = (tmp_path / "out" / "memory.md").read_text()
    assert "| openclip | 3 | 11.0 ± 2.0 |" in memory
    assert "| gamma0.8 | 3 | **12.0 ± 2.0** |" in memory
    differences = (tmp_path / "out" / "differences.md").read_text()
    assert "| batch 128 | neuclip − openclip | 3 | -1.0 ± 0.0 |" in differences
    assert "fastclip" not in differences  # no runs
    # Medians, without the beginning.
    assert "| 128 | neuclip | 200 | 20.0 | 10.0 | 1280 |" in (tmp_path / "out" / "cost.md").read_text()
    assert "**5.00**" in (tmp_path / "out" / "tuning.md").read_text()
    for ending in ("csv", "tex"):
        assert (tmp_path / "out" / f"comparison.{ending}").stat().st_size > 100


@pytest.mark.usefixtures("fake")
def test_what_is_published_stands_in_for_the_runs(
    setup: runs.Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of the records are those of the runs, no path of this machine is in them, and nothing is trained again."""
    for name in study_run.SETS:
        (setup.data / name).mkdir(exist_ok=True)
    folders = {"data": setup.data, "logs": setup.logs, "records": tmp_path / "records"}
    where = ["--pairs=225", *(f"--{name}={folder}" for name, folder in folders.items())]
    assert study_run.main(["tune", *where]) == 0
    choices = study_run.read_choices(setup)
    compared = runs.comparison_runs(setup, choices)
    training.train_all(compared[:5], setup.logs, lanes=2)
    for number, one in enumerate(compared[:5]):
        (setup.logs / one.name / "checkpoints").mkdir()
        (setup.logs / one.name / measure.FILE).write_text(
            json.dumps({"metrics": dict.fromkeys(all_metrics(), number / 10)})
        )
        (setup.logs / one.name / "metrics.jsonl").write_text("")
    unfinished = setup.logs / compared[5].name
    unfinished.mkdir()
    (unfinished / "params.txt").write_text("model: study\nepochs: 4\n")
    (unfinished / "results.jsonl").write_text('{"epoch": 3}\n')
    assert study_run.main(["publish", *where]) == 0
    finished = {path.parent.name for path in setup.logs.glob("*/calls")}
    assert f"{len(finished)} runs in" in capsys.readouterr().out
    assert finished == {path.name for path in (tmp_path / "records").iterdir() if path.is_dir()}
    for path in (tmp_path / "records").rglob("*"):
        assert path.is_dir() or str(tmp_path) not in path.read_text()
    monkeypatch.setattr(report.figures, "main", lambda _: 0)
    tables = []
    for logs in (setup.logs, tmp_path / "records"):
        assert study_run.main(["report", "--logs", str(logs), "--out", str(tmp_path / "out")]) == 0
        tables.append(
            [(tmp_path / "out" / f"{name}.csv").read_text() for name in ("comparison", "tuning", "differences")]
        )
    assert tables[0] == tables[1]
    records = replace(setup, logs=tmp_path / "records")
    assert [training.is_finished(one, records.logs) for one in runs.comparison_runs(records, choices)[:6]] == [
        True
    ] * 5 + [False]
    assert all(measure.is_measured(records.logs / one.name) for one in compared[:5])
    assert (
        tuning.tune(records, lambda due: training.train_all(due, records.logs, lanes=2))["neuclip", 32].choice.gamma
        == 0.42
    )
    assert "calls" not in {path.name for path in records.logs.rglob("*")}


def all_metrics() -> list[str]:
    return [metric for metrics in report.HEADLINES.values() for metric in metrics]
