"""Causal attention within each sequence of a micro-batch, never across sequence boundaries."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from engine.packing import MicroBatch


def packed_attention(
    micro_batch: "MicroBatch", dropout: float, layer: int, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attention of all sequences of a micro-batch; an `Attend` once two arguments are bound.

    Args:
        query: ``[T, heads, head_dim]``, as is the result.
        key, value: ``[T, kv_heads, head_dim]``.
    """
    if not dropout and is_for_flash_attention(query):
        borders, longest = micro_batch.cu_seqlens, max(micro_batch.seqlens)
        return FlashAttention.apply(query, key, value, borders, longest)
    if query.shape[1] != key.shape[1]:
        key, value = for_each_head(query, key, value)
    if not dropout and is_for_efficient_attention(query):
        return RepeatableAttention.apply(micro_batch.seqlens, query, key, value)
    return attention_of_each(micro_batch.seqlens, dropout, query, key, value)


def kept_bytes(heads: int, kv_heads: int, head_dim: int, longest: int, dtype: torch.dtype) -> int:
    """What `packed_attention` on a GPU keeps of a token for its backward pass, with its output.

    `FlashAttention` keeps query, key, value, the output, and a float32 logarithm per head.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return kept_bytes_of_each(heads, head_dim, dtype)
    return 2 * (heads + kv_heads) * head_dim * dtype.itemsize + 4 * heads


def kept_bytes_of_each(heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """The same for `attention_of_each`.

    Query, key and value, repeated for each head, the output of each sequence, all outputs together,
    and a float32 logarithm per head. (`RepeatableAttention` keeps a fifth less.)
    """
    return heads * (5 * head_dim * dtype.itemsize + 4)


def is_for_flash_attention(query: Tensor) -> bool:
    """Whether PyTorch's FlashAttention-2 has a kernel for ``query``, ``[N, heads, head_dim]``."""
    head_dim = query.shape[-1]
    has_dtype = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and has_dtype and head_dim <= 256 and head_dim % 8 == 0


class FlashAttention(torch.autograd.Function):
    """Causal attention of packed sequences by FlashAttention-2 (arXiv:2307.08691).

    The operator below `torch.nn.attention.varlen`, called directly: it has the same arguments in
    all versions since 2.11, and a deterministic backward pass, which varlen does not ask for.
    Query heads may share key heads; the operator adds up the gradients of a shared one.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int
    ) -> Tensor:
        """``borders``: ``[sequences + 1]``, int32; ``longest``: the longest sequence's tokens."""
        output, logsumexp, *random_state, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, borders, borders, longest, longest, 0.0, True, False
        )
        # The backward operator asks for the state of the dropout, even if there is none.
        ctx.save_for_backward(query, key, value, output, logsumexp, borders, *random_state)
        ctx.longest = longest
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, borders, seed, unused = ctx.saved_tensors
        lengths = borders, borders, ctx.longest, ctx.longest
        with deterministic_algorithms():
            grads = torch.ops.aten._flash_attention_backward(
                grad, *saved, *lengths, 0.0, True, seed, unused
            )
        return *grads, None, None


def is_for_efficient_attention(query: Tensor) -> bool:
    """Whether PyTorch computes it by memory-efficient attention, which sums in any order."""
    return query.is_cuda and query.dtype == torch.float32 and query.shape[-1] % 4 == 0


class RepeatableAttention(torch.autograd.Function):
    """`attention_of_each` without dropout, with gradients that have the same bits each time.

    Its operators decide in their backward pass whether they are deterministic, so this computes
    them again there. That is for float32, in which attention is a small part of a step. Heads that
    FlashAttention does not take, and dropout, have other operators.
    """

    @staticmethod
    def forward(
        ctx: Any, seqlens: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.seqlens = seqlens
        return attention_of_each(seqlens, 0.0, query, key, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad(), deterministic_algorithms():
            output = attention_of_each(ctx.seqlens, 0.0, *inputs)
            return None, *torch.autograd.grad(output, inputs, grad)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside this context, operators compute the same bits each time.

    FlashAttention's gradient of the query is otherwise summed in whatever order its blocks finish,
    and a run that resumes would not repeat the losses of one that was never stopped. All of a step
    but attention is deterministic by itself. Asked for everywhere, other operators would become
    slower or refuse. Unlike `torch.use_deterministic_algorithms`, this leaves torch.compile's
    settings alone.
    """
    deterministic = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode("error")
        deterministic.fill_uninitialized_memory = False  # which the operator has no use for
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fills


def attend_to_lengths(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
) -> Tensor:
    """Attention of one new token of each of N sequences, if `is_for_flash_attention`. No gradient.

    Nothing is read on the host, so that a CUDA graph can replay it.

    Args:
        query: ``[N, heads, head_dim]``, as is the result.
        keys, values: ``[rows, kv_heads, head_dim]``, of all sequences, in any rows.
        new: ``[N + 1]``, int32: the numbers 0 to N.
        starts: ``[N + 1]``, int32: the row of each sequence's first key; the last one is not used.
        lengths: ``[N]``, int32: the number of each sequence's keys, which are in adjacent rows.
        longest: an upper bound on ``lengths``.
    """
    borders = new, starts, 1, longest
    return torch.ops.aten._flash_attention_forward(
        query, keys, values, *borders, 0.0, False, False, seqused_k=lengths
    )[0]


def for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat ``key`` and ``value`` for query heads that share them (grouped-query attention)."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def attention_of_each(
    seqlens: tuple[int, ...], dropout: float, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """One sequence at a time, for what `FlashAttention` does not compute."""
    outputs = [
        F.scaled_dot_product_attention(
            *(tensor.transpose(0, 1)[None] for tensor in sequence),
            is_causal=True,
            dropout_p=dropout,
        )[0].transpose(0, 1)
        for sequence in zip(*(tensor.split(seqlens) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs)
