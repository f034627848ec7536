"""The checkpoints that a training run saves, each with a description of itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run.checkpoint import Removals
from run.manifest import BEST, LAST
from run.progress import Progress
from run.training_json import describe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Saves:
    """Writes ``best`` and ``last`` of the run in ``folder``.

    Save ``best`` before ``last``. After a kill between the two, the run then repeats the epoch and
    saves both. At the end of the context all replaced checkpoints have been deleted.

    Attributes:
        write: `run.checkpoint.save_checkpoint`.
    """

    folder: Path
    settings: Mapping[str, Any]
    steps_per_epoch: int
    data_hashes: Mapping[str, str]
    tokenizer: Any
    write: Callable[..., None]
    removals: Removals = field(default_factory=Removals)

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *_: object) -> None:
        self.removals.wait()

    def save_best(self, model: Any, progress: Progress, validation: Any) -> None:
        """Save ``best``, with the ``validation`` measurement that made it the best."""
        description = self._description(
            progress,
            validation_loss=validation.loss,
            validation_perplexity=validation.perplexity,
            validation_exact_match=progress.best_exact_match,
        )
        self._write(BEST, model, description)

    def save_last(
        self,
        model: Any,
        progress: Progress,
        tensors: "Mapping[str, torch.Tensor]",
        state: Mapping[str, Any],
    ) -> None:
        """Save ``last``, with ``tensors`` and ``state`` from `engine.state.pack_state`."""
        self._write(LAST, model, self._description(progress) | {"state": state}, tensors)

    def _write(self, name: str, model: Any, *content: Any) -> None:
        folder, weights = self.folder / name, model.pretrained
        self.write(folder, weights, self.tokenizer, *content, removals=self.removals)

    def _description(self, progress: Progress, **validation: float | None) -> dict[str, Any]:
        return describe(
            self.settings,
            step=progress.step,
            epoch=progress.step / self.steps_per_epoch,
            data_hashes=self.data_hashes,
            tokenizer=self.tokenizer.describe(),
            wandb=progress.run,
            **validation,
        )
