"""The results file of a checkpoint: a line per finished task, in the schema of the public DataComp code.

    eval_results/epoch_N_eval_results.jsonl
    {"key": "vtab/dtd", "dataset": "Describable Textures", "metrics": {"acc1": …, "main_metric": …}, "checkpoint_sha256": …}

The public code reads such a file, skips the tasks in it and ignores our further fields. It has no more than one line per task,
which that code's aggregation asks for.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.run_folder import Checkpoint
from evaluation.whole_files import write_whole

Line = dict[str, Any]

RESULTS = "eval_results.jsonl"
LATEST = "latest"  # for epoch_latest.pt, where it does not say which epoch it is of


def results_path(folder: Path, checkpoint: Checkpoint) -> Path:
    """Where the results of a checkpoint of the run folder belong: the name that the public code gives them."""
    return folder / "eval_results" / f"{_prefix(checkpoint)}_{RESULTS}"


def summary_path(folder: Path, checkpoint: Checkpoint) -> Path:
    """Where the aggregates of a checkpoint belong."""
    return folder / "eval_results" / f"{_prefix(checkpoint)}_summary.json"


def _prefix(checkpoint: Checkpoint) -> str:
    if checkpoint.epoch is not None:
        return f"epoch_{checkpoint.epoch}"
    return f"iter_{checkpoint.iteration}" if checkpoint.iteration is not None else LATEST


@dataclass(frozen=True)
class Identity:
    """What a result belongs to; results of another one are not reused.

    Args:
        sha256: the digest of the checkpoint file.
        model: the architecture, and the parameters that change it or its preprocessing.
        precision: of the towers, `fp32` or `bf16`; None takes results of either.
    """

    sha256: str
    model: Mapping[str, Any]
    precision: str | None = None

    def owns(self, line: Line) -> bool:
        """Whether a line of the file is a result of this checkpoint and model, in whatever precision."""
        return line.get("checkpoint_sha256") == self.sha256 and line.get("model") == _as_json(self.model)

    def finishes(self, line: Line) -> bool:
        """Whether it is one, in the precision that is asked for."""
        return self.owns(line) and self.precision in (None, line.get("precision"))


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@dataclass
class Opened:
    """What was found in a results file.

    Attributes:
        lines: key → the result, of the checkpoint in question and in the precision asked for.
        told: what was set aside and why, a sentence each.
    """

    lines: dict[str, Line] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


class ResultsFile:
    """Reads and appends to a results file, which several processes may do, each with its own tasks.

    Args:
        path: the file, which need not exist.
        identity: what its results must belong to.

    Attributes:
        lines: key → the result, of this checkpoint, in whatever precision: what the file holds.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path, self.identity = path, identity
        self.lines: dict[str, Line] = {}

    def open(self) -> Opened:
        """Read the results; whatever belongs to another checkpoint or model is moved into a file beside this one.

        Lines of the public code have no digest: nobody can tell which checkpoint they are of, so they are set aside as well.
        Lines in another precision stay until the task has a result in the one that is asked for.
        A line that was cut off by a kill is dropped.

        Raises:
            OSError: the file cannot be read or rewritten.
        """
        if not self.path.is_file():
            return Opened()
        with _locked(self.path):
            told = self._read()
        return Opened({key: line for key, line in self.lines.items() if self.identity.finishes(line)}, told)

    def record(self, line: Line) -> list[str]:
        """Add the result of a task, on the disk when this returns; it replaces an earlier result of the same task.

        Returns:
            What was set aside and why: the earlier result, if it is in another precision.

        Raises:
            OSError: it cannot be written.
            ValueError: for a number that is not finite.
        """
        text = _text([line])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            told = self._read()  # another process may have added to it
            before = self.lines.pop(line["key"], None)
            if before is not None and before.get("precision") != line.get("precision"):
                told.append(self._set_aside(str(before.get("precision")), [_text([before]).strip()]))
            if before is None:
                self._append(text.encode())
            else:
                write_whole(self.path, _text([*self.lines.values(), line]))
            self.lines[line["key"]] = line
        return told

    def _append(self, data: bytes) -> None:
        # One write of the whole line, so that a kill in between leaves the file as it was.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(descriptor, data) != len(data):
                raise OSError(f"{self.path}: the disk is full")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self) -> list[str]:
        """Read the file into `lines` and clean it; returns what there is to be told."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        kept: dict[str, Line] = {}
        others: dict[str, list[str]] = {}
        told = []
        for number, row in enumerate(text.split("\n"), 1):
            line = parse_line(row)
            if line is None:
                if row.strip():
                    told.append(f"{self.path}, line {number}, is not whole and was dropped")
            elif self.identity.owns(line):
                kept[line["key"]] = line
            else:
                others.setdefault(self._owner(line), []).append(row)
        for owner, foreign in others.items():
            told.append(self._set_aside(owner, foreign))
        if text != _text(kept.values()):
            write_whole(self.path, _text(kept.values()))
        self.lines = kept
        return told

    def _owner(self, line: Line) -> str:
        digest = line.get("checkpoint_sha256")
        if not isinstance(digest, str):
            return "unknown-checkpoint"
        if digest != self.identity.sha256:
            return f"checkpoint-{digest[:12]}"
        return "other-model"

    def _set_aside(self, owner: str, rows: list[str]) -> str:
        reasons = {
            "unknown-checkpoint": "do not say which checkpoint they are of (the public code's do not)",
            "other-model": "are of another model or preprocessing",
        }
        reason = reasons.get(owner, "are of a checkpoint that has been replaced")
        if not owner.startswith("checkpoint-") and owner not in reasons:
            reason = f"were computed in {owner}, not in {self.identity.precision}"
        backup = self.path.with_name(f"{self.path.stem}.{re.sub(r'[^a-z0-9-]', '_', owner)}.jsonl")
        before = backup.read_text(encoding="utf-8") if backup.is_file() else ""
        write_whole(backup, before + "".join(f"{row}\n" for row in rows))
        return f"{len(rows)} results in {self.path} {reason}: not used, moved to {backup.name}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from a results file, by a lock on a file beside it; where there are no locks, go on without."""
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        # Some network file systems have no locks.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file ends the lock


def parse_line(row: str) -> Line | None:
    """A line of a results file; None for what is no result."""
    try:
        line = json.loads(row)
    except ValueError:
        return None
    whole = isinstance(line, dict) and isinstance(line.get("key"), str) and isinstance(line.get("metrics"), dict)
    return line if whole else None


def read_results(path: Path) -> list[Line]:
    """The results in a file, of whatever checkpoint; none without the file."""
    if not path.is_file():
        return []
    rows = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in map(parse_line, rows) if line is not None]


def _text(lines: Iterable[Line]) -> str:
    # All ASCII: the public code reads in its machine's encoding. No NaN: that must fail here, not in whoever reads the file.
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
