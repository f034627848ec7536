"""Do two evaluations really differ?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grading.rules import correct_openai, some, visible
from run.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the problems that they share.

    Attributes:
        num_problems: how many these are.
        num_correct: of the first, and of the second.
        lost, won: ids that only the first, and only the second has right.
        p_value: of the exact McNemar test (McNemar, Psychometrika 12, 1947): how often a difference
            at least as large comes up by chance, where neither is better.
        difference: second less first, as a fraction of the problems.
        interval: 95 % of it, exact given how many problems were won or lost: it leaves out zero where
            the p-value is below 0.05 (Clopper and Pearson, Biometrika 26, 1934).
    """

    num_problems: int
    num_correct: tuple[int, int]
    lost: list[int]
    won: list[int]
    p_value: float
    difference: float
    interval: tuple[float, float]


def compare(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], names: tuple[str, str]
) -> Comparison:
    """Compare by the headline rule.

    Raises:
        UserError: a double id, an id that stands for different problems, or no problem in common.
    """
    by_id = tuple(_by_id(rows, name) for rows, name in zip((first, second), names, strict=True))
    common = sorted(by_id[0].keys() & by_id[1].keys())
    for identity in common:
        for key in ("gold", "question"):
            one, other = (rows[identity].get(key) for rows in by_id)
            if one != other and None not in (one, other):
                raise UserError(
                    f"{names[0]} and {names[1]}: id {identity} has the {key} {_parting(one, other)} in one and "
                    f"{_parting(other, one)} in the other: compare evaluations of the same rows"
                )
    if not common:
        raise UserError(
            f"{names[0]} and {names[1]}: have no problem in common: compare evaluations of the same split"
        )
    right = tuple(
        [correct_openai(rows[i]["completion"], rows[i]["gold"]) for i in common] for rows in by_id
    )
    pairs = list(zip(common, *right, strict=True))
    lost = [identity for identity, one, other in pairs if one and not other]
    won = [identity for identity, one, other in pairs if other and not one]
    p_value, low, high = _mcnemar(len(lost), len(won))
    return Comparison(
        num_problems=len(common),
        num_correct=(sum(right[0]), sum(right[1])),
        lost=lost,
        won=won,
        p_value=p_value,
        difference=(len(won) - len(lost)) / len(common),
        interval=(low / len(common), high / len(common)),
    )


def _parting(one: object, other: object) -> str:
    """``one`` from shortly before where it parts from ``other``: such that the difference can be seen."""
    text, pairs = str(one), zip(str(one), str(other), strict=False)
    same = next((place for place, (here, there) in enumerate(pairs) if here != there), len(text))
    return visible(text[max(0, same - 20) :][:60])


def _by_id(rows: Sequence[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    by_id = {row["id"]: row for row in rows}
    if len(by_id) < len(rows):
        double = [
            identity for identity, count in Counter(row["id"] for row in rows).items() if count > 1
        ]
        raise UserError(
            f"{name}: double ids {some(double)}: there must be one prediction a problem; evaluate again"
        )
    return by_id


def _mcnemar(lost: int, won: int) -> tuple[float, float, float]:
    """The exact two-sided p-value, and the 95 % interval of ``won - lost`` given their sum."""
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


def gain(greedy: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``other`` predictions of the same problems win and lose against ``greedy``, for ``scores.json``."""
    found = compare(greedy, other, ("the greedy predictions", "the others"))
    return {"won": found.won, "lost": found.lost, "p_value": found.p_value}
