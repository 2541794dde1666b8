"""Weights alone: open_clip reads them and computes the same; mistakes are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from safetensors import safe_open
from safetensors.torch import load_file

from end_to_end.corpus import MODEL_CONFIG
from training.atomic_files import write_atomically
from training.export import main

FORMATS = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """open_clip remembers models for the whole process."""
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    for name, more in (("tiny", {}), ("tiny-bias", {"init_logit_bias": -10.0})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**MODEL_CONFIG, **more}))
        open_clip.add_model_config(tmp_path / f"{name}.json")


def _checkpoint(folder: Path, name: str = "tiny", **more: Any) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(3)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    content = {
        "epoch": 2,
        "step": 40,
        "name": "run",
        "model": name,
        "state_dict": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        **more,
    }
    write_atomically(folder / "epoch_2.pt", content)
    return folder / "epoch_2.pt", model.eval()


def _features(model: torch.nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 3, 32, 32, generator=generator)
    text = torch.randint(1, 40, (3, model.context_length), generator=generator)
    with torch.no_grad():
        return [*model.eval()(image, text)]


@FORMATS
@pytest.mark.parametrize("name", ["tiny", "tiny-bias"])
def test_open_clip_computes_the_same_with_it(name: str, suffix: str, tmp_path: Path) -> None:
    path, model = _checkpoint(tmp_path, name)
    out = tmp_path / f"weights{suffix}"
    assert main([str(path), str(out)]) == 0
    plain = open_clip.create_model(name, pretrained=str(out))
    expected, found = _features(model), _features(plain)
    assert len(expected) >= 3
    for ours, theirs in zip(expected, found, strict=True):
        assert torch.equal(ours, theirs)
    number = sum(value.numel() for value in model.state_dict().values())
    assert out.stat().st_size < 4 * number + 60_000
    assert out.stat().st_size < path.stat().st_size / 2
    assert {p.name for p in tmp_path.glob("*weights*")} == {out.name}


@FORMATS
@pytest.mark.parametrize(("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_takes_half_the_place(flag: str, dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    path, model = _checkpoint(tmp_path)
    whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    assert main([str(path), str(whole)]) == 0
    assert main([str(path), str(half), "--dtype", flag]) == 0
    assert half.stat().st_size < 0.75 * whole.stat().st_size
    found = load_file(half) if suffix == ".safetensors" else torch.load(half, weights_only=True)["state_dict"]
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert found[name].dtype == (dtype if value.is_floating_point() and value.ndim > 0 else value.dtype), name
        assert torch.equal(found[name], value.to(found[name].dtype))
    loaded = open_clip.create_model("tiny", pretrained=str(half))
    assert loaded.logit_scale.item() == model.logit_scale.item()


def test_metadata_says_where_it_is_from(tmp_path: Path) -> None:
    path, _ = _checkpoint(tmp_path)
    main([str(path), str(tmp_path / "out.safetensors")])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "name": "run", "model": "tiny", "epoch": "2", "step": "40"}


@FORMATS
def test_tied_and_turned_tensors_are_written_each_for_itself(suffix: str, tmp_path: Path) -> None:
    tied = torch.randn(6, 4)
    weights = {
        "a": tied,
        "b": tied,
        "part": tied[2:4],
        "turned": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write_atomically(tmp_path / "epoch_1.pt", {"state_dict": weights})
    out = tmp_path / f"out{suffix}"
    assert main([str(tmp_path / "epoch_1.pt"), str(out)]) == 0
    found = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)["state_dict"]
    for name, value in weights.items():
        assert torch.equal(found[name], value)
        assert found[name].is_contiguous()


def test_a_bias_beside_the_architecture_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = _checkpoint(tmp_path, logit_bias=torch.tensor(-3.5))
    assert main([str(path), str(tmp_path / "out.pt")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'out.pt'}: ")
    assert second.startswith("left out: logit_bias -3.5")
    assert torch.load(tmp_path / "out.pt", weights_only=True).keys() == {"state_dict"}
    open_clip.create_model("tiny", pretrained=str(tmp_path / "out.pt"))


def _mistake(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = _checkpoint(tmp_path)
    out = tmp_path / "out.pt"
    assert "there is no such file" in _mistake(capsys, tmp_path / "epoch_9.pt", out)
    assert ".pt or .safetensors" in _mistake(capsys, path, tmp_path / "out.bin")
    assert "--dtype" in _mistake(capsys, path, out, "--dtype", "int8")
    assert "--forse is no flag" in _mistake(capsys, path, out, "--forse")
    assert "required" in _mistake(capsys, path)
    assert "cannot be written: No such file" in _mistake(capsys, path, tmp_path / "absent" / "out.pt")
    assert "cannot be written: No such file" in _mistake(capsys, path, tmp_path / "absent" / "out.safetensors")
    for number, content in enumerate(({"epoch": 1}, torch.zeros(3), {"state_dict": {"a": 3}}, {"state_dict": {}})):
        torch.save(content, tmp_path / f"foreign{number}.pt")
        assert "no weights" in _mistake(capsys, tmp_path / f"foreign{number}.pt", out)
    (tmp_path / "text.pt").write_text("text")
    assert "cannot be read as a checkpoint" in _mistake(capsys, tmp_path / "text.pt", out)
    path.write_bytes(path.read_bytes()[:-5])
    assert "is not whole: it is" in _mistake(capsys, path, out)
    assert not out.exists()


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = _checkpoint(tmp_path)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    assert "--force" in _mistake(capsys, path, out)
    assert out.read_bytes() == b"mine"
    assert main([str(path), str(out), "--force"]) == 0
    assert len(load_file(out)) > 10


def test_it_is_a_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "training.export", str(tmp_path / "absent.pt"), str(tmp_path / "out.pt")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
