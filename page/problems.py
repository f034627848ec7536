"""The problems of a page: what each run wrote, how it was judged, and how two runs differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from grading.mistakes import LABELS
from grading.rules import Verdict, grade_row
from page.text import checked, plain

RIGHT, WRONG, DISAGREE = "right", "wrong", "disagree"
WON, LOST, BOTH_RIGHT, BOTH_WRONG = "won", "lost", "both-right", "both-wrong"

# What a kind of problem is called in the list of filters.
TITLES = {
    RIGHT: "right",
    WRONG: "wrong",
    **{label: label for label in LABELS},
    DISAGREE: "rules disagree",
    WON: "won",
    LOST: "lost",
    BOTH_RIGHT: "both right",
    BOTH_WRONG: "both wrong",
}


@dataclass(frozen=True)
class Answer:
    """What one run wrote for a problem.

    Attributes:
        verdict: on the completion.
        text: the completion as HTML.
        ending: why it ended, and after how many tokens, as far as that is known.
    """

    verdict: Verdict
    text: Markup
    ending: str

    @property
    def result(self) -> str:
        """``right``, or the kind of mistake."""
        return self.verdict.label or RIGHT

    @property
    def agree(self) -> bool:
        """Whether all rules come to the same verdict."""
        return len(set(self.verdict.by_rule.values())) == 1

    @property
    def tags(self) -> list[str]:
        """The kinds by which the problem can be found."""
        tags = [RIGHT] if self.verdict.correct else [WRONG, self.verdict.label]
        return tags + ([] if self.agree else [DISAGREE])


@dataclass(frozen=True)
class Entry:
    """A problem of the page.

    Attributes:
        number: its id.
        question, gold: None if no row has them.
        steps: of the gold answer; None if unknown.
        length: tokens of the last run's completion or, if unknown, its characters.
        answers: by run; None where the run has none.
        change: how two runs differ, for example ``won``; None if there is one run.
        tags: the kinds by which the problem can be found.
    """

    number: int
    question: Markup | None
    gold: Markup
    steps: int | None
    length: int
    answers: list[Answer | None]
    change: str | None
    tags: list[str]


def entries_of(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Entry]:
    """The problems of one run, or of two, in the order of their ids.

    Args:
        runs: the rows of each, as in ``predictions.jsonl``, with each id once.
    """
    by_id = [{row["id"]: row for row in rows} for rows in runs]
    numbers = sorted({number for rows in by_id for number in rows})
    return [_entry(number, [rows.get(number) for rows in by_id]) for number in numbers]


def _entry(number: int, rows: Sequence[Mapping[str, Any] | None]) -> Entry:
    answers = [row and _answer(row) for row in rows]
    there = [row for row in rows if row]
    texts = [row["question"] for row in there if isinstance(row.get("question"), str)]
    steps = [row["steps"] for row in there if type(row.get("steps")) is int]
    change = _change(answers)
    prefixes = ("first-", "second-") if len(rows) > 1 else ("",)
    tags = [
        prefix + tag
        for prefix, answer in zip(prefixes, answers, strict=True)
        if answer
        for tag in answer.tags
    ]
    return Entry(
        number=number,
        question=plain(texts[0]) if texts else None,
        gold=plain(there[0]["gold"]),
        steps=steps[0] if steps else None,
        length=_length(there[-1]),
        answers=answers,
        change=change,
        tags=([change] if change else []) + tags,
    )


def _answer(row: Mapping[str, Any]) -> Answer:
    tokens = row.get("num_tokens")
    parts = [
        {"eos": "ended by itself", "length": "cut at the limit"}.get(row.get("stop"), ""),
        f"{tokens:,} tokens" if type(tokens) is int else "",
    ]
    verdict = grade_row(row)
    text = checked(row["completion"], verdict.correct)
    return Answer(verdict, text, ", ".join(filter(None, parts)))


def _length(row: Mapping[str, Any]) -> int:
    tokens = row.get("num_tokens")
    return tokens if type(tokens) is int else len(row["completion"])


def _change(answers: Sequence[Answer | None]) -> str | None:
    if len(answers) < 2 or None in answers:
        return None
    first, second = (answer.verdict.correct for answer in answers)
    if first == second:
        return BOTH_RIGHT if first else BOTH_WRONG
    return WON if second else LOST


def choices_of(entries: Sequence[Entry], names: Sequence[str]) -> list[tuple[str, list]]:
    """The groups of filters, each with its title and, for each filter, tag, words and count.

    A filter that finds nothing is left out.
    """
    counts: dict[str, int] = {}
    for entry in entries:
        for tag in entry.tags:
            counts[tag] = counts.get(tag, 0) + 1
    changes = ("Both runs", "", (WON, LOST, BOTH_RIGHT, BOTH_WRONG))
    kinds = (RIGHT, WRONG, *LABELS, DISAGREE)
    if len(names) > 1:
        groups = [changes, (names[0], "first-", kinds), (names[1], "second-", kinds)]
    else:
        groups = [("Result", "", kinds)]
    return [
        (
            title,
            [
                (prefix + tag, TITLES[tag], counts[prefix + tag])
                for tag in tags
                if prefix + tag in counts
            ],
        )
        for title, prefix, tags in groups
    ]
