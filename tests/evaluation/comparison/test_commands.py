"""figures.py from its command line: files, notes, mistakes."""

from __future__ import annotations

import csv
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.comparison.commands import main

from .conftest import RunMaker

ROOT = Path(__file__).resolve().parents[3]
Captured = pytest.CaptureFixture[str]


def test_curves(make_run: RunMaker, tmp_path: Path, capsys: Captured) -> None:
    for seed in (0, 1):
        make_run(f"a-s{seed}", seed=seed, told=2 - seed, datacomp=True)
    assert main(["curves", f"{tmp_path}/logs/*", "--out", str(tmp_path / "new" / "out")]) == 0
    out, err = capsys.readouterr()
    files = [tmp_path / "new" / "out" / name for name in ("curves.pdf", "curves.png")]
    assert all(str(path) in out and path.stat().st_size > 5000 for path in files)
    assert err == "note: a-s1 stands at epoch 1 of 2.\n"


def test_optimization(make_run: RunMaker, tmp_path: Path, capsys: Captured) -> None:
    for kind, offset in (("alternating", 0.1), ("simultaneous", 0.0)):
        make_run(kind, offset, npn_optimization=kind)
    assert main(["optimization", f"{tmp_path}/logs/*", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("optimization.*")} == {
        f"optimization.{ending}" for ending in ("pdf", "png", "md", "csv", "tex")
    }
    with open(tmp_path / "optimization.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["npn_optimization"] for row in rows] == ["alternating", "simultaneous"]
    assert [float(row["text_to_image_R@1"]) for row in rows] == pytest.approx([0.3, 0.2])
    assert "**30.00**" in capsys.readouterr().out


def test_ablation_and_its_names(make_run: RunMaker, tmp_path: Path, capsys: Captured) -> None:
    for value in (100, 500):
        make_run(f"r{value}", value / 1e4, npn_restart_iter=value)
    make_run("lr", npn_restart_iter=500, lr=0.5)
    runs = f"{tmp_path}/logs/*"
    assert main(["ablation", runs, "--table", "T_r", "--out", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().err == "note: besides npn_restart_iter the runs differ in lr; none of them are pooled.\n"
    assert main(["ablation", runs, "--by", "npn-restart-iter", "--out", str(tmp_path / "two")]) == 0
    for ending in ("md", "csv", "tex"):
        one, two = (tmp_path / name / f"ablation-npn_restart_iter.{ending}" for name in ("one", "two"))
        assert one.read_text() == two.read_text()
        assert len(one.read_text().splitlines()) >= 4


def test_other_epochs_are_told(make_run: RunMaker, tmp_path: Path, capsys: Captured) -> None:
    for seed, told in enumerate((2, 1)):
        make_run(f"a-{seed}", seed=seed, told=told, stop_epochs=1, datacomp=True)
    words = [f"{tmp_path}/logs/*", "--out", str(tmp_path)]
    assert main(["ablation", *words, "--by", "global-batch", "-m", "DataComp Average"]) == 0
    out, err = capsys.readouterr()
    assert err == "note: DataComp Average of global batch 8 is taken at epoch 1, the last of all; a-0 epoch 2.\n"
    assert out.splitlines()[0].startswith("| global batch |")
    assert "20.00 ± 0.00" in out
    assert main(["optimization", *words, "-m", "DataComp Average"]) == 0
    assert "the last of all; a-0 epoch 2" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("the encoder failed"), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_without_a_file_names_the_folder(
    error: OSError, make_run: RunMaker, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    make_run("a")
    monkeypatch.setattr("evaluation.comparison.commands.write_table", fail)
    out = tmp_path / "out"
    assert main(["ablation", f"{tmp_path}/logs/*", "--by", "lr", "--out", str(out)]) == 2
    said = f"error: {out} cannot be written ({error.strerror or error}); give another --out FOLDER.\n"
    assert capsys.readouterr().err == said


def test_metrics_by_name(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a")
    words = ["ablation", f"{tmp_path}/logs/*", "--by", "lr", "-m", "contrastive_loss", "-m", "clip_val_loss"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    with open(tmp_path / "ablation-lr.csv") as file:
        [row] = csv.DictReader(file)
    assert row == {"lr": "0.001", "seeds": "1", "contrastive_loss": "3.2", "clip_val_loss": "1.0"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["curves", "{logs}/none"], "none does not exist"),
        (["curves", "{logs}/a", "--metric", "recall"], "--metric recall: no run has it; there is clip_val_loss,"),
        (["ablation", "{logs}/a"], "give --by FLAG or --table NAME"),
        (["ablation", "{logs}/a", "--by", "lr", "--table", "m"], "give --by FLAG or --table NAME"),
        (["ablation", "{logs}/a", "--by", "npn_protos"], "--by npn_protos: no run has such a flag"),
        (["npn-time", "{logs}/a"], "--skip-steps 100"),
        (["npn-time", "{logs}/a", "--skip-steps", "-1"], "--skip-steps -1"),
        (["curves", "{logs}/a", "--out", "{logs}/a/params.txt"], "params.txt is a file"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    words: list[str], said: str, make_run: RunMaker, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("a")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main([word.format(logs=tmp_path / "logs") for word in words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert said in err
    assert (out, err.count("\n")) == ("", 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_as_a_script(make_run: RunMaker, tmp_path: Path) -> None:
    make_run("a")
    script = str(ROOT / "src" / "evaluation" / "figures.py")
    words = ["npn-time", str(tmp_path / "logs" / "a"), "--skip-steps", "20", "--out", "out"]
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "npn-time.tex").read_text().count("1.00") == 1
