"""The exception for users' mistakes, and errors as text."""

_MAX_MESSAGE_LENGTH = 400


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line, "<key>=<value>: <what is wrong>; <what to do>". `main.py` prints it without a traceback and
    exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """Returns an exception's message, with that of its cause, on one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        text = f"not found: {text}"
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        text += f" ({one_line(cause)})"
    return text if len(text) <= _MAX_MESSAGE_LENGTH else text[:_MAX_MESSAGE_LENGTH] + "..."
