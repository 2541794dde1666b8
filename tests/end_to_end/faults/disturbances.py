"""What is done to a rank before it begins to train: functions for `Run(prepare=…)`, made with functools.partial.

They are sent to another process, so they stand here, in a module that it can import, and not in the tests.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = "here\n"
LONGEST_PAUSE = 60.0


def on_rank(rank: int, prepare: Callable[[], None]) -> None:
    """Do it on one rank only."""
    if int(os.environ.get("RANK", 0)) == rank:
        prepare()


def together(*parts: Callable[[], None]) -> None:
    """Do several things."""
    for part in parts:
        part()


def pause(place: str, marker: Path, call: int = 1) -> None:
    """Hold a rank up where it is about to call a function.

    Each rank that arrives appends a line to `marker` and waits until `marker`.go is there.

    Args:
        place: "module:function" or "module:Class.method", as it is looked up by the one who calls it.
        call: the how manieth call, from 1.
    """

    def held_up() -> None:
        with open(marker, "a", encoding="utf-8") as file:
            file.write(HERE)
        go, end = marker.with_name(f"{marker.name}.go"), time.monotonic() + LONGEST_PAUSE
        while not go.exists() and time.monotonic() < end:
            time.sleep(0.01)

    before_call(place, held_up, call)


def hours_over_at_step(step: int) -> None:
    """Let an hour go by, for whoever asks how long the run has been going, before a step of this process."""
    from training import boundary

    real, passed = time.monotonic, [0.0]

    def let_it_pass() -> None:
        passed[0] = 3600.0

    before_call("training.loop:training_step", let_it_pass, step)
    arguments = boundary.Boundary.__init__.__defaults__
    assert arguments == (real,)
    boundary.Boundary.__init__.__defaults__ = (lambda: real() + passed[0],)


def before_call(place: str, act: Callable[[], None], call: int = 1) -> None:
    """Have a function do something else first, the `call`-th time it is called."""
    owner, name = _find(place)
    function = getattr(owner, name)
    calls = 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return function(*args, **kwargs)

    setattr(owner, name, replacement)


def _find(place: str) -> tuple[Any, str]:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    found: Any = importlib.import_module(module)
    for owner in owners:
        found = getattr(found, owner)
    return found, name


def full_disk(folder: Path, first: int, last: int) -> None:
    """Fill rank 0's disk before one step of this process, and make room again before another.

    Args:
        folder: on a file system that is small.
    """
    ballast = folder / "ballast"

    def fill() -> None:
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    on_rank(0, partial(before_call, "training.loop:training_step", fill, first))
    on_rank(0, partial(before_call, "training.loop:training_step", ballast.unlink, last))


def failing_writes(first: int, *numbers: int) -> None:
    """Have some checkpoints fail when half of them is written.

    Args:
        first: the how manieth write of this process is the first that fails.
        numbers: of the errors with which this one and the following ones fail.
    """
    from training import atomic_files

    whole, calls = atomic_files._save, [0]

    def fail(path: Path, content: Any) -> dict[str, Any]:
        calls[0] += 1
        if not first <= calls[0] < first + len(numbers):
            return whole(path, content)
        record = whole(path, content)
        os.truncate(path, record["bytes"] // 2)
        number = numbers[calls[0] - first]
        raise OSError(number, os.strerror(number))

    atomic_files._save = fail


def failure(place: str, marker: Path, rank: int, call: int) -> None:
    """Have a function raise on one rank; `marker` is there from then on."""

    def fail() -> None:
        marker.touch()
        raise ValueError(f"made up on rank {rank}")

    on_rank(rank, partial(before_call, place, fail, call))


def unknown_key(rank: int, key: int, call: int) -> None:
    """Give a sample of one batch of a rank another key."""
    from training.loop import Training

    check, calls = Training.check_keys, [0]

    def changed(self: Training, batch: Any) -> None:
        calls[0] += 1
        if calls[0] == call and int(os.environ["RANK"]) == rank:
            batch.keys[3] = key
        check(self, batch)

    Training.check_keys = changed


def broken_from(rank: int, sample: int) -> None:
    """Let every sample be broken that a worker of a rank looks at, from the `sample`-th on."""
    from training.data import stream
    from training.data.samples import BrokenSampleError

    read, looked_at = stream.read_labels, [0]

    def fail(*args: Any) -> Any:
        looked_at[0] += 1
        if looked_at[0] >= sample and int(os.environ["RANK"]) == rank:
            raise BrokenSampleError("made up")
        return read(*args)

    stream.read_labels = fail


def stalled_data(rank: int, batch: int) -> None:
    """Let a worker of a rank wait for its `batch`-th batch for longer than any test takes."""
    on_rank(rank, partial(before_call, "training.data.stream:BatchDataset.collect", partial(time.sleep, 600), batch))


def note_keys(folder: Path) -> None:
    """Note each sample that is trained on, as "epoch key", in files of the folder."""
    from training.loop import Training

    check = Training.check_keys

    def noted(self: Training, batch: Any) -> None:
        check(self, batch)
        with open(folder / f"keys of {os.getpid()}", "a", encoding="utf-8") as file:
            file.writelines(f"{self.state.epoch} {key}\n" for key in batch.keys.tolist())

    Training.check_keys = noted


def poisoned_pictures(rank: int, first: int, count: int = 1) -> None:
    """Make a rank's pictures NaN in some steps, from the `first`-th of this process on."""
    from training.pixels import Pixels

    clean, calls = Pixels.__call__, [0]

    def poisoned(self: Pixels, image: Any) -> Any:
        calls[0] += 1
        return clean(self, image) * (math.nan if first <= calls[0] < first + count else 1.0)

    on_rank(rank, partial(setattr, Pixels, "__call__", poisoned))


def poisoned_gradient(rank: int, step: int) -> None:
    """Make one number of a rank's own gradient infinite in one step, counted from 1."""
    from training import loop

    clean, calls = loop.training_step, [0]

    def spoil(gradient: Any) -> Any:
        gradient = gradient.clone()
        gradient.view(-1)[0] = math.inf
        return gradient

    def poisoned(training: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] != step:
            return clean(training, batch)
        hook = next(training.state.towers.model.visual.parameters()).register_hook(spoil)
        try:
            return clean(training, batch)
        finally:
            hook.remove()

    on_rank(rank, partial(setattr, loop, "training_step", poisoned))


def note_weights(folder: Path) -> None:
    """Save each rank's towers when its run is over, as weights_RANK.pt."""
    import torch

    from training.saving import Saver

    close = Saver.close

    def noted(self: Saver, seconds: float) -> None:
        towers = self._training.state.towers
        torch.save(towers.state_dict(), folder / f"weights_{os.environ['RANK']}.pt")
        close(self, seconds)

    Saver.close = noted
