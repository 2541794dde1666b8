"""Flags that change what a run does or leaves behind, each for a few steps in this process."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from end_to_end.corpus import Corpus
from end_to_end.runs import read_checkpoint_file, read_lines

Trainer = Callable[..., int]


@pytest.fixture
def short(train: Trainer, corpus: Corpus, tmp_path: Path) -> Callable[..., Path]:
    """short(*flags): the folder of a run of three steps an epoch."""

    def run(*flags: str) -> Path:
        length = ("--batch-size", "16", "--train-num-samples", "48", "--epochs", "1")
        schedule = ("--warmup", "0", "--log-every-n-steps", "1")
        name = flags[flags.index("--name") + 1] if "--name" in flags else "run"
        assert train("--name", name, "--train-data", corpus.train, *length, *schedule, *flags) == 0
        return tmp_path / "logs" / name

    return run


def _checkpoints(run: Path) -> list[str]:
    """The names of all files there; each has its sidecar, which is left out."""
    names = {path.name for path in (run / "checkpoints").iterdir()}
    files = {name for name in names if not name.endswith(".json")}
    assert names == files | {f"{name}.json" for name in files}
    return sorted(files)


def _weights(run: Path, name: str = "epoch_1.pt") -> dict[str, torch.Tensor]:
    return read_checkpoint_file(run / "checkpoints" / name)["state_dict"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "lamb"],
        ["--optimizer", "lion", "--lr", "1e-4"],
        ["--optimizer", "sgd", "--lr", "1e-1"],
        ["--optimizer", "sgd", "--momentum", "0", "--lr_tau_scheduler", "step_thresh"],
        ["--optimizer", "lion", "--lr_tau_scheduler", "step_thresh", "--temperature", "0.02"],
        ["--precision", "amp_bf16"],
        ["--precision", "bf16"],
        ["--precision", "pure_bf16"],
        ["--precision", "fp32"],
        ["--grad-clip-norm", "0.1"],
        ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1"],
        ["--skip-scheduler"],
        ["--lock-text"],
        ["--lock-image", "--lock-image-unlocked-groups", "1"],
        ["--force-patch-dropout", "0.5"],
        ["--force-image-size", "48"],
        ["--force-quick-gelu"],
        ["--aug-cfg", "scale=(0.5, 1.0)", "color_jitter=0.1"],
        ["--dataset-resampled"],
        ["--debug"],
    ],
    ids=" ".join,
)
def test_takes_a_few_steps(short: Callable[..., Path], flags: list[str]) -> None:
    metrics = read_lines(short(*flags) / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["loss"] is not None for line in metrics)


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16", "pure_bf16"])
def test_evaluates_in_every_precision(short: Callable[..., Path], corpus: Corpus, precision: str) -> None:
    flags = ("--precision", precision, "--val-data", corpus.validation, "--zeroshot-data", corpus.zeroshot)
    (line,) = read_lines(short(*flags) / "results.jsonl")
    assert line["clip_val_loss"] > 0
    assert 0 <= line["zeroshot-val-top1"] <= 1


@pytest.mark.parametrize("factors", ["1::3", None])
def test_several_sources(short: Callable[..., Path], corpus: Corpus, factors: str | None) -> None:
    weighted = ["--dataset-resampled", "--train-data-upsampling-factors", factors] if factors else []
    run = short("--train-data", f"{corpus.unnumbered}::{corpus.train}", *weighted)
    assert "6 shards of 2 sources" in (run / "out.log").read_text()


def test_csv(short: Callable[..., Path], corpus: Corpus) -> None:
    run = short("--train-data", corpus.table, "--dataset-type", "csv", "--train-num-samples", "32")
    assert read_checkpoint_file(run / "checkpoints" / "epoch_1.pt")["step"] == 2


def test_synthetic(train: Trainer, tmp_path: Path) -> None:
    flags = ("--dataset-type", "synthetic", "--train-num-samples", "8", "--batch-size", "4", "--epochs", "1")
    assert train("--name", "made-up", *flags) == 0
    assert read_checkpoint_file(tmp_path / "logs" / "made-up" / "checkpoints" / "epoch_1.pt")["step"] == 2


def test_lock_image_freezes_the_image_tower(short: Callable[..., Path]) -> None:
    run = short("--lock-image", "--epochs", "2")
    before, after = _weights(run), _weights(run, "epoch_2.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("visual.") for name in changed)
    assert "image tower frozen" in (run / "out.log").read_text()


def test_grad_checkpointing_changes_nothing(short: Callable[..., Path]) -> None:
    losses = [
        [line["loss"] for line in read_lines(short("--precision", "fp32", *flags) / "metrics.jsonl")]
        for flags in (["--name", "plain"], ["--name", "recomputed", "--grad-checkpointing"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_micro_batches_change_nothing(short: Callable[..., Path]) -> None:
    flags = ("--precision", "fp32", "--objective", "neuclip", "--npn_num_protos", "16")
    whole = short(*flags, "--name", "whole", "--batch-size", "16")
    for name, more in (("parts", ()), ("recomputed", ("--grad-checkpointing",))):
        run = short(*flags, "--name", name, "--batch-size", "8", "--accum-freq", "2", *more)
        assert "8 per rank × 2 micro-batches, 16 in all" in (run / "out.log").read_text()
        lines, expected = (read_lines(folder / "metrics.jsonl") for folder in (run, whole))
        for value in ("loss", "contrastive_loss", "global_loss", "temperature", "lr", "step", "samples"):
            assert [line[value] for line in lines] == pytest.approx([line[value] for line in expected], rel=1e-5), value


def test_grad_clipping_bounds_a_step(short: Callable[..., Path]) -> None:
    sgd = ("--optimizer", "sgd", "--momentum", "0", "--wd", "0", "--lr", "1", "--lr_tau", "1", "--skip-scheduler")
    flags = ("--precision", "fp32", "--train-num-samples", "16", "--epochs", "2", *sgd)
    run = short("--grad-clip-norm", "0.125", *flags)
    before, after = _weights(run), _weights(run, "epoch_2.pt")
    step = torch.cat([(after[name].double() - before[name].double()).flatten() for name in before])
    assert step.norm().item() == pytest.approx(0.125, rel=1e-3)


def test_profile_is_written(short: Callable[..., Path]) -> None:
    run = short("--profile", "--batch-size", "2", "--train-num-samples", "18", "--log-every-n-steps", "100")
    trace = json.loads((run / "profile.json").read_text())
    assert any("backward" in event.get("name", "").lower() for event in trace["traceEvents"])


def test_profile_of_a_short_epoch_is_written(short: Callable[..., Path]) -> None:
    assert (short("--profile") / "profile.json").is_file()


def test_delete_previous_checkpoint(short: Callable[..., Path]) -> None:
    assert _checkpoints(short("--epochs", "3", "--delete-previous-checkpoint")) == ["epoch_3.pt"]


def test_save_most_recent(short: Callable[..., Path]) -> None:
    run = short("--epochs", "3", "--save-most-recent", "--save-frequency", "2")
    assert _checkpoints(run) == ["epoch_2.pt", "epoch_3.pt", "epoch_latest.pt"]
    assert read_checkpoint_file(run / "checkpoints" / "epoch_latest.pt")["epoch"] == 3


def test_save_frequency_0_saves_the_last_epoch_only(short: Callable[..., Path]) -> None:
    assert _checkpoints(short("--epochs", "2", "--save-frequency", "0")) == ["epoch_2.pt"]


def test_val_frequency_0_never_evaluates(short: Callable[..., Path], corpus: Corpus) -> None:
    run = short("--val-data", corpus.validation, "--val-frequency", "0")
    assert not (run / "results.jsonl").exists()


def test_evaluations_keep_to_their_frequencies(short: Callable[..., Path], corpus: Corpus) -> None:
    sets = ("--val-data", corpus.validation, "--zeroshot-data", corpus.zeroshot)
    run = short(*sets, "--epochs", "4", "--stop_epochs", "3", "--val-frequency", "3", "--zeroshot-frequency", "2")
    due = {line["epoch"]: set(line) - {"epoch", "step"} for line in read_lines(run / "results.jsonl")}
    assert due.keys() == {2, 3}
    assert all(name.startswith("zeroshot-val-") for name in due[2])
    assert "clip_val_loss" in due[3]
    assert "zeroshot-val-top1" not in due[3]


def test_val_num_samples_limits_the_validation(short: Callable[..., Path], corpus: Corpus) -> None:
    run = short("--val-data", corpus.validation, "--val-num-samples", "20")
    assert [line["num_samples"] for line in read_lines(run / "results.jsonl")] == [20]


def test_resume_of_a_finished_run_changes_nothing(short: Callable[..., Path]) -> None:
    run = short()
    before = (run / "checkpoints" / "epoch_1.pt").read_bytes()
    assert short("--resume", "latest") == run
    assert (run / "checkpoints" / "epoch_1.pt").read_bytes() == before
    assert (run / "params_1.txt").exists(), "the first call's flags are kept"
    assert "nothing to do" in (run / "out.log").read_text()


def test_resume_latest_starts_a_run_that_is_not_there_yet(short: Callable[..., Path]) -> None:
    assert _checkpoints(short("--resume", "latest")) == ["epoch_1.pt"]


def test_resume_latest_passes_over_a_broken_checkpoint(short: Callable[..., Path]) -> None:
    run = short("--epochs", "2")
    second = run / "checkpoints" / "epoch_2.pt"
    second.write_bytes(second.read_bytes()[:5000])
    short("--epochs", "2", "--resume", "latest")
    log = (run / "out.log").read_text()
    assert "passed over" in log
    assert "resumed from" in log
    assert read_checkpoint_file(second)["epoch"] == 2


def test_resume_with_another_precision(short: Callable[..., Path]) -> None:
    run = short("--epochs", "2", "--stop_epochs", "1", "--precision", "fp32")
    short("--epochs", "2", "--resume", "latest", "--precision", "amp_bf16")
    assert _checkpoints(run) == ["epoch_1.pt", "epoch_2.pt"]
    (told,) = [line for line in (run / "out.log").read_text().splitlines() if "goes on with other flags" in line]
    assert "precision: fp32 → amp_bf16" in told


def test_pretrained_starts_from_a_checkpoint(short: Callable[..., Path]) -> None:
    first = short("--name", "first")
    weights = str(first / "checkpoints" / "epoch_1.pt")
    second = short("--name", "second", "--pretrained", weights, "--lr", "1e-12", "--lr_tau", "1e-12", "--wd", "0")
    before, after = _weights(first), _weights(second)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_tensorboard(short: Callable[..., Path]) -> None:
    run = short("--report-to", "tensorboard")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_name_is_made_up_when_none_is_given(train: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    length = ("--batch-size", "16", "--train-num-samples", "16", "--epochs", "1")
    assert train("--train-data", corpus.train, *length) == 0
    (run,) = (tmp_path / "logs").iterdir()
    for part in ("openclip", "model_tiny", "lr_0.0005", "b_16", "p_amp_bf16"):
        assert part in run.name


def test_evaluation_that_was_cut_off_is_made_up_for(short: Callable[..., Path], corpus: Corpus) -> None:
    flags = ("--name", "cut", "--val-data", corpus.validation)
    run = short(*flags)
    whole = read_lines(run / "results.jsonl")
    (run / "results.jsonl").unlink()
    short(*flags, "--resume", "latest")
    assert read_lines(run / "results.jsonl") == whole
    short(*flags, "--resume", "latest")
    assert len(read_lines(run / "results.jsonl")) == 1


def test_a_broken_validation_image_does_not_end_the_run(short: Callable[..., Path], tmp_path: Path) -> None:
    shard = tmp_path / "val.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in (("a.png", b"no image"), ("a.txt", b"a caption")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    run = short("--val-data", str(shard))
    assert _checkpoints(run) == ["epoch_1.pt"]
    assert not (run / "results.jsonl").exists()
    assert "evaluation after epoch 1 broken off" in (run / "out.log").read_text()
