"""What ends a run: a user's mistake, here or on another rank."""

from evaluation.errors import UNREADABLE, UserError, reason_of

__all__ = ["UNREADABLE", "OneRankError", "OtherRankError", "UserError", "reason_of"]


class OneRankError(UserError):
    """A mistake that only this rank knows of, found where ranks no longer check things together."""


class OtherRankError(Exception):
    """Another rank met an error that is no user's mistake; it tells of it itself."""
