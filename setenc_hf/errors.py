"""The one error that a command turns into one line and exit status 2."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, where (`file:line`) and what to do."""
