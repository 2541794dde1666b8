"""What the training process remembers and says of what workers tell it."""

from __future__ import annotations

import pytest
import torch

from training.data import Batch
from training.data.progress import KEPT_STEPS, Delivery, History, ProblemLog, Progress
from training.data.samples import Counts

BATCH = Batch(torch.zeros(1), torch.zeros(1), None)


def delivery(step: int, **problems: int) -> Delivery:
    found = {(kind, "a.tar"): number for kind, number in problems.items() if number}
    counts = Counts(2, found, f"s{step}" if problems else "")
    return Delivery(BATCH, Progress(0, 0, step, 1), counts)


def test_history_says_where_consumers_stood() -> None:
    history = History(5, [Progress(0, 0, 50), Progress(1, 1, 40, 1)])
    assert history.places(5).tolist() == [[0, 0, 50, 0], [1, 1, 40, 1]]
    history.add(1, delivery(101))
    history.add(0, delivery(102))
    assert history.places(5).tolist() == [[0, 0, 50, 0], [1, 1, 40, 1]]
    assert history.places(6).tolist() == [[0, 0, 50, 0], [0, 0, 101, 1]]
    assert history.places(7).tolist() == [[0, 0, 102, 1], [0, 0, 101, 1]]
    assert history.places(7).dtype == torch.int64
    for step in (4, 8):
        with pytest.raises(ValueError, match=f"step {step} is not known, only for 5 to 7"):
            history.places(step)


def test_history_forgets_places_but_no_counts() -> None:
    history = History(0, [Progress()])
    for step in range(100):
        history.add(0, delivery(step, gone=1, bad=step % 2))
    for step in range(100 - KEPT_STEPS + 1, 101):
        assert history.places(step).tolist() == [[0, 0, step - 1, 1]]
        assert history.counts(step) == Counts(
            2 * step, {("gone", "a.tar"): step, ("bad", "a.tar"): step // 2}, f"s{step - 1}"
        )
        assert history.totals(step) == (2 * step, step + step // 2)
    for step in (100 - KEPT_STEPS, 101):
        with pytest.raises(ValueError, match="is not known"):
            history.counts(step)


def test_problems_are_warned_of_at_a_bounded_rate(caplog: pytest.LogCaptureFixture) -> None:
    problems = ProblemLog()
    for step in range(1000):
        problems.add(delivery(step).counts)
        problems.add(delivery(step, **{"no image": 1, "truncated": 2 * (step == 7)}).counts)
    messages = [record.getMessage() for record in caplog.records]
    assert [int(message.split()[0].replace(",", "")) for message in messages] == [
        1,
        2,
        4,
        10,
        16,
        32,
        64,
        128,
        256,
        512,
    ]
    assert messages[3] == "10 samples left out so far (8 × no image, 2 × truncated); the last one: s7"
