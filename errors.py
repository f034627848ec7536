"""How a script ends: one clear line and an exit code instead of a traceback."""

import errno
import os
import signal
import sys
from collections.abc import Callable

USER_ERROR, NOT_FINITE = 2, 3


class UserError(Exception):
    """Something the user typed, or a file of theirs, is wrong.

    The message names the value, the rule and the cure, on one line. Exit code 2.
    """


class NotFiniteError(Exception):
    """The loss or the gradient norm is NaN or infinite. Exit code 3."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived and the state is saved. Exit code 128 + signal number.

    Like KeyboardInterrupt no Exception: what guards against other people's errors must not swallow it.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def one_line(text: object) -> str:
    """``text`` on one line; what is not printable, such as what steers a terminal, as an escape sequence."""
    line = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def cause_of(error: BaseException) -> str:
    """Type and message of what ``error`` came from in the first place, on one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {one_line(error)[:160]}"


def run_script(story: Callable[..., None], *arguments: object) -> None:
    """Run ``story(*arguments)`` and end the process with the exit code that interface and shell expect."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        story(*arguments)
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_complain(f"error: {one_line(error)}", USER_ERROR))
    except NotFiniteError as error:
        sys.exit(_complain(f"stopped: {one_line(error)}", NOT_FINITE))
    except Stopped as stop:
        sys.exit(_complain(f"stopped: {one_line(stop)}", 128 + stop.signal_number))
    except KeyboardInterrupt:
        sys.exit(_complain("stopped by Ctrl-C", 128 + signal.SIGINT))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _leave_the_pipe()
        if error.errno not in _STORAGE_FAULTS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_complain(f"error: {where}{error.strerror}: make room there or choose another folder", USER_ERROR))


_STORAGE_FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP),  # something is in the way
}


def _stop(number: int, frame: object) -> None:
    raise Stopped(number, "SIGTERM; what was finished is saved, and the same command goes on from there")


def _leave_the_pipe() -> None:
    # The reader of our output (a `| head`) is gone: not a fault, and nobody is left to tell.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def _complain(line: str, exit_code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return exit_code
