"""The exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in the flags or in the files they name.

    The message is one line that names the flag or the file, its value and the remedy, so that the command line tool can
    print it without a traceback.
    """
