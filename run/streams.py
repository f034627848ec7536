"""Makes standard output and error tolerant, so that a broken stream does not end a run."""

from __future__ import annotations

import atexit
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any

# OSError: the stream is broken. ValueError: it is closed, or can't encode a character.
FAULTS = (OSError, ValueError)


def is_one_of_several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_silent() -> bool:
    """Whether another process prints for this one: of several, only rank 0 prints."""
    return is_one_of_several() and os.environ.get("RANK") != "0"


@contextmanager
def one_mouth() -> Iterator[None]:
    """Drop the errors of all processes on a machine but one, where all make the same mistake."""
    if not is_one_of_several() or os.environ.get("LOCAL_RANK") == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as null, redirect_stderr(null):
        yield


class Tolerant:
    """A text stream that drops what it can't write, instead of raising an error.

    A closed terminal causes EIO, a reader that has exited EPIPE, a log on a full disk ENOSPC.

    Attributes:
        fault: the last failure, or None.
    """

    def __init__(self, stream: Any, fault: Exception | None = None):
        self._stream = stream
        self.fault = fault

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except FAULTS as error:
            self.fault = error
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except FAULTS as error:
            self.fault = error

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except FAULTS:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` tolerant and line-buffered.

    Characters that their encoding lacks are written as escape sequences. What a process prints that
    `is_silent` is dropped.
    """
    if is_silent():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for number in range(3):
        _open_if_closed(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, Tolerant):
            continue
        fault = None
        if stream is None:  # as Python sets it if the parent closed the descriptor
            stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
            fault = OSError(errno.EBADF, "it is closed")
        if hasattr(stream, "reconfigure"):
            with suppress(*FAULTS):
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, Tolerant(stream, fault))
    atexit.unregister(_discard_unwritten)
    atexit.register(_discard_unwritten)


def _open_if_closed(number: int) -> None:
    """Connect a closed descriptor ``number`` to the null device.

    Otherwise the next file that is opened, such as a checkpoint, would get this number, and
    anything printed would be written into it.
    """
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:  # a lower number was free
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)  # children need one as well


def _discard_unwritten() -> None:
    """Discard output that still can't be written when the interpreter exits.

    Python 3.13 would report it with a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, Tolerant):
            continue
        stream.fault = None
        stream.flush()
        if stream.fault is not None:
            with suppress(*FAULTS):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
