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

# Of a checkpoint's entry. To be raised when something else follows from its numbers, such as with another first fill of the
# shuffle buffer.
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

    def change(self, state: dict[str, Any]) -> str | None:
        """What of a checkpoint's entry is different here, in words; None if the epoch is of the same samples."""
        if state["seed"] != self.seed:
            return f"--seed (then {state['seed']}, now {self.seed})"
        if state["order"] != self.order:
            return f"the order of the data (then {state['order']}, now {self.order})"
        return None if state["fingerprint"] == self.fingerprint else "--train-data (names, sizes or factors)"


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
    consumers stand. row: the positions of the epoch that the segment shares out; of no account where the order is not exact.
    past: the checkpoint's entries of the segments before, where the order is exact.
    """

    epoch: int
    step: int
    segment: Segment
    places: Tensor
    row: Runs
    past: tuple[dict[str, Any], ...] = ()

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
    return Course(epoch, 0, whole, whole.places(), left_over((), whole, 0, epoch))


def resume(state: dict[str, Any] | None, epoch: int, whole: Segment, identity: DataIdentity) -> Course:
    """How to go through an epoch that a checkpoint may have broken off.

    Args:
        state: the checkpoint's entry, from Course.entry; None, or that of another epoch, begins the epoch.
        whole: a whole epoch in the present layout.
        identity: the present data.
    """
    if state is None or state.get("epoch") != epoch:
        return begin(epoch, whole)
    if state.get("format") != FORMAT:
        log.warning("the checkpoint's entry of the data is of another version: the epoch is begun again from its start")
        return begin(epoch, whole)
    change, step, seed = identity.change(state), state["step"], identity.seed
    last, places = _segment(state["segments"][-1])
    if change is None and whole == dataclasses.replace(last, number=0, first_step=0):
        past = tuple(state["segments"][:-1])
        return Course(epoch, step, last, places, left_over(past, last, seed, epoch), past)
    number = last.number + 1  # Whatever has changed: no random number of the old segment is drawn a second time.
    if change is None and identity.order in (EXACT, ROWS):
        past = tuple(state["segments"])
        row = left_over(past, whole, seed, epoch)
        segment = dataclasses.replace(whole, number=number, first_step=whole.steps - len(row) // whole.global_batch)
    else:
        first = -(-whole.steps * step // last.steps)
        # Which samples are left is unknown: the part of the epoch that is left is as large as it was. Beginning again instead
        # would set back schedules that follow the steps, or make the run longer than was asked for.
        _warn(change, identity.order, first, whole.steps)
        past, segment = (), dataclasses.replace(whole, number=number, first_step=first)
        row = left_over(past, segment, seed, epoch)
    return Course(epoch, segment.first_step, segment, segment.places(), row, past)


def _warn(change: str | None, order: str, step: int, steps: int) -> None:
    if change is not None:
        log.warning(
            "%s differs from the checkpoint's: the epoch goes on at step %d of %d of the present data, some of which may "
            "have been seen in this epoch",
            change,
            step,
            steps,
        )
    elif order == DEALT:
        log.warning(
            "ranks, workers, batches or the shuffle buffer differ from the checkpoint's and the sizes of the shards are "
            "unknown: shards are dealt anew for the steps from %d on, so some samples of the epoch may come twice or not at "
            "all; python -m training.data.index makes this exact",
            step,
        )


def left_over(past: Sequence[dict[str, Any]], present: Segment, seed: int, epoch: int) -> Runs:
    """The positions of an epoch that earlier segments have left for the present one.

    Args:
        past: entries of a checkpoint, in order. Without any, the present segment begins in the row where its steps do.
    """
    segments = [_segment(entry) for entry in past]
    first = segments[0][0] if segments else present
    # --train-num-samples may change on the way, so positions that a segment has no use for are kept for the next one.
    reach = max(segment.samples for segment in (present, *(segment for segment, _ in segments)))
    row = Runs.of(min(first.first_step * first.global_batch, first.samples), reach)
    for segment, places in segments:
        used = row.below(segment.samples)
        row = Runs.joined([_untaken(used, segment, places, seed, epoch), row.part(len(used), len(row))])
    return row.below(present.samples)


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
