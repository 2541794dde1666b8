"""What became of the samples of an epoch, over all ranks: how many were left out, why, and in which shards."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from training.atomic_files import replacing
from training.data.samples import Counts

REPORT_FILE = "data_report.json"
# A report names the worst shards; of others it says how many they are.
KEPT_SHARDS = 1000
# The log names this many.
_NAMED_SHARDS = 3


class DataReport:
    """Sums of counts.

    Attributes:
        good: samples delivered in batches.
        kinds: samples left out, by kind (see `training.data.samples.Problem`).
        last: the last one left out, where it lies and why; "" if there is none.
    """

    def __init__(self) -> None:
        self.good = 0
        self.kinds: Counter[str] = Counter()
        self.last = ""
        self._shards: dict[str, Counter[str]] = {}
        # Of shards that a saved state had no room for: how many there were, and their samples.
        self._other_shards = 0
        self._other_samples = 0

    @property
    def left_out(self) -> int:
        """Samples left out."""
        return self.kinds.total()

    @property
    def looked_at(self) -> int:
        """Samples looked at: good ones and those left out."""
        return self.good + self.left_out

    def add(self, counts: Counts) -> None:
        """Adds what one rank, or a worker of it, has counted."""
        self.good += counts.good
        for (kind, shard), number in counts.problems.items():
            self.kinds[kind] += number
            self._shards.setdefault(shard, Counter())[kind] += number
        self.last = counts.last or self.last

    def fraction(self) -> float:
        """The share of the samples looked at that was left out, 0 to 1; 0 before the first."""
        return self.left_out / self.looked_at if self.looked_at else 0.0

    def summary(self) -> str:
        """A few lines for the log."""
        if not self.left_out:
            return f"data: {self.looked_at:,} samples looked at, all of them good"
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in _descending(self.kinds))
        worst = self._worst()
        named = ", ".join(f"{shard} ({number:,})" for shard, number in worst[:_NAMED_SHARDS])
        others = len(worst[_NAMED_SHARDS:]) + self._other_shards
        return (
            f"data: {self.looked_at:,} samples looked at, {self.left_out:,} left out ({self.fraction():.2%}): {kinds}\n"
            f"data: most in {named}{f' and {others:,} more shards' if others else ''}; the last: {self.last}"
        )

    def state(self) -> dict[str, Any]:
        """Everything, in plain values, for a checkpoint; of shards the worst 1,000."""
        kept = self._worst()[:KEPT_SHARDS]
        other_shards, other_samples = self._others()
        return {
            "good": self.good,
            "kinds": dict(self.kinds),
            "last": self.last,
            "shards": {shard: dict(self._shards[shard]) for shard, _ in kept},
            "other_shards": other_shards,
            "other_samples": other_samples,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> DataReport:
        """The report that `state` was taken from."""
        report = cls()
        report.good = state["good"]
        report.kinds = Counter(state["kinds"])
        report.last = state["last"]
        report._shards = {shard: Counter(kinds) for shard, kinds in state["shards"].items()}
        report._other_shards = state["other_shards"]
        report._other_samples = state["other_samples"]
        return report

    def write(self, path: Path, epoch: int) -> None:
        """Puts the entry of an epoch into a file {"epochs": […]}, in the place of one that is there already.

        The file is never half-written. One that cannot be understood is kept under another name, and a new one is begun.

        Raises:
            OSError: it cannot be written.
        """
        epochs = [entry for entry in _read_epochs(path) if entry["epoch"] != epoch]
        epochs.append(self._entry(epoch))
        content = json.dumps({"epochs": sorted(epochs, key=lambda entry: entry["epoch"])}, indent=1) + "\n"
        with replacing(path) as file:
            file.write(content.encode("utf-8"))

    def _entry(self, epoch: int) -> dict[str, Any]:
        other_shards, other_samples = self._others()
        return {
            "epoch": epoch,
            "looked_at": self.looked_at,
            "good": self.good,
            "left_out": self.left_out,
            "fraction_left_out": self.fraction(),
            "kinds": dict(_descending(self.kinds)),
            "shards": {shard: dict(_descending(self._shards[shard])) for shard, _ in self._worst()[:KEPT_SHARDS]},
            "other_shards": other_shards,
            "left_out_in_other_shards": other_samples,
        }

    def _worst(self) -> list[tuple[str, int]]:
        """Shards with the number of their samples left out, most first."""
        return _descending({shard: kinds.total() for shard, kinds in self._shards.items()})

    def _others(self) -> tuple[int, int]:
        """Shards that there is no room for, and how many of their samples were left out."""
        beyond = self._worst()[KEPT_SHARDS:]
        return self._other_shards + len(beyond), self._other_samples + sum(number for _, number in beyond)


def _descending(numbers: dict[str, int]) -> list[tuple[str, int]]:
    """Most first; of equal ones by name, so that equal counts make equal reports."""
    return sorted(numbers.items(), key=lambda item: (-item[1], item[0]))


def _read_epochs(path: Path) -> list[dict[str, Any]]:
    """The entries of a report; none of one that is not there, or that had to be moved aside."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError):
        found = None
    epochs = found.get("epochs") if isinstance(found, dict) else None
    if isinstance(epochs, list) and all(isinstance(e, dict) and type(e.get("epoch")) is int for e in epochs):
        return epochs
    aside = path.with_name(path.name + ".damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged.{number}")
    os.replace(path, aside)
    return []
