"""The one exception for input that a person can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that cannot be used: the message says what is wrong, where (file, row, shape) and what to do.

    The command line prints the message as one line and exits with status 2.
    """
