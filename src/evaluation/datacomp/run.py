"""DataComp's tasks for one checkpoint: what is left to do, measuring it, keeping each result, the aggregates.

All ranks go through the same steps together; rank 0 reads and writes the files and speaks.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.datacomp.aggregate import main_metrics, summary_lines, write_summary
from evaluation.datacomp.errors import MissingData
from evaluation.datacomp.measure import TaskModel, find_data, measure_task
from evaluation.datacomp.results import Identity, ResultsFile, results_path, summary_path
from evaluation.datacomp.tasks import Task
from evaluation.errors import UserError, one_line
from evaluation.ranks import Place, known_to_all
from evaluation.run_folder import LoadedModel, Subject
from evaluation.suite import Setting


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Args:
        subject: the run, the checkpoint and the digest of its file.
        tasks: which tasks.
        data_dir: the folder of the sets.
        precision: of the towers, `fp32` or `bf16`.
        any_precision: results in the other precision count as finished too.
        redo: finished tasks are measured again.
    """

    subject: Subject
    tasks: list[Task]
    data_dir: Path
    precision: str
    any_precision: bool = True
    redo: bool = False


class Plan(NamedTuple):
    """to_do: tasks to measure; finished: keys with a result; missing: key → what was looked for; unusable: key → what is wrong
    with the set; told: sentences."""

    to_do: list[Task]
    finished: list[str]
    missing: dict[str, str]
    unusable: dict[str, str]
    told: list[str]


class Suite:
    """The tasks of a request, on this rank.

    Args:
        request: the same on every rank.
        place: this rank.
    """

    def __init__(self, request: Request, place: Place) -> None:
        self.request, self.place = request, place
        self.run, self.checkpoint, self.sha256, _ = request.subject
        identity = Identity(self.sha256, self.run.model_facts, None if request.any_precision else request.precision)
        self.file = ResultsFile(results_path(self.run.path, self.checkpoint), identity)

    def plan(self) -> Plan:
        """What is finished, missing and left to do, before anything is computed; prints it.

        Raises:
            SharedError: the data folder does not exist, a file cannot be read or written, or nothing can be evaluated at all.
        """
        request, place = self.request, self.place
        missing: dict[str, str] = {}
        unusable: dict[str, str] = {}
        for here in place.everyone(place.together(self._look_for_data)):  # a node may lack what another one has
            missing, unusable = {**here[0], **missing}, {**here[1], **unusable}
        told, results = place.from_main(self._open_results)
        finished = [] if request.redo else [task.key for task in request.tasks if task.key in results]
        missing = {key: text for key, text in missing.items() if key not in finished}
        unusable = {key: text for key, text in unusable.items() if key not in (*finished, *missing)}
        to_do = [task for task in request.tasks if task.key not in (*finished, *missing, *unusable)]
        plan = Plan(to_do, finished, missing, unusable, told)
        place.together(lambda: self._check(plan))
        self._announce(plan)
        return plan

    def measure(self, plan: Plan, loaded: LoadedModel, setting: Setting) -> dict[str, str]:
        """Measure what is left to do; a line is written and printed for each task as it is finished.

        Returns:
            key → what went wrong, for the tasks that failed.

        Raises:
            SharedError: a result cannot be written.
            Exception: with several ranks, one that the others may not have seen.
        """
        model = TaskModel(loaded.model, loaded.preprocess_val, loaded.tokenizer, setting)
        progress = Progress(plan.to_do, self.place)
        failed = {}
        for task in plan.to_do:
            progress.begins(task)
            problem = self._measure_one(task, model, progress)
            if problem is not None:
                failed[task.key] = problem
        return failed

    def finish(self, plan: Plan, failed: Mapping[str, str]) -> int:
        """Write and print the aggregates, and what is not there; returns the exit status."""
        failed = {**plan.unusable, **failed}
        self.place.from_main(self._write_summary)
        for key, message in plan.missing.items():
            self.place.say(f"missing: {key}: {message}")
        for key, message in failed.items():
            self.place.say(f"FAILED: {key}: {message}")
        return 1 if failed else 0

    def _look_for_data(self) -> tuple[dict[str, str], dict[str, str]]:
        if not self.request.data_dir.is_dir():
            raise UserError(
                f"--data_dir {self.request.data_dir} does not exist; "
                f"python src/evaluation/download.py {self.request.data_dir} fetches the sets."
            )
        missing, unusable = {}, {}
        for task in self.request.tasks:
            try:
                find_data(task, self.request.data_dir)
            except MissingData as error:
                missing[task.key] = one_line(error)
            except UserError as error:
                unusable[task.key] = one_line(error)
        return missing, unusable

    def _open_results(self) -> tuple[list[str], list[str]]:
        with _naming_file(self.file.path):
            opened = self.file.open()
        return opened.told, list(opened.lines)

    def _check(self, plan: Plan) -> None:
        if not plan.to_do and not plan.finished:
            sets = {**plan.unusable, **plan.missing}
            raise UserError(
                f"--data_dir {self.request.data_dir}: none of {len(sets)} sets can be used ({next(iter(sets.values()))}); "
                f"python src/evaluation/download.py {self.request.data_dir} fetches them."
            )

    def _announce(self, plan: Plan) -> None:
        say = self.place.say
        for sentence in plan.told:
            say(f"note: {sentence}")
        for key, message in plan.missing.items():
            say(f"missing: {key}: {message}")
        for key, message in plan.unusable.items():
            say(f"FAILED: {key}: {message}")
        parts = [f"tasks: {len(plan.to_do)} to do", f"{len(plan.finished)} finished before"]
        if plan.missing:
            parts.append(f"{len(plan.missing)} without data")
        if plan.unusable:
            parts.append(f"{len(plan.unusable)} with data that cannot be used")
        say(f"{self.run.name}, {self.checkpoint.label} (sha256 {self.sha256[:12]}…): {', '.join(parts)}")

    def _measure_one(self, task: Task, model: TaskModel, progress: Progress) -> str | None:
        try:
            metrics = measure_task(task, self.request.data_dir, model)
        except UserError as error:
            # measure_task fails on all ranks together.
            problem = one_line(error)
        except Exception as error:
            if self.place.world_size > 1 and not known_to_all(error):
                raise
            traceback.print_exc()
            problem = f"{type(error).__name__}: {one_line(error)}"
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # after a lack of memory, a smaller task may still fit
        else:
            images = model.samples.get(task.key)
            line = self._line(task, metrics, images, progress.seconds)
            self.place.from_main(lambda: self._record(line))
            progress.finished(task, line["metrics"].get("main_metric"), images)
            return None
        progress.failed(task, problem)
        return problem

    def _line(self, task: Task, metrics: Mapping[str, Any], images: int | None, seconds: float) -> dict[str, Any]:
        return {
            "key": task.key,
            "dataset": task.name,
            "metrics": {name: _finite(value) for name, value in metrics.items()},
            "checkpoint_sha256": self.sha256,
            "checkpoint": self.checkpoint.path.name,
            "model": self.run.model_facts,
            "precision": self.request.precision,
            "images": images,
            "seconds": round(seconds, 3),
        }

    def _record(self, line: dict[str, Any]) -> None:
        with _naming_file(self.file.path):
            for sentence in self.file.record(line):
                print(f"note: {sentence}")

    def _write_summary(self) -> None:
        with _naming_file(self.file.path):
            self.file.open()  # another process may have added to it
        lines = list(self.file.lines.values())
        path = summary_path(self.run.path, self.checkpoint)
        facts = {
            "run": self.run.name,
            "objective": self.run.objective,
            "model": self.run.model_facts,
            "checkpoint": {"file": f"checkpoints/{self.checkpoint.path.name}", "sha256": self.sha256},
            "epoch": self.checkpoint.epoch,
            "iteration": self.checkpoint.iteration,
        }
        with _naming_file(path):
            found = write_summary(path, lines, facts)
        print()
        print("\n".join(summary_lines(found, main_metrics(lines))))
        print(f"wrote {self.file.path}, {path}", flush=True)


