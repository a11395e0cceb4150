"""The one exception a user sees as a single line instead of a traceback."""


class PretrainError(Exception):
    """Something the user can fix; the message says what is wrong, what was got, and the way out."""


class ToldElsewhereError(PretrainError):
    """The same, in a process that leaves the telling to the first one of its run."""
