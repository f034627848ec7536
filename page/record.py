"""What the folder of a run has to show. Any file may be missing, as in old and unfinished runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grading.results import (
    IDENTITY_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    completion_id,
    read_predictions,
    read_scores,
)
from run.errors import UserError
from run.manifest import BEST, DESCRIPTION_FILE, FINISHED_FILE, LAST
from run.metrics_file import read_metrics

EVALUATIONS = "eval"  # the folder of a run's evaluations
FIRST_SHOWN = ("test", "validation")  # if no evaluation is named


@dataclass(frozen=True)
class Evaluation:
    """Greedy predictions.

    Attributes:
        name: of its folder, such as ``test`` or ``last-test``.
        rows: one per problem, in the order of their ids. Of several samples, that with the lowest
            number: the one that was finished first is a short one.
        scores: the content of ``scores.json``; empty if there is none.
        num_problems: how many were asked, which is more than there are rows if it is unfinished.
        damaged: how many lines of the file are not predictions.
        are_samples: whether there are several of a problem.
    """

    name: str
    rows: list[dict[str, Any]]
    scores: Mapping[str, Any]
    num_problems: int
    damaged: int
    are_samples: bool


@dataclass(frozen=True)
class Record:
    """What there is of a run.

    Attributes:
        name: the run's, or that of a folder of predictions.
        metrics: the lines of ``metrics.jsonl``.
        best: ``training.json`` of the best checkpoint, or empty.
        newest: that of the newest checkpoint, or empty.
        description: of the best checkpoint or, if there is none, of the newest.
        evaluation: the one to show; None if there is none.
        exact_match: of every evaluation of the run, by the name of its folder; None if it is not
            scored yet.
    """

    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    best: Mapping[str, Any] = field(default_factory=dict)
    newest: Mapping[str, Any] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    exact_match: Mapping[str, float | None] = field(default_factory=dict)


def read_records(folders: Sequence[Path], split: str | None) -> list[Record]:
    """`read_record` of one folder, or of two.

    Without ``split``, two runs show the evaluation that both have; if each has only others, none. A
    folder with a ``predictions.jsonl`` shows it in any case, since nothing else is meant by it.
    """
    if split is None and len(folders) > 1:
        first, second = map(_evaluations, folders)
        split = _first_shown([name for name in first if name in second])
        are_runs = not any((folder / PREDICTIONS_FILE).is_file() for folder in folders)
        if split is None and first and second and are_runs:
            return [replace(read_record(folder, None), evaluation=None) for folder in folders]
    return [read_record(folder, split) for folder in folders]


def read_record(folder: Path, split: str | None) -> Record:
    """Read the folder of a run, or a folder that contains a ``predictions.jsonl``.

    Args:
        split: the evaluation to show, by the name of its folder under ``eval``. None: ``test``,
            or else another one that there is.

    Raises:
        UserError: there is nothing to show, or no such evaluation.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder: name a run's, such as checkpoints/RUN_NAME")
    if (folder / PREDICTIONS_FILE).is_file():
        return _read_predictions_only(folder, split)
    metrics = read_metrics(folder)
    found = _evaluations(folder)
    if not metrics and not found:
        raise UserError(
            f"{folder}: has neither metrics.jsonl nor {EVALUATIONS}/SPLIT/{PREDICTIONS_FILE}: "
            "name the folder of a run, such as checkpoints/RUN_NAME"
        )
    if split is not None and split not in found:
        there = f"there is {', '.join(found)}" if found else "evaluate it first"
        raise UserError(
            f"--split {split}: {folder / EVALUATIONS / split} has no {PREDICTIONS_FILE}: {there}"
        )
    name = split or _first_shown(found)
    best = _description(folder / BEST / DESCRIPTION_FILE)
    newest = _description(folder / LAST / DESCRIPTION_FILE) or _description(folder / FINISHED_FILE)
    return Record(
        name=folder.resolve().name,
        metrics=metrics,
        best=best,
        newest=newest,
        description=best or newest,
        evaluation=name and read_evaluation(folder / EVALUATIONS / name),
        exact_match={name: _exact_match(folder / EVALUATIONS / name) for name in found},
    )


def _evaluations(folder: Path) -> list[str]:
    """The names that `read_record` accepts as ``split``."""
    if (folder / PREDICTIONS_FILE).is_file():
        return [_identity(folder).get("split"), folder.resolve().name]
    return sorted(file.parent.name for file in folder.glob(f"{EVALUATIONS}/*/{PREDICTIONS_FILE}"))


def _first_shown(names: Sequence[str]) -> str | None:
    return next((name for name in (*FIRST_SHOWN, *names) if name in names), None)


def _read_predictions_only(folder: Path, split: str | None) -> Record:
    """A `Record` of a folder outside any run."""
    evaluation = read_evaluation(folder)
    known = evaluation.scores.get("split")
    if split not in (None, known, evaluation.name):
        raise UserError(
            f"--split {split}: {folder / PREDICTIONS_FILE} is of {known or 'an unknown split'}: "
            "leave --split out, or name the folder of a run"
        )
    path = folder.resolve()
    # As evaluate.py names the folder of a model outside any run: NAME/eval/SPLIT.
    model = path.parents[1].name if path.parent.name == EVALUATIONS else path.name
    return Record(name=model, evaluation=evaluation)


def read_evaluation(folder: Path) -> Evaluation:
    """Read the predictions in ``folder``, which may still be growing."""
    damaged: list[int] = []
    rows = read_predictions(folder / PREDICTIONS_FILE, drop_cut_line=True, damaged=damaged)
    by_id: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=completion_id):
        by_id.setdefault(row["id"], row)
    identity = _identity(folder)
    asked = identity.get("num_problems")
    return Evaluation(
        name=folder.resolve().name,
        rows=list(by_id.values()),
        scores=identity,
        num_problems=max(asked if type(asked) is int else 0, len(by_id)),
        damaged=len(damaged),
        are_samples=len({completion_id(row) for row in rows}) > len(by_id),
    )


def _identity(folder: Path) -> dict[str, Any]:
    """The content of ``scores.json`` or, if it is not of all problems asked, of what asked them.

    An evaluation that went on with more problems writes it anew only at its end.
    """
    scores, asked = read_scores(folder / SCORES_FILE), read_scores(folder / IDENTITY_FILE)
    is_of_all = "num_problems" not in asked or scores.get("num_problems") == asked["num_problems"]
    return scores if scores and is_of_all else asked


def _exact_match(folder: Path) -> float | None:
    share = _identity(folder).get("exact_match")
    return share if isinstance(share, float) else None


def _description(file: Path) -> dict[str, Any]:
    """A ``training.json``; empty if it is missing or damaged, since the rest can still be shown."""
    try:
        content = json.loads(file.read_bytes())
        return content if isinstance(content["settings"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