class Progress:
    """A line for each task: number, name, main metric, seconds, images per second, and what is left."""

    def __init__(self, tasks: list[Task], place: Place, clock: Callable[[], float] = time.monotonic) -> None:
        self.place, self.clock = place, clock
        self.number, self.total = 0, len(tasks)
        self.left = sum(task.size for task in tasks)
        self.done = 0
        self.began = self.task_began = clock()

    @property
    def seconds(self) -> float:
        """Since the task began."""
        return self.clock() - self.task_began

    def begins(self, task: Task) -> None:
        """A task begins; told on a terminal only, where its result replaces the line."""
        self.number += 1
        self.task_began = self.clock()
        if sys.stdout.isatty() and self.place.is_main:
            print(f"\r\033[K[{self.number}/{self.total}] {task.name} …", end="", flush=True)

    def finished(self, task: Task, main: float | None, images: int | None) -> None:
        """A task has its result."""
        score = f"{main:.4f}" if main is not None else "–"
        rate = f"{images / max(self.seconds, 1e-9):,.0f}" if images else "–"
        self._end(task, f"{score:>6}  {self.seconds:7.1f} s  {rate:>7} images/s")

    def failed(self, task: Task, problem: str) -> None:
        """A task has none."""
        self._end(task, f"FAILED: {problem}")

    def _end(self, task: Task, text: str) -> None:
        self.left -= task.size
        self.done += task.size
        number = f"[{self.number:>{len(str(self.total))}}/{self.total}]"
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        self.place.say(f"{clear}{number} {task.name:<22}  {text}{self._what_is_left()}")

    def _what_is_left(self) -> str:
        tasks = self.total - self.number
        if not tasks:
            return ""
        # By the published sizes of the sets: the tasks differ by a factor of 150.
        minutes = (self.clock() - self.began) * self.left / self.done / 60
        return f"  {tasks} left, about {minutes:.0f} min" if minutes >= 1 else f"  {tasks} left, less than 1 min"


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read or written ({error.strerror or error}); free or mend it.") from None


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
