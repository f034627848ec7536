"""Causal attention within each sequence of a packed row, blind across their borders; no masks, no padding."""

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from engine.cpu.attention import LONGEST_KEPT, KeptAttention, heads_first
from engine.packing import Batch


class PackedAttention:
    """Attention of one micro-batch, the same for every layer; an `Attend` of model.py."""

    def __init__(self, batch: Batch, dropout: float = 0.0):
        self.seqlens, self.cu_seqlens, self.dropout = batch.seqlens, batch.cu_seqlens, dropout

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """``query`` is ``[N, heads, head_dim]``, ``key`` and ``value`` ``[N, kv_heads, head_dim]``; as ``query``."""
        if (groups := query.shape[1] // key.shape[1]) > 1:
            key, value = (
                key.repeat_interleave(groups, dim=1),
                value.repeat_interleave(groups, dim=1),
            )
        half = query.dtype in (torch.bfloat16, torch.float16)
        if query.is_cuda and half and not self.dropout:
            longest = max(self.seqlens)
            return varlen.varlen_attn(
                query,
                key,
                value,
                self.cu_seqlens,
                self.cu_seqlens,
                longest,
                longest,
                window_size=(-1, 0),
            )
        if not (query.is_cuda or half or self.dropout or max(self.seqlens) > LONGEST_KEPT):
            return KeptAttention.apply(query, key, value, self.seqlens)
        outputs = [
            F.scaled_dot_product_attention(
                *(heads_first(tensor)[None] for tensor in sequence),
                is_causal=True,
                dropout_p=self.dropout,
            )[0].transpose(0, 1)
            for sequence in zip(
                *(tensor.split(self.seqlens) for tensor in (query, key, value)), strict=True
            )
        ]
        return torch.cat(outputs)
