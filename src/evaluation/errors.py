"""What a user's mistake raises, and what libraries say of one in a line."""

import pickle

# What torch.load raises at a file that is damaged, cut short or something else, with weights_only=True.
UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError)

MOST_OF_A_LIBRARY = 240  # characters


class UserError(ValueError):
    """A mistake in the flags or in the files they name.

    The message is one line that names the flag or the file, its value and the remedy, so that the command line tool can
    print it without a traceback.
    """


class NoPairsError(UserError):
    """Shards that are whole and hold no image–text pair."""


def one_line(error: BaseException) -> str:
    """The message of an error, in one line; of one that comes from a loader process, without that process's traceback.

    What a library says is cut where it is long.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Caught "):
        return lines[-1].removeprefix("evaluation.errors.UserError: ")
    text = " ".join(filter(None, lines))
    return text if isinstance(error, UserError) else text[:MOST_OF_A_LIBRARY]


def reason_of(error: Exception) -> str:
    """The first line of a library's error, or its type if it has no text.

    What torch says of a file that is no checkpoint, or holds more than tensors and plain values, is left out: it advises to
    load it in a way that runs code from the file.
    """
    if isinstance(error, pickle.UnpicklingError):
        return "it is no checkpoint, or holds more than tensors and plain values"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
