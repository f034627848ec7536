"""Scores complete predictions: counts, intervals, majority votes, pass@k."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grading.results import RESUME
from grading.rules import RULES, check_golds, correct_openai, grade_row
from run.errors import UserError, first_few

if TYPE_CHECKING:
    from grading.dataset import Problem


def wilson_interval(num_correct: int, num_problems: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, as two fractions (Wilson, JASA 22, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(num_correct, num_problems).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def score(
    predictions: Sequence[Mapping[str, Any]],
    num_problems: int,
    source: str,
    can_resume: bool = True,
) -> dict[str, Any]:
    """Score one completion per problem by every rule.

    Args:
        predictions: rows with ``id``, ``gold``, ``completion`` and, if known, ``stop``, in any
            order.
        num_problems: how many were asked. The ids must be 0 .. num_problems - 1.
        source: the name of the predictions in error messages.
        can_resume: whether ``evaluate.py`` would resume these and add missing ones.

    Returns:
        The content of ``scores.json``. ``stopped_by_length`` is None if no row has a ``stop``, and
        ``stop_unknown`` counts the rows without one if only some have it.

    Raises:
        UserError: an id is missing, duplicated or unknown, or a gold answer is not a number.
            Raising beats reporting a wrong score.
    """
    _check_complete([row["id"] for row in predictions], num_problems, source, can_resume)
    check_golds(predictions, source)
    verdicts = [grade_row(row) for row in predictions]
    num_correct = sum(verdict.correct for verdict in verdicts)
    return {
        "exact_match": num_correct / num_problems,
        "num_correct": num_correct,
        "num_problems": num_problems,
        "ci95": list(wilson_interval(num_correct, num_problems)),
        "rules": {
            name: sum(verdict.by_rule[name] for verdict in verdicts) / num_problems
            for name in RULES
        },
        **_count_stops(predictions),
    }


def share_correct(completions: Sequence[str], problems: "Sequence[Problem]") -> float:
    """The share of ``problems`` that their ``completions`` answer, by OpenAI's rule."""
    pairs = zip(completions, problems, strict=True)
    return sum(correct_openai(text, problem.gold) for text, problem in pairs) / len(problems)


def _count_stops(predictions: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    stops = [row["stop"] for row in predictions if "stop" in row]
    counts = {"stopped_by_length": stops.count("length") if stops else None}
    if len(stops) < len(predictions):
        counts["stop_unknown"] = len(predictions) - len(stops)
    return counts


def score_samples(
    samples: Sequence[Mapping[str, Any]],
    num_problems: int,
    num_samples: int | None,
    source: str,
    can_resume: bool = True,
) -> dict[str, Any]:
    """Score several completions per problem by the headline rule.

    Args:
        samples: rows as in `score`, each with its number from 0 as ``sample``.
        num_samples: how many each problem must have; None: as many as the first problem has.

    Returns:
        ``num_problems`` and ``num_samples``; ``exact_match`` over all samples; ``maj_at``: for
        k = 1, 2, 4, ... and ``num_samples``, the share of problems that `majority_vote` of the
        first k samples gets right; ``ci95``: the interval of the last of these; ``pass_at``: for
        the same k, the mean of `pass_at`; ``num_tokens`` of all samples, if each says its own.

    Raises:
        UserError: a sample is missing, duplicated or unknown, or a gold answer is not a number.
    """
    by_problem: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in samples:
        by_problem.setdefault(row["id"], {})[row.get("sample", 0)] = row
    num_samples = num_samples or len(next(iter(by_problem.values()), ()))
    uneven = sorted(
        problem for problem, rows in by_problem.items() if sorted(rows) != list(range(num_samples))
    )
    if uneven or len(samples) != num_samples * len(by_problem):
        raise UserError(
            f"{source}: every problem must have exactly one of each sample 0 to {num_samples - 1} "
            f"(violated by {first_few(uneven) or 'a duplicate'}): "
            + (RESUME if can_resume else "remove or add rows until it has")
        )
    _check_complete(list(by_problem), num_problems, source, can_resume)
    check_golds(samples, source)
    counts = sorted({*(2**power for power in range(num_samples.bit_length())), num_samples})
    voted, passed, total = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0.0), 0
    for rows in by_problem.values():
        verdicts = [grade_row(rows[sample]) for sample in range(num_samples)]
        answers = [verdict.answer for verdict in verdicts]
        right = {verdict.answer for verdict in verdicts if verdict.correct}
        num_correct = sum(verdict.correct for verdict in verdicts)
        total += num_correct
        for k in counts:
            voted[k] += majority_vote(answers[:k]) in right
            passed[k] += pass_at(k, num_samples, num_correct)
    return {
        "num_problems": num_problems,
        "num_samples": num_samples,
        "exact_match": total / (num_problems * num_samples),
        "maj_at": {str(k): count / num_problems for k, count in voted.items()},
        "ci95": list(wilson_interval(voted[num_samples], num_problems)),
        "pass_at": {str(k): share / num_problems for k, share in passed.items()},
        **_count_tokens(samples),
    }


def _count_tokens(samples: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts = [row.get("num_tokens") for row in samples]
    return {"num_tokens": sum(counts)} if all(type(count) is int for count in counts) else {}


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, or in a tie the first one. None is not a vote.

    Self-consistency, arXiv:2203.11171.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    # Counter and max both keep the order of first appearance.
    return max(votes, key=lambda answer: votes[answer], default=None)


def pass_at(k: int, num_samples: int, num_correct: int) -> float:
    """Unbiased estimate, from ``num_samples``, of the probability that one of ``k`` is right.

    arXiv:2107.03374, equation 1.
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _check_complete(ids: Sequence[int], num_problems: int, source: str, can_resume: bool) -> None:
    """Raises UserError unless ``ids`` contains each of 0 .. num_problems - 1 exactly once."""
    if num_problems < 1:
        raise UserError(f"{source}: contains no problems: name a file with predictions")
    counted = f"{source}: contains {len(ids)} predictions for {num_problems} problems"
    if num_problems > 2 * len(ids) + 1000:  # too many are missing to list them
        raise UserError(f"{counted}: {RESUME if can_resume else 'add the missing ones'}")
    expected = set(range(num_problems))
    unknown = sorted(set(ids) - expected)
    kinds = {
        "duplicate ids": sorted(number for number, count in Counter(ids).items() if count > 1),
        "missing ids": sorted(expected - set(ids)),
        "unknown ids": unknown,
    }
    faults = [f"{kind} {first_few(found)}" for kind, found in kinds.items() if found]
    if not faults:
        return
    if sorted(ids) == list(range(1, num_problems + 1)):
        cure = f"they are 1 to {num_problems}: subtract 1 from each"
    elif can_resume and not unknown:
        cure = RESUME
    else:
        cure = "keep one row of each, numbered from 0"
    raise UserError(
        f"{counted}: {', '.join(faults)}; there must be exactly one of each id from 0: {cure}"
    )
