"""Calculator decoding (arXiv:2110.14168): results are computed, not written by the model."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from grading.arithmetic import value_of
from run.errors import UserError

DECIMALS = 10  # the most decimals in a result

# The end of a text that has just reached the "=" of an annotation: "She has <<48/2=".
_OPEN = re.compile(r"<<([^<>=]*)=([^<>=]*)\Z")

# In "0.5 of .25": "0.5", whose group is "0", and ".2", whose group is empty.
_BELOW_ONE = re.compile(r"(?<![0-9.])(0?)\.[0-9]")


class Tokenizer(Protocol):
    """The part of a tokenizer that calculator decoding needs."""

    def __len__(self) -> int: ...

    def piece(self, token_id: int) -> str | None: ...

    def ids_of(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


def write_result(value: Fraction, text: str) -> str | None:
    """``value`` as GSM8K writes it after ``text``: ``10``, not ``10.0``.

    A value below one is ``0.2``, or ``.2`` if that is how ``text`` writes such numbers.

    Returns:
        None if the value has more than `DECIMALS` decimals, or infinitely many. The data set has no
        such result, and how to round it is left to the model.
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
    """Inserts the result of ``<<expression=`` into a completion, in place of the model's own.

    Annotations are recognised in the text, since a tokenizer may merge ``=`` with its neighbours.
    The result is encoded by the tokenizer, into the tokens that the model has learned to read.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Raises UserError if results can't be written in this tokenizer's tokens."""
        self.tokenizer = tokenizer
        pieces = ((index, tokenizer.piece(index)) for index in range(len(tokenizer)))
        self._with_equals = frozenset(
            index for index, piece in pieces if piece and ("=" in piece or piece == "<0x3D>")
        )
        example = "She has <<1+2=3>>"
        ids = self._ids(example)
        up_to_equals = next(
            (number for number, index in enumerate(ids, start=1) if index in self._with_equals), 0
        )
        if not up_to_equals or ids[: up_to_equals - 1] + self.after(ids[:up_to_equals]) != ids:
            raise UserError(
                f"calculator true: the model's tokenizer can't continue {example!r} after its '=': "
                "set calculator false"
            )

    def after(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens to write in place of the newest of ``token_ids`` and after it, up to ``>>``.

        Empty unless the newest contains the "=" of an annotation whose expression has a value.
        """
        if token_ids[-1] not in self._with_equals:
            return []
        text, before = self._text(token_ids), self._text(token_ids[:-1])
        match = _OPEN.search(text)
        if match is None:
            return []
        value = value_of(match[1])
        result = None if value is None else write_result(value, text[: match.end(1)])
        if result is None:
            return []
        wanted = f"{text[: match.end(1)]}={result}>>"
        # Encoded after a newline, since no tokenizer merges that with a sign or a number.
        ids = self._ids("\n" + wanted[len(before) :])[len(self._ids("\n")) :]
        return ids if self._text([*token_ids[:-1], *ids]) == wanted else []

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.ids_of([text])[0]

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids)
