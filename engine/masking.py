"""Masked thought: a share of an answer's tokens is replaced where the model reads them.

What it learns to write stays the same, so it must work out each step from the question and from the
earlier tokens that it still sees (arXiv:2403.02178). A random replacement may be any token of the
vocabulary, as in `MaskedThought/models/mask_policy_utils.py` of
github.com/AlibabaResearch/DAMO-ConvAI (f9e562d), and the share rises as in
`MaskedThought/trainer/Trainer/trainer_436.py` there.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.packing import IGNORE, Example
from run.errors import UserError

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

RANDOM = "random"  # as mask_token, this is no token, even if the vocabulary has one of that name
NUMBERS = 2**32  # the random numbers are below it


@dataclass(frozen=True)
class Masking:
    """How many tokens of the answers are replaced during training, and by what.

    Attributes:
        rate: the share of the answers' tokens, once it has stopped rising.
        warmup_epochs: how many passes over the rows it takes to rise linearly from 0.
        replacements: ids, of which one is drawn for each replaced token.
    """

    rate: float
    warmup_epochs: float
    replacements: range

    def rate_after(self, epochs: float) -> float:
        """The share that is replaced after ``epochs`` passes over the rows."""
        if epochs >= self.warmup_epochs:
            return self.rate
        return self.rate * epochs / self.warmup_epochs

    def mask(self, example: Example, rate: float, *key: object) -> Example:
        """``example`` with a share ``rate`` of its answer's tokens replaced.

        BOS, prompt and labels stay as they are. So does EOS, which is not an input.

        Args:
            key: what the draws depend on, and nothing else. A higher rate replaces the tokens that
                a lower one does by the same ones, and more.
        """
        labels = enumerate(example.labels[:-1])
        answer = [position for position, label in labels if label != IGNORE]
        # SHAKE is a standard (FIPS 202), so the stream is the same with every library and machine.
        stream = hashlib.shake_128(json.dumps(["mask", *key]).encode())
        draws = struct.iter_unpack("<II", stream.digest(8 * len(answer)))
        input_ids, limit, count = list(example.input_ids), rate * NUMBERS, len(self.replacements)
        for position, (chance, choice) in zip(answer, draws, strict=True):
            if chance < limit:
                input_ids[position] = self.replacements[choice * count // NUMBERS]
        return replace(example, input_ids=input_ids)


def replacements(token: str, tokenizer: "Tokenizer", rows: int) -> range:
    """The ids that `Masking` draws from.

    Args:
        token: `RANDOM` for the whole vocabulary, or one token as the vocabulary spells it.
        rows: of the model's embedding, which may be fewer than there are tokens.

    Raises:
        UserError: the vocabulary has no such token, or the embedding no row for it.
    """
    if token == RANDOM:
        return range(min(tokenizer.base_size, rows))
    index = tokenizer.id_of(token)
    if index is None or index >= rows:
        lacks = "the vocabulary" if index is None else "the embedding"
        raise UserError(
            f"mask_token {token!r}: is not in {lacks} of model {tokenizer.name}: set {RANDOM}, or "
            "a token of it, spelled as it is there"
        )
    return range(index, index + 1)
