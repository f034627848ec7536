"""Tests whether two evaluations really differ: McNemar's paired test on their shared problems."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from grading.results import (
    IDENTITY_FILE,
    PREDICTIONS_FILE,
    RESUME,
    read_predictions,
    read_scores,
)
from grading.rules import check_golds, grade_row, report_contradictions, visible
from run.errors import UserError, first_few

NORMAL_QUANTILE = NormalDist().inv_cdf(0.975)


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
        interval: the 95 % interval of the difference, Tango's (Statistics in Medicine 17, 1998).
            It excludes zero if and only if the p-value is below 0.05.
    """

    num_problems: int
    num_correct: tuple[int, int]
    lost: list[int]
    won: list[int]
    p_value: float
    difference: float
    interval: tuple[float, float]


def compare_files(first: Path, second: Path) -> Comparison:
    """Compare two ``predictions.jsonl``.

    Raises:
        UserError: as `compare`; also if one contains samples, or is of an unfinished evaluation.
    """
    rows = [read_predictions(file) for file in (first, second)]
    for file, its_rows in zip((first, second), rows, strict=True):
        _check_finished(file, len(its_rows))
        if any(row.get("sample") for row in its_rows):
            raise UserError(
                f"{file}: contains several samples of each problem: compare greedy predictions"
            )
        check_golds(its_rows, str(file))
        report_contradictions(its_rows, file)
    return compare(*rows, (str(first), str(second)))


def _check_finished(file: Path, found: int) -> None:
    """Raises UserError if more predictions were asked for than the ``found`` ones.

    What is finished first is no fair selection: endless completions are finished last.
    """
    if file.name != PREDICTIONS_FILE:  # next to it are records of other predictions
        return
    asked = read_scores(file.with_name(IDENTITY_FILE)).get("num_problems", 0)
    if found < asked:
        raise UserError(f"{file}: contains {found} predictions for {asked} problems: {RESUME}")


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
    p_value = _mcnemar(len(lost), len(won))
    return Comparison(
        num_problems=len(shared),
        num_correct=(len(right_before), len(right_after)),
        lost=lost,
        won=won,
        p_value=p_value,
        difference=(len(won) - len(lost)) / len(shared),
        interval=_interval(len(shared), len(lost), len(won), p_value),
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
        if key == "gold" and one.replace(",", "") == other.replace(",", ""):
            continue  # the same to every rule
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


def _mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value."""
    from scipy.stats import binomtest

    return float(binomtest(won, lost + won, 0.5).pvalue) if lost + won else 1.0


def _interval(total: int, lost: int, won: int, p_value: float) -> tuple[float, float]:
    """Of the difference, as fractions of the ``total`` problems."""
    from scipy.optimize import brentq

    found, edge = (won - lost) / total, 1 - 1e-12

    def beyond(difference: float, quantile: float) -> float:
        return _tangos_score(total, lost, won, difference) - quantile

    low, high = -1.0, 1.0
    if beyond(-edge, NORMAL_QUANTILE) > 0:
        low = brentq(beyond, -edge, found, (NORMAL_QUANTILE,), xtol=1e-9)
    if beyond(edge, -NORMAL_QUANTILE) < 0:
        high = brentq(beyond, found, edge, (-NORMAL_QUANTILE,), xtol=1e-9)
    # The exact test is the stricter one, and decides whether there is a difference at all.
    return (low, high) if p_value < 0.05 else (min(low, 0.0), max(high, 0.0))


def _tangos_score(total: int, lost: int, won: int, difference: float) -> float:
    """Standard normal if ``difference`` is the true one. At zero, its square is McNemar's."""
    half = lost + won - (2 * total - won + lost) * difference
    square = half**2 + 8 * total * lost * difference * (1 - difference)
    lost_share = (math.sqrt(max(square, 0)) + half) / (4 * total)  # likeliest with this difference
    variance = total * (2 * lost_share + difference * (1 - difference))
    surplus = won - lost - total * difference
    if variance <= 0:  # this difference is certain, or impossible
        return math.copysign(math.inf, surplus) if surplus else 0.0
    return surplus / math.sqrt(variance)
