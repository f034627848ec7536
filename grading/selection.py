"""Selects samples to train on: rejection sampling fine-tuning (RFT), arXiv:2308.01825, section 3.3.

A sample of a train row is kept if

1. its answer is right, by the headline rule;
2. it can be written like an answer of the data set, whose last line is ``#### NUMBER``;
3. it contains equations;
4. each of its equations is true, and so is each number that is written behind an annotation;
5. no earlier sample of the problem has the same list of equations;
6. nor has the row itself.

The equations are the annotations ``<<48/2=24>>`` or, without any, each ``a op b = c``. Lists are
compared without whitespace. Another order of operands or of equations makes another list, and
other words do not. Of several samples with one list the first one is kept, in the order of the
files and of the samples' numbers. So it is as likely as the model makes it, while the paper's
algorithm 1, for samples of several models, prefers what differs most from the others by edit
distance.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grading.arithmetic import ANNOTATION, NUMBER, equations, first_false_equation, is_true
from grading.dataset import Problem
from grading.rules import OPENAI_ANSWER, correct_openai, cut_at_stop

# How far samples get. Each stage includes those after it.
STAGES = ("drawn", "right", "well_formed", "with_equations", "true", "distinct", "kept")

# Control characters other than tabs and line breaks, half characters, and what stands for bytes
# that are no character. No answer of the data set contains them.
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")

# In "<<70+2=72>>71": "72" and "71". But 3/4 is not a 3.
_WRITTEN_BEHIND = re.compile(rf"{ANNOTATION.pattern}\$?((?>-?{NUMBER}%?))(?!/)")


@dataclass(frozen=True)
class Sample:
    """A completion of a train row's question.

    Attributes:
        source: the number of the file that it is from.
    """

    source: int
    completion: str


@dataclass
class Selection:
    """The samples to train on.

    Attributes:
        added: the new rows, in the order of the problems and then of the samples.
        counts: for each source, how many samples reached each of the `STAGES`.
        kept: how many samples of each question were kept.
        num_sampled: how many questions have samples.
        num_lists: how many lists of equations the rows and the kept samples have.
    """

    added: list[Problem] = field(default_factory=list)
    counts: dict[int, Counter[str]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    num_sampled: int = 0
    num_lists: int = 0

    @property
    def total(self) -> dict[str, int]:
        return {name: sum(count[name] for count in self.counts.values()) for name in STAGES}


def select(rows: Sequence[Problem], samples: Mapping[str, Sequence[Sample]]) -> Selection:
    """Choose which ``samples`` to train on.

    Args:
        rows: the train rows, of which several may have the same question.
        samples: by question, the first drawn first.
    """
    selection = Selection()
    by_question: dict[str, list[Problem]] = {}
    for row in rows:
        by_question.setdefault(row.question, []).append(row)
    for question, same in by_question.items():
        _select_for(same, samples.get(question, ()), selection)
    return selection


def _select_for(rows: Sequence[Problem], samples: Sequence[Sample], selection: Selection) -> None:
    """Add the samples of one question, which all ``rows`` have, to ``selection``."""
    question, gold = rows[0].question, rows[0].gold
    known = {equation_list(row.answer) for row in rows}
    found: set[tuple[str, ...]] = set()
    judged: dict[str, tuple[str, str]] = {}  # many samples have the same text
    selection.kept[question] = 0
    selection.num_sampled += bool(samples)
    for sample in samples:
        if sample.completion not in judged:
            judged[sample.completion] = judge(sample.completion, gold)
        stage, answer = judged[sample.completion]
        if stage == "true" and (written := equation_list(answer)) not in found:
            stage = "distinct" if written in known else "kept"
            found.add(written)
        counts = selection.counts.setdefault(sample.source, Counter())
        counts.update(STAGES[: STAGES.index(stage) + 1])
        if stage == "kept":
            selection.added.append(Problem(question, answer))
            selection.kept[question] += 1
    selection.num_lists += len(known | found)


def judge(completion: str, gold: str) -> tuple[str, str]:
    """The last of the first five `STAGES` that a completion reaches, and the answer to train on.

    The answer is empty before ``well_formed``.
    """
    if not correct_openai(completion, gold):
        return "drawn", ""
    answer = as_answer(completion, gold)
    if answer is None:
        return "right", ""
    found = equations(answer)
    if not found:
        return "well_formed", answer
    is_sound = all(is_true(*equation) for equation in found) and not first_false_equation(answer)
    return ("true" if is_sound and is_well_annotated(answer) else "with_equations"), answer


def is_well_annotated(answer: str) -> bool:
    """Whether each ``<<`` begins an annotation, and a number behind one is its result."""
    if "<<" in ANNOTATION.sub("", answer):
        return False
    numbers = ((match[2], match[3]) for match in _WRITTEN_BEHIND.finditer(answer))
    return all(is_true(result, written) is not False for result, written in numbers)


def as_answer(completion: str, gold: str) -> str | None:
    """A right completion as the data set would write it, or None if that is not possible.

    It ends with the line that the headline rule reads, in the spelling of ``gold``. That line must
    be preceded by text without another ``####``, which does not go on to another question.
    """
    reasoning = completion[: OPENAI_ANSWER.search(completion).start()]
    text = reasoning.strip()
    if not text or not reasoning.endswith("\n") or "####" in text or NOT_TEXT.search(text):
        return None
    if cut_at_stop(text) != text:  # the number answers a question that the model made up
        return None
    return f"{text}\n#### {gold}"


def equation_list(answer: str) -> tuple[str, ...]:
    """The equations of an answer in order, without whitespace."""
    return tuple(re.sub(r"\s", "", f"{left}={right}") for left, right in equations(answer))
