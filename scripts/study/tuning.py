"""What is chosen for each method and batch size in the same way: by short runs, scored on pairs of their own.

First the learning rate; then, at that learning rate, γ, for the methods that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from evaluation.records import read_records
from study.errors import StudyError
from study.runs import (
    BATCH_SIZES,
    FURTHEST,
    GAMMAS,
    LEARNING_RATES,
    METHODS,
    PUBLISHED_GAMMA,
    Case,
    Choice,
    Run,
    Setup,
    tuning_run,
)

Train = Callable[[Sequence[Run]], None]
Scores = dict[float, float]
# Six recalls, not R@1 alone: one pair among 1,009 is a tenth of a percent of R@1, and learning rates are closer than that.
METRICS = tuple(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


class Tried(NamedTuple):
    """Mean recall on the tuning pairs by learning rate, and by γ at the best learning rate (empty without a γ)."""

    rates: Scores
    gammas: Scores

    @property
    def choice(self) -> Choice:
        """What scored highest; the smaller one of equals."""
        return Choice(_best(self.rates), _best(self.gammas) if self.gammas else None)


def tune(setup: Setup, train: Train) -> dict[Case, Tried]:
    """Try learning rates until none of the best lies at an end of what was tried, or there is no further one; then γ.

    Args:
        train: trains those of the runs that are not finished.
    """
    rates = _tune_rates(setup, train)
    choices = {
        case: [Choice(_best(found), gamma) for gamma in GAMMAS]
        for case, found in rates.items()
        if case[0] in PUBLISHED_GAMMA
    }
    train([tuning_run(setup, *case, choice) for case, of_case in choices.items() for choice in of_case])
    gammas = {
        case: {choice.gamma: score(setup, *case, choice) for choice in of_case if choice.gamma is not None}
        for case, of_case in choices.items()
    }
    return {case: Tried(found, gammas.get(case, {})) for case, found in rates.items()}


def score(setup: Setup, method: str, batch_size: int, choice: Choice) -> float:
    """Mean of R@1, R@5 and R@10 both ways after a finished tuning run.

    Raises:
        StudyError: the run has come to its end without an evaluation.
    """
    run = tuning_run(setup, method, batch_size, choice)
    results = read_records(setup.logs / run.name / "results.jsonl")
    if not results or any(name not in results[-1] for name in METRICS):
        raise StudyError(f"{setup.logs / run.name} has no evaluation: its out.log says why")
    return sum(results[-1][name] for name in METRICS) / len(METRICS)


def _tune_rates(setup: Setup, train: Train) -> dict[Case, Scores]:
    tried: dict[Case, set[float]] = {(method, size): set() for size in BATCH_SIZES for method in METHODS}
    due = {case: set(LEARNING_RATES[case[1]]) for case in tried}
    while any(due.values()):
        train([tuning_run(setup, *case, _published(case, lr)) for case, rates in due.items() for lr in sorted(rates)])
        for case, rates in due.items():
            tried[case] |= rates
        scores = {
            case: {lr: score(setup, *case, _published(case, lr)) for lr in sorted(rates)}
            for case, rates in tried.items()
        }
        due = {case: _beyond(found) - tried[case] for case, found in scores.items()}
    return scores


def _published(case: Case, lr: float) -> Choice:
    return Choice(lr, PUBLISHED_GAMMA.get(case[0]))


def _beyond(found: Scores) -> set[float]:
    rates: Iterable[float] = sorted(found)
    lowest, *_, highest = rates
    best = _best(found)
    further = {lowest / 2} if best == lowest else {highest * 2} if best == highest else set()
    return {lr for lr in further if FURTHEST[0] <= lr <= FURTHEST[1]}


def _best(found: Scores) -> float:
    return max(sorted(found), key=found.__getitem__)
