"""Progress of a loop: tqdm's bar on a terminal, occasional lines elsewhere (nohup, Slurm)."""

import time
from collections.abc import Callable
from datetime import timedelta

from tqdm import tqdm

from run.streams import is_silent

FIRST_SECONDS = 10  # from the start to the first plain line
EVERY_SECONDS = 30  # from one plain line to the next


class ProgressBar:
    """Reports the progress of a loop over ``total`` items.

    If standard error is a terminal, the bar is shown there. If not, lines are printed on standard
    output, though not for a loop of a few seconds.
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
            disable=is_silent() or None,  # None: unless standard error is a terminal
        )
        self._started = self._clock()
        self._due = self._started + FIRST_SECONDS
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, **postfix: str) -> None:
        """Set the values shown next to the bar, from its next update on."""
        self._postfix |= postfix
        self._bar.set_postfix(self._postfix, refresh=False)

    def update(self, **postfix: str) -> None:
        """Count one more item as done, and `show` the values given."""
        self._done += 1
        if postfix:
            self.show(**postfix)
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
