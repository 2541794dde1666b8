"""The clock counts what goes through each stage, in whichever process, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.bench_data import LoaderTime, measure_loader, report_lines
from training.data import build_train_loader
from training.data.stages import BATCH, STAGES, StageClock, StageTime


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_counted_by_stage(kit, tmp_path: Path, workers: int) -> None:
    kit.write_shards(tmp_path, [20, 20])
    broken = kit.members_of(40)
    broken[0] = ("000040.png", broken[0][1][:40])
    kit.write_tar(tmp_path / "1.tar", [broken, *(kit.members_of(number) for number in range(41, 48))])
    config = kit.config(tmp_path, workers=workers, batch_size=4, shuffle_buffer=3)
    clock = StageClock(workers)
    watched = build_train_loader(config, kit.plain_preprocess, kit.tokenize, 0, 1, False, clock)
    plain = build_train_loader(config, kit.plain_preprocess, kit.tokenize, 0, 1, False)
    assert kit.seen_keys(watched, 0) == kit.seen_keys(plain, 0)
    found = clock.read()
    assert {stage: found[stage].images for stage in ("transform", "tokenise", "collate", BATCH)} == {
        "transform": 48,
        "tokenise": 48,
        "collate": 48,
        BATCH: 48,
    }
    assert found["decode"].images == 49  # the broken one too
    assert found["read"].images >= 49
    assert all(found[stage].cpu > 0 for stage in (*STAGES, BATCH))
    # Reading goes on after a batch, so it is no part of the sum.
    inside = sum(found[stage].wall for stage in ("decode", "transform", "tokenise", "collate"))
    assert inside < found[BATCH].wall


def test_measuring_goes_on_over_epochs(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [8])
    clock = StageClock(0)
    loader = build_train_loader(kit.config(tmp_path), kit.plain_preprocess, kit.tokenize, 0, 1, False, clock)
    found = measure_loader(loader, clock, 5)
    assert found.images == 20
    assert found.stages[BATCH].images == 20


def test_the_report_does_its_sums() -> None:
    stages = dict.fromkeys(STAGES, StageTime(10, 0.010, 0.008)) | {BATCH: StageTime(10, 0.060, 0.050)}
    lines = report_lines([LoaderTime(10, 0.1, stages), LoaderTime(10, 0.05, stages)], 2, "tar read")
    assert lines[0] == "300 images/s on 2 ranks, 75 per worker (2 workers a rank)"
    assert "| decode | 1.000 | 0.800 | 17% | 1,000 |" in lines
    assert "| other | 1.000 | 1.000 | 17% | 1,000 |" in lines
    assert lines[-1] == "| whole | 6.000 | 5.000 | 100% | 167 |"


def test_without_a_clock_nothing_is_measured(kit, tmp_path: Path) -> None:
    """The functions in a batch's way are the dataset's own."""
    kit.write_shards(tmp_path, [8])
    loader = kit.open_ranks(kit.config(tmp_path), 1)[0]
    dataset = loader._loader.dataset
    assert dataset.tokenizer is kit.tokenize
    assert dataset.decode.__func__.__module__ == "training.data.pictures"
    assert torch.is_tensor(next(loader.epoch(0)).image)
