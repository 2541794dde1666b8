"""Where an epoch goes on that a checkpoint broke off, under the same layout or another one.

An epoch is a row of positions; who reads which of them is up to the layout. When ranks, workers or the batch size change in
the middle, what is left of the row is shared out anew: the epoch goes on as its next segment. A checkpoint holds, for each
segment, its layout and where its consumers stood. What they had left follows from these numbers, without reading data.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data.plan import Layout, Place
from training.data.progress import Progress
from training.data.runs import Runs
from training.data.seeds import Purpose
from training.data.shuffle import pass_over

log = logging.getLogger(__name__)

FORMAT = 1
# Orders in which the samples that are left of an epoch are known.
EXACT, DEALT, DRAWN, ROWS = ORDERS = ("exact", "dealt", "drawn", "rows")


@dataclass(frozen=True)
class DataIdentity:
    """By what data is known again.

    order: one of ORDERS. fingerprint: the same where names and sizes of the data are; other folders do not matter.
    """

    order: str
    seed: int
    fingerprint: str

    def changes(self, state: dict[str, Any]) -> list[str]:
        """What of a checkpoint's entry is different here, in words; nothing if the epoch is of the same samples."""
        if state.get("format") != FORMAT:
            return ["the form of the checkpoint's entry"]
        if state["seed"] != self.seed:
            return [f"--seed (then {state['seed']}, now {self.seed})"]
        if state["order"] != self.order:
            return [f"the order of the data (then {state['order']}, now {self.order})"]
        return [] if state["fingerprint"] == self.fingerprint else ["--train-data (names, sizes or factors)"]


@dataclass(frozen=True)
class Segment:
    """A stretch of an epoch that one layout delivers: a whole epoch, or the rest of one.

    number: see Layout.segment. first_step: steps of the epoch before it. steps: those of a whole epoch; both in this layout's
    count. batch_size: samples of one rank's batch. samples: those an epoch is meant to have, of which whole global batches
    are used.
    """

    number: int
    first_step: int
    steps: int
    batch_size: int
    world_size: int
    workers: int
    samples: int
    shuffle_buffer: int

    @classmethod
    def whole(cls, layout: Layout, samples: int, shuffle_buffer: int) -> Segment:
        """An epoch from its beginning."""
        return cls(0, 0, layout.steps, layout.batch_size, layout.world_size, layout.workers, samples, shuffle_buffer)

    @property
    def global_batch(self) -> int:
        """Samples of a step over all ranks."""
        return self.batch_size * self.world_size

    def layout(self, seed: int) -> Layout:
        """The layout of the segment's own steps."""
        steps = self.steps - self.first_step
        return Layout(steps, self.batch_size, self.world_size, self.workers, seed, self.number)

    def places(self) -> Tensor:
        """[world_size, workers, 4] int64: where its consumers begin."""
        return torch.zeros(self.world_size, self.workers, len(Progress._fields), dtype=torch.int64)


@dataclass(frozen=True)
class Course:
    """How the loader goes through one epoch, from its beginning or from a checkpoint.

    step: the first step that is still to come. segment: the one it is in. places: [world_size, workers, 4] int64, where its
    consumers stand. past: the checkpoint's entries of the segments before, where the order is exact.
    """

    epoch: int
    step: int
    segment: Segment
    places: Tensor
    past: tuple[dict[str, Any], ...] = ()

    def row(self, seed: int) -> Runs:
        """The positions of the epoch that the segment's consumers share."""
        return left_over(self.past, self.segment, seed, self.epoch)

    def entry(self, identity: DataIdentity, places: Tensor, step: int) -> dict[str, Any]:
        """The checkpoint's entry after `step` steps of the epoch: integers, texts, lists and int64 tensors.

        Raises:
            ValueError: places is not [world_size, workers, 4].
        """
        if places.shape != self.places.shape:
            raise ValueError(f"places are {list(places.shape)}, the data is read by {list(self.places.shape)}")
        return {
            "format": FORMAT,
            "epoch": self.epoch,
            "step": step,
            **dataclasses.asdict(identity),
            "segments": [*self.past, dataclasses.asdict(self.segment) | {"places": places.to("cpu", torch.int64)}],
        }


