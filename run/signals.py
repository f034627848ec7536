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


# A second signal from this list, the same or another, ends the process immediately.
INSISTENT = (signal.SIGINT, signal.SIGTERM)


# Two signals within this many seconds count as one request, since `timeout` sends each signal
# twice, and on Ctrl-C both the terminal and make send one.
SAME_REQUEST_SECONDS = 0.5


class StopSignal:
    """The first signal that asks this process to stop, after it starts listening.

    Later signals are ignored, since a closed terminal sends SIGHUP twice, and a scheduler SIGUSR1
    and then SIGTERM. Only a second Ctrl-C or SIGTERM ends the process immediately. A signal that
    the parent process ignored, as nohup does SIGHUP, remains ignored.

    Attributes:
        signal_number: the first signal; None until it arrives.
    """

    def __init__(self, same_request_seconds: float = SAME_REQUEST_SECONDS) -> None:
        self.signal_number: int | None = None
        self._same_request_seconds = same_request_seconds
        self._listener: Callable[[int], None] | None = None
        self._first_insistent: float | None = None  # when it arrived
        self._handlers_before: dict[int, object] = {}

    def tell(self, listener: Callable[[int], None]) -> None:
        """Call ``listener`` with the first signal, possibly between any two instructions.

        If a signal has already arrived, call it now.
        """
        self._listener = listener
        if self.signal_number is not None:
            listener(self.signal_number)

    def listen(self) -> StopSignal:
        for number in STOP_SIGNALS:
            # None is a handler that was not installed from Python.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers_before[number] = signal.signal(number, self._receive)
        return self

    def __enter__(self) -> StopSignal:
        return self.listen()

    def __exit__(self, *_: object) -> None:
        """Stop listening, unless a signal has arrived: another must not interrupt the clean-up."""
        if self.signal_number is None:
            for number, handler in self._handlers_before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if number in INSISTENT:
            now = time.monotonic()
            if self._first_insistent is None:
                self._first_insistent = now
            elif now - self._first_insistent > self._same_request_seconds:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        if self.signal_number is None:
            self.signal_number = number
            if self._listener:
                self._listener(number)
