"""A Triton kernel for the attention of a decoding step, which has one new token in each row.

FlashAttention-2 computes 128 queries at a time, of which a decoding step has one, so arithmetic
limits it. This kernel computes 16, the fewest that tensor cores take: query heads that share a key
head, and zeros. So what limits it is reading keys and values, each once.

This module imports Triton, so it is imported only where there is a GPU.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

HEADS = 16  # query heads of one key head that a program computes
KEYS = 32  # that it reads at a time
# A pass of the loop is computed while the keys and values of the next are on their way.
OPTIONS = {"num_stages": 3, "enable_fp_fusion": True}


def attend(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one new token of each of N sequences: online softmax (arXiv:2205.14135).

    A row's result is the same, bit by bit, whatever the other rows are. Nothing is read on the
    host, so that a CUDA graph can replay it. No gradient.

    Args:
        query: ``[N, heads, head_dim]``, as is the result, in bfloat16 or float16; each token's
            heads are adjacent.
        keys, values: ``[tokens, kv_heads, head_dim]``, contiguous.
        starts: ``[N]``, the token of each sequence's first key.
        lengths: ``[N]``, at least 1: the number of each sequence's keys, which are adjacent. What
            other tokens hold, even NaN, is not read.
    """
    rows, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    parts = triton.cdiv(group, HEADS)
    # A power of two, which the compiler requires, and as much as tensor cores take.
    block_dim = max(16, triton.next_power_of_2(head_dim))
    output = query.new_empty(query.shape)
    _attend[(rows * kv_heads * parts,)](
        *(query, keys, values, starts, lengths, output),
        *(query.stride(0), math.log2(math.e) * head_dim**-0.5),
        *(kv_heads, group, parts, head_dim, block_dim, HEADS, KEYS),
        num_warps=warps(block_dim),
        **OPTIONS,
    )
    return output


def warps(block_dim: int) -> int:
    """One, which waits for no other; but a large head needs the registers of two."""
    return max(1, block_dim // 128)


@triton.jit
def _attend(
    query,
    keys,
    values,
    starts,
    lengths,
    output,
    query_stride,
    scale,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    parts: tl.constexpr,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_heads: tl.constexpr,
    block_keys: tl.constexpr,
):
    """One row, one key head, and as many as ``block_heads`` of its query heads."""
    program = tl.program_id(0)
    row = (program // (kv_heads * parts)).to(tl.int64)
    kv_head = program // parts % kv_heads
    length = tl.load(lengths + row).to(tl.int32)
    width: tl.constexpr = kv_heads * head_dim
    first = tl.load(starts + row).to(tl.int64) * width + kv_head * head_dim
    column = tl.arange(0, block_dim)[None, :]
    head = program % parts * block_heads + tl.arange(0, block_heads)[:, None]
    is_head = (head < group) & (column < head_dim)
    at = (kv_head * group + head) * head_dim + column
    q = tl.load(query + row * query_stride + at, mask=is_head, other=0.0)

    number = tl.arange(0, block_keys)
    keys += first + number[:, None] * width + column
    values += first + number[:, None] * width + column
    largest = tl.full([block_heads], float("-inf"), tl.float32)
    total = tl.zeros([block_heads], tl.float32)
    attended = tl.zeros([block_heads, block_dim], tl.float32)
    for done in range(0, length, block_keys):
        is_seen = number < length - done
        is_there = is_seen[:, None] & (column < head_dim)
        k = tl.load(keys, mask=is_there, other=0.0)
        scores = tl.where(is_seen[None, :], tl.dot(q, k.T) * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrunk = tl.exp2(largest - larger)
        total = total * shrunk + tl.sum(weights, 1)
        v = tl.load(values, mask=is_there, other=0.0)
        attended = tl.dot(weights.to(v.dtype), v, attended * shrunk[:, None])
        largest = larger
        keys += block_keys * width
        values += block_keys * width
    target = output + row * (kv_heads * group * head_dim) + at
    tl.store(target, (attended / total[:, None]).to(q.dtype), mask=is_head)
