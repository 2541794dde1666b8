#!/usr/bin/env python3
"""Measure a finished run of the study on the held-out sets that it reports: RUN/study.json.

python scripts/study/measure.py logs/study/neuclip-b128-s0 --data data/study
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")]

from evaluation import precision
from evaluation.datasets import PairDataset, open_classification
from evaluation.errors import UserError
from evaluation.ranks import joined
from evaluation.run_folder import RunFolder
from evaluation.suite import Setting, measure_classification, measure_pairs
from evaluation.whole_files import write_whole

FILE = "study.json"
ERRORS = "normalizer_error.json"
# Drawing styles that were never trained; names that were never trained.
PAIRS = ("retrieval_set", "retrieval_concept")
# Trained names in those styles; names that were never trained.
ZEROSHOT = ("zeroshot", "zeroshot_concept")


def measure(run: RunFolder, data: Path, setting: Setting) -> dict[str, Any]:
    """The metrics of a run's last checkpoint on the sets of PAIRS and of ZEROSHOT.

    Returns:
        {"sha256": of the checkpoint, "chance": {…}, "metrics": {"SET/metric": share or rank}}.
    """
    checkpoint = run.checkpoint()
    loaded = run.load_checkpoint(checkpoint, setting.device)
    metrics: dict[str, float | None] = {}
    chance: dict[str, float | None] = {}
    for name in PAIRS:
        pairs = PairDataset(str(data / name), loaded.preprocess_val, loaded.tokenizer)
        measured, _ = measure_pairs(loaded.model, pairs, setting)
        metrics |= {f"{name}/{key}": value for key, value in measured.metrics.items()}
        chance |= {f"{name}/{key}": value for key, value in measured.chance.items()}
    for name in ZEROSHOT:
        source = open_classification(str(data / name), loaded.preprocess_val)
        measured = measure_classification(loaded.model, loaded.tokenizer, source, setting)
        metrics |= {f"{name}/{key.removeprefix('zeroshot/')}": value for key, value in measured.metrics.items()}
        chance |= {f"{name}/{key.removeprefix('zeroshot/')}": value for key, value in measured.chance.items()}
    return {
        "sha256": checkpoint.sha256(),
        "chance": chance,
        "metrics": metrics,
    }


def is_record(folder: Path) -> bool:
    """Whether a run's folder is a published one, without its checkpoints."""
    return not (folder / "checkpoints").exists()


def is_measured(folder: Path) -> bool:
    """Whether study.json is of the run's last checkpoint, or of a run of which nothing but figures is there."""
    path = folder / FILE
    if not path.exists() or is_record(folder):
        return path.exists()
    return bool(json.loads(path.read_text(encoding="utf-8"))["sha256"] == RunFolder(folder).checkpoint().sha256())


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--data", type=Path, default=Path("data/study"), help="what build_study.py has made")
    args = parser.parse_args(argv)
    try:
        run = RunFolder(args.run)
        with joined("auto") as place:
            chosen = precision.chosen_precision("auto", place.device)
            setting = Setting(place.device, workers=1, autocast_context=chosen.autocast_context)
            content = measure(run, args.data, setting)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_whole(args.run / FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
