"""Which tasks --tasks means: keys, names or groups of them."""

from __future__ import annotations

import re

from evaluation.datacomp.aggregate import AVERAGE, GROUPS
from evaluation.datacomp.tasks import TASKS, Task
from evaluation.errors import UserError


def selected_tasks(words: str | None) -> list[Task]:
    """The tasks of a list with commas, in the suite's order; all without one.

    A word is a key (`vtab/dtd`), its last part (`dtd`), a name (`Describable Textures`) or a group: those of the aggregates
    (`imagenet-variants`, `retrieval`, `dist-shifts` …) or the first part of keys (`vtab`, `wilds`, `fairness`).
    Capitals, spaces and signs do not count.

    Raises:
        UserError: for a word that is none of them.
    """
    if words is None:
        return list(TASKS.values())
    known = _vocabulary()
    wanted: set[str] = set()
    for word in filter(None, map(str.strip, words.split(","))):
        if _plain(word) not in known:
            groups = ", ".join(sorted({key.split("/")[0] for key in TASKS if "/" in key} | set(map(_slug, GROUPS))))
            raise UserError(
                f"--tasks {word}: no task or group of that name; groups: {groups}; tasks: {', '.join(TASKS)}."
            )
        wanted |= known[_plain(word)]
    if not wanted:
        raise UserError(f"--tasks {words!r} names no task; leave it out for all {len(TASKS)}.")
    return [task for key, task in TASKS.items() if key in wanted]


def _vocabulary() -> dict[str, set[str]]:
    known: dict[str, set[str]] = {}
    for key, task in TASKS.items():
        prefix, _, last = key.rpartition("/")
        for word in filter(None, (prefix, last, key, task.name)):
            known.setdefault(_plain(word), set()).add(key)
    for name, keys in GROUPS.items():
        for word in {_plain(_slug(name)), _plain(name)}:
            known.setdefault(word, set()).update(keys)
    known["imagenet"], known["all"] = {"imagenet1k"}, set(TASKS)
    return known


def _slug(name: str) -> str:
    """`ImageNet & Variants` → imagenet-variants."""
    if name == AVERAGE:
        return "all"
    return "-".join(
        re.findall(r"[a-z0-9]+", name.lower().removeprefix("imagenet dist. ").replace("shifts", "dist-shifts"))
    )


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())
