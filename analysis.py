"""What a score does not say: what went wrong, where the rules part, and whether two runs really differ."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from calculator import NUMBER, evaluate, first_false_equation
from errors import UserError, one_line
from scoring import RULES, correct_lm_eval_flexible, correct_openai, cut_at_stop, extract_openai, some, visible

LABELS = ("arithmetic", "reasoning", "format", "cut")
WORDS = (30, 45, 60)  # borders between lengths of questions
_NUMBER = re.compile(f"-?{NUMBER}")


def mistake(completion: str, gold: str, stop: str | None) -> tuple[str | None, str | None]:
    """What is wrong with a completion, and the first false equation in it.

    Args:
        stop: why it stopped; None where that is not known: then it has another label than ``cut``.

    Returns:
        ``(None, None)`` where the headline rule finds the gold; else a label and an equation or None:

        - ``cut``: stopped by length;
        - ``format``: the headline rule finds no number, or the gold in another spelling (``18.0``),
          but the flexible rule or the last number is right;
        - ``arithmetic``: an annotation or an ``a op b = c`` is false;
        - ``reasoning``: none is, and the result is wrong.
    """
    if correct_openai(completion, gold):
        return None, None
    text = cut_at_stop(completion)  # what follows is another question, not this answer
    false = first_false_equation(text)
    if stop == "length":
        return "cut", false
    found, numbers = extract_openai(completion), _NUMBER.findall(text)
    if found is None:
        well_meant = correct_lm_eval_flexible(completion, gold) or (bool(numbers) and _equal(numbers[-1], gold))
    else:
        well_meant = _equal(found.rstrip("."), gold)
    if well_meant:
        return "format", false
    return ("arithmetic", false) if false else ("reasoning", None)


def _equal(number: str, gold: str) -> bool:
    value = evaluate(number)
    return value is not None and value == evaluate(gold)


def count_steps(answer: str) -> int:
    """How many steps of reasoning a data set's answer has: its lines before the last, without empty ones."""
    return sum(bool(line.strip()) for line in answer.rstrip().split("\n")[:-1])


def analyse(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of labels, ids on which the rules part, and accuracy by kinds of problems.

    Args:
        predictions: scored rows, with ``stop``, ``steps`` and ``question`` where they are known.

    Returns:
        ``errors``: label to count, of ``cut`` None where no row has a ``stop``; ``rules_disagree``: ids;
        ``by_steps`` and ``by_question_words``: kind of problem to ``num_correct`` and ``num_problems``.
    """
    labels = Counter(mistake(row["completion"], row["gold"], row.get("stop"))[0] for row in predictions)
    verdicts = {row["id"]: {rule(row["completion"], row["gold"]) for rule in RULES.values()} for row in predictions}
    stepped = [(row["steps"], row) for row in predictions if type(row.get("steps")) is int and row["steps"] >= 0]
    worded = [(len(row["question"].split()), row) for row in predictions if isinstance(row.get("question"), str)]
    unknown = {} if any("stop" in row for row in predictions) else {"cut": None}
    return {
        "errors": {label: labels[label] for label in LABELS} | unknown,
        "rules_disagree": sorted(identity for identity, verdict in verdicts.items() if len(verdict) > 1),
        "by_steps": _accuracy((f"{min(steps, 8)}" + "+" * (steps >= 8), row) for steps, row in stepped),
        "by_question_words": _accuracy((_length_class(words), row) for words, row in worded),
    }


def _length_class(words: int) -> str:
    """``1-30``, ``31-45``, ``46-60`` or ``61+`` words."""
    low = 1
    for high in WORDS:
        if words <= high:
            return f"{low}-{high}"
        low = high + 1
    return f"{low}+"


def _accuracy(kinds: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for kind, row in kinds:
        count = counts.setdefault(kind, {"num_correct": 0, "num_problems": 0})
        count["num_correct"] += correct_openai(row["completion"], row["gold"])
        count["num_problems"] += 1
    return dict(sorted(counts.items(), key=lambda item: int(re.match("[0-9]+", item[0])[0])))


def analysis_table(analysis: dict[str, Any]) -> str:
    """`analyse`'s result as a few lines of text for people."""
    counts = analysis["errors"].items()
    errors = ", ".join(f"{label} {'not known' if count is None else count}" for label, count in counts)
    disagree = analysis["rules_disagree"]
    lines = [f"  wrong, by kind           {errors}", f"  rules disagree           {len(disagree):>8}"]
    if disagree:
        lines[-1] += f"   ids {some(disagree)}"
    for name, title in (("by_steps", "by steps of the gold"), ("by_question_words", "by words of question")):
        if counts := analysis[name]:
            shares = ", ".join(f"{kind}: {c['num_correct'] / c['num_problems']:.0%}" for kind, c in counts.items())
            lines.append(f"  {title:<25}{shares}")
    return "\n".join(lines)


# ---------------------------------------------------------------- two runs


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


def compare(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], names: tuple[str, str]) -> Comparison:
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
        raise UserError(f"{names[0]} and {names[1]}: have no problem in common: compare evaluations of the same split")
    right = tuple([correct_openai(rows[i]["completion"], rows[i]["gold"]) for i in common] for rows in by_id)
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
        double = [identity for identity, count in Counter(row["id"] for row in rows).items() if count > 1]
        raise UserError(f"{name}: double ids {some(double)}: there must be one prediction a problem; evaluate again")
    return by_id


def _mcnemar(lost: int, won: int) -> tuple[float, float, float]:
    """The exact two-sided p-value, and the 95 % interval of ``won - lost`` given their sum."""
    from scipy.stats import binomtest

    changed = lost + won
    if not changed:
        return 1.0, 0.0, 0.0
    test = binomtest(won, changed, 0.5)
    share = test.proportion_ci(0.95, method="exact")
    return float(test.pvalue), (2 * float(share.low) - 1) * changed, (2 * float(share.high) - 1) * changed


def comparison_table(result: Comparison, names: tuple[str, str]) -> str:
    """A `Comparison` as a few lines of text for people."""
    total = result.num_problems
    low, high = result.interval
    lines = [f"on the {total} problems in common:"]
    for name, num_correct in zip(names, result.num_correct, strict=True):
        lines.append(f"  {num_correct / total:8.2%}   {num_correct} of {total}   {one_line(name)}")
    lines += [
        f"  difference (second less first)   {result.difference:+.2%}",
        f"  95 % interval                    {low:+.2%} to {high:+.2%}",
        f"  exact paired p-value (McNemar)   {result.p_value:.4g}",
        f"  won {len(result.won)}" + (f": ids {some(result.won)}" if result.won else ""),
        f"  lost {len(result.lost)}" + (f": ids {some(result.lost)}" if result.lost else ""),
    ]
    return "\n".join(lines)


def gain(greedy: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``other`` predictions of the same problems win and lose against ``greedy``, for ``scores.json``."""
    found = compare(greedy, other, ("the greedy predictions", "the others"))
    return {"won": found.won, "lost": found.lost, "p_value": found.p_value}


def gain_line(scores: dict[str, Any]) -> str:
    """The score with the calculator beside the one without, for people."""
    counts = f"{scores['num_correct']} of {scores['num_problems']}"
    return (
        f"  with the calculator      {scores['exact_match']:8.2%}   {counts}, "
        f"won {len(scores['won'])}, lost {len(scores['lost'])}, p = {scores['p_value']:.3g}"
    )
