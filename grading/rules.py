"""From a completion to a verdict, by the published rules for GSM8K.

The headline is OpenAI's rule. Both filters of EleutherAI's lm-evaluation-harness are always
reported with it. All three are reproduced exactly, including their faults, so that scores can be
compared with the literature.

Sources: `grade_school_math/dataset.py` of github.com/openai/grade-school-math and
`lm_eval/tasks/gsm8k/gsm8k.yaml`, `lm_eval/filters/extraction.py`, `lm_eval/api/metrics.py`
of github.com/EleutherAI/lm-evaluation-harness.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grading.arithmetic import NUMBER, first_false_equation, value_of
from run.errors import UserError, first_few

OPENAI_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
LM_EVAL_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LM_EVAL_STOPS = ("Question:", "</s>", "<|im_end|>")
LM_EVAL_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")

# Commas only between groups of three digits: the rules remove them, and would read 3,14 as 314.
GOLD = re.compile(r"-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)?(\.[0-9]+)?")
ANY_NUMBER = re.compile(f"-?{NUMBER}")


# ---------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """The verdict on one completion. Each part is computed when it is first used.

    Attributes:
        completion, gold: the text to judge, and the data set's number.
        stop: why the completion ended (``eos``, ``length``, ...); None if unknown.
    """

    completion: str
    gold: str
    stop: str | None = None

    @cached_property
    def answer(self) -> str | None:
        """The number that the headline rule finds in the completion."""
        return extract_openai(self.completion)

    @cached_property
    def correct(self) -> bool:
        """Whether the completion is correct by the headline rule."""
        return correct_openai(self.completion, self.gold)

    @cached_property
    def by_rule(self) -> dict[str, bool]:
        return {name: rule(self.completion, self.gold) for name, rule in RULES.items()}

    @cached_property
    def label(self) -> str | None:
        """The kind of mistake; None for a correct completion.

        - ``cut``: stopped by length;
        - ``format``: the number is right but the headline rule does not accept it, because it is
          spelt differently (``18.0``), or only the flexible rule or the last number gives it;
        - ``arithmetic``: an annotation or an ``a op b = c`` is false;
        - ``reasoning``: no equation is false, but the result is wrong.
        """
        if self.correct:
            return None
        if self.stop == "length":
            return "cut"
        if self._is_right_but_misspelt():
            return "format"
        return "arithmetic" if self._first_false_equation else "reasoning"

    @property
    def false_equation(self) -> str | None:
        """The first false equation in a wrong completion."""
        return None if self.correct else self._first_false_equation

    @cached_property
    def _first_false_equation(self) -> str | None:
        return first_false_equation(cut_at_stop(self.completion))

    def _is_right_but_misspelt(self) -> bool:
        if self.answer is not None:
            return _equal_in_value(self.answer.rstrip("."), self.gold)
        if correct_lm_eval_flexible(self.completion, self.gold):
            return True
        numbers = ANY_NUMBER.findall(cut_at_stop(self.completion))
        return bool(numbers) and _equal_in_value(numbers[-1], self.gold)


def grade(completion: str, gold: str, stop: str | None = None) -> Verdict:
    """Judge a completion. Every score, label and comparison is based on these verdicts."""
    return Verdict(completion, gold, stop)


def grade_row(row: Mapping[str, Any]) -> Verdict:
    """`grade` for a row of ``predictions.jsonl``, ignoring the row's own ``correct``."""
    return grade(row["completion"], row["gold"], row.get("stop"))


def _equal_in_value(number: str, gold: str) -> bool:
    value = value_of(number)
    return value is not None and value == value_of(gold)


def report_contradictions(rows: Iterable[Mapping[str, Any]], source: object) -> None:
    """Print one line if rows have a ``correct`` that contradicts the headline rule."""
    found = [
        row["id"] for row in rows if "correct" in row and row["correct"] != grade_row(row).correct
    ]
    if found:
        print(
            f"{source}: {len(found)} rows have a 'correct' that the headline rule contradicts "
            f"(ids {first_few(found)}): the rule counts"
        )


# ---------------------------------------------------------------- the published rules


def extract_openai(completion: str) -> str | None:
    """The first ``#### NUMBER`` without its commas; None if there is none."""
    match = OPENAI_ANSWER.search(completion)
    return match.group(1).strip().replace(",", "") if match else None


def correct_openai(completion: str, gold: str) -> bool:
    return extract_openai(completion) == gold.replace(",", "")


def extract_lm_eval_strict(completion: str) -> str | None:
    """The first ``#### NUMBER`` before any stop string, verbatim."""
    matches = OPENAI_ANSWER.findall(cut_at_stop(completion))
    return matches[0].strip() if matches else None


def correct_lm_eval_strict(completion: str, gold: str) -> bool:
    return _equal_lm_eval(extract_lm_eval_strict(completion), gold)


