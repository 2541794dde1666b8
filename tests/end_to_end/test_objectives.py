"""Every objective trained from the command line on one rank and on two: what it writes, resuming it, opening its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from end_to_end import processes
from end_to_end.corpus import COLOURS, MODEL, SHARD_SIZES, VALIDATION_SIZE, Corpus
from end_to_end.runs import flat_tensors, read_checkpoint_file, read_lines, run_ranks
from neuclip import OBJECTIVES
from training.evaluate import Evaluator
from training.model import TwoTowers

EPOCHS = 2
GLOBAL_BATCH = 16
STEPS = sum(SHARD_SIZES) // GLOBAL_BATCH
TIMINGS = {"samples_per_second", "seconds_per_step", "data_wait_share", "objective_seconds", "normalizer_seconds"}


def _flags(corpus: Corpus, objective: str, ranks: int, logs: Path, name: str) -> list[str]:
    return [
        *corpus.model,
        *("--objective", objective, "--npn_num_protos", "48", "--npn_restart_iter", "8", "--data_size", "700"),
        *("--train-data", corpus.train, "--batch-size", str(GLOBAL_BATCH // ranks), "--workers", "1"),
        *("--epochs", str(EPOCHS), "--lr", "2e-3", "--lr_tau", "1e-3", "--beta2", "0.95", "--warmup", "4"),
        *("--logs", str(logs), "--name", name, "--log-every-n-steps", "1", "--seed", "6", "--device", "cpu"),
    ]


Run = tuple[str, int, Path, str]
KINDS = [(name, ranks) for name in OBJECTIVES for ranks in (1, 2)]
ON_ONE_RANK = [kind for kind in KINDS if kind[1] == 1]


def _id(kind: tuple[str, int]) -> str:
    return f"{kind[0]}-{kind[1]}"


@pytest.fixture(scope="module", params=KINDS, ids=_id)
def run(
    request: pytest.FixtureRequest, forked_ranks: None, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """(objective, ranks, run folder, standard output of rank 0) of a finished run."""
    objective, ranks = request.param
    logs = tmp_path_factory.mktemp("logs")
    evaluation = ["--val-data", corpus.validation, "--zeroshot-data", corpus.zeroshot, "--zeroshot-frequency", "1"]
    with processes.Run(
        ranks, [*_flags(corpus, objective, ranks, logs, "run"), *evaluation], logs / "output"
    ) as process:
        assert process.wait(240) == [0] * ranks, process.said_by_all()
        return objective, ranks, logs / "run", process.said(0)


def test_loss_falls(run: Run) -> None:
    metrics = read_lines(run[2] / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, EPOCHS * STEPS + 1))

    def mean(name: str, part: slice) -> float:
        values = [line[name] for line in metrics[part]]
        return sum(values) / len(values)

    first, last = slice(0, 4), slice(-4, None)
    assert mean("loss", last) < mean("loss", first)
    # Nats of the same contrastive loss for every objective; uninformed features would stay where they are.
    assert mean("contrastive_loss", last) < mean("contrastive_loss", first) - 0.3


def test_run_folder_is_complete(run: Run, corpus: Corpus) -> None:
    objective, _, folder, _ = run
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/epoch_{number}.pt{end}" for number in range(1, EPOCHS + 1) for end in ("", ".json")}
    logs = (".lock", "params.txt", "out.log", "metrics.jsonl", "results.jsonl", "data_report.json")
    expected = {*logs, f"model_configs/{MODEL}.json", *checkpoints}
    assert files == expected
    assert (folder / "model_configs" / f"{MODEL}.json").read_bytes() == Path(corpus.model_config).read_bytes()
    parameters = dict(line.split(": ", 1) for line in (folder / "params.txt").read_text().splitlines())
    assert parameters["objective"] == objective
    assert parameters["model"] == MODEL
    assert parameters["lr"] == "0.002"


def test_plan_is_printed_and_logged(run: Run) -> None:
    objective, ranks, folder, printed = run
    log = (folder / "out.log").read_text()
    for text in (printed, log):
        assert text.count(f"{objective}: {OBJECTIVES[objective].summary}") == 1
        for part in (
            f"{ranks} on cpu",
            f"{GLOBAL_BATCH // ranks} per rank, {GLOBAL_BATCH} in all",
            f"{len(SHARD_SIZES)} shards",
            f"{STEPS} steps, {STEPS * GLOBAL_BATCH} samples",
            f"{STEPS * GLOBAL_BATCH * EPOCHS} in {EPOCHS} epochs",
            "amp_bf16",
            f"torch {torch.__version__.split('+')[0]}",
            f"open_clip_torch {open_clip.__version__}",
            "parameters",
            "git",
        ):
            assert part in text, part
    assert log.index("samples seen") < log.index("step 1/")


def test_log_line_of_an_interval(run: Run) -> None:
    lines = [line for line in (run[2] / "out.log").read_text().splitlines() if f"step {STEPS}/{STEPS} " in line]
    assert len(lines) == EPOCHS
    for part in ("loss", "τ", "lr ", "lr_tau", "samples/s", "data wait", "ETA 0:00:00"):
        assert part in lines[-1], part


def test_results_of_both_evaluations(run: Run) -> None:
    results = read_lines(run[2] / "results.jsonl")
    assert [(line["epoch"], line["step"]) for line in results] == [(1, STEPS), (2, 2 * STEPS)]
    for line in results:
        assert line["num_samples"] == VALIDATION_SIZE
        assert line["clip_val_loss"] > 0
        for way in ("image_to_text", "text_to_image"):
            assert 0 <= line[f"{way}_R@1"] <= line[f"{way}_R@5"] <= line[f"{way}_R@10"] <= 1
            assert 1 <= line[f"{way}_median_rank"] <= VALIDATION_SIZE
        assert 0 <= line["zeroshot-val-top1"] <= line["zeroshot-val-top5"] <= 1
    # Chance is 10/37, and 1 of 6 classes.
    assert results[-1]["image_to_text_R@10"] > 10 / VALIDATION_SIZE + 0.1
    assert results[-1]["zeroshot-val-top1"] > 2 / len(COLOURS)


def test_checkpoint_describes_itself(run: Run) -> None:
    objective, _, folder, _ = run
    for epoch in (1, 2):
        checkpoint = read_checkpoint_file(folder / "checkpoints" / f"epoch_{epoch}.pt")
        assert checkpoint["epoch"] == epoch
        assert checkpoint["step"] == epoch * STEPS
        assert checkpoint["name"] == "run"
        assert checkpoint["objective"]["name"] == objective


@pytest.fixture
def seen_features(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features that the model of a run in this process gives whenever it would be evaluated."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(self: Evaluator, towers: TwoTowers, epoch: int) -> dict[str, float]:
        towers.eval()
        with torch.no_grad():
            seen.append(towers(_images(), self.tokenizer(list(COLOURS)))[:2])
        towers.train()
        return {}

    monkeypatch.setattr(Evaluator, "__call__", look)
    return seen


def _images() -> torch.Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("run", ON_ONE_RANK, indirect=True, ids=_id)
def test_resumes_bit_by_bit_and_opens_in_plain_open_clip(
    run: Run,
    train: Callable[..., int],
    corpus: Corpus,
    tmp_path: Path,
    seen_features: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    objective, _, whole, _ = run
    flags = _flags(corpus, objective, 1, tmp_path / "logs", "parts")
    assert train(*flags, "--stop_epochs", "1") == 0
    parts = tmp_path / "logs" / "parts"
    assert not (parts / "checkpoints" / "epoch_2.pt").exists()
    first = parts / "checkpoints" / "epoch_1.pt"

    open_clip.add_model_config(parts / "model_configs")
    model, _, _ = open_clip.create_model_and_transforms(MODEL, pretrained=str(first))
    tokenizer = open_clip.get_tokenizer(MODEL)
    with torch.no_grad():
        image_features = model.eval().encode_image(_images(), normalize=True)
        text_features = model.encode_text(tokenizer(list(COLOURS)), normalize=True)
    assert torch.equal(image_features, seen_features[0][0])
    assert torch.equal(text_features, seen_features[0][1])

    assert train(*flags, "--resume", "latest") == 0
    _assert_same_second_epoch(whole, parts)


def _assert_same_second_epoch(whole: Path, resumed: Path) -> None:
    def losses(folder: Path) -> list[dict[str, Any]]:
        lines = read_lines(folder / "metrics.jsonl")
        return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if line["step"] > STEPS]

    assert len(losses(whole)) == STEPS
    assert losses(resumed) == losses(whole)
    contents = [flat_tensors(read_checkpoint_file(f / "checkpoints" / "epoch_2.pt")) for f in (whole, resumed)]
    assert contents[0].keys() == contents[1].keys()
    different = [place for place in contents[0] if not torch.equal(contents[0][place], contents[1][place])]
    assert different == []


@pytest.fixture(scope="module")
def stateful_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks of the objective with most state of its own, stopped after its first epoch and then resumed.

    It was told its ranks as srun does it.
    """
    logs = tmp_path_factory.mktemp("logs")
    flags = _flags(corpus, "neuclip", 2, logs, "whole")
    for done in run_ranks(2, flags, "srun"):
        assert done.returncode == 0, done.stdout + done.stderr
    return logs / "whole"


