"""The errors that end a script in one line."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable


class UserError(Exception):
    """The command line or one of the user's files is wrong. Exit code 2.

    The message is one line that names the value, the rule and the cure.
    """

    exit_code = 2


class OutOfMemory(UserError):
    """One of several processes ran out of memory in a step, which ends all of them.

    Attributes:
        fitting: the micro_batch_tokens with which to try again.
    """

    def __init__(self, fitting: int, message: str):
        super().__init__(message)
        self.fitting = fitting


class NotFiniteError(Exception):
    """The loss or the gradient norm is NaN or infinite. Exit code 3."""

    exit_code = 3


class Stopped(BaseException):
    """A stop signal arrived and the state is saved. Exit code 128 + signal number.

    A BaseException, like KeyboardInterrupt, so that `except Exception` around third-party calls
    does not swallow it.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def exit_code_of(error: BaseException | None) -> int:
    """The exit code of a script that ``error`` ends: 0 for none, and Python's 1 for a bug."""
    return 0 if error is None else getattr(error, "exit_code", 1)


def one_line(text: object) -> str:
    """``text`` on one line, with escape sequences for unprintable characters.

    If printed unchanged, they could control the terminal.
    """
    line = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def gist(error: BaseException) -> str:
    """What ``error`` says, on one line; of NCCL only its last error, since places come first."""
    text = str(error)
    return one_line(text.rpartition("Last error:")[2].strip() or text)[:160]


def cause_of(error: BaseException) -> str:
    """Type and message of `root_cause`, on one line."""
    root = root_cause(error)
    return f"{type(root).__name__}: {gist(root)}"


def root_cause(error: BaseException) -> BaseException:
    """The error at the beginning of ``error``'s chain."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _numbers(names: str) -> set[int]:
    """The error numbers of those ``names`` that this system has."""
    return {getattr(errno, name) for name in names.split() if hasattr(errno, name)}


_DISK_FULL = _numbers("ENOSPC EDQUOT EFBIG")


_DISK = _numbers(
    "EROFS EIO EACCES EPERM EBUSY ETXTBSY ENXIO ENODEV ENOMEDIUM EUCLEAN EBADMSG ENOLCK EDEADLK"
)


_NETWORK_MOUNT = _numbers(
    "EREMOTEIO ESTALE ENOTCONN ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNRESET "
    "ECONNABORTED ECONNREFUSED ESHUTDOWN ECOMM EPROTO ENOLINK EREMCHG "
    "ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED"
)


_NAME_TAKEN_OR_IMPOSSIBLE = _numbers("EISDIR ENOTDIR EEXIST ENOTEMPTY ELOOP EMLINK ENAMETOOLONG")


# Faults that the user can fix. Any other OSError is a bug in these programs: a traceback.
STORAGE_FAULTS = _DISK_FULL | _DISK | _NETWORK_MOUNT | _NAME_TAKEN_OR_IMPOSSIBLE


def storage_cure(error: Exception) -> str:
    """What the user can do about a storage fault."""
    in_rust = re.search(r"\(os error ([0-9]+)\)", str(error))  # as in "Full (os error 28)"
    number = getattr(error, "errno", None) or (int(in_rust[1]) if in_rust else None)
    if number in _DISK_FULL:
        return "make room there"
    return "check that disk or mount, and your permissions there"


def counted(number: int, noun: str) -> str:
    """Such as ``1 epoch`` or ``3 epochs``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def first_few(values: Iterable[int | str]) -> str:
    """The first five of ``values``, and how many more there are."""
    values = list(values)
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(map(str, values[:5])) + more
