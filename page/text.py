"""Text that a model wrote, as HTML: nothing in it can act, and nothing in it is invisible."""

import re
import unicodedata
from fractions import Fraction
from itertools import groupby

from markupsafe import Markup, escape

from grading.arithmetic import find_equations, value_of
from grading.rules import OPENAI_ANSWER, cut_at_stop

LONGEST = 6000  # characters of a text that are shown; 256 tokens are about 700

TRUE, FALSE, ANSWER, IGNORED = "true", "false", "answer", "ignored"


def checked(completion: str, correct: bool) -> Markup:
    """A completion with each of its equations checked and the answer marked, in ``span`` elements.

    The class of a span is ``true`` or ``false`` for an equation, ``answer`` for what the headline
    rule extracts, or ``ignored`` for what follows the text that is judged. After a false equation
    stands what its left side really is.

    Args:
        correct: whether the answer is right, by the headline rule.
    """
    shown = completion[:LONGEST]
    judged = len(cut_at_stop(completion))
    kinds = [""] * judged + [IGNORED] * (len(completion) - judged)
    values: dict[int, str] = {}  # of left sides, by the end of their equation
    false: list[tuple[int, int, str]] = []  # the same with the start
    found = [each for each in find_equations(completion[:judged]) if each.end <= len(shown)]
    # The longest first, so that an annotation inside another equation shows as well.
    for equation in sorted(found, key=lambda equation: equation.start - equation.end):
        length, is_true = equation.end - equation.start, equation.is_true
        if is_true is not None:
            kinds[equation.start : equation.end] = [TRUE if is_true else FALSE] * length
        if is_true is False:
            value = in_digits(value_of(equation.expression))
            said = any(start <= equation.start < end and value == it for start, end, it in false)
            if not said:  # by the equation around it
                values[equation.end] = value
                false.append((equation.start, equation.end, value))
    if answer := OPENAI_ANSWER.search(completion):
        kind = f"{ANSWER} right" if correct else ANSWER
        kinds[answer.start() : answer.end()] = [kind] * len(answer[0])
    parts, start = [], 0
    # A piece also ends where a value is to be inserted.
    for (kind, _), letters in groupby(
        zip(kinds[: len(shown)], _parts(values, len(shown)), strict=True)
    ):
        end = start + len(list(letters))
        piece = visible(shown[start:end])
        parts.append(Markup('<span class="{}">{}</span>').format(kind, piece) if kind else piece)
        if end in values:
            parts.append(Markup('<em class="value">false: it is {}</em>').format(values[end]))
        start = end
    return Markup("").join(parts) + _rest(completion)


def _parts(values: dict[int, str], length: int) -> list[int]:
    """For each character, how many of the positions in ``values`` come before it."""
    before, parts = 0, []
    for position in range(length):
        before += position in values
        parts.append(before)
    return parts


def plain(text: str) -> Markup:
    """A question, or any other text that is only shown."""
    return visible(text[:LONGEST]) + _rest(text)


def _rest(text: str) -> Markup:
    if not text.strip(" \n\t"):  # or its place would look like one that was not filled
        return Markup('<em class="value">{}</em>').format("only spaces" if text else "no text")
    if len(text) <= LONGEST:
        return Markup("")
    return Markup('<em class="value">{:,} more characters in the file</em>').format(
        len(text) - LONGEST
    )


def visible(text: str) -> Markup:
    """``text`` with the code points of all that is invisible or could reorder what is around it.

    That is each character that is neither printable nor a line break or tab: control characters,
    the formatting characters of bidirectional text, lone surrogates, no-break and zero-width
    spaces.
    """
    if text.isprintable():
        return escape(text)
    parts = [
        Markup('<code title="{}">U+{}</code>').format(
            unicodedata.name(letters, "control character"), f"{ord(letters):04X}"
        )
        if is_hidden
        else escape(letters)
        for is_hidden, letters in _pieces(text)
    ]
    return Markup("").join(parts)


def _pieces(text: str) -> list[tuple[bool, str]]:
    """Each hidden character by itself, and the text between them."""
    pieces = []
    for is_hidden, group in groupby(text, lambda letter: not _is_shown(letter)):
        letters = list(group)
        pieces += (
            [(True, letter) for letter in letters] if is_hidden else [(False, "".join(letters))]
        )
    return pieces


def _is_shown(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\t"


def in_digits(value: Fraction) -> str:
    """``24``, ``166,666.5`` or, rounded, ``0.333333``."""
    if value.denominator == 1:
        return f"{value.numerator:,}"
    # With decimals, or it would look like a whole number; a float has no more than 15 digits.
    digits = min(max(6, len(str(int(abs(value)))) + 2), 15)
    return re.sub("e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{float(value):,.{digits}g}")
