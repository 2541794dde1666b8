"""A user's mistake costs one line on stderr, exit status 2 and no training: the line names flag, value and remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from end_to_end.corpus import MODEL_CONFIG, Corpus
from end_to_end.runs import read_checkpoint_file
from neuclip import OBJECTIVES
from neuclip.objectives.openclip import OpenCLIP
from training import run_lock

Trainer = Callable[..., int]
Refusal = Callable[..., str]


@pytest.fixture
def refused(train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """refused(*flags): the one line that a run with these flags ends with."""

    def run(*flags: str) -> str:
        logs = tmp_path / "logs"
        before = _training_files(logs)
        capsys.readouterr()
        try:
            status = train(*flags)
        except SystemExit as leaving:
            status = leaving.code  # the command line's parser leaves by itself
        errors = capsys.readouterr().err
        assert status == 2, errors
        assert "Traceback" not in errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("error: ")
        assert _training_files(logs) == before, "training had begun"
        return errors

    return run


def _training_files(logs: Path) -> dict[str, int]:
    names = ("*.pt", "metrics.jsonl", "results.jsonl", "params*.txt")
    return {str(path): path.stat().st_mtime_ns for name in names for path in logs.rglob(name)}


def _assert_names(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def test_no_shard_matches(refused: Refusal, tmp_path: Path) -> None:
    pattern = str(tmp_path / "{000..003}.tar")
    _assert_names(refused("--train-data", pattern), "--train-data", pattern, "no shard matches", "correct the path")


def test_tar_that_is_no_tar(refused: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "000.tar"
    path.write_text("<html>404: not found</html>\n" * 100)
    message = refused("--train-data", str(path), "--batch-size", "2", "--train-num-samples", "2")
    _assert_names(message, "--train-data", str(path), "not a tar file", "fetch it again")


class NeedsKeys(OpenCLIP):
    """An objective with state per sample."""

    name = "needy"
    synonyms = ()
    needs_keys = True

    @classmethod
    def add_arguments(cls, group: object) -> None:
        """None beside those of its parent, which are there already."""


def test_no_key_where_it_is_needed(refused: Refusal, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "needy", NeedsKeys)
    message = refused("--objective", "needy", "--train-data", corpus.unnumbered, "--batch-size", "8")
    _assert_names(message, "--train-data", corpus.unnumbered, "key", "number the samples")


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_keys_are_needed_by_nobody_else(train: Trainer, corpus: Corpus, objective: str) -> None:
    flags = ("--train-data", corpus.unnumbered, "--batch-size", "16", "--epochs", "1", "--npn_num_protos", "16")
    assert train("--objective", objective, *flags) == (2 if OBJECTIVES[objective].needs_keys else 0)


def test_unknown_model(refused: Refusal, corpus: Corpus) -> None:
    message = refused("--model", "ViT-B-33", "--train-data", corpus.train)
    _assert_names(message, "--model ViT-B-33", "ViT-B-16", "--model-config")


def test_batch_larger_than_data(refused: Refusal, corpus: Corpus) -> None:
    message = refused("--train-data", corpus.train, "--batch-size", "201")
    _assert_names(message, "--batch-size 201", "200", "lower --batch-size")
    message = refused("--train-data", corpus.train, "--batch-size", "67", "--accum-freq", "3")
    _assert_names(message, "--batch-size 67 --accum-freq 3", "201", "200", "lower --batch-size")


@pytest.mark.parametrize("size", ["0", "-1"])
def test_batch_of_nothing(refused: Refusal, corpus: Corpus, size: str) -> None:
    _assert_names(refused("--train-data", corpus.train, "--batch-size", size), "--batch-size", size, "at least 1")


def test_batch_of_one_has_no_negatives(refused: Refusal, corpus: Corpus) -> None:
    _assert_names(refused("--train-data", corpus.train, "--batch-size", "1"), "--batch-size", "1")


def test_name_that_exists(train: Trainer, refused: Refusal, corpus: Corpus, tmp_path: Path) -> None:
    flags = ("--name", "taken", "--train-data", corpus.train, "--batch-size", "64", "--epochs", "1")
    assert train(*flags) == 0
    _assert_names(refused(*flags), "--name taken", str(tmp_path / "logs"), "choose another name", "--resume latest")


def test_run_that_another_process_trains(
    refused: Refusal, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "logs" / "busy"
    folder.mkdir(parents=True)
    # A lock of this process would not keep it out.
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, 2); print(flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", holder, str(folder / ".lock")]
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.1)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        message = refused("--name", "busy", "--resume", "latest", "--train-data", corpus.train, "--batch-size", "64")
        other.kill()
    _assert_names(message, "--name busy", "is being trained by", "give another --name")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--objective", "neuclip", "--npn_num_protos", "0"], ["--npn_num_protos", "0", "give 1 or more"]),
        (["--objective", "neuclip", "--gamma", "1.5"], ["--gamma", "1.5", "[0, 1]"]),
        (["--objective", "neuclip", "--gamma=-0.1"], ["--gamma", "-0.1", "[0, 1]"]),
        (["--objective", "siglip", "--npn"], ["--objective siglip", "--npn", "drop one"]),
        (["--siglip", "--npn"], ["--siglip", "--npn", "--objective"]),
        (["--report-to", "wandb,carrier-pigeon"], ["--report-to", "carrier-pigeon", "tensorboard, wandb"]),
        (["--no-such-flag", "1"], ["--no-such-flag"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--precision", "fp12"], ["--precision", "fp12", "amp_bf16"]),
        (["--objective", "noclip"], ["--objective", "noclip", "openclip"]),
        (["--resume", "nowhere/epoch_1.pt"], ["--resume", "nowhere/epoch_1.pt", "no such file"]),
        (["--pretrained", "nowhere.pt"], ["--pretrained", "nowhere.pt", "tag"]),
        (["--val-data", "nowhere/{000..003}.tar"], ["--val-data", "nowhere", "does not exist"]),
        (["--zeroshot-data", "nowhere"], ["--zeroshot-data", "nowhere", "folder"]),
        (["--imagenet-val", "nowhere"], ["--imagenet-val", "nowhere", "folder"]),
    ],
    ids=lambda part: part[0] if part[0].startswith("--") else "",
)
def test_flags(refused: Refusal, corpus: Corpus, flags: list[str], parts: list[str]) -> None:
    _assert_names(refused("--train-data", corpus.train, "--batch-size", "16", *flags), *parts)


def test_no_data_at_all(refused: Refusal) -> None:
    _assert_names(refused(), "--train-data", "missing", "--dataset-type synthetic")


def test_sample_count_that_cannot_be_learnt(refused: Refusal, corpus: Corpus) -> None:
    url = f"pipe:cat {corpus.unnumbered}"
    message = refused("--train-data", url, "--dataset-type", "webdataset", "--batch-size", "4")
    _assert_names(message, "--train-num-samples", url, "training.data.index")


def test_cuda_that_is_not_there(refused: Refusal, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused("--train-data", corpus.train, "--device", "cuda")
    _assert_names(message, "--device cuda", "cpu")


def test_model_config_that_is_no_json(refused: Refusal, corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"embed_dim": 16,')
    message = refused("--train-data", corpus.train, "--model-config", str(path), "--model", "broken")
    _assert_names(message, "--model-config", str(path), "json")


@pytest.fixture
def checkpoint(train: Trainer, corpus: Corpus, tmp_path: Path) -> Path:
    """A whole checkpoint of the tiny model."""
    flags = ("--name", "source", "--train-data", corpus.train, "--batch-size", "64", "--epochs", "1")
    assert train(*flags) == 0
    return tmp_path / "logs" / "source" / "checkpoints" / "epoch_1.pt"


def _resume(refused: Refusal, corpus: Corpus, path: Path, *flags: str) -> str:
    return refused("--train-data", corpus.train, "--batch-size", "64", "--epochs", "2", "--resume", str(path), *flags)


def test_checkpoint_cut_short(refused: Refusal, corpus: Corpus, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1000):
        checkpoint.write_bytes(content[:length])
        _assert_names(_resume(refused, corpus, checkpoint), "--resume", str(checkpoint), "is not whole")


def test_checkpoint_that_is_text(refused: Refusal, corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1\n")
    _assert_names(_resume(refused, corpus, path), "--resume", str(path), "cannot be read")


def test_pretrained_file_that_is_text(refused: Refusal, corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1\n")
    message = refused("--train-data", corpus.train, "--pretrained", str(path))
    _assert_names(message, "--pretrained", str(path))


def test_checkpoint_of_another_architecture(refused: Refusal, corpus: Corpus, checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "wider.json"
    config.write_text(json.dumps({**MODEL_CONFIG, "embed_dim": 24}))
    message = _resume(refused, corpus, checkpoint, "--model", "wider", "--model-config", str(config))
    _assert_names(message, "--resume", str(checkpoint), "another architecture", "tiny", "--model wider")


def test_checkpoint_of_another_objective(refused: Refusal, corpus: Corpus, checkpoint: Path) -> None:
    message = _resume(refused, corpus, checkpoint, "--objective", "siglip")
    _assert_names(message, "--resume", str(checkpoint), "openclip", "siglip", "--pretrained")


def test_checkpoint_of_another_optimizer(refused: Refusal, corpus: Corpus, checkpoint: Path) -> None:
    message = _resume(refused, corpus, checkpoint, "--lock-image")
    _assert_names(message, "--resume", str(checkpoint), "flags")


def test_weights_alone_are_no_checkpoint(refused: Refusal, corpus: Corpus, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(read_checkpoint_file(checkpoint)["state_dict"], path)
    _assert_names(_resume(refused, corpus, path), "--resume", str(path), "lacks", "--pretrained")


def test_name_is_free_again_after_a_mistake(train: Trainer, refused: Refusal, corpus: Corpus, tmp_path: Path) -> None:
    flags = ("--name", "again", "--train-data", corpus.train, "--batch-size", "64", "--epochs", "1")
    refused(*flags, "--resume", str(tmp_path / "absent.pt"))
    assert train(*flags) == 0


def test_an_objective_that_the_model_does_not_allow(refused: Refusal, corpus: Corpus) -> None:
    message = refused("--amorlip", "--h_dim_factor", "0.0001", "--train-data", corpus.train, "--batch-size", "8")
    _assert_names(message, "--objective amorlip cannot be built", "--h_dim_factor 0.0001")


def test_tables_larger_than_memory(refused: Refusal, corpus: Corpus) -> None:
    message = refused("--fastclip", "--data_size", str(10**14), "--train-data", corpus.train, "--batch-size", "8")
    _assert_names(message, "--objective fastclip cannot be built", "memory")
