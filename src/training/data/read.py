"""Reading the samples of a shard, undecoded."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

from training.data.plan import ShardSlice
from training.data.samples import IMAGE_SUFFIXES, Problem, RawSample, from_members
from training.data.streams import CannotOpenError, Patience, StreamError, is_stream, may_pass, opened
from training.data.tar_members import Damage, DamagedCompressionError, Member, TarBytes, split_name, walk

# Bytes of a member that is read at all. Others, whatever they hold, are passed over.
LARGEST_MEMBER = dict.fromkeys(IMAGE_SUFFIXES, 256 * 2**20) | dict.fromkeys(("txt", "json"), 16 * 2**20)
_KINDS = {errno.ENOENT: Problem.GONE, errno.ENOTDIR: Problem.GONE}


@dataclass(slots=True)
class Group:
    """Members of a tar file in a row that share a name up to the first dot of its last part: a sample.

    position: its number in the shard.
    members: the content of those that a sample is made of, by suffix in lower case.
    suffixes: those of all members.
    problem: what makes it unusable whatever its members hold, one of the kinds of Problem.
    damage: what is wrong with the shard in this place, one of the same kinds.
    """

    position: int
    name: str
    members: dict[str, bytes] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)
    problem: str | None = None
    damage: str | None = None

    def sample(self, url: str) -> RawSample:
        """The sample; with a problem where the members cannot make one up because of damage."""
        name = f"{url}: {self.name}"
        raw = from_members(self.members, name, url)
        problem = self.problem
        if problem is None and (raw.image is None or raw.caption is None):
            problem = self.damage
        return raw if problem is None else RawSample(None, None, None, name, url, problem)


def read_slots(part: ShardSlice, patience: Patience = Patience()) -> Iterator[RawSample]:  # noqa: B008 (it is frozen)
    """What lies at the positions of a slice, in file order.

    A slice with a stop yields exactly one RawSample for each of `part.places()`, whatever the shard holds: where there is no
    whole sample, one with `problem` set. Without a stop nobody knows how many there should be: it yields the samples there
    are, and one RawSample with `problem` for each damage. Nothing is raised for damage.

    A position is the number of a sample among those that the shard, damaged as it may be, shows from its beginning: what
    lies there is the same whichever others are read.
    """
    url = part.shard.url
    found, damage = 0, Damage(Problem.FEWER, "run python -m training.data.index again")
    for item in read_groups(part, patience):
        if isinstance(item, Group):
            found += 1
            yield item.sample(url)
        else:
            damage = item
            if part.stop is None:
                yield RawSample(None, None, None, f"{url} ({item.detail})", url, item.kind)
    if part.stop is not None:
        for position in part.places()[found:]:
            yield RawSample(None, None, None, f"{url} sample {position} ({damage.detail})", url, damage.kind)


def read_groups(part: ShardSlice, patience: Patience) -> Iterator[Group | Damage]:
    """The samples of a slice, and what is wrong with the shard as far as it was read; other samples are not read.

    A stream that fails is opened again, and so is one whose data are damaged: what is wrong in the same place a second time
    is wrong in the data. Nothing is raised.
    """
    reading = _Reading(part)
    fruitless = 0
    while True:
        reached = reading.reached
        try:
            with opened(part.shard.url, patience) as source:
                yield from reading.groups(source)
            return
        except (OSError, CannotOpenError) as error:
            fruitless = 1 if reading.reached > reached else fruitless + 1
            if not may_pass(part.shard.url, error) or fruitless > patience.retries:
                yield _given_up(part.shard.url, error)
                return
        patience.pause(fruitless)


def _given_up(url: str, error: Exception) -> Damage:
    reason = f"{type(error).__name__} {error}".split("\n")[0]
    if isinstance(error, OSError) and is_stream(url):
        return Damage(Problem.STREAM_FAILED, reason)
    return Damage(_KINDS.get(getattr(error, "errno", None) or 0, Problem.UNREADABLE), reason)


class _Reading:
    """How far a slice has been read, over several tries.

    reached: the furthest sample met, whether it is in the slice or not; −1 before the first.
    """

    def __init__(self, part: ShardSlice) -> None:
        self.reached = -1
        self._part = part
        self._limit = part.stop
        if part.chosen is not None:
            self._limit = max(part.chosen, default=-1) + 1
        self._next = 0
        self._told: set[Damage] = set()
        self._doubted: set[Damage] = set()
        # What a file holds it will hold the next time; what came over a line may come better.
        self._doubting = is_stream(part.shard.url)

    def groups(self, source: TarBytes) -> Iterator[Group | Damage]:
        """What has not been delivered yet.

        Raises:
            OSError: of reading; a StreamError where a stream's data are damaged, for the first time.
        """
        group: Group | None = None
        current, index, damage = None, -1, None
        for item in walk(source):
            if isinstance(item, Damage):
                damage = item.kind
                if group is not None:
                    group.damage = damage
                yield from self._tell(item)
                continue
            name, suffix = split_name(item.name)
            if name is None or suffix is None:
                continue
            if name != current:
                current, index = name, index + 1
                if group is not None:
                    yield self._deliver(group)
                self.reached = max(self.reached, index)
                if self._limit is not None and index >= self._limit:
                    return
                wanted = index >= self._next and self._part.has(index)
                group = Group(index, name, damage=damage) if wanted else None
                damage = None
            if group is not None:
                _add(group, suffix.lower(), item, source)
        if group is not None:
            yield self._deliver(group)
        if index < 0 and damage is None:
            yield Damage(Problem.EMPTY, "there is no member whose name has a suffix")

    def _deliver(self, group: Group) -> Group:
        self._next = group.position + 1
        return group

    def _tell(self, damage: Damage) -> Iterator[Damage]:
        if self._doubting:
            if damage not in self._doubted:
                self._doubted.add(damage)
                raise StreamError(damage.detail)
            # The data are damaged where they come from, and further places are believed.
            self._doubting = False
        if damage not in self._told:
            self._told.add(damage)
            yield damage


def _add(group: Group, suffix: str, member: Member, source: TarBytes) -> None:
    """Takes a member into a group, reading it if it is one that counts."""
    if suffix in group.suffixes:
        group.problem = Problem.TWICE
    group.suffixes.add(suffix)
    largest = LARGEST_MEMBER.get(suffix)
    if largest is None or not member.whole:
        return
    if member.size > largest:
        group.problem = group.problem or Problem.HUGE_MEMBER
        return
    with contextlib.suppress(DamagedCompressionError):  # The walk comes upon it next, and says so.
        content = source.read(member.size)
        if len(content) == member.size:
            group.members.setdefault(suffix, content)
