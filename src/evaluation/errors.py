"""The exception that a user's mistake raises, and its message in one line."""


class UserError(ValueError):
    """A mistake in the flags or in the files they name.

    The message is one line that names the flag or the file, its value and the remedy, so that the command line tool can
    print it without a traceback.
    """


def one_line(error: BaseException) -> str:
    """The message of an error; of one that comes from a loader process, without that process's traceback before it."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1].removeprefix("evaluation.errors.UserError: ") if lines[0].startswith("Caught ") else lines[0]
