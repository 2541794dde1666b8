"""Images per second of one loader worker, stage by stage, and side by side with the loader of open_clip's trainer.

    PYTHONPATH=src python benchmarks/loader.py --sizes 256,512 --peer-python peer/bin/python --json loader.json

The shards are made on the spot (benchmarks/photo_shards.py): JPEGs like photographs with shortest sides of --sizes pixels,
and captions. All sides read the same shards with the same batch size and one worker, and crop to --image-size pixels by
open_clip's transform for training: `fast` and `exact` are this repository's loader with that --decode, `open_clip` is the
loader of open_clip_train.

Rounds are interleaved: in each round every side loads one epoch, the others wait, and ratios are taken within a round.
An epoch begins with starting to read and ends with the last batch in the main process. Median (quartiles) of --repeats rounds.

open_clip's trainer needs its own pins (webdataset at most 0.2.86). Where they cannot live beside ours:

    python -m venv peer && peer/bin/pip install 'open_clip_torch[training]==3.3.0'
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from measure import Spread, machine, spread, table, write_json
from photo_shards import jpeg, photograph, write_photo_shards
from PIL import Image
from torchvision.transforms.functional import resized_crop

from training.bench_data import LoaderTime, report_lines
from training.data.pictures import make_pictures, take_apart
from training.data.stages import StageTime

HERE = Path(__file__).resolve().parent
OURS = ("fast", "exact")
PEER = "open_clip"
SHARDS = 4
COMPARED_PICTURES = 64


class Side:
    """Loaders in a process of their own."""

    def __init__(self, names: str, python: str, order: dict[str, Any]) -> None:
        """names: with commas. order: what loader_sides.py is told."""
        self.names = names
        self._process = subprocess.Popen(
            [python, str(HERE / "loader_sides.py"), names, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.problem = self._answer().get("error")

    def ask(self, what: str, name: str) -> dict[str, Any]:
        """Send an order, wait for the answer."""
        print(what, name, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process of {self.names} ended"}


def measure_size(args: Namespace, shortest: int) -> dict[str, Any]:
    """Everything about shards of one size."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = write_photo_shards(Path(folder), shortest, args.samples, SHARDS)
        order = {"folder": folder} | {name: getattr(args, name) for name in ("samples", "batch_size", "image_size")}
        wanted = [(",".join(OURS), sys.executable)] + [(PEER, args.peer_python)] * (args.peer == PEER)
        sides = {}
        for names, python in wanted:
            side = Side(names, python, order)
            stack.callback(side.close)
            sides |= dict.fromkeys(names.split(","), side)
        problems = {name: side.problem for name, side in sides.items() if side.problem}
        running = [name for name in sides if name not in problems]
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(args.warmup + args.repeats):
            # Each goes first in turn.
            turn = number % max(len(running), 1)
            rounds.append({name: sides[name].ask("epoch", name) for name in running[turn:] + running[:turn]})
        stages = {name: sides[name].ask("stages", name) for name in running if name in OURS}
    return {"files": files, "problems": problems, "rounds": rounds[args.warmup :], "stages": stages}


def rates(rounds: list[dict[str, dict[str, float]]], side: str) -> list[float]:
    """Images per second of a side in each round."""
    return [found[side]["images"] / found[side]["seconds"] for found in rounds]


def ratios(rounds: list[dict[str, dict[str, float]]], side: str, key: str = "seconds") -> list[float]:
    """How many times as fast as open_clip a side is in each round, by the clock or by the worker's time on a core."""
    return [
        (found[PEER][key] / found[PEER]["images"]) / max(found[side][key] / found[side]["images"], 1e-9)
        for found in rounds
    ]


def side_rows(shortest: int, found: dict[str, Any]) -> list[list[str]]:
    """Lines of the first table."""
    rounds, rows = found["rounds"], []
    for side in (name for name in (*OURS, PEER) if name in rounds[0]):
        cpu = spread([1000 * r[side]["worker_cpu"] / r[side]["images"] for r in rounds])
        row = [f"{shortest}", side, f"{spread(rates(rounds, side)):,.0f}", f"{cpu:.2f}"]
        if PEER in rounds[0] and side != PEER:
            row += [f"{spread(ratios(rounds, side)):.2f}", f"{spread(ratios(rounds, side, 'worker_cpu')):.2f}"]
        else:
            row += ["–", "–"]
        rows.append(row)
    return rows


