"""Composes scores.json in memory from complete predictions, and writes it once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grading.compare import gain
from grading.mistakes import analyse
from grading.results import (
    CALCULATOR,
    GREEDY,
    IDENTITY_FILE,
    PREDICTIONS_FILE,
    SAMPLES,
    SCORES_FILE,
    read_identity,
    read_predictions,
)
from grading.rules import report_contradictions
from grading.score import score, score_samples, wilson_interval
from run.errors import UserError
from run.files import replace_file

# These agree if two evaluations are of the same model and the same problems.
SAME_EVALUATION = ("weights", "split", "data_sha256", "prompt", "max_new_tokens", "dtype")

# The parts of an additional decoding's identity that are repeated in the greedy scores.json.
SHOWN = ("temperature", "seed", "with_calculator")


@dataclass(frozen=True)
class Scored:
    """Predictions and their scores.

    Attributes:
        rows: the predictions.
        identity: everything that they depend on.
        numbers: their scores.
        timing: how long decoding took, and whether batching was verified.
        is_new: whether any of them were decoded by this process.
    """

    rows: Sequence[dict[str, Any]]
    identity: Mapping[str, Any]
    numbers: Mapping[str, Any]
    timing: Mapping[str, Any] = field(default_factory=dict)
    is_new: bool = False

    @property
    def content(self) -> dict[str, Any]:
        """The content of the ``scores.json`` next to the predictions."""
        return {**self.identity, **self.numbers, **self.timing}

    @property
    def logged(self) -> dict[str, float]:
        """The numbers to log to metrics.jsonl and W&B."""
        if "maj_at" in self.numbers:
            shares = self.numbers["maj_at"].items()
            return {f"{self._prefix}maj_at_{k}": share for k, share in shares}
        total, errors = self.numbers["num_problems"], self.numbers["errors"]
        numbers: dict[str, float] = {}
        for rule, share in self.numbers["rules"].items():
            name = "exact_match" if rule == "openai" else rule  # which is the headline
            low, high = wilson_interval(round(share * total), total)
            numbers |= {name: share, f"{name}_low": low, f"{name}_high": high}
        numbers |= {f"errors_{kind}": n for kind, n in errors.items() if n is not None}
        return {self._prefix + name: number for name, number in numbers.items()}

    @property
    def tables(self) -> dict[str, Sequence[Mapping[str, Any]]]:
        """The predictions to log to W&B, by name: not those of samples, which may be many."""
        return {} if "maj_at" in self.numbers else {f"{self._prefix}predictions": self.rows}

    @property
    def _prefix(self) -> str:
        return "calculator_" if self.identity.get("with_calculator") else ""


def score_predictions(
    rows: Sequence[dict[str, Any]],
    identity: Mapping[str, Any],
    source: Path,
    timing: Mapping[str, Any],
    is_new: bool = False,
) -> Scored:
    """Score greedy predictions, or samples.

    Args:
        identity: includes the number of predictions that there must be.
        source: the name of the predictions in messages.
        timing, is_new: see `Scored`.
    """
    report_contradictions(rows, source)
    can_resume = "weights" in identity  # evaluate.py can't resume another program's predictions
    num_problems = identity["num_problems"]
    if any("sample" in row for row in rows):
        num_samples = identity.get("num_samples")
        numbers = score_samples(rows, num_problems, num_samples, str(source), can_resume)
    else:
        numbers = score(rows, num_problems, str(source), can_resume) | analyse(rows)
    return Scored(rows, identity, numbers, timing, is_new)


def additional_scores(
    greedy: Scored, folder: Path, known: Mapping[str, Scored | None] | None = None
) -> dict[str, Any]:
    """Scores with the calculator and of samples, for the ``scores.json`` of ``greedy``.

    Predictions that are incomplete or belong to another evaluation are reported and left out.

    Args:
        greedy: the greedy predictions in ``folder``.
        known: by name, predictions that were just scored, or None if that failed. Any others are
            read from their files.
    """
    known = known or {}
    found: dict[str, Any] = {}
    for name in (CALCULATOR, SAMPLES):
        file = folder / name / PREDICTIONS_FILE
        if not file.exists():
            continue
        try:
            scored = known[name] if name in known else _read_scored(file, greedy.identity)
            if scored is None:
                raise UserError(f"{file}: is incomplete")
            lead = gain(greedy.rows, scored.rows) if name == CALCULATOR else {}
        except UserError:  # no problem there may cost the greedy score
            print(
                f"{file}: is incomplete, or belongs to another evaluation: "
                f"left out of {SCORES_FILE}"
            )
            continue
        shown = {key: scored.identity[key] for key in SHOWN if key in scored.identity}
        found[name] = shown | scored.numbers | lead
    return found


def _read_scored(file: Path, greedy_identity: Mapping[str, Any]) -> Scored:
    """Read and score ``file``. Raises UserError if it is incomplete or of another evaluation."""
    identity = read_identity(file.with_name(IDENTITY_FILE))
    same = (*SAME_EVALUATION, "num_problems")
    if any(identity.get(key) != greedy_identity.get(key) for key in same):
        raise UserError(f"{file}: belongs to another evaluation")
    return score_predictions(read_predictions(file, drop_cut_line=True), identity, file, {})


def write_scores(file: Path, scores: Mapping[str, Any]) -> None:
    replace_file(file, json.dumps(scores, indent=2) + "\n")


def write_all_scores(output: Path, scored: Mapping[str, Scored | None]) -> dict[str, Any]:
    """Write each folder's ``scores.json`` once. The greedy one includes the others' scores.

    Args:
        output: the folder of the greedy predictions.
        scored: by name; None if decoding was not completed.

    Returns:
        The content of the greedy one or, if only samples were asked for, of theirs; empty if that
        decoding was not completed.
    """
    scores: dict[str, Any] = {}
    if greedy := scored.get(GREEDY):
        scores = greedy.content | additional_scores(greedy, output, scored)
        write_scores(output / SCORES_FILE, scores)
    for name in (CALCULATOR, SAMPLES):
        if one := scored.get(name):
            write_scores(output / name / SCORES_FILE, one.content)
            if GREEDY not in scored:
                scores = one.content
    return scores
