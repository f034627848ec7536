"""Where a training run stands."""

import time
from dataclasses import dataclass
from pathlib import Path

from run.wandb_run import RunPath


@dataclass
class Progress:
    """Where a run stands; saved with ``last``, so that a resumed run logs what the unstopped one would.

    Attributes:
        step: optimizer steps done.
        nats, num_labels: summed loss, and supervised tokens, since the last logged line.
        best_loss: validation loss of the best epoch so far, in nats a token.
        best_exact_match: its exact match on the validation rows, where that is what chooses.
        fitting: after an out-of-memory error, what micro_batch_tokens was set to and what fits.
        wandb_run_id, wandb_project, wandb_entity: where W&B has the run.
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
        self.wandb_run_id, self.wandb_project, self.wandb_entity = (
            run.run_id,
            run.project,
            run.entity,
        )

    def count(self, nats: float, num_labels: int) -> None:
        """One more optimizer step is done."""
        self.step += 1
        self.nats += nats
        self.num_labels += num_labels

    def budget(self, configured: int) -> int:
        """``configured`` micro_batch_tokens, or what was found to fit of just that many."""
        return self.fitting[1] if self.fitting and self.fitting[0] == configured else configured

    def is_best(self, loss: float, exact_match: float | None) -> bool:
        """Whether an epoch is the best so far, by exact match where there is one, then by loss; it is remembered."""
        if self.best_loss is not None:
            before = self.best_exact_match or 0.0, -self.best_loss
            if (exact_match or 0.0, -loss) <= before:
                return False
        self.best_loss, self.best_exact_match = loss, exact_match
        return True

    def forget_best_without(self, folder: Path) -> bool:
        """Whether there was a best epoch whose checkpoint is not there any more; then it is none."""
        if self.best_loss is None or folder.exists():
            return False
        self.best_loss = self.best_exact_match = None
        return True

    def read_and_reset_loss(self) -> float:
        """Mean loss in nats over all supervised tokens since the last call."""
        loss = self.nats / self.num_labels
        self.nats, self.num_labels = 0.0, 0
        return loss


class Speed:
    """Tokens a second over the optimizer steps alone, without validation and saving."""

    def __init__(self) -> None:
        self._tokens, self._seconds, self._started = 0, 0.0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, tokens: int) -> None:
        self._tokens += tokens
        self._seconds += time.perf_counter() - self._started

    def read_and_reset(self) -> float:
        rate = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        return rate
