"""Thousands of shards with random faults through the loader's stages: nothing raises, nothing hangs, nothing sound is lost.

FAULT_CASES=30000 python -m pytest tests/end_to_end/faults/test_shard_fuzz.py runs more of them. A case is made from its
number alone: the message of a failure names it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

from training.data import DataConfig, NoUsableSamplesError, build_train_loader
from training.data.pictures import Pictures, make_pictures
from training.data.plan import ShardSlice
from training.data.read import read_slots
from training.data.samples import BrokenSampleError, Problem, RawSample, read_labels
from training.data.shards import Shard as DataShard
from training.data.streams import Patience
from training.data.tar_headers import count_samples

from .corruption import Shard, build, corrupt, pack

CASES = int(os.environ.get("FAULT_CASES", "2000"))
CHUNK = 500
CPU_SECONDS = 20
KINDS = {value for name, value in vars(Problem).items() if name.isupper()}
# What a part that is missing anyway may be put down to beside damage.
SHARD_KINDS = {Problem.BAD_HEADER, Problem.TRUNCATED, Problem.BAD_COMPRESSION}
AT_ONCE = Patience(stall=30.0, retries=1, wait=lambda _seconds: None)


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """What was counted over all cases, told at the end."""
    found: Counter[str] = Counter()
    yield found
    capturing = request.config.pluginmanager.getplugin("capturemanager")
    with capturing.global_and_fixture_disabled():
        print("\n" + ", ".join(f"{found[name]:,} {name}" for name in sorted(found)))


@contextlib.contextmanager
def limited(case: int) -> Iterator[None]:
    """An end to what goes round in circles, by processor time, so that a busy machine is no failure."""

    def expired(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"case {case} takes more than {CPU_SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, expired)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def preprocess() -> Any:
    return image_transform_v2(PreprocessCfg(size=16), is_train=True, aug_cfg=AugmentationCfg(scale=(0.5, 1.0)))


@pytest.fixture(scope="module")
def decoding() -> list[Pictures]:
    transform = preprocess()
    return [make_pictures(transform, "fast"), make_pictures(transform, "exact")]


def made(case: int) -> tuple[Shard, random.Random]:
    rng = random.Random(f"shard {case}")
    shard = build(rng)
    corrupt(shard, rng)
    if rng.random() < 0.12:
        pack(shard, rng)
    return shard, rng


def usable(slot: RawSample, needs_keys: bool, pictures: Pictures) -> str | None:
    """What the loader makes of a slot: None for a sample that goes into a batch, else the reason why it does not."""
    try:
        caption, key = read_labels(slot, needs_keys)
        decoded = pictures.decode(slot.image)
    except BrokenSampleError as error:
        return str(error)
    pixels = pictures.transform(decoded)
    assert pixels.shape == (16, 16, 3)
    assert caption.strip()
    assert key is None or key >= 0
    return None


def outcome(slot: RawSample) -> tuple:
    return slot.image, slot.caption, slot.key, slot.problem


def check_certain(shard: Shard, slots: list[RawSample], reasons: list[str | None], needs_keys: bool) -> Counter[str]:
    """Samples that nothing has touched are there, whole, and judged for what they are."""
    found: dict[str, list[int]] = {}
    for index, slot in enumerate(slots):
        found.setdefault(slot.name.split(": ", 1)[-1], []).append(index)
    certain = shard.certain()
    for number in certain:
        sample = shard.samples[number]
        places = found.get(sample.name, [])
        assert len(places) == 1, f"sample {number} is there {len(places)} times"
        fault = None if sample.fault == Problem.NO_KEY and not needs_keys else sample.fault
        allowed = {fault} | (SHARD_KINDS if fault in (Problem.NO_IMAGE, Problem.NO_CAPTION) and shard.harmed else set())
        assert reasons[places[0]] in allowed, f"sample {number}: {reasons[places[0]]}, not {fault}"
        if sample.fault is None:
            members = dict(sample.members)
            assert slots[places[0]].image == members["jpg"]
            assert slots[places[0]].caption == f"picture {sample.key}".encode()
    sound = [n for n, sample in enumerate(shard.samples) if sample.fault is None]
    delivered = {slots[index].name.split(": ", 1)[-1] for index, reason in enumerate(reasons) if reason is None}
    rescued = sum(shard.samples[n].name in delivered for n in sound if n not in certain)
    return Counter(
        {
            "samples sound from the start": len(sound),
            "samples certain to be delivered": sum(n in certain for n in sound),
            "others delivered": rescued,
            "lost": len(sound) - sum(n in certain for n in sound) - rescued,
        }
    )


def check_slices(url: str, count: int, whole: list[RawSample], rng: random.Random) -> None:
    """Every part of a shard has in its places what the whole has there."""
    assert len(whole) == count
    chosen = frozenset(rng.sample(range(count), rng.randrange(count + 1)))
    part = read_slots(ShardSlice(DataShard(url, 0, count), stop=count, chosen=chosen), AT_ONCE)
    assert [outcome(slot) for slot in part] == [outcome(whole[place]) for place in sorted(chosen)]
    start, stop = sorted(rng.sample(range(count + 1), 2))
    step = rng.choice((1, 1, 2))
    part = read_slots(ShardSlice(DataShard(url, 0, count), start, stop, step), AT_ONCE)
    assert [outcome(slot) for slot in part] == [outcome(slot) for slot in whole[start:stop:step]]


def check_case(case: int, path: Path, decoding: list[Pictures], figures: Counter[str]) -> None:
    shard, rng = made(case)
    path.write_bytes(shard.data)
    needs_keys, pictures = rng.random() < 0.5, rng.choice(decoding)
    through_a_pipe = not shard.packed and rng.random() < 0.02
    url = f"pipe:cat {path}" if through_a_pipe else str(path)
    torch.default_generator.manual_seed(case)

    slots = list(read_slots(ShardSlice(DataShard(url, 0)), AT_ONCE))
    reasons = [usable(slot, needs_keys, pictures) for slot in slots]
    assert set(reasons) <= KINDS | {None}
    groups = [slot for slot in slots if ": " in slot.name and not slot.name.endswith(")")]
    if not through_a_pipe:
        # A pipe cannot be gone back in to where a size led out of it.
        figures += check_certain(shard, slots, reasons, needs_keys)

    count = len(shard.samples)
    whole = list(read_slots(ShardSlice(DataShard(url, 0, count), stop=count), AT_ONCE))
    check_slices(url, count, whole, rng)
    assert [outcome(slot) for slot in whole[: len(groups)]] == [outcome(slot) for slot in groups[:count]]
    counted = count_samples(str(path))
    if not through_a_pipe:
        assert counted.samples in (len(groups), len(groups) - 1)
        assert counted.damage is not None or counted.samples == len(groups)
    judged = Counter("good" if usable(slot, needs_keys, pictures) is None else "left out" for slot in whole)
    assert judged.total() == count
    figures.update({"cases": 1, "slots": count, "slots good": judged["good"], "slots left out": judged["left out"]})


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_faults(first: int, tmp_path: Path, decoding: list[Pictures], figures: Counter[str]) -> None:
    for case in range(first, min(first + CHUNK, CASES)):
        try:
            with limited(case):
                check_case(case, tmp_path / "0.tar", decoding, figures)
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar"]
    assert not (tmp_path.parent / "00000.jpg").exists()


def numbers(captions: list[str]) -> torch.Tensor:
    """The number in a caption, −1 for one that a fault has changed."""
    words = [caption.split()[-1] for caption in captions]
    return torch.tensor([[int(word) if word.isascii() and word.isdigit() and len(word) < 9 else -1] for word in words])


def write_many(folder: Path, rng: random.Random) -> tuple[set[int], int]:
    """Some shards, each harmed or not; keys of the samples that must come, and how many samples are counted."""
    certain: set[int] = set()
    total = 0
    folder.mkdir()
    for number in range(rng.randrange(1, 5)):
        shard = build(rng)
        if rng.random() < 0.7:
            corrupt(shard, rng)
        path = folder / f"{number}.tar"
        path.write_bytes(shard.data)
        counted = count_samples(str(path))
        total += counted.samples
        found = shard.certain()
        if counted.damage is not None and found:
            found.discard(max(found))  # It may be the last one of a file that is cut short, which is not counted.
        certain |= {shard.samples[n].key for n in found if shard.samples[n].fault in (None, Problem.NO_KEY)}
    if rng.random() < 0.3:
        (folder / "9.tar").write_bytes(rng.choice((b"", rng.randbytes(3000), bytes(10240))))
    return certain, total


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_through_the_loader(workers: int, tmp_path: Path, figures: Counter[str]) -> None:
    """Every step of an epoch comes, out of samples that are sound, and with all that nothing has touched."""
    for case in range(6 if workers else max(CASES // 20, 1)):
        rng = random.Random(f"loader {case}")
        folder = tmp_path / str(case)
        certain, total = write_many(folder, rng)
        if total == 0:
            continue
        config = DataConfig(
            str(folder), workers=workers, batch_size=1, shuffle_buffer=rng.choice((0, 5)), needs_keys=False
        )
        loader = build_train_loader(config, preprocess(), numbers, 0, 1, False)
        seen: Counter[int] = Counter()
        try:
            with limited(case):
                for batch in loader.epoch(case):
                    seen.update(batch.text[:, 0].tolist())
        except NoUsableSamplesError:
            assert not certain, f"case {case}"
            continue
        assert seen.total() == loader.steps_per_epoch == total, f"case {case}"
        assert certain <= set(seen), f"case {case}"
        figures["epochs through the loader"] += 1
