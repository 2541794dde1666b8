"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in the flags or in the files they name, found before training starts.

    The message is one line that names the flag or the file, the value it has, and the remedy, so that the entry point
    can print it without a traceback.
    """