def stage_lines(found: dict[str, dict[str, float]]) -> list[str]:
    """The table of --bench-data, without its first lines about rates."""
    stages = {stage: StageTime(**spent) for stage, spent in found.items()}
    whole = stages["batch"]
    return report_lines([LoaderTime(int(whole.images), max(whole.wall, 1e-9), stages)], 1, "tar read")[2:]


def pixel_differences(shortest: int, image_size: int) -> dict[str, Spread | float]:
    """How far `fast` is from `exact`, in levels of 0 to 255, over some of the pictures.

    "mean" and "largest" of all values. "mean_same_crop" and "largest_same_crop" leave out that edges of the crop move to
    pixels of the reduced picture: both sides have the moved crop.
    """
    preprocess = open_clip.image_transform(image_size, is_train=True)
    fast, exact = (make_pictures(preprocess, mode) for mode in OURS)
    crop = take_apart(preprocess).crop
    drawn, moved = [], []
    for number in range(COMPARED_PICTURES):
        data = jpeg(photograph(np.random.default_rng([1, number]), shortest))
        torch.manual_seed(number)
        want = exact.transform(exact.decode(data)).short()
        torch.manual_seed(number)
        cut = fast.decode(data)
        have = fast.transform(cut).short()
        whole = Image.open(BytesIO(data))
        times = -(-whole.width // cut.picture.width)
        box = [min(times * edge, side) for edge, side in zip(cut.box, 2 * (whole.height, whole.width))]
        same = np.array(resized_crop(whole, *box, crop.size, crop.interpolation)).astype(np.int16)
        drawn.append((have - want).abs())
        moved.append((have - torch.from_numpy(same)).abs())
    return {
        "mean": torch.stack(drawn).float().mean().item(),
        "largest": torch.stack(drawn).max().item(),
        "mean_same_crop": torch.stack(moved).float().mean().item(),
        "largest_same_crop": torch.stack(moved).max().item(),
    }


def report(args: Namespace, found: dict[int, dict[str, Any]]) -> None:
    """Print the tables."""
    print(
        f"{machine(torch.device('cpu'))['device']}; one worker a side, batch {args.batch_size}, crops to {args.image_size}"
    )
    for shortest, one in found.items():
        kilobytes, pixels = one["files"]["mean_bytes"] / 1000, one["files"]["mean_pixels"]
        print(f"made-up JPEGs, shortest side {shortest}: {kilobytes:.1f} kB and {pixels:,.0f} pixels in the mean")
        for side, problem in one["problems"].items():
            print(f"{side} does not run in this environment ({problem}); how to make one for it: --help")
    head = ["shortest side", "loader", "images/s", "worker's CPU ms per image", "times open_clip", "by CPU time"]
    print("\n" + table(head, [row for shortest, one in found.items() for row in side_rows(shortest, one)]))
    for shortest, one in found.items():
        for side, stages in one["stages"].items():
            print(f"\nstages, shortest side {shortest}, --decode {side}\n")
            print("\n".join(stage_lines(stages)))
    print("\nlevels of 255 between fast and exact, mean / largest; and with the same crop")
    for shortest, one in found.items():
        d = one["pixels"]
        print(
            f"{shortest}: {d['mean']:.2f} / {d['largest']:.0f}; "
            f"{d['mean_same_crop']:.3f} / {d['largest_same_crop']:.0f}"
        )


def main() -> None:
    """Measure every size, print, write."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--sizes", default="256,512", help="shortest sides of the pictures, in pixels, with commas")
    add("--image-size", type=int, default=224, help="side of the model's input")
    add("--samples", type=int, default=960, help="pictures of an epoch, whole batches")
    add("--batch-size", type=int, default=64)
    add("--peer", choices=(PEER, "none"), default=PEER)
    add(
        "--peer-python", default=sys.executable, help="interpreter of the environment in which open_clip's trainer runs"
    )
    add("--repeats", type=int, default=10, help="rounds that count")
    add("--warmup", type=int, default=1, help="rounds before those")
    add("--json", type=Path, help="file for every number")
    args = parser.parse_args()
    found = {int(shortest): measure_size(args, int(shortest)) for shortest in args.sizes.split(",")}
    for shortest, one in found.items():
        one["pixels"] = pixel_differences(shortest, args.image_size)
    report(args, found)
    write_json(
        args.json, {"machine": machine(torch.device("cpu")), "arguments": vars(args) | {"json": None}, "sizes": found}
    )


if __name__ == "__main__":
    main()
