"""What a set of graded completions is worth."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from grading.rules import RULES, check_gold, extract_openai, some
from run.errors import UserError

GO_ON = "run evaluate.py again, it goes on where it stopped"


def wilson_interval(num_correct: int, num_problems: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, as two fractions (Wilson, JASA 22, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(num_correct, num_problems).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def score(
    predictions: Sequence[dict[str, Any]], num_problems: int, source: str, can_go_on: bool = True
) -> dict[str, Any]:
    """Score one completion a problem by every rule.

    Args:
        predictions: objects with ``id``, ``gold``, ``completion`` and, where it is known, ``stop``, in any order.
        num_problems: how many problems were asked; the ids must be 0 .. num_problems - 1.
        source: what an error message calls the predictions.
        can_go_on: whether they are such as ``evaluate.py`` goes on with, and adds what is missing to.

    Returns:
        The content of ``scores.json``; in it ``stopped_by_length`` is None where no prediction says why it
        stopped, and ``stop_unknown`` how many don't, where some don't.

    Raises:
        UserError: an id is missing, double or foreign, or a gold is no number: no score is
            better than a wrong one.
    """
    _check_complete(
        [prediction["id"] for prediction in predictions], num_problems, source, can_go_on
    )
    _check_golds(predictions, source)
    verdicts = {
        name: [rule(prediction["completion"], prediction["gold"]) for prediction in predictions]
        for name, rule in RULES.items()
    }
    num_correct = sum(verdicts["openai"])
    return {
        "exact_match": num_correct / num_problems,
        "num_correct": num_correct,
        "num_problems": num_problems,
        "ci95": list(wilson_interval(num_correct, num_problems)),
        "rules": {name: sum(verdict) / num_problems for name, verdict in verdicts.items()},
        **_count_cut(predictions),
    }


def _count_cut(predictions: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    stops = [prediction["stop"] for prediction in predictions if "stop" in prediction]
    unknown = len(predictions) - len(stops)
    return {"stopped_by_length": stops.count("length") if stops else None} | (
        {"stop_unknown": unknown} if unknown else {}
    )


def score_samples(
    samples: Sequence[dict[str, Any]],
    num_problems: int,
    num_samples: int | None,
    source: str,
    can_go_on: bool = True,
) -> dict[str, Any]:
    """Score several completions a problem, by the headline rule.

    Args:
        samples: as in `score`, each with ``sample``, its number from 0.
        num_samples: how many there must be of each problem; None: as many as the first has.

    Returns:
        ``num_problems``, ``num_samples``; ``exact_match``, of all samples; ``maj_at``, for k = 1, 2,
        4, ... and ``num_samples`` the share of problems that `majority_vote` of the first k gets
        right; ``ci95`` of the last of these; ``pass_at``, for the same k the mean of `pass_at`.

    Raises:
        UserError: a sample is missing, double or foreign, or a gold is no number.
    """
    by_problem: dict[int, dict[int, dict[str, Any]]] = {}
    for row in samples:
        by_problem.setdefault(row["id"], {})[row.get("sample", 0)] = row
    num_samples = num_samples or len(next(iter(by_problem.values()), ()))
    uneven = sorted(
        index for index, drawn in by_problem.items() if sorted(drawn) != list(range(num_samples))
    )
    if uneven or len(samples) != num_samples * len(by_problem):
        raise UserError(
            f"{source}: there must be exactly one of each sample 0 to {num_samples - 1} a problem (not so in "
            f"{some(uneven) or 'some'}): {GO_ON if can_go_on else 'leave or add rows until there is'}"
        )
    _check_complete(list(by_problem), num_problems, source, can_go_on)
    _check_golds(samples, source)
    counts = sorted({*(2**power for power in range(num_samples.bit_length())), num_samples})
    voted, passed, total = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0.0), 0
    for drawn in by_problem.values():
        answers = [extract_openai(drawn[sample]["completion"]) for sample in range(num_samples)]
        gold = drawn[0]["gold"].replace(",", "")
        total += (num_correct := answers.count(gold))
        for k in counts:
            voted[k] += majority_vote(answers[:k]) == gold
            passed[k] += pass_at(k, num_samples, num_correct)
    return {
        "num_problems": num_problems,
        "num_samples": num_samples,
        "exact_match": total / (num_problems * num_samples),
        "maj_at": {str(k): count / num_problems for k, count in voted.items()},
        "ci95": list(wilson_interval(voted[num_samples], num_problems)),
        "pass_at": {str(k): share / num_problems for k, share in passed.items()},
    }


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; of equally frequent ones the one that came first. No answer is no vote.

    Self-consistency, arXiv:2203.11171.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(
        votes, key=lambda answer: votes[answer], default=None
    )  # Counter and max keep the order


def pass_at(k: int, num_samples: int, num_correct: int) -> float:
    """The unbiased estimate that one of ``k`` samples is right, from ``num_samples`` (arXiv:2107.03374, equation 1)."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _check_golds(predictions: Sequence[dict[str, Any]], source: str) -> None:
    for prediction in predictions:
        try:
            check_gold(prediction["gold"])
        except ValueError as error:
            raise UserError(
                f"{source}: problem {prediction['id']}: {error}; restore the data set's number, or evaluate again"
            ) from None


def _check_complete(ids: Sequence[int], num_problems: int, source: str, can_go_on: bool) -> None:
    held = f"{source}: holds {len(ids)} predictions for {num_problems} problems"
    if num_problems > 2 * len(ids) + 1000:  # no use in listing them all
        raise UserError(f"{held}: {GO_ON if can_go_on else 'add those that are missing'}")
    double = sorted(identity for identity, count in Counter(ids).items() if count > 1)
    missing = sorted(set(range(num_problems)) - set(ids))
    foreign = sorted(set(ids) - set(range(num_problems)))
    faults = [
        f"{what} {some(which)}"
        for what, which in (
            ("double ids", double),
            ("missing ids", missing),
            ("unknown ids", foreign),
        )
        if which
    ]
    if num_problems < 1:
        faults = ["no problems"]
    if faults:
        cure = (
            GO_ON
            if can_go_on and not foreign
            else "leave one row of each, and number them from 0 on"
        )
        if sorted(ids) == list(range(1, num_problems + 1)):
            cure = f"they are 1 to {num_problems}: take 1 from each"
        raise UserError(
            f"{held}: {', '.join(faults)}; there must be exactly one each with ids from 0: {cure}"
        )
