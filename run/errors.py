"""The errors that end a script in one line."""

from __future__ import annotations

import errno
import re


class UserError(Exception):
    """Something the user typed, or a file of theirs, is wrong.

    The message names the value, the rule and the cure, on one line. Exit code 2.
    """


class NotFiniteError(Exception):
    """The loss or the gradient norm is NaN or infinite. Exit code 3."""


class Stopped(BaseException):
    """A stop signal arrived and the state is saved. Exit code 128 + signal number.

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


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _numbers(names: str) -> set[int]:
    """Those of ``names`` that this system has."""
    return {getattr(errno, name) for name in names.split() if hasattr(errno, name)}


# Of disks and mounts, and never a fault of these programs. Their other OSErrors stay tracebacks.
_STORAGE_FAULTS = (
    _FULL
    | _numbers(
        "EROFS EIO EACCES EPERM EBUSY ETXTBSY ENXIO ENODEV ENOMEDIUM EREMOTEIO EUCLEAN EBADMSG ENOLCK EDEADLK "
        "ESTALE ENOTCONN ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNRESET ECONNABORTED ECONNREFUSED "
        "ESHUTDOWN ECOMM EPROTO ENOLINK ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED EREMCHG "
        "EISDIR ENOTDIR EEXIST ENOTEMPTY ELOOP EMLINK ENAMETOOLONG"  # something is in the way, or the name is
    )
)


def storage_cure(error: Exception) -> str:
    """What helps against a fault of the disk."""
    found = re.search(r"\(os error ([0-9]+)\)", str(error))  # so libraries in Rust have it
    number = getattr(error, "errno", None) or (int(found[1]) if found else None)
    return (
        "make room there" if number in _FULL else "check that disk or mount, and your rights there"
    )
