"""Where numbers go: JSON lines, tensorboard, wandb, the log."""

from __future__ import annotations

import errno
import io
import logging
import math
import resource
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from end_to_end.runs import read_lines
from training.distributed import World
from training.errors import UserError
from training.reporting import Reporter, log_to_file, progress_bar, start_logging
from training.run_folder import RunFolder

CPU = torch.device("cpu")
MAIN, OTHER = World(0, 2, CPU), World(1, 2, CPU)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    return folder


def _args(report_to: str = "") -> Namespace:
    return Namespace(report_to=report_to, name="run", wandb_project_name="project", wandb_notes="", lr=0.1)


def test_lines_are_json_even_of_numbers_that_are_none(folder: RunFolder) -> None:
    reporter = Reporter(_args(), folder, MAIN)
    reporter.training(3, {"loss": 0.5, "bad": math.nan, "worse": math.inf})
    reporter.training(4, {"loss": 0.25})
    reporter.evaluation(1, 4, {"top1": 0.5, "clip_val_loss": -math.inf})
    reporter.close()
    assert read_lines(folder.metrics) == [
        {"step": 3, "loss": 0.5, "bad": None, "worse": None},
        {"step": 4, "loss": 0.25},
    ]
    assert read_lines(folder.results) == [{"epoch": 1, "step": 4, "top1": 0.5, "clip_val_loss": None}]


def test_a_line_is_there_as_soon_as_it_is_reported(folder: RunFolder) -> None:
    reporter = Reporter(_args(), folder, MAIN)
    reporter.training(1, {"loss": 0.5})
    assert len(read_lines(folder.metrics)) == 1


