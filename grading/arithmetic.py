"""Arithmetic in GSM8K's notation: the value of an expression, and the first false equation."""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

# The text comes from a model, so we limit its number of characters, the nesting of parentheses and
# the size of numbers. Anything beyond these limits has no value here, and costs no time.
LONGEST, DEEPEST, LARGEST = 200, 20, 10**30

# "<<48/2=24>>": the expression and its result.
ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")

# "1,450,000", "0.5", ".5"
NUMBER = r"(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)"

# In "48 / 2": "48", " /", " 2".
_TOKEN = re.compile(rf"\s*({NUMBER}|//|[-+*/()%])")

# Other spellings of operators: "4 x 5" and "4 × 5" are "4 * 5". An x is a product only between
# numbers, since "2x - 3" contains a variable.
_SPELLINGS = (
    (r"[×]|(?<=[0-9)%.\s])[xX](?=\s*[$(.]?[0-9])", "*"),
    ("÷", "/"),
    ("[−–]", "-"),
    (r"\$", " "),
)

# In "It is 3 * 4 = 13 eggs": "3 * 4" and "13". That is a possible expression, "=", and a complete
# number, unlike the 1 of "= 1 1/2". The bounded repetitions keep the time linear.
_RUN, _BLANKS = r"[-+*/().,%0-9 \t]", r"[ \t]{0,3}"
_EQUATION = re.compile(
    rf"(?<![\w:).,%(+*/-])({_RUN}{{0,{LONGEST}}}[0-9)%]{_BLANKS})"
    rf"=[ \t]{{0,{LONGEST}}}((?>-?{NUMBER}%?))"
    rf"(?!{_BLANKS}[*/+(0-9]|{_BLANKS}-{_BLANKS}[0-9.(])",
)

_BULLET = re.compile(r"^\s*[-*] ")  # the "- " of "- 5 + 6 = 11" in a list
_LEADING_PUNCTUATION = re.compile(r"^(?:[ \t,]|\.(?![0-9]))+")  # the ", " of ", 5 + 6", not ".5"
_DANGLING_OPERATOR = re.compile(r"[+*/]|-\s")  # the "- " of "- 3", after words: "40 marbles - 3"


def value_of(expression: str) -> Fraction | None:
    """The exact value of an expression of numbers, ``+ - * / // ( )`` and ``%`` (a hundredth).

    None for anything else, such as other characters, a missing operand, a division by zero, or a
    size beyond the limits above. Commas within numbers are thousands separators. Nothing is
    executed.
    """
    if len(expression) > LONGEST:
        return None
    tokens, end = [], 0
    for match in _TOKEN.finditer(expression):
        if match.start() != end:
            return None
        tokens.append(match[1])
        end = match.end()
    if expression[end:].strip():
        return None
    try:
        return _Parser(tokens).value()
    except (ValueError, ZeroDivisionError):
        return None