def begin(epoch: int, whole: Segment) -> Course:
    """An epoch from its beginning."""
    return Course(epoch, 0, whole, whole.places())


def resume(state: dict[str, Any] | None, epoch: int, whole: Segment, identity: DataIdentity) -> Course:
    """How to go through an epoch that a checkpoint may have broken off.

    Args:
        state: the checkpoint's entry, from Course.entry; None, or that of another epoch, begins the epoch.
        whole: a whole epoch in the present layout.
        identity: the present data.
    """
    if state is None or state.get("epoch") != epoch:
        return begin(epoch, whole)
    changes = identity.changes(state)
    last, places = _segment(state["segments"][-1])
    step = state["step"]
    # A number for whatever happens below: no random number of the old segment is drawn a second time.
    number = last.number + 1
    if not changes and whole == dataclasses.replace(last, number=0, first_step=0):
        return Course(epoch, step, last, places, tuple(state["segments"][:-1]))
    if not changes and identity.order in (EXACT, ROWS):
        past = tuple(state["segments"])
        left = len(left_over(past, whole, identity.seed, epoch))
        segment = dataclasses.replace(whole, number=number, first_step=whole.steps - left // whole.global_batch)
        return Course(epoch, segment.first_step, segment, segment.places(), past)
    # Which samples are left is unknown, so a part of the epoch is left that is as large as the one not yet trained on.
    # Beginning again instead would set back schedules that follow the steps, or make the run longer than was asked for.
    segment = dataclasses.replace(whole, number=number, first_step=-(-whole.steps * step // last.steps))
    if changes:
        log.warning(
            "%s differs from the checkpoint's: the epoch goes on at step %d of %d of the present data, some of which may "
            "have been seen in this epoch",
            changes[0],
            segment.first_step,
            segment.steps,
        )
    elif identity.order == DEALT:
        log.warning(
            "ranks, workers, batches or the shuffle buffer differ from the checkpoint's and the sizes of the shards are "
            "unknown: shards are dealt anew for the steps from %d on, so some samples of the epoch may come twice or not at "
            "all; python -m training.data.index makes this exact",
            segment.first_step,
        )
    return Course(epoch, segment.first_step, segment, segment.places())


def left_over(past: Sequence[dict[str, Any]], present: Segment, seed: int, epoch: int) -> Runs:
    """The positions of an epoch that earlier segments have left for the present one.

    Args:
        past: entries of a checkpoint, in order. Without any, the present segment begins in the row where its steps do.
    """
    segments = [_segment(entry) for entry in past]
    first = segments[0][0] if segments else present
    row = Runs.of(min(first.first_step * first.global_batch, first.samples), first.samples)
    following = [segment for segment, _ in segments[1:]] + [present]
    for (segment, places), after in zip(segments, following):
        row = _untaken(row, segment, places, seed, epoch)
        # --train-num-samples may have been changed.
        row = Runs.joined([row.below(after.samples), Runs.of(segment.samples, max(segment.samples, after.samples))])
    return row


def _untaken(row: Runs, segment: Segment, places: Tensor, seed: int, epoch: int) -> Runs:
    """What consumers have not taken out of their shuffle buffers, and what none of them was to read."""
    layout = segment.layout(seed)
    left = []
    for rank, of_rank in enumerate(places.tolist()):
        for worker, numbers in enumerate(of_rank):
            place, progress = Place(epoch, rank, worker), Progress(*numbers)
            if progress.attempt == 0 and progress.spare == 0:
                own = row.part(*layout.sample_range(place))
                left.append(_unread(own, place, layout, progress.taken, segment.shuffle_buffer))
    return Runs.joined([*left, row.part(layout.num_samples, len(row))])


def _unread(own: Runs, place: Place, layout: Layout, taken: int, shuffle_buffer: int) -> Runs:
    if taken == 0:
        return own
    rng = layout.rng(Purpose.SHUFFLE_BUFFER, *place, 0)
    held, read = pass_over(len(own), taken, shuffle_buffer, rng)
    return Runs.joined([own.pick(np.sort(np.array(held, dtype=np.int64))), own.part(read, len(own))])


def _segment(entry: dict[str, Any]) -> tuple[Segment, Tensor]:
    return Segment(**{field.name: entry[field.name] for field in dataclasses.fields(Segment)}), entry["places"]
