"""The exception that a user's mistake raises, and its message in one line."""


class UserError(ValueError):
    """A mistake in the flags or in the files they name.

    The message is one line that names the flag or the file, its value and the remedy, so that the command line tool can
    print it without a traceback.
    """


def message_of(error: BaseException) -> str:
    """The one line of a UserError; from a loader process it arrives under that process's traceback, as the last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix("evaluation.errors.UserError: ")
