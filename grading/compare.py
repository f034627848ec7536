"""Tests whether two evaluations really differ: McNemar's paired test on their shared problems."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grading.results import read_predictions
from grading.rules import first_few, grade_row, report_contradictions, visible
from run.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the problems that they share.

    Attributes:
        num_problems: how many they share.
        num_correct: how many of these the first and the second evaluation get right.
        lost, won: ids that only the first, or only the second evaluation gets right.
        p_value: of the exact McNemar test (McNemar, Psychometrika 12, 1947), the probability of a
            difference at least this large by chance, if neither is better.
        difference: second minus first, as a fraction of the problems.
        interval: the 95 % interval of the difference, exact given the number of problems won or
            lost. It excludes zero if and only if the p-value is below 0.05 (Clopper and Pearson,
            Biometrika 26, 1934).
    """

    num_problems: int
    num_correct: tuple[int, int]
    lost: list[int]
    won: list[int]
    p_value: float
    difference: float
    interval: tuple[float, float]


def compare_files(first: Path, second: Path) -> Comparison:
    """Compare two ``predictions.jsonl``."""
    rows = [read_predictions(file) for file in (first, second)]
    for file, its_rows in zip((first, second), rows, strict=True):
        report_contradictions(its_rows, file)
    return compare(*rows, (str(first), str(second)))


def compare(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], names: tuple[str, str]
) -> Comparison:
    """Compare two evaluations by the headline rule.

    Raises:
        UserError: an id is duplicated or belongs to different problems, or the evaluations have no
            problem in common.
    """
    ours, theirs = _by_id(first, names[0]), _by_id(second, names[1])
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise UserError(
            f"{names[0]} and {names[1]}: have no problem in common: "
            "compare evaluations of the same split"
        )
    for number in shared:
        _check_same_problem(ours[number], theirs[number], names)
    right_before = {number for number in shared if grade_row(ours[number]).correct}
    right_after = {number for number in shared if grade_row(theirs[number]).correct}
    lost, won = sorted(right_before - right_after), sorted(right_after - right_before)
    p_value, low, high = _mcnemar(len(lost), len(won))
    return Comparison(
        num_problems=len(shared),
        num_correct=(len(right_before), len(right_after)),
        lost=lost,
        won=won,
        p_value=p_value,
        difference=(len(won) - len(lost)) / len(shared),
        interval=(low / len(shared), high / len(shared)),
    )


def gain(greedy: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The problems that ``other`` predictions win and lose against greedy ones, for scores.json."""
    comparison = compare(greedy, other, ("the greedy predictions", "the others"))
    return {"won": comparison.won, "lost": comparison.lost, "p_value": comparison.p_value}


def _by_id(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, Mapping[str, Any]]:
    by_id = {row["id"]: row for row in rows}
    if len(by_id) < len(rows):
        counts = Counter(row["id"] for row in rows)
        duplicates = [number for number, count in counts.items() if count > 1]
        raise UserError(
            f"{name}: duplicate ids {first_few(duplicates)}: there must be one prediction per "
            "problem; evaluate again"
        )
    return by_id


def _check_same_problem(
    first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]
) -> None:
    for key in ("gold", "question"):
        one, other = first.get(key), second.get(key)
        if one != other and None not in (one, other):
            raise UserError(
                f"{names[0]} and {names[1]}: id {first['id']} has the {key} "
                f"{_around_difference(one, other)} in one and {_around_difference(other, one)} in "
                "the other: compare evaluations of the same rows"
            )


def _around_difference(one: object, other: object) -> str:
    """An excerpt of ``one`` around its first difference from ``other``."""
    text, pairs = str(one), zip(str(one), str(other), strict=False)
    start = next((place for place, (here, there) in enumerate(pairs) if here != there), len(text))
    return visible(text[max(0, start - 20) :][:60])


def _mcnemar(lost: int, won: int) -> tuple[float, float, float]:
    """The exact two-sided p-value, and the 95 % interval of ``won - lost``, given their sum."""
    from scipy.stats import binomtest

    changed = lost + won
    if not changed:
        return 1.0, 0.0, 0.0
    test = binomtest(won, changed, 0.5)
    share = test.proportion_ci(0.95, method="exact")
    return (
        float(test.pvalue),
        (2 * float(share.low) - 1) * changed,
        (2 * float(share.high) - 1) * changed,
    )