def test_two_ranks_resume_bit_by_bit(stateful_run: Path, corpus: Corpus) -> None:
    first = str(stateful_run / "checkpoints" / "epoch_1.pt")
    flags = [*_flags(corpus, "neuclip", 2, stateful_run.parent, "resumed"), "--resume", first]
    for done in run_ranks(2, flags, "torchrun"):
        assert done.returncode == 0, done.stdout + done.stderr
    _assert_same_second_epoch(stateful_run, stateful_run.parent / "resumed")


def test_two_ranks_go_on_as_one(stateful_run: Path, corpus: Corpus, train: Callable[..., int], tmp_path: Path) -> None:
    first = str(stateful_run / "checkpoints" / "epoch_1.pt")
    flags = _flags(corpus, "neuclip", 1, tmp_path / "logs", "alone")
    assert train(*flags, "--resume", first) == 0
    before = read_lines(stateful_run / "metrics.jsonl")
    after = read_lines(tmp_path / "logs" / "alone" / "metrics.jsonl")
    assert [line["step"] for line in after] == list(range(STEPS + 1, 2 * STEPS + 1))
    # It goes on from where the two ranks were, neither from anew nor with its normalizers lost.
    for name in ("loss", "contrastive_loss"):
        start, middle, end = (
            sum(line[name] for line in part) for part in (before[:4], before[STEPS - 4 : STEPS], after[:4])
        )
        assert end < (start + middle) / 2, name
    second = read_checkpoint_file(tmp_path / "logs" / "alone" / "checkpoints" / "epoch_2.pt")
    assert second["objective"]["state_dict"]["_extra_state"]["step"] == 2 * STEPS
