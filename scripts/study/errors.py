"""What goes wrong for a user of the study's scripts."""


class StudyError(Exception):
    """A message for the user: what is wrong, and the remedy."""
