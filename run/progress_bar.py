"""How far a loop is: tqdm's bar on a terminal; elsewhere, under nohup or Slurm, a plain line now and then."""

import time
from collections.abc import Callable
from datetime import timedelta

from tqdm import tqdm

FIRST_SECONDS, EVERY_SECONDS = (
    10,
    30,
)  # from the start to the first plain line, and from one to the next


class ProgressBar:
    """What a loop over ``total`` things tells of itself, on standard error if that is a terminal, else on output.

    A loop of a few seconds writes no plain line.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        done: int = 0,
        leave: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``unit`` is the name of one thing; ``done`` of them were done before; ``leave``: the bar stays at the end."""
        self._title, self._total, self._unit, self._leave, self._clock = (
            title,
            total,
            unit,
            leave,
            clock,
        )
        self._done = self._done_before = done
        self._postfix: dict[str, str] = {}

    def __enter__(self) -> "ProgressBar":
        self._bar = tqdm(
            total=self._total,
            initial=self._done,
            desc=self._title,
            unit=self._unit,
            leave=self._leave,
            disable=None,  # where standard error is no terminal
        )
        self._started = self._clock()
        self._due = self._started + FIRST_SECONDS
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, **postfix: str) -> None:
        """One more is done; ``postfix`` is shown beside it, and stays until it is given anew."""
        self._done += 1
        self._postfix |= postfix
        if postfix:
            self._bar.set_postfix(self._postfix, refresh=False)
        self._bar.update()
        now = self._clock()
        if self._bar.disable and now >= self._due:
            self._due = now + EVERY_SECONDS
            print(self._line(now - self._started), flush=True)

    def write(self, text: str) -> None:
        """Print ``text`` on a line of its own, above the bar."""
        self._bar.write(text)

    def _line(self, seconds: float) -> str:
        each = seconds / (self._done - self._done_before)
        left = timedelta(seconds=round(each * (self._total - self._done)))
        shown = [f"{self._title}: {self._unit} {self._done} of {self._total}"]
        shown += [f"{name} {value}" for name, value in self._postfix.items()]
        return ", ".join([*shown, f"about {left} left"])
