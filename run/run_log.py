"""The reports of a training run: numbers to its log, text above its progress bar."""

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from run.errors import NotFiniteError, Stopped, UserError, cause_of, counted
from run.manifest import BEST
from run.metrics_log import MetricsLog, NoMetrics
from run.progress import Progress, Speed
from run.progress_bar import ProgressBar
from run.streams import is_silent
from run.time_left import TimeLeft
from run.tracker import RunPath, Tracker
from run.training_json import read_description
from run.wandb_run import new_run, saved_run, start_tracker

NUM_SAMPLES = 4  # problems whose completions are logged after each epoch


def wandb_path(project: str, resume_from: Path | None) -> RunPath:
    """The run's path in W&B: a new one, or the resumed run's."""
    if resume_from is None:
        return new_run(project)
    description = read_description(resume_from)
    return saved_run(description, project, description["settings"].get("wandb_project"))


class Described(Protocol):
    """What `run.saves.Saves` has."""

    folder: Path
    settings: Mapping[str, Any]
    plan: Mapping[str, Any]
    data_hashes: Mapping[str, str]


class Batches(Protocol):
    """Those of the run (`data.Batches`)."""

    per_epoch: int

    def mask_rate(self, step: int) -> float | None: ...


class Usage(Protocol):
    """What `engine.usage.Usage` has."""

    def at(self, tokens_per_second: float) -> dict[str, float]: ...


def open_log(
    saves: Described, progress: Progress, batches: Batches, steps: int, usage: Usage
) -> "RunLog":
    """Open the run's log and tracker, whose path W&B or a sweep's agent may have chosen."""
    folder, settings = saves.folder, saves.settings
    # The process that prints tracks the run, too.
    mode = "disabled" if is_silent() else settings["wandb_mode"]
    tracker = start_tracker(
        mode,
        run=progress.run,
        name=settings["run_name"],
        folder=folder,
        settings={**settings, "plan": saves.plan, "data": saves.data_hashes},
    )
    progress.run = tracker.run or progress.run
    best = folder / BEST if settings.get("wandb_artifact") else None
    if best and tracker.run is None:
        print("wandb_artifact: best will not be uploaded, since W&B is off")
    left = TimeLeft(steps, batches.per_epoch, settings["checkpoint_steps"])
    cure = partial(cure_for_not_finite, settings)
    return RunLog(folder, tracker, progress, batches, steps, left, usage, cure, best)


def cure_for_not_finite(settings: Mapping[str, Any], updates: int) -> str:
    """What to do about a loss that is not finite after so many ``updates`` of the weights."""
    cure = "lower the learning_rate"
    if updates == 0:
        cure = "no step has changed the model yet, so copy it again"
    if settings["fp8"]:
        return f"{cure}, or set fp8 false"
    return cure if settings["dtype"] == "float32" else f"{cure}, or set dtype float32"


class Problem(Protocol):
    question: str
    answer: str


class Stepped(Protocol):
    loss: float
    grad_norm: float


class Measured(Protocol):
    loss: float
    perplexity: float
    by_class: Mapping[str, "Measured"]


