"""Python's garbage collector, kept from walking through everything that stays for the whole run.

A full collection looks at every object there is, those of torch, of the model and of the loader too: a pause of a tenth of a
second and more, at another step on every rank, and all ranks wait for the one that pauses. What is frozen is passed over.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def freeze_once() -> None:
    """Collect, and pass over what is left from now on. Does nothing where something is frozen already: it takes a while."""
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()


@contextmanager
def thawed_at_the_end() -> Iterator[None]:
    """Afterwards everything can be collected again, also after an error: a process may train more than once."""
    try:
        yield
    finally:
        gc.unfreeze()
