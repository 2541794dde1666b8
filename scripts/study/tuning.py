"""Learning rates, chosen for each method and batch size in the same way: short runs, scored on pairs of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from evaluation.records import read_records
from study.errors import StudyError
from study.runs import BATCH_SIZES, FURTHEST, LEARNING_RATES, METHODS, Run, Setup, tuning_run

Case = tuple[str, int]
Scores = dict[Case, dict[float, float]]
# Six recalls, not R@1 alone: one pair among 1,009 is a tenth of a percent of R@1, and learning rates are closer than that.
METRICS = tuple(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


def tune(setup: Setup, train: Callable[[Sequence[Run]], None]) -> Scores:
    """Try learning rates until none of the best lies at an end of what was tried, or there is no further one.

    Args:
        train: trains those of the runs that are not finished.

    Returns:
        For each method and batch size: learning rate → mean recall on the tuning pairs.
    """
    tried: dict[Case, set[float]] = {(method, size): set() for size in BATCH_SIZES for method in METHODS}
    due = {case: set(LEARNING_RATES[case[1]]) for case in tried}
    while any(due.values()):
        train([tuning_run(setup, *case, lr) for case, rates in due.items() for lr in sorted(rates)])
        for case, rates in due.items():
            tried[case] |= rates
        scores = {case: {lr: score(setup, *case, lr) for lr in sorted(rates)} for case, rates in tried.items()}
        due = {case: _beyond(found) - tried[case] for case, found in scores.items()}
    return scores


def best_rates(scores: Scores) -> dict[Case, float]:
    """The learning rate with the highest score; the smaller one of equals."""
    return {case: max(sorted(found), key=found.__getitem__) for case, found in scores.items()}


def score(setup: Setup, method: str, batch_size: int, lr: float) -> float:
    """Mean of R@1, R@5 and R@10 both ways after a finished tuning run.

    Raises:
        StudyError: the run has come to its end without an evaluation.
    """
    run = tuning_run(setup, method, batch_size, lr)
    results = read_records(setup.logs / run.name / "results.jsonl")
    if not results or any(name not in results[-1] for name in METRICS):
        raise StudyError(f"{setup.logs / run.name} has no evaluation: its out.log says why")
    return sum(results[-1][name] for name in METRICS) / len(METRICS)


def _beyond(found: dict[float, float]) -> set[float]:
    rates: Iterable[float] = sorted(found)
    lowest, *_, highest = rates
    best = max(rates, key=found.__getitem__)
    further = {lowest / 2} if best == lowest else {highest * 2} if best == highest else set()
    return {lr for lr in further if FURTHEST[0] <= lr <= FURTHEST[1]}
