"""The one error that a command turns into one line and exit status 2, and the hint that ends many of them."""

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, where (`file:line`) and what to do."""


def nearest(name: str, names: Sequence[str]) -> str:
    """Return a hint at the name that was probably meant."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
