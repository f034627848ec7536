"""Checks that the ranks of a job have the same rows and the same model."""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.llama import Llama
    from engine.packing import Example

SAMPLED = 64  # numbers of each weight, at most


def check_same_on_all(model: "Llama", examples: Iterable["Example"]) -> None:
    """Raises UserError on all of several ranks if their rows differ, or a sample of their weights.

    They would wait for each other's micro-batches, or compute with a mixture of two models.
    """
    if model.ranks.size == 1:
        return
    rows, weights = hashlib.sha256(), hashlib.sha256()
    for example in examples:
        rows.update(repr((example.input_ids, example.labels)).encode())
    for weight in model.pretrained.parameters():
        some = weight.detach().flatten()[:: 1 + weight.numel() // SAMPLED]
        weights.update(some.double().cpu().numpy().tobytes())
    model.ranks.check_same({"rows": rows.hexdigest(), "weights": weights.hexdigest()})
