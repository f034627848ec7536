"""From a completion to a verdict: the published rules for GSM8K, and what a score is worth.

The headline is OpenAI's rule; beside it, always, stand both filters of EleutherAI's
lm-evaluation-harness. They are reproduced to the letter, faults included, so that a score
can be compared with the literature.

Sources: `grade_school_math/dataset.py` of github.com/openai/grade-school-math and
`lm_eval/tasks/gsm8k/gsm8k.yaml`, `lm_eval/filters/extraction.py`, `lm_eval/api/metrics.py`
of github.com/EleutherAI/lm-evaluation-harness.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping

OPENAI_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


LM_EVAL_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


LM_EVAL_STOPS = ("Question:", "</s>", "<|im_end|>")


LM_EVAL_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


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
    odd = [
        (place, gold)
        for place, gold in golds.items()
        if plain_number(gold) != gold.replace(",", "")
    ]
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


def some(values: Iterable[int | str]) -> str:
    """The first few of ``values``, and how many more there are."""
    values = list(values)
    return ", ".join(map(str, values[:5])) + (
        f" and {len(values) - 5} more" if len(values) > 5 else ""
    )
