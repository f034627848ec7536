"""From a completion to a verdict: the published rules for GSM8K, and what a score is worth.

The headline is OpenAI's rule; beside it, always, stand both filters of EleutherAI's
lm-evaluation-harness. They are reproduced to the letter, faults included, so that a score
can be compared with the literature.

Sources: `grade_school_math/dataset.py` of github.com/openai/grade-school-math and
`lm_eval/tasks/gsm8k/gsm8k.yaml`, `lm_eval/filters/extraction.py`, `lm_eval/api/metrics.py`
of github.com/EleutherAI/lm-evaluation-harness.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from errors import UserError, one_line

OPENAI_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
LM_EVAL_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LM_EVAL_STOPS = ("Question:", "</s>", "<|im_end|>")
LM_EVAL_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
GO_ON = "run evaluate.py again, it goes on where it stopped"
GOLD = re.compile(r"-?([0-9][0-9,]*)?(\.[0-9]+)?")


def gold_answer(answer: str) -> str:
    """The number after ``####`` on the last line of a data set's answer, as it is written there.

    Raises:
        ValueError: there is no such number, or more than one ``####``; shows what is there and says what is
            wrong with it. Without this check "no answer" would equal "no gold", and garbage would score 96 %.
    """
    before, mark, after = answer.rpartition("####")
    what = _wrong_around_mark(before, mark, after.rstrip())
    number = after.rstrip()[1:]
    try:
        if not what:
            check_gold(number)
            return number
    except ValueError as error:
        what = str(error)
    shown = visible(answer[max(0, len(before) - 20) :][:60] if mark else answer[-60:])
    raise ValueError(f"{shown} must end in a line '#### NUMBER', its only '####', but {what}")


def _wrong_around_mark(before: str, mark: str, after: str) -> str | None:
    """What is wrong before and after the last ``####`` of an answer, its number aside; None where nothing is."""
    line_before, (line, _, more) = before.rpartition("\n")[2], after.partition("\n")
    if not mark:
        return "holds none"
    if mark in before:
        return f"holds it {before.count(mark) + 1} times"
    if line_before:
        return f"{visible(line_before[-20:])} stands before it on its line"
    if not line.strip():
        return "no number follows it on its line"
    if more:
        return f"{visible(more.strip()[:20])} stands after its line"
    if line[0] != " " or line[1].isspace():
        gap = line[: len(line) - len(line.lstrip())] or line[0]
        return f"{visible(gap[:20])} stands where one space must separate it from the number"
    return None


def check_gold(number: object) -> None:
    """Raises ValueError unless ``number`` is a text such as ``-1,450,000`` or ``0.5``."""
    if isinstance(number, str) and GOLD.fullmatch(number) and any(map(str.isdecimal, number)):
        return
    foreign = re.search("[^0-9.,-]", number) if isinstance(number, str) else None
    held = f" (it holds {visible(foreign[0])}{_name_of(foreign[0])})" if foreign else ""
    shown = visible(number[:60]) if isinstance(number, str) else repr(number)
    raise ValueError(f"the gold {shown} is no number such as 18, -3, 1,450,000 or 0.5{held}")


def visible(text: str) -> str:
    """``text`` in quotes, each of its characters to be seen: by itself if it is ASCII, else as an escape sequence.

    A space beside another one is such a sequence too: in the one line of an error two would look like one.
    """
    return re.sub("  +", lambda spaces: r"\x20" * len(spaces[0]), ascii(text))


def _name_of(letter: str) -> str:
    name = unicodedata.name(letter, "")
    return f", {name}" if name and not letter.isascii() else ""


def plain_number(gold: str) -> str:
    """A valid gold as most would write it: without commas, superfluous zeros, and the sign of zero."""
    whole, _, fraction = gold.replace(",", "").removeprefix("-").partition(".")
    fraction = fraction.rstrip("0")
    number = (whole.lstrip("0") or "0") + ("." + fraction if fraction else "")
    return number if number == "0" else ("-" if gold.startswith("-") else "") + number


def say_odd_golds(golds: Mapping[str, str], where: str) -> None:
    """Print one line where golds are spelt so that no rule counts the plain number as right.

    Args:
        golds: valid ones, by the place at which each stands.
    """
    odd = [(place, gold) for place, gold in golds.items() if plain_number(gold) != gold.replace(",", "")]
    if odd:
        place, gold = odd[0]
        print(
            f"{where}: {len(odd)} of {len(golds)} golds are not spelt plainly, the first in {place}: {gold[:60]}, and "
            f"a completion must spell it so too: {plain_number(gold)[:60]} does not count"
        )


def extract_openai(completion: str) -> str | None:
    """The first ``#### NUMBER``, without its commas; None where there is none."""
    match = OPENAI_ANSWER.search(completion)
    return match.group(1).strip().replace(",", "") if match else None