def extract_lm_eval_flexible(completion: str) -> str | None:
    """The last text before any stop string that looks like a number."""
    matches = LM_EVAL_FLEXIBLE.findall(cut_at_stop(completion))
    return next(group for group in matches[-1] if group).strip() if matches else None


def correct_lm_eval_flexible(completion: str, gold: str) -> bool:
    return _equal_lm_eval(extract_lm_eval_flexible(completion), gold)


def cut_at_stop(completion: str) -> str:
    """The completion up to the point where lm-evaluation-harness would have stopped it.

    The text after it is another question, not part of this answer.
    """
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


# ---------------------------------------------------------------- gold answers


def gold_answer(answer: str) -> str:
    """The number after ``####`` on the last line of a data set's answer, verbatim.

    Raises:
        ValueError: the number is missing or malformed, or there is more than one ``####``. Without
            this check "no answer" would equal "no gold answer", and garbage would score 96 %.
    """
    before, mark, after = answer.rpartition("####")
    fault = _fault_around_mark(before, mark, after.rstrip())
    number = after.rstrip()[1:]
    try:
        if not fault:
            check_gold(number)
            return number
    except ValueError as error:
        fault = str(error)
    shown = visible(answer[max(0, len(before) - 20) :][:60] if mark else answer[-60:])
    raise ValueError(f"{shown} must end in a line '#### NUMBER', its only '####', but {fault}")


def _fault_around_mark(before: str, mark: str, after: str) -> str | None:
    """Describes a fault around the last ``####`` of an answer, apart from its number, or None."""
    line_before, (line, _, more) = before.rpartition("\n")[2], after.partition("\n")
    if not mark:
        return "contains none"
    if mark in before:
        return f"contains it {before.count(mark) + 1} times"
    if line_before:
        return f"{visible(line_before[-20:])} precedes it on its line"
    if not line.strip():
        return "no number follows it on its line"
    if more:
        return f"{visible(more.strip()[:20])} follows its line"
    if line[0] != " " or line[1].isspace():
        gap = line[: len(line) - len(line.lstrip())] or line[0]
        return f"{visible(gap[:20])} is where a single space must separate it from the number"
    return None


def check_gold(number: object) -> None:
    """Raises ValueError unless ``number`` is a string such as ``-1,450,000`` or ``0.5``."""
    if isinstance(number, str) and GOLD.fullmatch(number) and any(map(str.isdecimal, number)):
        return
    shown, reason = repr(number), ""
    if isinstance(number, str):
        shown = visible(number[:60])
        if unexpected := re.search("[^0-9.,-]", number):
            reason = f" (it contains {visible(unexpected[0])}{_name_of(unexpected[0])})"
        elif "," in number:
            reason = " (a comma may only separate groups of three digits)"
    raise ValueError(
        f"the gold answer {shown} is not a number such as 18, -3, 1,450,000 or 0.5{reason}"
    )


def check_golds(predictions: Iterable[Mapping[str, Any]], source: str) -> None:
    """Raises UserError unless each gold answer is a number."""
    for row in predictions:
        try:
            check_gold(row["gold"])
        except ValueError as error:
            raise UserError(
                f"{source}: problem {row['id']}: {error}; restore the data set's number, or "
                "evaluate again"
            ) from None


def _name_of(letter: str) -> str:
    name = unicodedata.name(letter, "")
    return f", {name}" if name and not letter.isascii() else ""


def count_steps(answer: str) -> int:
    """The number of reasoning steps in a data set's answer: its non-empty lines before the last."""
    return sum(bool(line.strip()) for line in answer.rstrip().split("\n")[:-1])


def plain_number(gold: str) -> str:
    """A valid gold answer in its usual spelling, such as ``-1450.1`` for ``-01,450.10``."""
    whole, _, fraction = gold.replace(",", "").removeprefix("-").partition(".")
    fraction = fraction.rstrip("0")
    number = (whole.lstrip("0") or "0") + ("." + fraction if fraction else "")
    return number if number == "0" else ("-" if gold.startswith("-") else "") + number


def say_odd_golds(golds: Mapping[str, str], where: str) -> None:
    """Print one line if gold answers are spelt in a way that makes a plain number count as wrong.

    Args:
        golds: valid gold answers, by the place where each was found.
    """
    odd = [row for row in golds.items() if plain_number(row[1]) != row[1].replace(",", "")]
    if odd:
        place, gold = odd[0]
        print(
            f"{where}: {len(odd)} of {len(golds)} gold answers are not spelt plainly, the first in "
            f"{place}: {gold[:60]}, and a completion must use that spelling: "
            f"{plain_number(gold)[:60]} does not count"
        )


# ---------------------------------------------------------------- text for messages


def visible(text: str) -> str:
    """``text`` in quotes, with escape sequences for everything but plain ASCII.

    Repeated spaces are escaped too, since an error message would merge them.
    """
    return re.sub("  +", lambda spaces: r"\x20" * len(spaces[0]), ascii(text))
