"""How much longer a training run takes, with its validations and saves."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm


@dataclass
class Mean:
    """The mean of some times, in seconds."""

    seconds: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.count += 1

    @property
    def value(self) -> float:
        """0 as long as there is none."""
        return self.seconds / max(self.count, 1)


class TimeLeft:
    """Estimates the rest of a run from what its steps and the pauses between them took so far.

    A long pause follows each epoch, with its validation, saves and sample, and a shorter one a step
    that is saved. One before the first of its kind is over can't be estimated, and counts nothing.
    """

    def __init__(
        self,
        steps: int,
        steps_per_epoch: int,
        checkpoint_steps: int | None,
        clock: Callable[[], float] | None = None,
    ):
        self._total = steps
        self._per_epoch = steps_per_epoch
        self._per_save = checkpoint_steps or steps + 1
        self._clock = clock or time.monotonic
        self._steps, self._epoch_ends, self._saves = Mean(), Mean(), Mean()
        self._others = Mean()  # the pauses after all other steps
        self._is_first = True
        self._ended: float | None = None  # when the last step did

    @contextmanager
    def timed(self, step: int) -> Iterator[None]:
        """Count the time inside this context as that of ``step``, counted from 1."""
        started = self._clock()
        if self._ended is not None:
            self._pause_after(step - 1).add(started - self._ended)
        yield
        self._ended = self._clock()
        if self._is_first and self._steps.count:
            # The first step of a process compiles and allocates, so it counts only while alone.
            self._steps, self._is_first = Mean(), False
        self._steps.add(self._ended - started)

    def _pause_after(self, step: int) -> Mean:
        if step % self._per_epoch == 0:
            return self._epoch_ends
        return self._saves if step % self._per_save == 0 else self._others

    def after(self, step: int) -> tuple[float, bool]:
        """The seconds from the end of ``step`` on, and whether all that is to come is in them."""
        epoch_ends = self._multiples(self._per_epoch, step)
        saves = self._multiples(self._per_save, step)
        saves -= self._multiples(lcm(self._per_save, self._per_epoch), step)
        left = self._total - step
        seconds = left * (self._steps.value + self._others.value)
        seconds += epoch_ends * self._epoch_ends.value + saves * self._saves.value
        unknown = (epoch_ends and not self._epoch_ends.count) or (saves and not self._saves.count)
        return seconds, not unknown

    def _multiples(self, number: int, step: int) -> int:
        """How many of the steps from ``step`` to the last are multiples of ``number``."""
        return self._total // number - (step - 1) // number


def count_saves(epochs: int, steps_per_epoch: int, checkpoint_steps: int | None) -> int:
    """How often a run saves ``last`` after a step: after each epoch, and as its setting asks."""
    steps = epochs * steps_per_epoch
    every = checkpoint_steps or steps + 1
    return epochs + steps // every - steps // lcm(every, steps_per_epoch)
