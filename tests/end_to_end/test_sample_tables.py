"""Objectives with numbers for every sample, from the command line: large tables beside the checkpoint, keys out of range."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from end_to_end.corpus import Corpus
from end_to_end.runs import flat_tensors, read_checkpoint_file, run_ranks
from neuclip.normalizers import table

FLAGS = (
    "--fastclip",
    "--temperature_scheme",
    "individual_learnable",
    "--lr_tau",
    "0.01",
    "--lr_tau_scheduler",
    "const",
)


def _flags(corpus: Corpus, name: str, *more: str) -> list[str]:
    common = ["--train-data", corpus.train, "--name", name, "--batch-size", "16", "--warmup", "0", "--epochs", "3"]
    return [*FLAGS, "--data_size", "700", *common, *more]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables stand beside the checkpoint from the first byte on."""
    monkeypatch.setattr(table, "STATE_DICT_LIMIT", 0)


@pytest.mark.usefixtures("large")
def test_a_run_with_large_tables_resumes_bit_by_bit(train: Callable[..., int], corpus: Corpus, tmp_path: Path) -> None:
    assert train(*_flags(corpus, "whole")) == 0
    assert train(*_flags(corpus, "parts", "--stop_epochs", "1")) == 0
    assert train(*_flags(corpus, "parts", "--resume", "latest")) == 0
    logs = tmp_path / "logs"
    checkpoints = [read_checkpoint_file(logs / name / "checkpoints" / "epoch_3.pt") for name in ("whole", "parts")]
    folders = [
        logs / name / "checkpoints" / content.pop("tables") for name, content in zip(("whole", "parts"), checkpoints)
    ]
    contents = [flat_tensors(content) for content in checkpoints]
    assert contents[0].keys() == contents[1].keys()
    assert [place for place in contents[0] if not torch.equal(contents[0][place], contents[1][place])] == []
    (part,) = [path.name for path in folders[0].glob("*.pt")]
    tables = [torch.load(folder / part, weights_only=True) for folder in folders]
    assert tables[0].shape == (700, 8)
    assert torch.isfinite(tables[0][:, 0]).sum() > 190
    assert torch.equal(tables[0], tables[1])


@pytest.mark.usefixtures("large")
def test_tables_come_and_go_with_their_checkpoints(train: Callable[..., int], corpus: Corpus, tmp_path: Path) -> None:
    flags = _flags(corpus, "run", "--save-most-recent", "--delete-previous-checkpoint")
    assert train(*flags) == 0
    checkpoints = tmp_path / "logs" / "run" / "checkpoints"
    (folder,) = checkpoints.glob("tables-*")
    files = {"epoch_3.pt", "epoch_latest.pt"}
    assert {path.name for path in checkpoints.iterdir()} == {folder.name, *files, *(f"{name}.json" for name in files)}
    for name in ("epoch_3.pt", "epoch_latest.pt"):
        assert read_checkpoint_file(checkpoints / name)["tables"] == folder.name


@pytest.mark.usefixtures("large")
def test_lost_tables_are_missed(
    train: Callable[..., int], corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*_flags(corpus, "run", "--stop_epochs", "1")) == 0
    (folder,) = (tmp_path / "logs" / "run" / "checkpoints").glob("tables-*")
    folder.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert train(*_flags(corpus, "run", "--resume", "latest")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --resume latest: no checkpoint in")
    assert f"epoch_1.pt: its per-sample tables in {folder} are not there" in message
    assert len(message.splitlines()) == 1


def test_another_data_size_is_refused(
    train: Callable[..., int], corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*_flags(corpus, "run", "--stop_epochs", "1")) == 0
    capsys.readouterr()
    assert train(*_flags(corpus, "run", "--resume", "latest", "--data_size", "800")) == 2
    message = capsys.readouterr().err
    assert "--data_size" in message
    assert "700" in message
    assert "800" in message


def test_a_key_out_of_range_in_the_middle_of_an_epoch(
    train: Callable[..., int], corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the look at the first and the last shard does not find it, the step that meets it does."""
    monkeypatch.setattr("training.data.preflight._check_keys", lambda *_: None)
    assert train(*_flags(corpus, "run", "--data_size", "210")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: a training sample has the key ")
    assert "--data_size 210" in message
    assert "give at least" in message


def test_a_key_out_of_range_ends_all_ranks_and_is_named(corpus: Corpus, tmp_path: Path) -> None:
    """The key is in the middle of a shard, where nobody looks before training."""
    with tarfile.open(corpus.folder / "00000.tar") as old, tarfile.open(tmp_path / "00000.tar", "w") as new:
        for number, member in enumerate(old.getmembers()):
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".json") and 60 <= number < 63:
                content = json.dumps({"key": 5000}).encode()
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    flags = ["--fastclip", "--data_size", "700", "--train-data", str(tmp_path / "00000.tar"), "--batch-size", "8"]
    flags += [*corpus.model, "--epochs", "2", "--logs", str(tmp_path / "logs"), "--workers", "0", "--device", "cpu"]
    done = run_ranks(2, flags)
    assert [rank.returncode for rank in done] == [2, 2]
    said = [rank.stderr for rank in done if "a training sample has the key 5000, outside 0 … 699" in rank.stderr]
    assert len(said) == 1
    assert "Traceback" not in said[0]
