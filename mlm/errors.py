"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake its user can mend.

    The message is one line: what is wrong, the value, what to do. `main.py` prints it without a traceback and
    exits with code 2.
    """
