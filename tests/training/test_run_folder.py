"""The folder of a run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from training.errors import UserError
from training.run_folder import RunFolder, default_name


def test_paths(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    assert folder.path == tmp_path / "run"
    assert folder.checkpoints == tmp_path / "run" / "checkpoints"
    assert folder.checkpoints.is_dir()
    assert folder.metrics.name == "metrics.jsonl"
    assert folder.results.name == "results.jsonl"
    folder.create()


def test_params_are_readable_lines_and_earlier_ones_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    for lr in (0.1, 0.2, 0.3):
        folder.write_params(Namespace(lr=lr, batch_size=4, name="run", val_data=None))
    assert (folder.path / "params.txt").read_text() == "batch_size: 4\nlr: 0.3\nname: run\nval_data: None\n"
    assert "lr: 0.1" in (folder.path / "params_1.txt").read_text()
    assert "lr: 0.2" in (folder.path / "params_2.txt").read_text()


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    folder.check_new(None)
    folder.create()
    folder.check_new(None)  # nothing but an attempt that failed early
    folder.write_params(Namespace(lr=0.1))
    with pytest.raises(UserError, match=r"--name run exists already.*--resume latest"):
        folder.check_new(None)
    folder.check_new("latest")
    folder.check_new("some/epoch_1.pt")


def test_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--logs"):
        RunFolder(str(tmp_path / "file"), "run").create()


def test_default_name_says_what_runs() -> None:
    args = Namespace(objective="openclip", model="hf-hub:some/model", lr=5e-4, batch_size=64, precision="fp32")
    name = default_name(args)
    assert Path(name).name == name
    assert ":" not in name
    for part in ("openclip", "model_hf-hub-some-model", "lr_0.0005", "b_64", "p_fp32"):
        assert part in name
