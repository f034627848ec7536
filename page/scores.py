"""The scores of a page, each with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grading.mistakes import analyse
from grading.rules import RULES, grade_row
from grading.score import wilson_interval

RULE_NAMES = {
    "openai": ("OpenAI", "the headline: the first #### NUMBER"),
    "lm_eval_strict": ("lm-eval strict-match", "the first #### NUMBER, before another question"),
    "lm_eval_flexible": ("lm-eval flexible-extract", "the last number, in whatever form"),
}
MISTAKES = {
    "arithmetic": "an equation is false",
    "reasoning": "all arithmetic is right, but not the result",
    "format": "the number is right, in a form that the headline rule does not accept",
    "cut": "stopped at max_new_tokens",
}


@dataclass(frozen=True)
class Share:
    """How many of some problems are right.

    Attributes:
        title, meaning: of these problems, or of the rule by which they are right.
    """

    title: str
    meaning: str
    num_correct: int
    num_problems: int

    @property
    def value(self) -> float:
        return self.num_correct / self.num_problems

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson_interval(self.num_correct, self.num_problems)


@dataclass(frozen=True)
class Samples:
    """The scores of several samples of each problem.

    Attributes:
        by_k: k, maj@k and pass@k, for each k that was scored.
        how: in which ways they were drawn, such as ``at temperature 0.7``.
        interval: the 95 % interval of maj@k for the last k; None if unknown.
    """

    by_k: list[tuple[str, float, float]]
    how: list[str]
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Scores:
    """The scores of an evaluation.

    Attributes:
        rules: by each rule, the headline first.
        mistakes: label, meaning and count; the count is None where no row has a ``stop``.
        by_steps, by_words: the accuracy by steps of the gold answer, and by words of the question.
        disagree: on how many problems the rules disagree.
        calculator: its exact match, how many problems it won and lost, and the p-value; or None.
        samples: None if there are none.
    """

    rules: list[Share]
    mistakes: list[tuple[str, str, int | None]]
    by_steps: list[Share]
    by_words: list[Share]
    disagree: int
    calculator: tuple[float, int, int, float] | None
    samples: Samples | None

    @property
    def headline(self) -> Share:
        return self.rules[0]


def scores_of(rows: Sequence[Mapping[str, Any]], recorded: Mapping[str, Any]) -> Scores:
    """Score ``rows``, which need not be all that were asked.

    Args:
        recorded: the content of ``scores.json``, for what is not in the rows. It may be of greedy
            predictions, with the scores of samples in it, or of samples alone.
    """
    verdicts = [grade_row(row) for row in rows]
    analysis = analyse(rows)
    return Scores(
        rules=[
            Share(*RULE_NAMES[name], sum(verdict.by_rule[name] for verdict in verdicts), len(rows))
            for name in RULES
        ],
        mistakes=[(name, MISTAKES[name], count) for name, count in analysis["errors"].items()],
        by_steps=_shares(analysis["by_steps"]),
        by_words=_shares(analysis["by_question_words"]),
        disagree=len(analysis["rules_disagree"]),
        calculator=_calculator(recorded),
        samples=_samples(recorded if "maj_at" in recorded else recorded.get("samples")),
    )


def _calculator(recorded: Mapping[str, Any]) -> tuple[float, int, int, float] | None:
    """What ``scores.json`` says of decoding with the calculator; None if it is not all there."""
    try:
        found = recorded["calculator"]
        changed = len(found["won"]), len(found["lost"])
        return float(found["exact_match"]), *changed, float(found["p_value"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _samples(drawn: Any) -> Samples | None:
    """What the scores ``drawn`` say of samples; None if the shares are not all there."""
    try:
        voted, passed = drawn["maj_at"], drawn["pass_at"]
        by_k = [(str(k), float(share), float(passed[k])) for k, share in voted.items()]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    how = [f"at temperature {drawn['temperature']}"] if "temperature" in drawn else []
    if drawn.get("with_calculator") is True:
        how.append("drawn with the calculator")
    try:
        low, high = map(float, drawn["ci95"])
        interval = low, high
    except (KeyError, TypeError, ValueError, OverflowError):
        interval = None
    return Samples(by_k, how, interval) if by_k else None


def _shares(counts: Mapping[str, Mapping[str, int]]) -> list[Share]:
    return [
        Share(kind, "", count["num_correct"], count["num_problems"])
        for kind, count in counts.items()
    ]
