"""The folder of a run."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from training.errors import UserError
from training.run_folder import RunFolder, cut_back, default_name


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
    # A run that goes on as it was, perhaps many times, does not fill its folder.
    folder.write_params(Namespace(lr=0.3, batch_size=4, name="run", val_data=None))
    assert sorted(path.name for path in folder.path.glob("params*")) == ["params.txt", "params_1.txt", "params_2.txt"]


def test_flags_that_differ_from_those_of_the_last_start_are_named(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    flags = {"lr": 0.1, "train_data": "a: b", "wandb_notes": "two\nlr: 3", "val_data": None}
    assert folder.changed_flags(Namespace(**flags)) == []
    folder.write_params(Namespace(**flags))
    assert folder.changed_flags(Namespace(**flags, new_flag=1)) == []
    changed = folder.changed_flags(Namespace(**{**flags, "lr": 0.2, "train_data": "a: c", "val_data": ""}))
    assert changed == ["lr: 0.1 → 0.2", "train_data: a: b → a: c", "val_data: None → "]


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


def _lines(*entries: Any) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


METRICS = [{"step": step, "loss": 1.0 / step} for step in (1, 10, 20, 30)]


@pytest.mark.parametrize("torn", [b"", b'{"step": 40, "lo', _lines({"step": 40})[:-1], b"\xc3"])
def test_lines_after_the_checkpoint_are_set_aside(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(_lines(*METRICS) + torn)
    assert cut_back(path, 20) == (2 if torn else 1)
    assert path.read_bytes() == _lines(*METRICS[:3])
    aside = (tmp_path / "metrics.discarded.jsonl").read_bytes()
    assert aside == _lines(METRICS[3]) + (torn + b"\n" if torn else b"")
    assert cut_back(path, 20) == 0
    assert cut_back(path, 10) == 1
    assert path.read_bytes() == _lines(*METRICS[:2])
    assert (tmp_path / "metrics.discarded.jsonl").read_bytes() == aside + _lines(METRICS[2])
    assert list(tmp_path.glob(".*")) == []


def test_a_file_without_anything_to_cut_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert cut_back(path, 5) == 0
    path.write_bytes(_lines(*METRICS))
    os.utime(path, (1, 1))
    assert cut_back(path, 30) == 0
    assert path.stat().st_mtime == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_lacks_only_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(_lines(*METRICS)[:-1])
    assert cut_back(path, 30) == 0
    assert path.read_bytes() == _lines(*METRICS)
    assert list(tmp_path.iterdir()) == [path]


def test_results_of_epochs_that_come_again_are_cut_too(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    older = {"epoch": 0, "imagenet": 0.1}  # without a step
    results = [older, *({"epoch": epoch, "step": 100 * epoch, "imagenet": 0.5} for epoch in (1, 2, 3))]
    folder.results.write_bytes(_lines(*results) + b'{"epoch": 4, "st')
    assert folder.has_results(3)
    assert cut_back(folder.results, 250) == 2
    assert [folder.has_results(epoch) for epoch in (0, 1, 2, 3, 4)] == [True, True, True, False, False]
    assert folder.results.read_bytes() == _lines(*results[:3])


def test_the_file_stays_as_it_was_where_nothing_can_be_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(_lines(*METRICS))
    (tmp_path / "metrics.discarded.jsonl").mkdir()
    with pytest.raises(OSError, match="directory"):
        cut_back(path, 10)
    assert path.read_bytes() == _lines(*METRICS)
