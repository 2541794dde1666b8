"""Counting the samples of a tar file by its headers alone, which reads no member.

Counts agree with what reading the shard yields, position by position: both go by the same walk.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.data.samples import Problem
from training.data.tar_members import BLOCK, Damage, DamagedCompressionError, parse_header, split_name, tar_bytes, walk

_ENDING = (Problem.TRUNCATED, Problem.BAD_COMPRESSION, Problem.UNREADABLE)


@dataclass(frozen=True)
class TarCount:
    """samples: positions that hold one, if perhaps a broken one; damage: what is wrong with the file first, or None."""

    samples: int
    damage: str | None = None


def count_samples(path: str) -> TarCount:
    """Counts the samples of a local tar file (a compressed one is read through).

    Of a file that is cut short the last sample is not counted. Nothing is raised for damage.
    """
    samples, current = 0, None
    damage: list[Damage] = []
    try:
        with open(path, "rb") as file:
            for item in walk(tar_bytes(file, local=True)):
                if isinstance(item, Damage):
                    damage.append(item)
                    continue
                name, _suffix = split_name(item.name)
                if name is not None and name != current:
                    samples, current = samples + 1, name
    except OSError as error:
        damage.append(Damage(Problem.UNREADABLE, str(error)))
    if not damage:
        return TarCount(samples)
    if damage[-1].kind in _ENDING:
        # The last sample may lack the files that the damage took.
        samples = max(samples - 1, 0)
    return TarCount(samples, damage[0].detail)


def check_first_header(path: str) -> str | None:
    """What keeps `path` from being read as a tar file, None if its first header is sound."""
    try:
        with open(path, "rb") as file:
            block = tar_bytes(file, local=True).read(BLOCK)
    except (OSError, DamagedCompressionError) as error:
        return str(error)
    if not block:
        return "empty file"
    # An archive may be empty: it begins with its end.
    return None if parse_header(block) is not None or block == bytes(BLOCK) else "no tar header at its beginning"