class _Parser:
    """Recursive descent.

    ``sum = product ([+-] product)*``, ``product = factor ([*/] factor)*``,
    ``factor = ([+-] factor | "(" sum ")" | number) "%"*``
    """

    def __init__(self, tokens: list[str]):
        self._tokens = [*tokens, ""]
        self._next = self._depth = 0

    def value(self) -> Fraction:
        result = self._sum()
        if self._tokens[self._next]:
            raise ValueError("something follows the expression")
        return result

    def _take(self, *wanted: str) -> str:
        token = self._tokens[self._next]
        if not token or token not in wanted:
            return ""
        self._next += 1
        return token

    def _sum(self) -> Fraction:
        result = self._product()
        while operator := self._take("+", "-"):
            term = self._product()
            result = _bounded(result + term if operator == "+" else result - term)
        return result

    def _product(self) -> Fraction:
        result = self._factor()
        while operator := self._take("*", "/", "//"):
            factor = self._factor()
            if operator == "*":
                result = _bounded(result * factor)
            else:
                result = _bounded(
                    result / factor if operator == "/" else Fraction(result // factor)
                )
        return result

    def _factor(self) -> Fraction:
        self._depth += 1
        if self._depth > DEEPEST:
            raise ValueError("nested too deeply")
        if sign := self._take("-", "+"):
            result = self._factor() * (-1 if sign == "-" else 1)
        elif self._take("("):
            result = self._sum()
            if not self._take(")"):
                raise ValueError("a parenthesis is open")
        else:
            # Raises ValueError if this is not a number but an operator or the end.
            result = _bounded(Fraction(self._tokens[self._next].replace(",", "")))
            self._next += 1
        self._depth -= 1
        while self._take("%"):
            result /= 100
        return result


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ValueError("too large")
    return value


class Equation(NamedTuple):
    """An ``<<expression=result>>`` or ``a op b = c`` in a text.

    Attributes:
        start, end: where it is in the text. ``48/2 = <<48/2=24>>24`` contains another one.
        shown: itself, verbatim except for an annotation inside it.
    """

    start: int
    end: int
    shown: str
    expression: str
    result: str

    @property
    def is_true(self) -> bool | None:
        """See `is_true`."""
        return is_true(self.expression, self.result)


def first_false_equation(text: str) -> str | None:
    """The first ``<<expression=result>>`` or ``a op b = c`` in ``text`` that is false, verbatim.

    Text that can't be read as arithmetic is neither true nor false. A result with decimals is true
    if it is the exact value, rounded.
    """
    return next((found.shown for found in find_equations(text) if found.is_true is False), None)


def equations(text: str) -> list[tuple[str, str]]:
    """The left and the right side of each equation in ``text``, in order.

    These are the annotations or, if there are none, each ``a op b = c``.
    """
    if annotations := ANNOTATION.findall(text):
        return annotations
    return [(found.expression, found.result) for found in find_equations(text)]


def find_equations(text: str) -> list[Equation]:
    """All equations in ``text`` and where they are, in order."""
    return sorted(_equations(text), key=lambda equation: equation.start)


def _equations(text: str) -> Iterator[Equation]:
    for match in ANNOTATION.finditer(text):
        yield Equation(*match.span(), match[0], match[1], match[2])
    # Replaced by spaces of the same length, so that all other positions remain the same.
    plain = ANNOTATION.sub(_blanks, text)
    for line in re.finditer(r"[^\n]+", plain):
        written = line[0]
        for spelling, meaning in _SPELLINGS:
            written = re.sub(spelling, meaning, written)
        written = _BULLET.sub(_blanks, written)
        for match in _EQUATION.finditer(written):
            left = _LEADING_PUNCTUATION.sub("", match[1])
            if re.search(r"[-+*/]", left[1:]) and not _DANGLING_OPERATOR.match(left):
                start = line.start() + match.start() + len(match[1]) - len(left)
                shown = f"{left.strip()} = {match[2]}"
                yield Equation(start, line.start() + match.end(), shown, left, match[2])


def _blanks(match: re.Match[str]) -> str:
    return " " * len(match[0])


def is_true(expression: str, result: str) -> bool | None:
    """Whether the value of ``expression`` is ``result``; None if either can't be read."""
    return _is_true(expression, result) if max(len(expression), len(result)) <= LONGEST else None


@lru_cache(maxsize=2**16)  # samples of a problem have the same equations many times
def _is_true(expression: str, result: str) -> bool | None:
    exact, claimed = value_of(expression), value_of(result)
    if exact is None or claimed is None:
        return None
    number = re.sub(r"[^0-9]+$", "", result)  # whitespace, "%" and ")" are no decimals
    decimals = len(number.partition(".")[2])
    tolerance = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
    if not result.rstrip().endswith("%"):
        return abs(exact - claimed) <= tolerance
    # "30 / 60 * 100 = 50%" is true, and so is "30 / 60 = 50%". Its decimals are those of percent.
    return any(abs(100 * claimed - percent) <= tolerance for percent in (exact, 100 * exact))
