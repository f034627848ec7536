"""The progress and the speed of a training run."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from run.manifest import FITTING_FILE
from run.tracker import RunPath


@dataclass
class Progress:
    """The progress of a run, saved with ``last``.

    It lets a resumed run log the same lines as an uninterrupted one.

    Attributes:
        step: optimizer steps done.
        nats, num_labels: summed loss, and number of supervised tokens, since the last logged line.
        best_loss: validation loss of the best epoch so far, in nats per token.
        best_exact_match: that epoch's exact match on the validation rows, if it chooses the best.
        fitting: after memory ran out, the setting micro_batch_tokens and the value that fits.
        wandb_run_id, wandb_project, wandb_entity: the run's path in W&B.
    """

    step: int = 0
    nats: float = 0.0
    num_labels: int = 0
    best_loss: float | None = None
    best_exact_match: float | None = None
    fitting: tuple[int, int] | None = None
    wandb_run_id: str = ""
    wandb_project: str = ""
    wandb_entity: str | None = None

    @property
    def run(self) -> RunPath:
        return RunPath(self.wandb_run_id, self.wandb_project, self.wandb_entity)

    @run.setter
    def run(self, run: RunPath) -> None:
        self.wandb_run_id = run.run_id
        self.wandb_project = run.project
        self.wandb_entity = run.entity

    def add_step(self, nats: float, num_labels: int) -> None:
        """Count one more optimizer step, with the summed loss of its supervised tokens."""
        self.step += 1
        self.nats += nats
        self.num_labels += num_labels

    def take_mean_loss(self) -> float:
        """Mean loss in nats over all supervised tokens since the last call."""
        loss = self.nats / self.num_labels
        self.nats, self.num_labels = 0.0, 0
        return loss

    def budget(self, setting: int) -> int:
        """The micro_batch_tokens to try: ``setting``, or less where just that ran out of memory."""
        return self.fitting[1] if self.fitting and self.fitting[0] == setting else setting

    def is_due(self, every: int | None) -> bool:
        """Whether this step is a multiple of ``every``; never if None."""
        return every is not None and self.step % every == 0

    def improve(self, loss: float, exact_match: float | None) -> bool:
        """Record an epoch if it is the best so far, by exact match if measured, then by loss.

        Returns:
            Whether it is the best.
        """
        if not self._is_better(loss, exact_match):
            return False
        self.best_loss, self.best_exact_match = loss, exact_match
        return True

    def _is_better(self, loss: float, exact_match: float | None) -> bool:
        if self.best_loss is None:
            return True
        best = self.best_exact_match or 0.0, -self.best_loss
        return (exact_match or 0.0, -loss) > best

    def standing(self, loss: float, exact_match: float | None) -> str:
        """What `improve` will say of an epoch, and its change against the best one before it."""
        if self.best_loss is None:
            return "the best so far"
        change = f"loss {loss - self.best_loss:+.2g}"
        if exact_match is not None:
            points = 100 * (exact_match - (self.best_exact_match or 0.0))
            change = f"exact match {points:+.2f} points, {change}"
        if self._is_better(loss, exact_match):
            return f"the best so far ({change})"
        return f"not the best ({change})"

    @property
    def best(self) -> str:
        """What made the best epoch the best, in words."""
        if self.best_exact_match is None:
            return f"best validation loss {self.best_loss:.6f}"
        return f"best validation exact match {self.best_exact_match:.2%}, loss {self.best_loss:.6f}"

    def forget_missing_best(self, folder: Path) -> None:
        """Forget the best epoch if its checkpoint ``folder`` no longer exists, and report that."""
        if self.best_loss is not None and not folder.exists():
            self.best_loss = self.best_exact_match = None
            print(f"{folder}: missing; the best will be chosen among the remaining epochs")


def fitting_budget(
    folder: Path, setting: int | None, planned: int, saved: tuple[int, int] | None
) -> tuple[int, int] | None:
    """`Progress.fitting`: what is ``saved``, or less if a job has run out of memory since.

    Args:
        setting: micro_batch_tokens.
        planned: what the setting stands for.
    """
    known = saved[1] if saved and saved[0] == planned else planned
    try:
        content = json.loads((folder / FITTING_FILE).read_bytes())
        is_smaller = content["micro_batch_tokens"] == setting and int(content["fitting"]) < known
        return (planned, int(content["fitting"])) if is_smaller else saved
    except (OSError, ValueError, KeyError, TypeError):  # there is none
        return saved


class Speed:
    """Tokens per second of the optimizer steps alone, without validation and saving."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0

    @contextmanager
    def timed(self, num_tokens: int) -> Iterator[None]:
        """Count the time inside this context, which trains on ``num_tokens`` tokens."""
        started = time.perf_counter()
        yield
        self._tokens += num_tokens
        self._seconds += time.perf_counter() - started

    def take_tokens_per_second(self) -> float:
        """The mean since the last call."""
        rate = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        return rate
