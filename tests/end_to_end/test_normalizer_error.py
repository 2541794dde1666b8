"""The normalizer estimation error of trained runs: against numbers worked out apart, on one rank and on two."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from end_to_end.corpus import SHARD_SIZES, Corpus
from end_to_end.runs import ROOT, free_port, run_together
from evaluation.datasets import PairDataset
from evaluation.normalizer_error import main
from evaluation.run_folder import RunFolder

N, SAMPLES, PROBES = 16, sum(SHARD_SIZES), 48
SIDES = ("image", "text")
METHODS = {
    "openclip": ["--objective", "openclip"],
    "siglip": ["--objective", "siglip"],
    "fastclip-v3": ["--fastclip", "--multiply_tau", "--data_size", "700"],
    "fastclip-v2": [
        "--fastclip",
        "--temperature_scheme",
        "individual_learnable",
        "--lr_tau",
        "0.02",
        "--data_size",
        "700",
    ],
    "amorlip": ["--objective", "amorlip", "--rho_list", "[8.5 -8.5]"],
    "neuclip": ["--objective", "neuclip", "--npn_num_protos", "48", "--npn_restart_iter", "8"],
}


@pytest.fixture
def trained(train: Callable[..., int], corpus: Corpus, tmp_path: Path) -> Callable[[str], Path]:
    """trained(method): the folder of a run of two epochs."""

    def make(method: str) -> Path:
        plan = [
            "--epochs",
            "2",
            "--batch-size",
            str(N),
            "--lr",
            "2e-3",
            "--warmup",
            "2",
            "--seed",
            "3",
            "--name",
            method,
        ]
        fixed = ["--precision", "fp32", "--log-every-n-steps", "5"]
        assert train("--train-data", corpus.train, *plan, *fixed, *METHODS[method]) == 0
        return tmp_path / "logs" / method

    return make


def examine(folder: Path, *flags: str) -> list[dict[str, Any]]:
    given = ["--train_output_dir", str(folder), "--device", "cpu", "--workers", "0", "--probes", str(PROBES), *flags]
    assert main(given) == 0
    return json.loads((folder / "normalizer_error.json").read_text())["records"]


def features_of(folder: Path, epoch: int, corpus: Corpus) -> tuple[Tensor, Tensor, Tensor, float]:
    """Image and text features of the whole training set, the samples' keys, and 1/τ; float64."""
    run = RunFolder(folder)
    loaded = run.load_model(epoch)
    pairs = PairDataset(corpus.train, loaded.preprocess_val, loaded.tokenizer)
    samples = [pairs[i] for i in range(len(pairs))]
    with torch.no_grad():
        images = loaded.model.encode_image(torch.stack([sample["image"] for sample in samples])).double()
        texts = loaded.model.encode_text(torch.stack([sample["text"] for sample in samples])).double()
    keys = [json.loads(pairs.index.read(members["json"]))["key"] for members in pairs.index.members]
    scale = float(loaded.model.logit_scale.exp())  # type: ignore[attr-defined]
    return F.normalize(images, dim=1), F.normalize(texts, dim=1), torch.tensor([int(key) for key in keys]), scale


def truth_of(images: Tensor, texts: Tensor, scale: float | Tensor, eps: float) -> Tensor:
    """α of all samples against all others, [2, n]; the whole matrix at once."""
    scores = images @ texts.T
    sides = []
    for matrix in (scores, scores.T):
        logits = (matrix - matrix.diagonal()[:, None]) * scale
        logits.fill_diagonal_(-math.inf)
        sides.append((eps + torch.logsumexp(logits, 1).exp() / (len(images) - 1)).log())
    return torch.stack(sides)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, trained: Callable[[str], Path], corpus: Corpus) -> None:
    folder = trained(method)
    # All samples are probes but for those that do not fill a batch: the mean over all is close, not equal.
    records = examine(folder, "--epochs", "1,2", "--probes", str(SAMPLES))
    assert [record["epoch"] for record in records] == [1, 2]
    steps = SAMPLES // N
    assert [record["samples_seen"] for record in records] == [steps * N, 2 * steps * N]
    for record in records:
        assert (record["samples"], record["left_out"], record["batch"]) == (SAMPLES, 0, N)
        assert record["probes"] == SAMPLES // N * N
        estimates = record["estimates"]
        assert (estimates["own"] is None) == (method in ("openclip", "siglip"))
        if estimates["own"] is None:
            assert estimates["used"] == estimates["batch"]
        for estimate in filter(None, estimates.values()):
            assert estimate["mse"] == pytest.approx((estimate["image"]["mse"] + estimate["text"]["mse"]) / 2)
            for side in SIDES if estimate["unknown"] == 0 else ():
                assert estimate[side]["bias"] == pytest.approx(estimate[side]["mean"] - record["truth"][side], abs=1e-9)
                assert estimate[side]["mse"] >= estimate[side]["bias"] ** 2
    if method == "fastclip-v2":
        return  # a temperature for each sample
    images, texts, _, scale = features_of(folder, 2, corpus)
    truth = truth_of(images, texts, scale, {"neuclip": 1e-8, "fastclip-v3": 1e-14}.get(method, 0.0))
    spread = truth.std(dim=1) * math.sqrt(SAMPLES % N) / math.sqrt(SAMPLES)
    for side, values, width in zip(SIDES, truth, spread):
        assert records[1]["truth"][side] == pytest.approx(float(values.mean()), abs=4 * float(width) + 1e-4)


