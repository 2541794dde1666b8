"""The loaders that benchmarks/loader.py compares, each in a process of its own that waits for orders.

    python benchmarks/loader_sides.py fast,exact '{"folder": "shards", "samples": 960, "batch_size": 64, "image_size": 224}'
    python benchmarks/loader_sides.py open_clip '{"folder": "shards", "samples": 960, "batch_size": 64, "image_size": 224}'

The process prints {"ready": …} or {"error": …}; then a line such as "epoch fast" on its standard input makes it load one epoch
with one worker and print what that took, and "stages fast" (ours only) what each stage took. Nothing of this repository is
imported for open_clip's side, which may need an environment of its own.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch

SEED = 0
Epochs = Callable[[int], Iterable[Any]]


def open_ours(order: dict[str, Any], decode: str, clock: Any = None) -> Epochs:
    """Batches of an epoch by its number, from the loader that training builds."""
    from training.data import DataConfig, build_train_loader

    config = DataConfig(
        order["folder"], workers=1, batch_size=order["batch_size"], seed=SEED, decode=decode, needs_keys=False
    )
    return build_train_loader(config, *_transforms(order), 0, 1, pin_memory=False, clock=clock).epoch


def open_peer(order: dict[str, Any]) -> Epochs:
    """Batches of an epoch by its number, from the loader that open_clip's trainer builds."""
    from open_clip_train.data import get_data

    preprocess, tokenizer = _transforms(order)
    shards = sorted(str(path) for path in Path(order["folder"]).glob("*.tar"))
    args = Namespace(
        train_data=f"{order['folder']}/{{{Path(shards[0]).stem}..{Path(shards[-1]).stem}}}.tar",
        train_num_samples=order["samples"],
        train_data_upsampling_factors=None,
        dataset_type="webdataset",
        dataset_resampled=False,
        batch_size=order["batch_size"],
        workers=1,
        world_size=1,
        seed=SEED,
        val_data=None,
        imagenet_val=None,
        imagenet_v2=None,
    )
    data = get_data(args, (preprocess, preprocess), epoch=0, tokenizer=tokenizer)["train"]

    def epoch(number: int) -> Iterable[Any]:
        data.set_epoch(number)
        return data.dataloader

    return epoch


def _transforms(order: dict[str, Any]) -> tuple[Callable, Callable]:
    return open_clip.image_transform(order["image_size"], is_train=True), open_clip.get_tokenizer("ViT-B-32")


def run_epoch(epochs: Epochs, number: int) -> dict[str, float]:
    """Images, seconds until the last batch is here, and seconds in which the worker used a core."""
    cpu, began, images = _worker_seconds(), time.perf_counter(), 0
    for batch in epochs(number):
        images += len(batch[0])
    return {"images": images, "seconds": time.perf_counter() - began, "worker_cpu": _worker_seconds() - cpu}


def _worker_seconds() -> float:
    """Of all living child processes; Linux only, 0 elsewhere. Workers stay alive between epochs."""
    total = 0
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if stat.exists():
            total += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def run_stages(order: dict[str, Any], decode: str) -> dict[str, dict[str, float]]:
    """Images, seconds and seconds at work of each stage in an epoch, the second one of a loader."""
    from training.data.stages import StageClock

    clock = StageClock(1)
    epochs = open_ours(order, decode, clock)
    for _ in epochs(0):
        pass
    before = clock.read()
    for _ in epochs(1):
        pass
    return {stage: vars(spent - before[stage]) for stage, spent in clock.read().items()}


def main() -> None:
    """Obey the orders on standard input."""
    order = json.loads(sys.argv[2])
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    loaders: dict[str, Epochs] = {}
    try:
        for name in sys.argv[1].split(","):
            loaders[name] = open_peer(order) if name == "open_clip" else open_ours(order, name)
            run_epoch(loaders[name], 0)
    except Exception as error:
        # Whatever it is, the measuring process is to say it and go on without this side.
        print(
            json.dumps({"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"}),
            flush=True,
        )
        return
    print(json.dumps({"ready": list(loaders)}), flush=True)
    for number, line in enumerate(sys.stdin, start=1):
        what, name = line.split()
        found = run_stages(order, name) if what == "stages" else run_epoch(loaders[name], number)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
