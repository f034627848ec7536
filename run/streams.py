"""Standard output and error that no run dies of: it has files to finish."""

from __future__ import annotations

import atexit
import errno
import os
import sys
from contextlib import suppress
from typing import Any

ENDS = (
    OSError,
    ValueError,
)  # a stream that is broken, and one that is closed or can't write a letter


class Tolerant:
    """A text stream whose failures end nothing: what can't be written is dropped.

    A closed terminal gives EIO, a reader that is gone EPIPE, a log on a full disk ENOSPC.

    Attributes:
        fault: the last failure, or None.
    """

    def __init__(self, stream: Any, fault: Exception | None = None):
        self._stream = stream
        self.fault = fault

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except ENDS as error:
            self.fault = error
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except ENDS as error:
            self.fault = error

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ENDS:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` tolerant, written line by line, with escapes for foreign letters."""
    for number in range(3):
        _open_closed(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, Tolerant):
            continue
        fault = None
        if stream is None:  # so Python has it where the parent closed it
            stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
            fault = OSError(errno.EBADF, "it is closed")
        if hasattr(stream, "reconfigure"):
            with suppress(*ENDS):
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, Tolerant(stream, fault))
    atexit.unregister(_settle)
    atexit.register(_settle)


def _open_closed(number: int) -> None:
    """Let descriptor ``number``, if it is closed, lead nowhere: else the next file, a checkpoint, would get it."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:  # a lower one is free
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)  # children need one as well


def _settle() -> None:
    # What still can't be written when the interpreter ends must go nowhere: Python 3.13 tells of it, with a traceback.
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, Tolerant):
            continue
        stream.fault = None
        stream.flush()
        if stream.fault is not None:
            with suppress(*ENDS):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
