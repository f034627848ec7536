"""Arithmetic as GSM8K writes it: what an expression is worth, whether an equation is true, and results forced into
what a model writes (calculator decoding, arXiv:2110.14168)."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from errors import UserError

if TYPE_CHECKING:
    from transformers import Tokenizer

# Bounds on text that a model wrote: what is beyond them has no value here, and costs no time.
LONGEST, DEEPEST, LARGEST = 200, 20, 10**30
DECIMALS = 10  # most that a result is written with

ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
NUMBER = r"(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)"
# An annotation at the end of a text, up to "=" or what came with it.
_OPEN = re.compile(r"<<([^<>=]*)=([^<>=]*)\Z")
_BELOW_ONE = re.compile(r"(?<![0-9.])(0?)\.[0-9]")
_TOKEN = re.compile(rf"\s*({NUMBER}|//|[-+*/()%])")
# As people write them, and what they stand for. An x is a product before a number only: "2x - 3" is none.
_SPELLINGS = ((r"[×]|(?<=[0-9)%.\s])[xX](?=\s*[$(.]?[0-9])", "*"), ("÷", "/"), ("[−–]", "-"), (r"\$", ""))
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
                result = _bounded(result / factor if operator == "/" else Fraction(result // factor))
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


# ---------------------------------------------------------------- calculator decoding


def write_result(value: Fraction, text: str) -> str | None:
    """``value`` as GSM8K writes it behind ``text``: ``10``, not ``10.0``; ``0.2``, or ``.2`` where ``text`` writes so.

    None where its decimals do not end, or only after more than `DECIMALS`: the data set has no
    such result, and rounding it is the model's choice.
    """
    shifted = abs(value) * 10**DECIMALS
    if shifted.denominator != 1:
        return None
    whole, decimals = divmod(shifted.numerator, 10**DECIMALS)
    written = f"{whole}.{decimals:0{DECIMALS}}".rstrip("0").rstrip(".")
    below_one = _BELOW_ONE.findall(text)
    if below_one and not below_one[-1] and written.startswith("0."):
        written = written[1:]
    return f"-{written}" if value < 0 else written


class ForcedResults:
    """Puts the result of ``<<expression=`` into a completion, in the model's place.

    What is an annotation is decided on the text, since a tokenizer may join ``=`` with its
    neighbours; the result is then written in the tokens that the tokenizer itself would write, as
    the model has learned to read them.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        """Raises UserError where results can't be written in this tokenizer's tokens."""
        self.tokenizer = tokenizer
        pieces = ((index, tokenizer.piece(index)) for index in range(len(tokenizer)))
        self._with_equals = frozenset(index for index, piece in pieces if piece and ("=" in piece or piece == "<0x3D>"))
        example = "She has <<1+2=3>>"
        ids = self._ids(example)
        opened = next((number for number, index in enumerate(ids, start=1) if index in self._with_equals), 0)
        if not opened or ids[: opened - 1] + self.after(ids[:opened]) != ids:
            raise UserError(
                f"calculator true: the model's tokenizer can't write {example!r} from its '=' on: set calculator false"
            )

    def after(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens that take the place of the newest of ``token_ids`` and follow it, up to ``>>``.

        Empty where the newest does not bring the "=" of an annotation, or its expression has no value.
        """
        if token_ids[-1] not in self._with_equals:
            return []
        text, before = self._text(token_ids), self._text(token_ids[:-1])
        match = _OPEN.search(text)
        if match is None:
            return []
        value = evaluate(match[1])
        result = None if value is None else write_result(value, text[: match.end(1)])
        if result is None:
            return []
        wanted = f"{text[: match.end(1)]}={result}>>"
        # Behind a line's end, with which no tokenizer merges a sign or a number.
        ids = self._ids("\n" + wanted[len(before) :])[len(self._ids("\n")) :]
        return ids if self._text([*token_ids[:-1], *ids]) == wanted else []

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.ids_of([text])[0]

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids)
