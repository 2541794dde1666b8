"""The comparison with open_clip's own step compares the same mathematics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from end_to_end.corpus import MODEL_CONFIG
from end_to_end.runs import ROOT, clean_environment

sys.path.insert(0, str(ROOT / "benchmarks"))

import vs_open_clip


@pytest.mark.parametrize(("ranks", "flags"), [(1, ""), (2, ""), (1, "--siglip --grad-checkpointing --lr 1e-3")])
def test_both_learn_the_same(ranks: int, flags: str, tmp_path: Path) -> None:
    # open_clip takes a name with "vit" for a vision transformer, as we do: beta2 and eps depend on it.
    (tmp_path / "tiny-vit.json").write_text(json.dumps(MODEL_CONFIG))
    words = (
        f"--model tiny-vit --model-config {tmp_path}/tiny-vit.json --precision fp32 --device cpu --threads 1 {flags} "
    )
    words += f"--ranks {ranks} --batch-size 8 --steps 3 --repeats 2 --warmup 1 --json {tmp_path}/found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "vs_open_clip.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=clean_environment())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    ours, theirs = found["losses"]
    assert len(ours) == len(theirs) == 9
    assert found["first_loss_difference"] < 1e-5 * theirs[0]
    assert found["loss_difference"] < 1e-3 * theirs[0]
    # They have learnt something, so that equal losses say something about the updates too.
    assert abs(theirs[-1] - theirs[0]) > 10 * found["loss_difference"]
    blocks = found["every_block"]
    assert len(blocks["ours"]) == len(blocks["theirs"]) == 2
    assert found["ratio"]["count"] == 2
    assert min(found["ours_ms"]["median"], found["theirs_ms"]["median"]) > 0
    assert "ours / theirs" in done.stdout


def test_they_get_floats_whatever_our_loader_delivers() -> None:
    tower = torch.nn.Identity()
    tower.image_mean, tower.image_std = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
    pixels = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8).to(memory_format=torch.channels_last)
    floats = vs_open_clip.as_floats(pixels, tower)
    assert floats.is_contiguous()
    torch.testing.assert_close(floats[0, :, 0, 0], torch.tensor([1.0, 3.0, 1.0]))
    assert torch.equal(vs_open_clip.as_floats(floats, tower), floats)


@pytest.mark.parametrize("words", ["--steps 0", "--ours=--batch-sise"])
def test_mistakes_are_told(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vs_open_clip.parse_args(["--device", "cpu", "--precision", "fp32", words.split()[0], *words.split()[1:]])
    assert words.split("=")[-1].split()[0] in capsys.readouterr().err
