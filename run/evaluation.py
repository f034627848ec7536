"""Where the results of an evaluation go: their folder, and the scores in the run's log."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run.errors import UserError
from run.locks import is_free, locked, locked_if_free
from run.manifest import BEST, FINISHED_FILE, LAST, check_no_links
from run.metrics_log import MetricsLog, is_logged
from run.paths import local_path
from run.tracker import Tracker
from run.training_json import read_description
from run.wandb_run import (
    FINISH_SECONDS,
    INIT_SECONDS,
    WANDB_FOLDER,
    is_off,
    saved_run,
    start_tracker,
)

# Of a prediction, what a table in W&B shows.
COLUMNS = ("id", "correct", "label", "question", "gold", "completion", "answer", "stop")

LOCKED_SECONDS = 1.0  # for how long another evaluation may lock a run, at most
TURN_SECONDS = INIT_SECONDS + FINISH_SECONDS  # for how long it may log to W&B
LONG_TURN = "another evaluation is still logging there; metrics.jsonl has the score"


@dataclass(frozen=True)
class Score:
    """Numbers to log.

    Attributes:
        numbers: by name, without the prefix ``eval/``.
        is_new: whether any of their completions were decoded by this process.
        tables: the completions themselves, for W&B, by name.
    """

    numbers: Mapping[str, float]
    is_new: bool
    tables: Mapping[str, Sequence[Mapping[str, Any]]]


def evaluation_folder(model: str, run_folder: Path | None, output_dir: str, split: str) -> Path:
    """The ``eval`` folder of the model's run, or one named after a ``model`` outside any run."""
    if run_folder is not None:
        for folder in (run_folder, run_folder / "eval"):
            check_no_links(folder)
        checkpoint = local_path(model).resolve().name  # of ".", and of a link to best
        return run_folder / "eval" / (split if checkpoint == BEST else f"{checkpoint}-{split}")
    place = local_path(model)
    name = place.resolve().name if place.exists() else model.replace("/", "--")
    return local_path(output_dir) / name / "eval" / split


def log_scores(
    run_folder: Path,
    description: Mapping[str, Any],
    identity: Mapping[str, Any],
    scores: Sequence[Score],
    *,
    run_name: str,
    wandb_mode: str | None,
    wandb_project: str,
    start_tracker: Callable[..., Tracker] = start_tracker,
) -> None:
    """Log scores into the run of a checkpoint, if data and decoding are the same as the run's.

    If nothing was decoded for a score this time, it is logged only if metrics.jsonl lacks it. An
    earlier evaluation may have been killed after its last completion and before it got here.

    Args:
        description: the checkpoint's ``training.json``.
        identity: everything that the completions depend on.
    """
    split, trained = identity["split"], description["settings"]
    same = all(identity[key] == trained.get(key) for key in ("prompt", "max_new_tokens", "dtype"))
    if not same or identity["data_sha256"] != description["data"].get(f"{split}_sha256"):
        print("not logged as the run's score: data or settings differ from the run's")
        return
    prefix = "eval/" if split == "test" else f"eval/{split}_"
    unlogged: dict[str, float] = {}
    tables: dict[str, Sequence[Mapping[str, Any]]] = {}
    for score in scores:
        numbers = {prefix + name: value for name, value in score.numbers.items()}
        if score.is_new or not is_logged(run_folder, description["step"], numbers):
            unlogged |= numbers
            tables |= {prefix + name: rows for name, rows in score.tables.items()}
    if not unlogged:
        return
    with turn_in_wandb(run_folder, wandb_mode) as mode:
        newest = newest_description(run_folder)
        tracker = start_tracker(
            mode,
            run=saved_run(newest or description, wandb_project, trained.get("wandb_project")),
            name=run_name,
            folder=run_folder,
            settings={},
        )
        # The run is locked only while the line is written, so that a training run that is about to
        # start does not have to wait for W&B.
        with ExitStack() as stack, locked_if_free(run_folder) as alone:
            ended = exit_code_of_training(newest)
            log = MetricsLog(run_folder, tracker, alone=alone, exit_code=ended)
            metrics = stack.enter_context(log)
            metrics.write(description["step"], description["epoch"], unlogged)
            for name, rows in tables.items():
                shown = [{column: row.get(column) for column in COLUMNS} for row in rows]
                tracker.table(description["step"], name, shown)


@contextmanager
def turn_in_wandb(run_folder: Path, wandb_mode: str | None) -> Iterator[str | None]:
    """Wait until no other evaluation logs in the run's W&B run, and keep others out of it.

    W&B mixes up what two processes log in one run.

    Yields:
        ``wandb_mode``, or ``disabled`` if the run is being trained, since its training passes on
        what is added to its metrics, or if another evaluation takes too long.
    """
    if is_off(wandb_mode):
        yield wandb_mode
        return
    with ExitStack() as turn:
        try:
            turn.enter_context(locked(run_folder / WANDB_FOLDER, LONG_TURN, TURN_SECONDS))
        except UserError as error:
            print(f"W&B: {error}")
            yield "disabled"
            return
        except OSError:  # W&B itself would choose another folder
            pass
        if is_free(run_folder, LOCKED_SECONDS):
            yield wandb_mode
            return
        print("W&B: this run is being trained, and its training logs the score, without the table")
        yield "disabled"


def newest_description(run_folder: Path) -> dict[str, Any] | None:
    """The newest ``training.json``, which knows the run's path in W&B; None if it was removed.

    A sweep may have moved the run since ``best`` was saved.
    """
    for place in ((run_folder / LAST,), (run_folder, FINISHED_FILE)):
        try:
            return read_description(*place)
        except UserError:  # removed, to save disk space
            continue
    return None


def exit_code_of_training(newest: Mapping[str, Any] | None) -> int:
    """0 for a run whose steps are all done, or of which this is unknown; 1 for one that broke off.

    Args:
        newest: see `newest_description`.
    """
    return int(newest is not None and newest["epoch"] < newest["settings"].get("epochs", 0))
