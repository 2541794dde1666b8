"""The folder of a run: logs/<name>/ with params.txt, out.log, checkpoints/ and whatever training writes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import IO

from training.atomic_files import replacing
from training.errors import UserError
from training.run_lock import lock_run


class RunFolder:
    """Paths inside a run folder.

    Attributes:
        path: logs/<name>.
        name: the run's name.
    """

    def __init__(self, logs: str, name: str) -> None:
        self.path = Path(logs) / name
        self.name = name
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where epoch_N.pt and epoch_latest.pt go."""
        return self.path / "checkpoints"

    @property
    def model_configs(self) -> Path:
        """Copies of the --model-config files, so that evaluation can build the model."""
        return self.path / "model_configs"

    @property
    def results(self) -> Path:
        """One line of JSON per evaluation."""
        return self.path / "results.jsonl"

    @property
    def metrics(self) -> Path:
        """One line of JSON per logging interval."""
        return self.path / "metrics.jsonl"

    def has_results(self, epoch: int) -> bool:
        """Whether an evaluation after that many epochs is in results.jsonl."""
        if not self.results.exists():
            return False
        lines = self.results.read_text(encoding="utf-8").splitlines()
        return any(line.startswith(f'{{"epoch": {epoch},') for line in lines)

    def check_new(self, resume: str | None) -> None:
        """Refuse to write into another run's folder.

        Raises:
            UserError: the folder holds a run and --resume is not given.
        """
        if resume is None and (self.path / "params.txt").exists():
            raise UserError(
                f"--name {self.name} exists already in {self.path.parent}: choose another name, "
                "or add --resume latest to go on with it"
            )

    def create(self) -> None:
        """Make the folders.

        Raises:
            UserError: the place cannot be written to.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--logs {self.path.parent}: cannot make {self.checkpoints} ({error.strerror})") from None

    def hold(self) -> None:
        """Be the only process that trains this run, until `release`.

        Raises:
            UserError: another one does.
        """
        self._lock = lock_run(self.path)

    def release(self) -> None:
        """Leave the run to others; nothing happens where it is not held."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def changed_flags(self, args: Namespace) -> list[str]:
        """How flags differ from those in params.txt, each "name: before → now"; empty where there is no such file.

        Raises:
            OSError: the file cannot be read.
        """
        file = self.path / "params.txt"
        if not file.exists():
            return []
        written: dict[str, str] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            # The first of a name: a text of several lines may look like other flags.
            written.setdefault(*line.partition(": ")[::2])
        now = {name: (str(value).splitlines() or [""])[0] for name, value in sorted(vars(args).items())}
        return [
            f"{name}: {written[name]} → {value}" for name, value in now.items() if written.get(name, value) != value
        ]

    def write_params(self, args: Namespace) -> None:
        """Write every resolved flag to params.txt, one `name: value` a line; earlier ones are kept as params_1.txt, …

        A run that goes on with the same flags leaves the file as it is.
        """
        file = self.path / "params.txt"
        text = "".join(f"{name}: {value}\n" for name, value in sorted(vars(args).items()))
        if file.exists():
            if file.read_text(encoding="utf-8") == text:
                return
            number = 1 + len(list(self.path.glob("params_*.txt")))
            # Copied, not renamed: at no moment is there a run without params.txt.
            shutil.copyfile(file, self.path / f"params_{number}.txt")
        with replacing(file) as stream:
            stream.write(text.encode("utf-8"))


def cut_back(path: Path, step: int) -> int:
    """Take out of a file of JSON lines what a run wrote after the step that it goes on from, since it will write that again.

    What is taken out is appended to NAME.discarded.jsonl as it was, lines that a killed process left unfinished included, so
    that nothing is lost. A crash leaves the file as it was, or cut back; in the first case lines may be set aside twice.

    Args:
        path: metrics.jsonl or results.jsonl; it need not exist.
        step: optimizer steps taken, as the checkpoint says. Lines of this step stay, and those that name no step.

    Returns:
        The number of lines taken out.

    Raises:
        OSError: one of the files cannot be read or written.
    """
    if not path.exists():
        return 0
    text = path.read_bytes()
    lines = [line + b"\n" for line in text.split(b"\n") if line]
    kept = [line for line in lines if _is_of_the_run(line, step)]
    if b"".join(kept) == text:
        return 0
    taken_out = [line for line in lines if not _is_of_the_run(line, step)]
    if taken_out:
        aside = path.with_name(f"{path.stem}.discarded.jsonl")
        with open(aside, "ab") as file:
            file.writelines(taken_out)
            file.flush()
            os.fsync(file.fileno())  # before they leave the other file
        logging.info("%s: %d lines after step %d set aside in %s", path.name, len(taken_out), step, aside.name)
    with replacing(path) as file:
        file.writelines(kept)
    return len(taken_out)


def _is_of_the_run(line: bytes, step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and (not isinstance(entry.get("step"), int) or entry["step"] <= step)


def default_name(args: Namespace) -> str:
    """A name from the time and the main flags, for runs without --name."""
    parts = [
        datetime.now().strftime("%Y_%m_%d-%H_%M_%S"),
        args.objective,
        f"model_{args.model}",
        f"lr_{args.lr:g}",
        f"b_{args.batch_size}",
        f"p_{args.precision}",
    ]
    return re.sub(r"[^\w.=-]", "-", "-".join(parts))
