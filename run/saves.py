"""The checkpoints that a training run saves, each with a description of itself."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

from run.checkpoint import Removals
from run.errors import Stopped, one_line
from run.manifest import BEST, LAST
from run.progress import Progress
from run.training_json import describe

if TYPE_CHECKING:
    import torch


class Parts(Protocol):
    """How checkpoints are written.

    Attributes:
        save: `run.checkpoint.save_checkpoint`.
        copy: `engine.state.copy_to_host`. Where it gives copies of a model's tensors, they are
            written while training goes on. Where it gives None, training waits.
    """

    save: Callable[..., None]
    copy: "Callable[..., dict[str, torch.Tensor] | None]"


@dataclass(frozen=True)
class Snapshot:
    """The ``weights`` of ``model`` after ``step``, which saves them as it would its own.

    Attributes:
        model: `engine.llama.Llama.stored`.
    """

    model: Any
    step: int
    weights: "Mapping[str, torch.Tensor]"

    def save_pretrained(self, folder: Path, *, max_shard_size: int) -> None:
        # Transformers empties the dictionary that it is given.
        weights = dict(self.weights)
        self.model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)


class Writer:
    """Writes checkpoints in a thread, one after the other, while training goes on.

    If one can't be written, those after it are not.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._writes: list[Future[None]] = []

    def add(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call ``write(*arguments)`` after all that were added before it have succeeded."""
        before = self._writes[-1:]
        self._writes.append(self._thread.submit(_write_after, before, write, *arguments))

    def check(self) -> None:
        """Raise the error of a write that has failed by now."""
        if any(write.done() and write.exception() for write in self._writes):
            self.wait()

    def wait(self) -> None:
        """Block until all is written, and raise the error of the first write that failed."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def close(self) -> None:
        """`wait`, and end the thread."""
        self._thread.shutdown()
        self.wait()


def _write_after(
    before: Sequence[Future[None]], write: Callable[..., None], *arguments: Any
) -> None:
    for one in before:
        one.result()
    write(*arguments)


@dataclass
class Saves:
    """Writes ``best`` and ``last`` of the run in ``folder``.

    Save ``best`` before ``last``. After a kill between the two, the run then repeats the epoch and
    saves both. Of a run of adapters, a checkpoint has only these; ``base`` says what they adapt.

    In its context, a save takes a copy of all that it writes, if there is memory for it, and goes
    on beside training. A save of another step waits for it, so there is one copy at most. At the
    end of the context all checkpoints are written, and the replaced ones deleted. A signal must not
    raise an error there: the lock of the folder would be released while a thread writes to it.
    """

    folder: Path
    settings: Mapping[str, Any]
    plan: Mapping[str, Any]
    steps_per_epoch: int
    base: Mapping[str, str] | None
    data_hashes: Mapping[str, str]
    tokenizer: Any
    parts: Parts
    removals: Removals = field(default_factory=Removals)
    _writer: Writer | None = field(default=None, init=False)
    _newest: "ref[Snapshot] | None" = field(default=None, init=False)  # until it is written

    def __enter__(self) -> "Saves":
        self._writer = Writer()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
        except Exception as failure:
            # The error that ended training is the one to report, unless it says that all is saved.
            if kind is None or issubclass(kind, Stopped):
                raise
            print(one_line(failure))
        finally:
            self._writer = None
            self.removals.wait()

    def is_due(self, progress: Progress) -> bool:
        """Whether the setting checkpoint_steps asks for a save at this step.

        Raises:
            UserError: an earlier checkpoint could not be written.
        """
        self._writer.check()
        return progress.is_due(self.settings["checkpoint_steps"])

    def save_best(self, model: Any, progress: Progress, validation: Any) -> None:
        """Save ``best``, with the ``validation`` measurement that made it the best."""
        description = self._description(
            progress,
            validation_loss=validation.loss,
            validation_perplexity=validation.perplexity,
            validation_exact_match=progress.best_exact_match,
            validation_by_class={
                name: {"loss": part.loss, "perplexity": part.perplexity, "tokens": part.num_tokens}
                for name, part in validation.by_class.items()
            },
        )
        self._save(BEST, model, description)

    def save_last(
        self,
        model: Any,
        progress: Progress,
        tensors: "Mapping[str, torch.Tensor]",
        state: Mapping[str, Any],
    ) -> None:
        """Save ``last``, with ``tensors`` and ``state`` from `engine.state.pack_state`."""
        self._save(LAST, model, self._description(progress) | {"state": state}, tensors)

    def _save(
        self,
        name: str,
        model: Any,
        description: Mapping[str, Any],
        *tensors: "Mapping[str, torch.Tensor]",
    ) -> None:
        copies = self._copies(model, description["step"], tensors)
        if copies is not None:
            self._writer.add(self._write, name, copies[0], description, *copies[1:])
            return
        if self._writer is not None:
            self._writer.wait()
        self._write(name, model.stored, description, *tensors)

    def _copies(
        self, model: Any, step: int, tensors: "Sequence[Mapping[str, torch.Tensor]]"
    ) -> tuple[Any, ...] | None:
        """Copies of the weights and of ``tensors``; None if training is to wait for the save.

        At the end of an epoch, ``last`` shares its weights with ``best``.
        """
        if self._writer is None:
            return None
        snapshot = self._newest and self._newest()
        if snapshot is None or snapshot.step != step:
            del snapshot
            self._writer.wait()  # until the memory of the copy before is free
            weights = self.parts.copy(model, model.stored.state_dict(), *tensors)
            if weights is None:
                return None
            snapshot = Snapshot(model.stored, step, weights)
            self._newest = ref(snapshot)
        copies = snapshot, *(self.parts.copy(model, each) for each in tensors)
        return None if None in copies else copies

    def _write(self, name: str, weights: Any, *content: Any) -> None:
        folder = self.folder / name
        self.parts.save(folder, weights, self.tokenizer, *content, removals=self.removals)

    def _description(self, progress: Progress, **validation: Any) -> dict[str, Any]:
        return describe(
            self.settings,
            plan=self.plan,
            step=progress.step,
            epoch=progress.step / self.steps_per_epoch,
            base=self.base,
            data_hashes=self.data_hashes,
            tokenizer=self.tokenizer.describe(),
            wandb=progress.run,
            **validation,
        )