def test_full_disk_costs_lines_and_says_so_once(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(_args(), folder, MAIN)
    reporter.training(1, {"loss": 0.5})
    # The disk has room for 90 bytes of the file: of the third line a part.
    with small_files(90):
        for step in range(2, 6):
            reporter.training(step, {"loss": 0.5, "temperature": 0.07})
    assert [line["step"] for line in read_lines(folder.metrics)] == [1, 2]
    reporter.training(6, {"loss": 0.25})
    reporter.close()
    assert [line["step"] for line in read_lines(folder.metrics)] == [1, 2, 6]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "metrics.jsonl cannot be written: " in said[0]
    assert "3 lines are missing" in said[1]


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes; a write that would is cut short, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_under_tensorboard(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(_args("tensorboard"), folder, MAIN)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reporter.tensorboard.add_scalar = fail
    reporter.training(1, {"loss": 0.5})
    reporter.training(2, {"loss": 0.5})
    reporter.close()
    assert [record.getMessage() for record in caplog.records] == [
        "tensorboard cannot write: No space left on device; from here on it gets nothing"
    ]
    assert len(read_lines(folder.metrics)) == 2


def test_full_disk_under_the_log_file(
    folder: RunFolder, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    start_logging(MAIN, debug=False)
    log_to_file(Path("/dev/full"))
    for number in range(5):
        logging.info("line %d", number)
    said = capsys.readouterr()
    handler = root_logger.handlers[-1]
    root_logger.removeHandler(handler)
    with suppress(OSError):  # as logging itself does at the end of the process
        handler.close()
    assert said.out.count("line ") == 5
    assert said.err == "/dev/full cannot be written (No space left on device); the log goes on here\n"


def test_other_ranks_write_nothing(folder: RunFolder) -> None:
    reporter = Reporter(_args("tensorboard,wandb"), folder, OTHER)
    reporter.training(1, {"loss": 0.5})
    reporter.evaluation(1, 1, {"loss": 0.5})
    reporter.close()
    assert [path.name for path in folder.path.iterdir()] == ["checkpoints"]


def test_tensorboard(folder: RunFolder) -> None:
    reporter = Reporter(_args("tensorboard"), folder, MAIN)
    reporter.training(1, {"loss": 0.5})
    reporter.training(5, {"loss": 0.25})
    reporter.evaluation(1, 5, {"top1": 0.75})
    reporter.close()
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (5, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("val/top1")] == [(5, 0.75)]


def _picture(folder: RunFolder) -> Path:
    path = folder.path / "gallery.png"
    Image.new("RGB", (4, 2), (250, 10, 0)).save(path)
    return path


def test_pictures_in_tensorboard(folder: RunFolder) -> None:
    reporter = Reporter(_args("tensorboard"), folder, MAIN)
    assert reporter.shows_pictures
    reporter.pictures(5, {"gallery": _picture(folder)})
    reporter.close()
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    (shown,) = events.Images("val/gallery")
    assert (shown.step, shown.width, shown.height) == (5, 4, 2)
    with Image.open(io.BytesIO(shown.encoded_image_string)) as image:
        assert image.convert("RGB").getpixel((3, 1)) == (250, 10, 0)


def test_pictures_in_wandb(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    fake.Image = lambda path: ("image", path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    reporter = Reporter(_args("wandb"), folder, MAIN)
    path = _picture(folder)
    reporter.pictures(5, {"gallery": path})
    reporter.pictures(6, {})
    assert fake.logged == [{"val/gallery": ("image", str(path)), "step": 5}]


def test_nobody_to_show_pictures_to(folder: RunFolder) -> None:
    assert not Reporter(_args(""), folder, MAIN).shows_pictures
    assert not Reporter(_args("tensorboard"), folder, OTHER).shows_pictures


class FakeWandb(ModuleType):
    """Counts what would go to wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        """Begin."""
        self.started.append(options)
        return self

    def log(self, values: dict[str, Any], **_: Any) -> None:
        """One call."""
        self.logged.append(values)

    def finish(self) -> None:
        """End."""
        self.finished += 1


def test_wandb_is_called_once_per_interval(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    reporter = Reporter(_args("wandb"), folder, MAIN)
    reporter.training(1, {"loss": 0.5, "lr": 0.1})
    reporter.training(2, {"loss": 0.4, "lr": 0.1})
    reporter.evaluation(1, 2, {"top1": 0.5})
    reporter.close()
    assert fake.logged == [
        {"train/loss": 0.5, "train/lr": 0.1, "step": 1},
        {"train/loss": 0.4, "train/lr": 0.1, "step": 2},
        {"val/top1": 0.5, "val/epoch": 1, "step": 2},
    ]
    (options,) = fake.started
    assert (options["project"], options["name"], options["resume"]) == ("project", "run", "allow")
    assert options["id"] == "run", "a resumed run must go on in the same place"
    assert options["config"]["lr"] == 0.1
    assert fake.finished == 1


@pytest.mark.parametrize(("outlet", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_absent_package_is_explained(
    outlet: str, module: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--report-to {outlet}.*pip install {outlet}"):
        Reporter(_args(outlet), folder, MAIN)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        if handler not in root.handlers:
            root.addHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize(
    ("world", "debug", "shown"),
    [(MAIN, False, ["info", "warning"]), (MAIN, True, ["debug", "info", "warning"]), (OTHER, True, ["warning"])],
)
def test_console_shows_rank_0_and_warnings_of_others(
    world: World, debug: bool, shown: list[str], root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    start_logging(world, debug)
    for level in ("debug", "info", "warning"):
        getattr(logging, level)("this is %s", level)
    printed = capsys.readouterr().out
    assert [level for level in ("debug", "info", "warning") if f"this is {level}" in printed] == shown
    assert ("[rank 1]" in printed) == (world is OTHER)


def test_log_file_takes_the_same_lines(folder: RunFolder, root_logger: logging.Logger) -> None:
    start_logging(MAIN, debug=False)
    log_to_file(folder.path / "out.log")
    logging.info("τ is %.2f", 0.07)
    logging.debug("unseen")
    text = (folder.path / "out.log").read_text(encoding="utf-8")
    assert "τ is 0.07" in text
    assert "unseen" not in text


def test_no_bar_where_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for world in (MAIN, OTHER):
        with progress_bar(world, 3, "epoch") as bar:
            bar.update()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_progress_bar_starts_no_thread() -> None:
    """Workers are forked right after it; see the comment there."""
    before = set(threading.enumerate())
    with progress_bar(MAIN, 3, "epoch") as bar:
        bar.update()
        assert set(threading.enumerate()) == before
