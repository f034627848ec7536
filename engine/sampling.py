"""Choosing the next token from the logits at random."""

from collections.abc import Callable

import torch
from torch import Tensor

# choose(logits, numbers) returns the next tokens [n], for logits [n, vocabulary], from a random
# number in float64 for each. It reads nothing on the host, so a CUDA graph can replay it.
Choose = Callable[[Tensor, Tensor], Tensor]


def sampled(temperature: float, logits: Tensor, numbers: Tensor) -> Tensor:
    """Tokens from softmax(logits / temperature), a `Choose` once ``temperature`` is bound.

    The distribution function is inverted at each of ``numbers``.
    """
    logits = logits.double()  # a float32 sum of 32,000 terms would lose the small ones
    # The largest is subtracted first, so that no temperature makes the quotient infinite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    summed = logits.softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(summed, numbers[:, None] * summed[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[-1] - 1)
