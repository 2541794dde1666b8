"""The ways in: torchrun with the published command, the module, the file."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.run import get_args_parser

from end_to_end.corpus import MODEL, Corpus
from end_to_end.published import published_flags
from end_to_end.runs import MAIN, read_checkpoint_file, read_lines, run_python
from training.params import build_parser


def test_published_command_on_two_ranks(corpus: Corpus, tmp_path: Path) -> None:
    flags = published_flags(
        train_data=corpus.train,
        train_num_samples="192",
        data_size="1000",
        batch_size="16",
        workers="1",
        model=MODEL,
    )
    added = ["--model-config", corpus.model_config, "--logs", str(tmp_path), "--stop_epochs", "1", "--device", "cpu"]
    # Without the -- torchrun's own parser takes --logs for a short form of two flags of its own.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    done = run_python(*launcher, str(MAIN), *flags, *added)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "neuclip"
    assert "4096" in (run / "params.txt").read_text()
    assert "2 on cpu" in (run / "out.log").read_text()
    checkpoint = read_checkpoint_file(run / "checkpoints" / "epoch_1.pt")
    assert checkpoint["step"] == 192 // 32
    assert checkpoint["objective"]["name"] == "neuclip"
    metrics = read_lines(run / "metrics.jsonl")
    assert metrics[-1]["step"] == 192 // 32
    assert metrics[-1]["samples"] == 192


def test_torchrun_leaves_every_flag_to_training() -> None:
    options = [option for action in build_parser()._actions for option in action.option_strings]
    spellings = {"--" + option[2:].replace(old, new) for option in options for old, new in ("-_", "_-")}
    for flag in sorted(spellings):
        words = ["--standalone", "--nproc-per-node", "2", "--", "main.py", flag, "x"]
        parsed = get_args_parser().parse_args(words)
        assert [parsed.training_script, *parsed.training_script_args] == ["main.py", flag, "x"]


def test_module_shows_its_help() -> None:
    done = run_python("-m", "training.main", "--help")
    assert done.returncode == 0, done.stderr
    assert "--train-data" in done.stdout
    assert done.stderr == ""


def test_mistake_ends_the_file_with_one_line(corpus: Corpus, tmp_path: Path) -> None:
    flags = ["--train-data", str(tmp_path / "{000..003}.tar"), *corpus.model, "--logs", str(tmp_path)]
    done = run_python(str(MAIN), *flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --train-data")


def test_unknown_flag_ends_the_module_with_one_line(tmp_path: Path) -> None:
    done = run_python("-m", "training.main", "--no-such-flag", "1", "--logs", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error:")
    assert "--no-such-flag" in done.stderr
