"""What a user's mistake raises, and what libraries say of one in a line."""

import pickle

from evaluation.errors import UserError

__all__ = ["UNREADABLE", "OneRankError", "OtherRankError", "UserError", "reason_of"]

# What torch.load raises at a file that is damaged, cut short or something else, with weights_only=True.
UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError)


class OneRankError(UserError):
    """A mistake that only this rank knows of, found where ranks no longer check things together."""


class OtherRankError(Exception):
    """Another rank met an error that is no user's mistake; it tells of it itself."""


def reason_of(error: Exception) -> str:
    """The first line of a library's error, or its type if it has no text.

    What torch says of a file that is no checkpoint, or holds more than tensors and plain values, is left out: it advises to
    load it in a way that runs code from the file.
    """
    if isinstance(error, pickle.UnpicklingError):
        return "it is no checkpoint, or holds more than tensors and plain values"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
