"""The exception for a set that is not there, which is no reason to leave out the others."""

from evaluation.errors import UserError


class MissingData(UserError):
    """A set of the suite, or a part of it, is not in the data folder; the message says what was looked for and where."""
