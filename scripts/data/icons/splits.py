"""What is held out, in three ways: concepts, whole sets, and concepts in one family of sets."""

from collections.abc import Set
from enum import StrEnum

from building.names import stable_hash

from .selection import TEST_SETS

HELD_OUT_CONCEPTS = 0.02
HELD_OUT_COMBINATIONS = 0.025


class Split(StrEnum):
    """Where an icon goes.

    TEST_CONCEPT: its concept is held out in every set, so that no name of it was ever trained.
    TEST_SET: its whole set, a drawing style, is held out.
    TEST_COMBO: its concept is trained, but not from this family of sets.
    EMOJI: never trained.
    """

    TRAIN = "train"
    TEST_CONCEPT = "test_concept"
    TEST_COMBO = "test_combo"
    TEST_SET = "test_set"
    EMOJI = "emoji"


def _share(*words: str) -> float:
    """Draw a number in [0, 1) that depends on the words alone: no list has to be kept anywhere."""
    return stable_hash("|".join(words)) / 2**128


def split_of(key: str, prefix: str, family: str) -> Split:
    """Say where an icon goes.

    Args:
        key: its concept's key, so that all spellings of a concept are on one side.
        prefix: its set.
        family: the sets drawn by the same hand.
    Returns:
        The split. TEST_COMBO holds only if the concept is in the training split, which `settle_combo` checks.
    """
    if _share("concept", key) < HELD_OUT_CONCEPTS:
        return Split.TEST_CONCEPT
    if prefix in TEST_SETS:
        return Split.TEST_SET
    if _share("combo", key, family) < HELD_OUT_COMBINATIONS:
        return Split.TEST_COMBO
    return Split.TRAIN


def settle_combo(split: Split, key: str, trained: Set[str]) -> Split:
    """Give a held-out combination back to training where no other family has the concept.

    Args:
        split: what `split_of` said.
        key: the concept's key.
        trained: keys of all concepts that `split_of` put into training.
    """
    return Split.TRAIN if split is Split.TEST_COMBO and key not in trained else split