def correct_openai(completion: str, gold: str) -> bool:
    return extract_openai(completion) == gold.replace(",", "")


def extract_lm_eval_strict(completion: str) -> str | None:
    """The first ``#### NUMBER`` before any stop string, as it stands there."""
    matches = OPENAI_ANSWER.findall(cut_at_stop(completion))
    return matches[0].strip() if matches else None


def extract_lm_eval_flexible(completion: str) -> str | None:
    """The last thing before any stop string that looks like a number."""
    matches = LM_EVAL_FLEXIBLE.findall(cut_at_stop(completion))
    return next(group for group in matches[-1] if group).strip() if matches else None


def correct_lm_eval_strict(completion: str, gold: str) -> bool:
    return _equal_lm_eval(extract_lm_eval_strict(completion), gold)


def correct_lm_eval_flexible(completion: str, gold: str) -> bool:
    return _equal_lm_eval(extract_lm_eval_flexible(completion), gold)


def cut_at_stop(completion: str) -> str:
    """The completion up to where lm-evaluation-harness would have stopped it."""
    for stop in LM_EVAL_STOPS:
        completion = completion.partition(stop)[0]
    return completion


def _equal_lm_eval(extracted: str | None, gold: str) -> bool:
    return extracted is not None and _normalise_lm_eval(extracted) == _normalise_lm_eval(gold)


def _normalise_lm_eval(text: str) -> str:
    for pattern in LM_EVAL_IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


RULES: dict[str, Callable[[str, str], bool]] = {
    "openai": correct_openai,
    "lm_eval_strict": correct_lm_eval_strict,
    "lm_eval_flexible": correct_lm_eval_flexible,
}


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
    _check_complete([prediction["id"] for prediction in predictions], num_problems, source, can_go_on)
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


# ---------------------------------------------------------------- samples


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
    uneven = sorted(index for index, drawn in by_problem.items() if sorted(drawn) != list(range(num_samples)))
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
    return max(votes, key=lambda answer: votes[answer], default=None)  # Counter and max keep the order


def pass_at(k: int, num_samples: int, num_correct: int) -> float:
    """The unbiased estimate that one of ``k`` samples is right, from ``num_samples`` (arXiv:2107.03374, equation 1)."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def samples_table(scores: dict[str, Any], title: str) -> str:
    """The scores of samples as a few lines of text for people."""
    low, high = scores["ci95"]
    drawn = f" at temperature {scores['temperature']}" if "temperature" in scores else ""
    lines = [f"{title}: {scores['num_samples']} samples a problem{drawn}"]
    lines.append(f"    mean of all             {scores['exact_match']:8.2%}")
    for name, shown in (("maj_at", "maj@"), ("pass_at", "pass@")):
        shares = ", ".join(f"{shown}{k} {share:.2%}" for k, share in scores[name].items())
        lines.append(f"    {shares}")
    lines.append(f"    95 % interval of maj@{scores['num_samples']:<3} {low:8.2%} to {high:.2%}")
    return "\n".join(lines)


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
        for what, which in (("double ids", double), ("missing ids", missing), ("unknown ids", foreign))
        if which
    ]
    if num_problems < 1:
        faults = ["no problems"]
    if faults:
        cure = GO_ON if can_go_on and not foreign else "leave one row of each, and number them from 0 on"
        if sorted(ids) == list(range(1, num_problems + 1)):
            cure = f"they are 1 to {num_problems}: take 1 from each"
        raise UserError(f"{held}: {', '.join(faults)}; there must be exactly one each with ids from 0: {cure}")


def some(values: Iterable[int | str]) -> str:
    """The first few of ``values``, and how many more there are."""
    values = list(values)
    return ", ".join(map(str, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def score_table(scores: dict[str, Any], title: str) -> str:
    """The scores as a few lines of text for people."""
    low, high = scores["ci95"]
    names = {
        "openai": "OpenAI (headline)",
        "lm_eval_strict": "lm-eval strict-match",
        "lm_eval_flexible": "lm-eval flexible-extract",
    }
    counts = f"{scores['num_correct']} of {scores['num_problems']}"
    lines = [
        one_line(title),
        f"  exact match              {scores['exact_match']:8.2%}   {counts}",
        f"  95 % interval (Wilson)   {low:8.2%} to {high:.2%}",
        *(f"    {names[name]:<24}{fraction:8.2%}" for name, fraction in scores["rules"].items()),
        _cut_line(scores["stopped_by_length"], scores.get("stop_unknown", 0)),
    ]
    return "\n".join(lines)


def _cut_line(stopped_by_length: int | None, unknown: int) -> str:
    if stopped_by_length is None:
        return "  cut by max_new_tokens   not known: no prediction says why it stopped"
    shown = f"   and not known of {unknown}" if unknown else ""
    return f"  cut by max_new_tokens    {stopped_by_length:>8}{shown}"