def test_what_fastclip_remembers(trained: Callable[[str], Path], corpus: Corpus) -> None:
    """With every sample a probe, log u against the truth, both worked out here."""
    folder = trained("fastclip-v3")
    (record,) = examine(folder, "--epochs", "2", "--probes", str(SAMPLES), "--global_batch", "8")
    assert record["probes"] == SAMPLES  # 200 is a multiple of 8
    images, texts, keys, scale = features_of(folder, 2, corpus)
    truth = truth_of(images, texts, scale, 1e-14)
    table = torch.load(folder / "checkpoints" / "epoch_2.pt", weights_only=True)["objective"]["state_dict"][
        "table.table"
    ]
    known = table[keys].T.double()
    seen = torch.isfinite(known)
    assert record["estimates"]["own"]["unknown"] == pytest.approx(float((~seen).double().mean()))
    for side, name in enumerate(SIDES):
        error = (known - truth)[side][seen[side]]
        found = record["estimates"]["own"][name]
        assert found["mse"] == pytest.approx(float(error.square().mean()), abs=1e-4)
        assert found["bias"] == pytest.approx(float(error.mean()), abs=1e-4)
        assert record["truth"][name] == pytest.approx(float(truth[side].mean()), abs=1e-5)


@pytest.mark.parametrize("method", ["fastclip-v2", "neuclip"])
def test_two_ranks(method: str, trained: Callable[[str], Path]) -> None:
    folder = trained(method)
    (alone,) = examine(folder, "--epochs", "2")
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    (copy / "normalizer_error.json").unlink()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [str(ROOT / "src/evaluation/normalizer_error.py"), "--train_output_dir", str(copy), "--epochs", "2"]
    command += ["--device", "cpu", "--workers", "1", "--probes", str(PROBES)]
    done = run_together([command] * 2, [{**meeting, "RANK": str(rank)} for rank in (0, 1)])
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[1].stdout == ""
    (shared,) = json.loads((copy / "normalizer_error.json").read_text())["records"]

    def numbers(value: Any) -> list[Any]:
        return [n for key in sorted(value) for n in numbers(value[key])] if isinstance(value, dict) else [value]

    for here, there in zip(numbers(alone), numbers(shared), strict=True):
        assert here == (pytest.approx(there, abs=1e-4) if isinstance(there, float) else there)


def test_what_is_there_is_not_measured_again(
    trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained("neuclip")
    examine(folder, "--epochs", "1")
    monkeypatch.setattr("evaluation.normalizer_error.measure", lambda *_: pytest.fail("measured again"))
    examine(folder, "--epochs", "1")
    monkeypatch.undo()
    capsys.readouterr()
    assert len(examine(folder)) == 2  # all epochs: the one that is missing
    told = capsys.readouterr().out
    assert "epoch 2 against" in told
    assert "epoch 1, epoch 2 against" not in told
    assert (folder / "normalizer_error.png").stat().st_size > 10_000
    assert (folder / "normalizer_error.pdf").stat().st_size > 5_000
    lines = (folder / "normalizer_error.md").read_text().splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:4]] == ["epoch 1", "epoch 2"]
    assert len(examine(folder, "--epochs", "1", "--seed", "1")) == 3  # other probes: kept apart


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "7"], r"has no epoch_7\.pt; there is: epoch_1\.pt, epoch_2\.pt"),
        (["--epochs", "1;2"], r"--epochs 1;2 is no list"),
        (["--probes", "0"], r"--probes 0: give 1 or more"),
        (["--global_batch", "1"], r"--global_batch 1 of .* cannot be dealt out"),
        (
            ["--global_batch", "512"],
            r"only 200 of 200 samples drawn are whole and 512 are needed .* smaller --global_batch",
        ),
        (["--data", "nowhere.tar"], r"nowhere\.tar does not exist"),
        (["--out", "/dev/null/x"], r"/dev/null/x cannot be written"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained("openclip")
    capsys.readouterr()
    status = main(["--train_output_dir", str(folder), "--device", "cpu", "--workers", "0", *flags])
    said = capsys.readouterr().err.strip()
    assert status == 2
    assert len(said.splitlines()) == 1
    assert re.search(message, said), said
