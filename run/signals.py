"""Signals that ask a process to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)


INSISTING = (
    signal.SIGINT,
    signal.SIGTERM,
)  # a second one of these, in any order, ends the process at once


ONE_REQUEST = (
    0.5  # seconds: `timeout` sends each signal twice, and a terminal and make both send Ctrl-C
)


class StopSignal:
    """The first signal that asks this process to end, from when it listens on.

    Signals after the first one change nothing: a closed terminal sends SIGHUP twice, a scheduler SIGUSR1
    and later SIGTERM. Only a second Ctrl-C or SIGTERM ends the process at once. What the parent has
    ignored, as nohup does with SIGHUP, stays ignored.

    Attributes:
        signal_number: the first signal, or None so far.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._listener: Callable[[int], None] | None = None
        self._insisted: float | None = None  # when the first Ctrl-C or SIGTERM came
        self._before: dict[int, object] = {}

    def tell(self, listener: Callable[[int], None]) -> None:
        """Call ``listener`` with the first signal, between any two instructions; now, if that has come already."""
        self._listener = listener
        if self.signal_number is not None:
            listener(self.signal_number)

    def listen(self) -> StopSignal:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __enter__(self) -> StopSignal:
        return self.listen()

    def __exit__(self, *_: object) -> None:
        """Goes on listening once a signal has come: the next one must not cut the clean-up."""
        if self.signal_number is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        if number in INSISTING:
            now = time.monotonic()
            if self._insisted is not None and now - self._insisted > ONE_REQUEST:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._insisted = self._insisted or now
        if self.signal_number is None:
            self.signal_number = number
            if self._listener:
                self._listener(number)
