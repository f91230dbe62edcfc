"""How every command ends: quietly when it worked, with one clear line and exit status 2 on bad input."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from .errors import InputError

Main = Callable[[Sequence[str] | None], object]


def run_command(main: Main) -> None:
    """Run `main` on the process's arguments; turn bad input into one line on standard error and exit status 2."""
    signal.signal(signal.SIGTERM, _stop)  # a polite kill unwinds, so that half-written output is removed
    try:
        main(None)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:  # of the system: a full disk, a file where a folder should be
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was written under the output's name", file=sys.stderr)
        sys.exit(130)


def _stop(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends two: the second must not cut the clean-up short
    sys.exit(143)
