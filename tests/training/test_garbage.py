"""The garbage collector passes over what stays for the whole run, and over nothing afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from small_training import make_args, make_batches, make_training
from training import garbage
from training.loop import train_one_epoch


class Ring:
    """Refers to itself, so that only the collector can remove it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _thawed() -> None:
    """Whatever ran before in this process."""
    gc.unfreeze()


def test_what_is_there_is_passed_over_until_the_end() -> None:
    ring = Ring()
    seen = weakref.ref(ring)
    with garbage.thawed_at_the_end():
        garbage.freeze_once()
        del ring
        gc.collect()
        assert seen() is not None
    gc.collect()
    assert seen() is None


def test_what_had_died_before_is_not_kept() -> None:
    seen = weakref.ref(Ring())
    with garbage.thawed_at_the_end():
        garbage.freeze_once()
        assert seen() is None


def _fail_while_frozen() -> None:
    with garbage.thawed_at_the_end():
        garbage.freeze_once()
        raise KeyError


def test_thawed_after_an_error_too() -> None:
    with pytest.raises(KeyError):
        _fail_while_frozen()
    assert gc.get_freeze_count() == 0


def test_a_run_freezes_once_after_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(make_args("--epochs", "2"), make_batches(3, 4))
    steps: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: steps.append(training.state.step))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(steps))
    train_one_epoch(training, 0)
    train_one_epoch(training, 1)
    assert steps == [1]
