"""What ends a run: a user's mistake, here or on another rank."""

from evaluation.errors import UNREADABLE, UserError, reason_of

__all__ = ["UNREADABLE", "AbsentDataError", "OneRankError", "OtherRankError", "UserError", "reason_of"]


class AbsentDataError(UserError):
    """None of the files that --train-data names is there: a wrong path, or another machine than the one that trains."""


class OneRankError(UserError):
    """A mistake that only this rank knows of, found where ranks no longer check things together."""


class OtherRankError(Exception):
    """Another rank met an error that is no user's mistake; it tells of it itself."""
