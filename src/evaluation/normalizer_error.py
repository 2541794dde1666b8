#!/usr/bin/env python3
"""How far a method's log-normalizers are from those of the whole training set, over the epochs of one or more runs.

    python src/evaluation/normalizer_error.py --train_output_dir logs/A logs/B --epochs 1,2,4,8

For each run a normalizer_error.json in its folder; of all of them a table, and a picture of the errors over the samples seen
(the paper's figures 2c and 4). Any number of ranks: torchrun --nproc-per-node 4 -- src/evaluation/normalizer_error.py …
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script, Python puts this folder first on the path; its modules would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence

from evaluation import precision
from evaluation.errors import UserError, one_line
from evaluation.normalizers.examined import Examined, global_batch_size, open_examined
from evaluation.normalizers.measure import Probing, measure
from evaluation.normalizers.pool import Pool, open_pool
from evaluation.normalizers.report import ErrorFile, draw, markdown, write_picture
from evaluation.ranks import Place, SharedError, environment, joined
from evaluation.run_folder import Checkpoint, RunFolder
from evaluation.suite import Setting
from evaluation.whole_files import write_whole
from neuclip.objectives import OBJECTIVES


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags → namespace; `-` and `_` inside a flag's name mean the same.

    Raises:
        UserError: a number is out of range.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train_output_dir", "--train-output-dir", nargs="+", required=True, metavar="DIR", help="runs"
    )
    parser.add_argument(
        "--epochs", default="", metavar="1,2,4,8", help="checkpoints epoch_N.pt (default: all there are)"
    )
    parser.add_argument("--data", metavar="SHARDS", help="the data set (default: what the run was trained on)")
    parser.add_argument("--probes", type=int, default=4096, help="samples whose normalizers are examined, about")
    parser.add_argument(
        "--global_batch", "--global-batch", type=int, help="N that an objective sees at a time (default: the run's own)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of probes")
    parser.add_argument(
        "--batch_size", "--batch-size", type=int, default=256, help="samples encoded at a time per rank"
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes per rank")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")
    parser.add_argument(
        "--precision", choices=precision.NAMES, default="auto", help="of the towers; auto: bf16 on GPUs, else fp32"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="for the table and the picture (default: the first run's folder)"
    )
    args = parser.parse_args(argv)
    for name in ("probes", "batch_size", "global_batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: give 0 or more")
    return args


def chosen_checkpoints(run: RunFolder, epochs: str) -> list[Checkpoint]:
    """The checkpoints of the epochs asked for, or all of the run's epoch_N.pt.

    Raises:
        UserError: one is missing, or the list is no list of numbers.
    """
    if not epochs:
        found = [checkpoint for checkpoint in run.checkpoints() if checkpoint.epoch is not None]
        return found or [run.checkpoint()]
    try:
        numbers = sorted({int(word) for word in epochs.split(",")})
    except ValueError:
        raise UserError(f"--epochs {epochs} is no list of epochs such as 1,2,4,8") from None
    return [run.checkpoint(number) for number in numbers]


def examine(run: RunFolder, args: argparse.Namespace, place: Place) -> ErrorFile:
    """Measure those checkpoints of a run that its normalizer_error.json does not have yet. All ranks call it together."""
    batch_size = args.global_batch or global_batch_size(run)
    data = args.data or str(run.params.get("train_data") or "")
    _check(run, data, batch_size, place.world_size)
    probing = Probing(batch_size, args.probes, args.seed)
    file = ErrorFile(run, {"data": data, "batch": batch_size, "probes": probing.wanted, "seed": args.seed})
    # All ranks decide before the first of them writes.
    due = place.together(lambda: [c for c in chosen_checkpoints(run, args.epochs) if not file.has(c)])
    if not due:
        return file
    examined = place.together(lambda: [_open(run, c, batch_size, place) for c in due])
    setting = Setting(
        device=place.device,
        batch_size=args.batch_size,
        workers=args.workers,
        autocast_context=precision.chosen_precision(args.precision, place.device).autocast_context,
        rank=place.rank,
        world_size=place.world_size,
    )
    if place.is_main:
        print(f"{run.name}: {', '.join(c.label for c in due)} against all of {data} …", flush=True)
    pool = _open_pool(run, data, examined[0], args.workers, place)
    records = measure(examined, pool, probing, setting)
    for one, record in zip(examined, records):
        file.add(one.checkpoint, {"step": one.step, "samples_seen": one.step * global_batch_size(run), **record})
    if place.is_main:
        file.write()
    return file


def _check(run: RunFolder, data: str, batch_size: int, world_size: int) -> None:
    if not data:
        raise UserError(f"{run.path}/params.txt names no train_data: give --data SHARDS")
    if batch_size < 2 or batch_size % world_size:
        raise UserError(
            f"--global_batch {batch_size} of {run.name} cannot be dealt out to {world_size} ranks: "
            "give at least 2 and a multiple of the number of ranks"
        )


def _open(run: RunFolder, checkpoint: Checkpoint, batch_size: int, place: Place) -> Examined:
    return open_examined(run, checkpoint, batch_size, place.device, place.world_size)


def _open_pool(run: RunFolder, data: str, one: Examined, workers: int, place: Place) -> Pool:
    columns = {
        "image_key": str(run.params.get("csv_img_key") or "filepath"),
        "caption_key": str(run.params.get("csv_caption_key") or "title"),
        "separator": run.texts.get("csv_separator") or "\t",
    }
    return open_pool(
        data,
        one.loaded.preprocess_val,
        one.loaded.tokenizer,
        needs_keys=OBJECTIVES[run.objective].needs_keys,
        csv_columns=columns,
        workers=workers,
        rank=place.rank,
        world_size=place.world_size,
    )


def run_tool(args: argparse.Namespace) -> None:
    """Examine all runs; rank 0 writes the table and the picture."""
    runs = [RunFolder(path) for path in args.train_output_dir]
    for run in runs:  # what is missing is reported before anything is computed
        chosen_checkpoints(run, args.epochs)
    with joined(args.device) as place:
        files = [examine(run, args, place) for run in runs]
        if not place.is_main:
            return
    folder = Path(args.out) if args.out else runs[0].path
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown(files)
    write_whole(folder / "normalizer_error.md", table)
    pictures = write_picture(draw(files), folder)
    print(table)
    print("wrote " + ", ".join(map(str, [folder / "normalizer_error.md", *pictures, *(file.path for file in files)])))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line tool; returns the exit status. A user's mistake is one line on stderr and status 2."""
    try:
        run_tool(parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if not isinstance(error, SharedError) or environment()[0] == 0:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
