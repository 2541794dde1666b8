"""The one exception that a user's mistake raises; the same one in evaluation, whose code training calls."""

from evaluation.errors import UserError

__all__ = ["UserError"]
