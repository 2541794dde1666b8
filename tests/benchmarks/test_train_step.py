"""The benchmark of a training step: its parts are those of the step, on one rank and on two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from end_to_end.corpus import MODEL_CONFIG
from end_to_end.runs import ROOT, clean_environment

sys.path.insert(0, str(ROOT / "benchmarks"))

import train_step


def run(tmp_path: Path, own: str, flags: str) -> tuple[dict[str, Any], str]:
    """What the JSON holds, and what was printed."""
    (tmp_path / "tiny.json").write_text(json.dumps(MODEL_CONFIG))
    words = (
        f"{own} --device cpu --threads 1 --repeats 3 --warmup 1 --json {tmp_path}/found.json -- --model tiny".split()
    )
    words += ["--model-config", str(tmp_path / "tiny.json"), "--precision", "fp32", *flags.split()]
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=clean_environment())
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "found.json").read_text()), done.stdout


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--batch-size 8 --objective neuclip --npn_num_protos 4 --grad-clip-norm 1"),
        (2, "--batch-size 4 --objective openclip --accum-freq 2 --grad-compression bf16"),
    ],
)
def test_parts_make_up_the_step(ranks: int, flags: str, tmp_path: Path) -> None:
    found, printed = run(tmp_path, f"--ranks {ranks}", flags)
    assert found["ranks"] == ranks
    for rank in found["every_round"]:
        assert all(len(times) == 3 and min(times) >= 0 for times in rank.values())
        for part in ("forward", "loss", "backward", "optimizer"):
            assert min(rank[part]) > 0, part
        # They are parts of other steps than the whole ones, so only about as long.
        for number in range(3):
            whole = sum(rank[part][number] for part in train_step.PARTS)
            assert 0.1 * min(rank["total"]) < whole < 10 * max(rank["total"])
    milliseconds = {part: value["median"] for part, value in found["milliseconds"].items()}
    assert (milliseconds["normalizer"] > 0) == ("neuclip" in flags)
    assert ("exposed communication" in milliseconds) == (ranks > 1)
    assert found["samples_per_second"] == pytest.approx(1000 * 8 * ranks / milliseconds["total"])
    assert found["mfu"] is None
    rows = [line.split(" | ")[0].strip("| ") for line in printed.splitlines() if line.startswith("| ")]
    assert rows[2:] == list(milliseconds)


def test_flops_are_those_of_the_model(tmp_path: Path) -> None:
    """Of the tiny model counted by hand: matrix products and convolutions, forward times three."""
    found, _ = run(tmp_path, "--ranks 1 --peak-tflops 0.5", "--batch-size 8 --objective siglip")
    vision, text = MODEL_CONFIG["vision_cfg"], MODEL_CONFIG["text_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2

    def block(length: int, width: int) -> int:
        """One transformer layer: queries, keys, values and output, both products of attention, the perceptron."""
        return 2 * (4 * length * width**2 + 2 * length**2 * width + 8 * length * width**2)

    images = 2 * patches * 3 * vision["patch_size"] ** 2 * vision["width"]
    images += block(patches + 1, vision["width"]) + 2 * vision["width"] * MODEL_CONFIG["embed_dim"]
    texts = block(text["context_length"], text["width"]) + 2 * text["width"] * MODEL_CONFIG["embed_dim"]
    assert found["gflops_per_sample"] == pytest.approx(3 * (images + texts) / 1e9)
    total = found["milliseconds"]["total"]["median"] / 1000
    assert found["mfu"] == pytest.approx(8 * 3 * (images + texts) / total / 0.5e12)


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "amp_bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "amp", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("AMD EPYC", "amp_bf16", None),
    ],
)
def test_peaks(device: str, precision: str, peak: float | None) -> None:
    assert train_step.peak_flops(device, precision) == peak


@pytest.mark.parametrize("words", ["--repeats 0", "-- --batch-size many", "-- --objective nothing"])
def test_mistakes_are_told(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.parse_args(["--device", "cpu", *words.split()])
    assert words.removeprefix("-- ").split()[0] in capsys.readouterr().err
