"""Causal attention within each sequence of a micro-batch, never across sequence boundaries."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

if TYPE_CHECKING:
    from engine.packing import MicroBatch


def packed_attention(
    micro_batch: "MicroBatch",
    dropout: float,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Attention of all sequences of a micro-batch; an `Attend` once two arguments are bound.

    Args:
        query: ``[T, heads, head_dim]``, as is the result.
        key, value: ``[T, kv_heads, head_dim]``.
    """
    if query.shape[1] != key.shape[1]:
        key, value = for_each_head(query, key, value)
    if query.dtype in (torch.bfloat16, torch.float16) and not dropout and query.is_cuda:
        borders, longest = micro_batch.cu_seqlens, max(micro_batch.seqlens)
        return varlen.varlen_attn(
            query, key, value, borders, borders, longest, longest, window_size=(-1, 0)
        )
    return attention_of_each(micro_batch.seqlens, dropout, query, key, value)


def kept_bytes(heads: int, head_dim: int, longest: int, dtype: torch.dtype) -> int:
    """What `packed_attention` keeps of a token for its backward pass, with its output.

    Query, key, value, the output, and a float32 logarithm per head. If key and value have fewer
    heads, this is the size of their copies.
    """
    return heads * (4 * head_dim * dtype.itemsize + 4)


def for_each_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat ``key`` and ``value`` for query heads that share them (grouped-query attention)."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def attention_of_each(
    seqlens: tuple[int, ...],
    dropout: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """One sequence at a time, for devices, dtypes and dropout that `varlen_attn` can't handle."""
    outputs = [
        F.scaled_dot_product_attention(
            *(tensor.transpose(0, 1)[None] for tensor in sequence),
            is_causal=True,
            dropout_p=dropout,
        )[0].transpose(0, 1)
        for sequence in zip(*(tensor.split(seqlens) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs)
