"""Which concepts are held out."""

from building.names import stable_hash

HELD_OUT_ONE_IN = 20


def is_held_out(key: str) -> bool:
    """Say whether a concept belongs to the test split, from its key alone: no list has to be kept anywhere."""
    return stable_hash(key) % HELD_OUT_ONE_IN == 0
