"""What a score does not say: what went wrong, where the rules part, and whether two runs really differ."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from grading.arithmetic import NUMBER, evaluate, first_false_equation
from grading.rules import (
    RULES,
    correct_lm_eval_flexible,
    correct_openai,
    cut_at_stop,
    extract_openai,
)

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
        well_meant = correct_lm_eval_flexible(completion, gold) or (
            bool(numbers) and _equal(numbers[-1], gold)
        )
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
    labels = Counter(
        mistake(row["completion"], row["gold"], row.get("stop"))[0] for row in predictions
    )
    verdicts = {
        row["id"]: {rule(row["completion"], row["gold"]) for rule in RULES.values()}
        for row in predictions
    }
    stepped = [
        (row["steps"], row)
        for row in predictions
        if type(row.get("steps")) is int and row["steps"] >= 0
    ]
    worded = [
        (len(row["question"].split()), row)
        for row in predictions
        if isinstance(row.get("question"), str)
    ]
    unknown = {} if any("stop" in row for row in predictions) else {"cut": None}
    return {
        "errors": {label: labels[label] for label in LABELS} | unknown,
        "rules_disagree": sorted(
            identity for identity, verdict in verdicts.items() if len(verdict) > 1
        ),
        "by_steps": _accuracy(
            (f"{min(steps, 8)}" + "+" * (steps >= 8), row) for steps, row in stepped
        ),
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
