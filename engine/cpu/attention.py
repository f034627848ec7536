"""Attention in training on a CPU."""

from collections.abc import Iterator
from typing import Any

import torch

# On the CPU: queries at a time, and the longest sequence whose probabilities are worth keeping.
QUERY_BLOCK, LONGEST_KEPT = 64, 1024


class KeptAttention(torch.autograd.Function):
    """Attention on the CPU that keeps its probabilities for the backward pass.

    ``scaled_dot_product_attention`` computes them twice, to hold no square of a long sequence. For
    sequences as short as GSM8K's the squares are smaller than the other activations. Each block of
    queries meets only the keys before its end: little is computed that causality hides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seqlens: tuple[int, ...],
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        queries, keys, values, outputs = (
            heads_first(tensor) for tensor in (query, key, value, output)
        )
        longest = max(seqlens)
        future = query.new_full((longest, longest), -torch.inf).triu_(1)
        kept = []
        for start, first, end in _blocks(seqlens):
            rows, columns = slice(start + first, start + end), slice(start, start + end)
            scores = torch.baddbmm(
                future[first:end, :end],
                queries[:, rows],
                keys[:, columns].mT,
                alpha=query.shape[-1] ** -0.5,
            )
            probabilities = torch.softmax(scores, dim=-1, out=scores)
            outputs[:, rows] = torch.bmm(probabilities, values[:, columns])
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.seqlens = seqlens
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grads = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        queries, keys, values, grad_outputs = (
            heads_first(tensor) for tensor in (query, key, value, grad)
        )
        grad_queries, grad_keys, grad_values = (heads_first(tensor) for tensor in grads)
        scale = query.shape[-1] ** -0.5
        for (start, first, end), probabilities in zip(_blocks(ctx.seqlens), kept, strict=True):
            rows, columns = slice(start + first, start + end), slice(start, start + end)
            grad_rows = grad_outputs[:, rows]
            grad_values[:, columns] += torch.bmm(probabilities.mT, grad_rows)
            grad_probabilities = torch.bmm(grad_rows, values[:, columns].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, query.dtype
            )
            grad_queries[:, rows] = torch.bmm(grad_scores.mul_(scale), keys[:, columns])
            grad_keys[:, columns] += torch.bmm(grad_scores.mT, queries[:, rows])
        return *grads, None


def heads_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1)


def _blocks(seqlens: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Where each sequence starts in the row, and where in it each block of its queries begins and ends."""
    start = 0
    for length in seqlens:
        for first in range(0, length, QUERY_BLOCK):
            yield start, first, min(first + QUERY_BLOCK, length)
        start += length