class RunLog:
    """Writes the log and the progress bar. Every line is about the current step of ``progress``."""

    def __init__(
        self,
        folder: Path,
        tracker: Tracker,
        progress: Progress,
        batches: Batches,
        steps: int,
        left: TimeLeft,
        usage: Usage,
        cure_for_not_finite: Callable[[int], str],
        best: Path | None = None,
    ):
        """``best`` is the checkpoint to upload when all steps are done; None: no upload."""
        self._metrics = NoMetrics() if is_silent() else MetricsLog(folder, tracker, progress.step)
        self._tracker, self._usage, self._best = tracker, usage, best
        self._bar = ProgressBar("training", steps, "step", progress.step)
        self._progress = progress
        self._steps_per_epoch = batches.per_epoch
        self._steps, self._epochs = steps, steps // batches.per_epoch
        self._mask_rate = batches.mask_rate
        self._speed = Speed()
        self._left, self._cure_for_not_finite = left, cure_for_not_finite

    def start(self, rows: int, held_out: int, batch_size: int, device: str, how: str) -> None:
        """Print a summary of the run before it starts."""
        print(
            f"training: {counted(rows, 'row')}, {counted(self._steps, 'step')} of "
            f"{counted(batch_size, 'sequence')} in {counted(self._epochs, 'epoch')}, on {device} "
            f"in {how}; validation: {counted(held_out, 'row')}"
        )

    def __enter__(self) -> "RunLog":
        self._stack = ExitStack()
        self._stack.enter_context(self._metrics)
        self._stack.push(self._upload_best)  # after the bar is closed, before W&B is
        self._stack.enter_context(self._bar)
        return self

    def _upload_best(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._best is not None and kind is None:
            self._tracker.upload(self._best)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def timing(self, batch: Sequence[Any]) -> Iterator[None]:
        """Count the time inside this context, which trains on ``batch``."""
        num_tokens = sum(len(row.input_ids) for row in batch)
        with self._left.timed(self._progress.step + 1), self._speed.timed(num_tokens):
            yield

    def step(self, loss: float, perplexity: float, learning_rate: float, grad_norm: float) -> None:
        """Log a step. ``loss`` and ``perplexity`` are means over all steps since the last call."""
        speed = self._speed.take_tokens_per_second()
        numbers = {
            "train/loss": loss,
            "train/perplexity": perplexity,
            "train/learning_rate": learning_rate,
            "train/grad_norm": grad_norm,
            "train/tokens_per_second": speed,
            **self._usage.at(speed),
        }
        mask_rate = self._mask_rate(self._progress.step - 1)
        if mask_rate is not None:
            numbers["train/mask_rate"] = mask_rate
        self._write(numbers)
        self._bar.show(loss=f"{loss:.4f}", tok_s=f"{speed:.0f}")

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._bar.update(left=self._left.after(self._progress.step))

    def out_of_memory(self, fitting: int) -> None:
        """Memory ran out, and suffices for ``fitting`` micro_batch_tokens."""
        step = self._progress.step
        self._bar.write(f"step {step}: out of memory; micro_batch_tokens is {fitting} from here on")
        self._write({"train/micro_batch_tokens": fitting})

    def not_finite(self, result: Stepped, rows: str, last: Path) -> NotFiniteError:
        """Log a step with a NaN or infinite loss or gradient norm; returns the error to raise.

        Args:
            rows: describes the rows that caused it.
            last: the checkpoint from before this step.
        """
        numbers = {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
        return self._not_finite(numbers, rows, last, self._progress.step - 1)

    def check_validation(self, measured: Measured, last: Path) -> None:
        """Raises NotFiniteError if the validation loss is NaN or infinite, after logging it."""
        numbers = {"val/loss": measured.loss, "val/perplexity": measured.perplexity}
        if not all(map(math.isfinite, numbers.values())):
            raise self._not_finite(numbers, "the validation rows", last, self._progress.step)

    def validation(self, measured: Measured, exact_match: float | None, num_problems: int) -> None:
        """Log an epoch. ``exact_match`` over ``num_problems`` is None if it was not measured."""
        numbers = {"val/loss": measured.loss, "val/perplexity": measured.perplexity}
        numbers |= {f"val/perplexity_{n}": part.perplexity for n, part in measured.by_class.items()}
        shown = str(measured)
        if exact_match is not None:
            numbers["val/exact_match"] = exact_match
            shown += f", exact match {exact_match:.2%} of {num_problems}"
        self._write(numbers)
        epoch = self._progress.step // self._steps_per_epoch
        standing = self._progress.standing(measured.loss, exact_match)
        self._bar.write(f"epoch {epoch} of {self._epochs}: validation {shown}, {standing}")

    def sample(
        self,
        decode: Callable[[Sequence[list[int]]], list[tuple[str, str]]],
        prompts: Sequence[list[int]],
        problems: Sequence[Problem],
        release: Callable[[], None],
    ) -> None:
        """Show what the model writes for the first problem, next to the answer in the data set.

        W&B gets a table of the first `NUM_SAMPLES`, which are decoded together. If that fails, say
        so: a sample is no reason to end the run.

        Args:
            release: frees the memory that a failed attempt left behind.
        """
        try:
            written = decode(prompts[:NUM_SAMPLES])
            failure = ""
        except UserError as error:
            failure = str(error)
        except Exception as error:
            failure = cause_of(error)
        if failure:  # outside the except block, whose traceback holds the attempt's tensors
            release()
            self._bar.write(f"  no sample: {failure}")
            return
        rows = [
            {"question": p.question, "gold": p.answer, "model": text, "stop": stop}
            for p, (text, stop) in zip(problems, written, strict=False)
        ]
        first = rows[0]
        self._bar.write(
            f"  question: {first['question']!r}\n"
            f"  model:    {first['model']!r} ({first['stop']})\n"
            f"  gold:     {first['gold']!r}"
        )
        self._tracker.table(self._progress.step, "val/samples", rows)

    def stopped(self, signal_number: int, last: Path) -> Stopped:
        """The error to raise after a signal and the save that follows it."""
        name = signal.Signals(signal_number).name
        return Stopped(
            signal_number,
            f"{name} after step {self._progress.step}, saved in {last}: type the same command to "
            "resume",
        )

    def _not_finite(
        self, numbers: Mapping[str, float], rows: str, last: Path, updates: int
    ) -> NotFiniteError:
        self._write(numbers)
        shown = ", ".join(f"{name.partition('/')[2]} {value}" for name, value in numbers.items())
        return NotFiniteError(
            f"step {self._progress.step}: {shown} must be finite, caused by {rows}; the weights in "
            f"{last} are from before this step: {self._cure_for_not_finite(updates)}"
        )

    def _write(self, numbers: Mapping[str, float]) -> None:
        step = self._progress.step
        self._metrics.write(step, step / self._steps_per_epoch, numbers)
