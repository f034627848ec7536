"""Packed attention equals textbook attention of each sequence alone."""

import math
from collections.abc import Callable

import pytest
import torch

from engine import attention, packing
from engine.cpu import attention as cpu_attention

EXACT = {"rtol": 0, "atol": 1e-12}


def batch_of(seqlens: tuple[int, ...]) -> packing.Batch:
    return packing.collate(
        [packing.Example([1] * (length + 1), [1] * (length + 1)) for length in seqlens]
    )


def textbook(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seqlens: tuple[int, ...]
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V over the whole row, with the mask written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    sequence = torch.repeat_interleave(torch.tensor(seqlens))
    position = torch.arange(len(sequence))
    seen = (sequence[:, None] == sequence) & (position[:, None] >= position)
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("block", [1, 3, 8, 64])
def test_kept_attention_equals_the_textbook_with_its_gradients(
    block: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a block that sees too much or too little, and gradients added to the wrong sequence."""
    monkeypatch.setattr(cpu_attention, "QUERY_BLOCK", block)
    calls = spy(monkeypatch, cpu_attention.KeptAttention, "apply")
    batch = batch_of((9, 1, 16, 8, 5))
    torch.manual_seed(0)
    tokens = batch.num_tokens
    tensors = [
        torch.randn(tokens, heads, 6, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    upstream = torch.randn(tokens, 4, 6, dtype=torch.float64)
    ours = attention.PackedAttention(batch)(0, *tensors)
    theirs = textbook(*tensors, batch.seqlens)
    assert len(calls) == 1
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors, upstream),
        torch.autograd.grad(theirs, tensors, upstream),
        **EXACT,
    )


def test_a_long_sequence_keeps_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against memory that grows with the square of the length, where the length is large."""
    monkeypatch.setattr(attention, "LONGEST_KEPT", 60)
    calls = spy(monkeypatch, cpu_attention.KeptAttention, "apply")
    torch.manual_seed(0)
    batch = batch_of((61, 3))
    tensors = [torch.randn(64, 4, 6, dtype=torch.float64) for _ in range(3)]
    output = attention.PackedAttention(batch)(0, *tensors)
    assert not calls
    torch.testing.assert_close(output, textbook(*tensors, batch.seqlens), **EXACT)


def spy(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    original: Callable[..., torch.Tensor] = getattr(owner, name)
    calls: list[object] = []

    def recorded(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(owner, name, recorded)
    return calls
