"""Progress of a loop: tqdm's bar on a terminal, occasional lines elsewhere (nohup, Slurm)."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from tqdm import tqdm

from run.streams import is_silent

FIRST_SECONDS = 10  # from the start to the first plain line
EVERY_SECONDS = 30  # from one plain line to the next
# Of tqdm, with our estimate of the time that is left.
BAR = "{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{left}{{postfix}}]"


def has_no_cursor() -> bool:
    """Whether a bar would be drawn again and again, below each other.

    The kernel of a notebook gives its commands a terminal that can't be drawn on.
    """
    return os.environ.get("TERM") == "dumb" or "JPY_PARENT_PID" in os.environ


class ProgressBar:
    """Reports the progress of a loop over ``total`` items.

    If standard error is a terminal, the bar is shown there. If not, or in a notebook, lines are
    printed on standard output, though not for a loop of a few seconds.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        done: int = 0,
        leave: bool = True,
        clock: Callable[[], float] | None = None,
    ):
        """
        Args:
            unit: the name of one item.
            done: how many items were done before.
            leave: whether the bar remains on the terminal at the end.
            clock: a replacement for ``time.monotonic``.
        """
        self._title = title
        self._total = total
        self._unit = unit
        self._leave = leave
        self._clock = clock or time.monotonic
        self._done = self._done_before = done
        self._postfix: dict[str, str] = {}

    def __enter__(self) -> "ProgressBar":
        self._bar = tqdm(
            total=self._total,
            initial=self._done,
            desc=self._title,
            unit=self._unit,
            leave=self._leave,
            dynamic_ncols=True,
            # None: unless standard error is a terminal
            disable=is_silent() or has_no_cursor() or None,
        )
        self._started = self._clock()
        self._due = self._started + FIRST_SECONDS
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.bar_format = None
        self._bar.close()

    def show(self, **postfix: str) -> None:
        """Set the values shown next to the bar, from its next update on."""
        self._postfix |= postfix
        self._bar.set_postfix(self._postfix, refresh=False)

    def update(self, left: tuple[float, bool] | None = None, **postfix: str) -> None:
        """Count one more item as done, and `show` the values given.

        Args:
            left: the seconds that are left, and whether these include all; None: as many for each
                item as so far.
        """
        self._done += 1
        if postfix:
            self.show(**postfix)
        if left is not None:
            self._bar.bar_format = BAR.format(left=clock(left[0]) + "+" * (not left[1]))
        self._bar.update()
        now = self._clock()
        if self._bar.disable and now >= self._due:
            self._due = now + EVERY_SECONDS
            print(self._line(left or self._at_this_pace(now)), flush=True)

    def write(self, text: str) -> None:
        """Print ``text`` on a line of its own, above the bar."""
        self._bar.write(text)
        sys.stdout.flush()

    def _at_this_pace(self, now: float) -> tuple[float, bool]:
        each = (now - self._started) / (self._done - self._done_before)
        return each * (self._total - self._done), True

    def _line(self, left: tuple[float, bool]) -> str:
        shown = [f"{self._title}: {self._unit} {self._done} of {self._total}"]
        shown += [f"{name} {value}" for name, value in self._postfix.items()]
        about = "about" if left[1] else "more than"
        return ", ".join([*shown, f"{about} {clock(left[0])} left"])


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
