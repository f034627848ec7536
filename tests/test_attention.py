"""Packed attention equals textbook attention of each sequence alone."""

import math

import pytest
import torch

from engine import attention, packing
from engine.cpu import kernels
from engine.device import cpu_kernels

EXACT = {"rtol": 0, "atol": 1e-12}


def batch_of(seqlens: tuple[int, ...]) -> packing.MicroBatch:
    sequences = [packing.Example([1] * (length + 1), [1] * (length + 1)) for length in seqlens]
    return packing.collate(sequences, cpu_kernels(with_onednn=False))


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
def test_kept_attention_equals_the_textbook_with_its_gradients(block: int, kv_heads: int) -> None:
    """Guards against a block that sees too much or too little, and gradients in the wrong place."""
    batch = batch_of((9, 1, 16, 8, 5))
    torch.manual_seed(0)
    tokens = batch.num_tokens
    tensors = [
        torch.randn(tokens, heads, 6, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    upstream = torch.randn(tokens, 4, 6, dtype=torch.float64)
    ours = kernels.packed_attention(batch, 0.0, 0, *tensors, query_block=block)
    theirs = textbook(*tensors, batch.seqlens)
    assert "KeptAttention" in ours.grad_fn.name()
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors, upstream),
        torch.autograd.grad(theirs, tensors, upstream),
        **EXACT,
    )


def test_repeatable_attention_equals_the_textbook_and_asks_for_determinism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against other bits in a resumed run in float32 on a GPU, and other gradients."""
    batch, modes = batch_of((9, 1, 16)), []
    compute = attention.attention_of_each

    def watched(*arguments: object) -> torch.Tensor:
        modes.append(torch.are_deterministic_algorithms_enabled())
        return compute(*arguments)

    monkeypatch.setattr(attention, "attention_of_each", watched)
    monkeypatch.setattr(attention, "is_for_efficient_attention", lambda query: True)
    torch.manual_seed(0)
    tensors = [torch.randn(64, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(64, 4, 6, dtype=torch.float64)
    ours = attention.packed_attention(batch, 0.0, 0, *tensors)
    theirs = textbook(*tensors, batch.seqlens)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors, upstream),
        torch.autograd.grad(theirs, tensors, upstream),
        **EXACT,
    )
    assert modes == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()
    dropped = attention.packed_attention(batch, 0.5, 0, *tensors)
    assert "Repeatable" not in dropped.grad_fn.name()  # which would drop others the second time


def test_a_long_sequence_keeps_no_square() -> None:
    """Guards against memory that grows with the square of the length, where the length is large."""
    torch.manual_seed(0)
    batch = batch_of((61, 3))
    tensors = [torch.randn(64, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    kept = kernels.packed_attention(batch, 0.0, 0, *tensors, longest_kept=61)
    output = kernels.packed_attention(batch, 0.0, 0, *tensors, longest_kept=60)
    assert "KeptAttention" in kept.grad_fn.name() and "KeptAttention" not in output.grad_fn.name()
    torch.testing.assert_close(output, textbook(*tensors, batch.seqlens), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_device_computes_the_same_attention(dtype: torch.dtype, kv_heads: int) -> None:
    """Guards against a path that only a GPU, another dtype or dropout takes, and nobody tries."""
    torch.manual_seed(0)
    batch = batch_of((9, 1, 16, 8, 5))
    shapes = [(batch.num_tokens, heads, 6) for heads in (4, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    expected = textbook(*(tensor.double() for tensor in tensors), batch.seqlens)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3  # which has 8 bits
    for function in (attention.packed_attention, kernels.packed_attention):
        found = function(batch, 0.0, 0, *tensors)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
