"""Results of arithmetic written in the model's place (calculator decoding, arXiv:2110.14168)."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from grading.arithmetic import evaluate
from run.errors import UserError

if TYPE_CHECKING:
    from transformers import Tokenizer


DECIMALS = 10  # most that a result is written with


# An annotation at the end of a text, up to "=" or what came with it.
_OPEN = re.compile(r"<<([^<>=]*)=([^<>=]*)\Z")


_BELOW_ONE = re.compile(r"(?<![0-9.])(0?)\.[0-9]")


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
        self._with_equals = frozenset(
            index for index, piece in pieces if piece and ("=" in piece or piece == "<0x3D>")
        )
        example = "She has <<1+2=3>>"
        ids = self._ids(example)
        opened = next(
            (number for number, index in enumerate(ids, start=1) if index in self._with_equals), 0
        )
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
