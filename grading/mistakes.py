"""Analyses the predictions: kinds of mistakes, disagreements of the rules, hard problems."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grading.rules import Verdict, grade_row

LABELS = ("arithmetic", "reasoning", "format", "cut")
MOST_STEPS = 8  # problems with this many steps or more are counted together, as "8+"
WORD_BOUNDARIES = (30, 45, 60)  # between the classes of question lengths


def analyse(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of labels, ids on which the rules disagree, and accuracy by kind of problem.

    Args:
        predictions: complete rows, with ``stop``, ``steps`` and ``question`` where known.

    Returns:
        ``errors``: label to count, with None for ``cut`` if no row has a ``stop``;
        ``rules_disagree``: ids; ``by_steps`` and ``by_question_words``: kind of problem to
        ``num_correct`` and ``num_problems``.
    """
    graded = [(row, grade_row(row)) for row in predictions]
    labels = Counter(verdict.label for _, verdict in graded)
    errors: dict[str, int | None] = {label: labels[label] for label in LABELS}
    if not any("stop" in row for row in predictions):
        errors["cut"] = None
    disagree = {row["id"] for row, verdict in graded if len(set(verdict.by_rule.values())) > 1}
    by_steps = [
        (_steps_class(row["steps"]), verdict)
        for row, verdict in graded
        if type(row.get("steps")) is int and row["steps"] >= 0
    ]
    by_words = [
        (_length_class(len(row["question"].split())), verdict)
        for row, verdict in graded
        if isinstance(row.get("question"), str)
    ]
    return {
        "errors": errors,
        "rules_disagree": sorted(disagree),
        "by_steps": _accuracy(by_steps),
        "by_question_words": _accuracy(by_words),
    }


def _steps_class(steps: int) -> str:
    """``0``, ``1``, ..., ``7`` or ``8+`` steps."""
    return str(steps) if steps < MOST_STEPS else f"{MOST_STEPS}+"


def _length_class(words: int) -> str:
    """``1-30``, ``31-45``, ``46-60`` or ``61+`` words."""
    low = 1
    for high in WORD_BOUNDARIES:
        if words <= high:
            return f"{low}-{high}"
        low = high + 1
    return f"{low}+"


def _accuracy(graded: Iterable[tuple[str, Verdict]]) -> dict[str, dict[str, int]]:
    """The counts of each kind of problem, ordered by the number at the beginning of its name."""
    counts: dict[str, dict[str, int]] = {}
    for kind, verdict in graded:
        count = counts.setdefault(kind, {"num_correct": 0, "num_problems": 0})
        count["num_correct"] += verdict.correct
        count["num_problems"] += 1
    return dict(sorted(counts.items(), key=lambda item: int(re.match("[0-9]+", item[0])[0])))
