"""Arithmetic as GSM8K writes it: what an expression is worth, whether an equation is true, and results forced into
what a model writes (calculator decoding, arXiv:2110.14168)."""

import re
from collections.abc import Iterator
from fractions import Fraction

# Bounds on text that a model wrote: what is beyond them has no value here, and costs no time.
LONGEST, DEEPEST, LARGEST = 200, 20, 10**30


ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")


NUMBER = r"(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)"


_TOKEN = re.compile(rf"\s*({NUMBER}|//|[-+*/()%])")


# As people write them, and what they stand for. An x is a product before a number only: "2x - 3" is none.
_SPELLINGS = (
    (r"[×]|(?<=[0-9)%.\s])[xX](?=\s*[$(.]?[0-9])", "*"),
    ("÷", "/"),
    ("[−–]", "-"),
    (r"\$", ""),
)


# In running text: what may be an expression, "=", and a whole number that nothing goes on with, as in "= 1 1/2".
# The bounds keep the time linear in the text.
_RUN, _BLANKS = r"[-+*/().,%0-9 \t]", r"[ \t]{0,3}"


_EQUATION = re.compile(
    rf"(?<![\w:).,%(+*/-])({_RUN}{{0,{LONGEST}}}[0-9)%]{_BLANKS})=[ \t]{{0,{LONGEST}}}((?>-?{NUMBER}%?))"
    rf"(?!{_BLANKS}[*/+(0-9]|{_BLANKS}-{_BLANKS}[0-9.(])",
)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of numbers, ``+ - * / // ( )`` and ``%`` (a hundredth).

    None where it is none: other characters, a missing operand, a division by zero, or beyond the
    bounds above. Commas within numbers are thousands' separators. Nothing is ever executed.
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
    """Recursive descent over ``sum = product ([+-] product)*``, ``product = factor ([*/] factor)*``."""

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
            result = _bounded(Fraction(self._tokens[self._next].replace(",", "") or "none"))
            self._next += 1
        self._depth -= 1
        while self._take("%"):
            result /= 100
        return result


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ValueError("too large")
    return value


def first_false_equation(text: str) -> str | None:
    """The first ``<<expression=result>>`` or ``a op b = c`` in ``text`` that is not true, as it stands there.

    What can't be read as arithmetic is neither true nor false. A result with decimals is true
    where it is the exact one, rounded.
    """
    found = sorted(_equations(text), key=lambda equation: equation[0])
    return next((shown for _, shown, left, right in found if is_true(left, right) is False), None)


def _equations(text: str) -> Iterator[tuple[int, str, str, str]]:
    for match in ANNOTATION.finditer(text):
        yield match.start(), match[0], match[1], match[2]
    # Blanks of the same length: places in the text stay what they are.
    plain = ANNOTATION.sub(lambda match: " " * len(match[0]), text)
    for line in re.finditer(r"[^\n]+", plain):
        written = line[0]
        for pattern, meaning in _SPELLINGS:
            written = re.sub(pattern, meaning or " ", written)
        written = re.sub(r"^\s*[-*] ", lambda bullet: " " * len(bullet[0]), written)
        for match in _EQUATION.finditer(written):
            left = re.sub(r"^(?:[ \t,]|\.(?![0-9]))+", "", match[1])
            # "40 marbles - 3 = 37" begins before what could be read.
            if re.search(r"[-+*/]", left[1:]) and not re.match(r"[+*/]|-\s", left):
                shown = f"{left.strip()} = {match[2]}"
                yield line.start() + match.start(), shown, left, match[2]


def is_true(expression: str, result: str) -> bool | None:
    """Whether ``expression`` is worth ``result``; None where either can't be read."""
    exact, claimed = evaluate(expression), evaluate(result)
    if exact is None or claimed is None:
        return None
    # "30 / 60 * 100 = 50%" is true, and so is "30 / 60 = 50%".
    claims = {claimed, claimed * 100} if result.rstrip().endswith("%") else {claimed}
    decimals = len(result.rstrip("% ").partition(".")[2])
    tolerance = Fraction(1, 2 * 10**decimals) if decimals else 0
    return any(abs(exact - claim) <= tolerance for claim in claims)
