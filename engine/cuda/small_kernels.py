"""Triton kernels for what lies between the products and attention of a decoding step's layer.

By hand, not by torch.compile: that takes seconds to import and compile, as much as it would save on
a test set, and makes two kernels of `rotate_into` where query heads share key heads. This module
imports Triton, so it is imported only where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 16  # that a program rotates: of 128 components of 2 bytes, each thread reads 16 bytes
COLUMNS = 1024  # that a program of `gated` computes
# Products are rounded before they are added, as by separate operators: no fused multiply-add.
ROUNDED = {"enable_fp_fusion": False}


def rotate_into(
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Rotate query and key (arXiv:2104.09864), and write key and value into the cache.

    Args:
        cos, sin: ``[N, 1, head_dim]``. Both halves of cos are equal; of sin, the first is negated.
        query: ``[N, heads, head_dim]``, as is the result; each token's heads are adjacent.
        key, value: ``[N, kv_heads, head_dim]``; likewise.
        tokens: ``[N]``, where in the cache.
        keys, values: ``[tokens, kv_heads, head_dim]``, the cache of one layer.

    Returns:
        The rotated query.
    """
    rows, heads, head_dim = query.shape
    kv_heads, half = key.shape[1], head_dim // 2
    rotated = query.new_empty(query.shape)
    blocks, kv_blocks = triton.cdiv(heads, HEADS), triton.cdiv(kv_heads, HEADS)
    _rotate_into[rows, blocks + 2 * kv_blocks](
        *(cos, sin, query, key, value, tokens, rotated, keys, values),
        *(query.stride(0), key.stride(0), value.stride(0), heads, kv_heads, half),
        *(blocks, kv_blocks, HEADS, triton.next_power_of_2(half), _exact(query)),
        **ROUNDED,
    )
    return rotated


def gated(both: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202), ``[N, intermediate]``, of the two side by side."""
    rows, columns = both.shape[0], both.shape[1] // 2
    output = both.new_empty(rows, columns)
    _gated[rows, -(-columns // COLUMNS)](both, output, columns, COLUMNS, _exact(both), **ROUNDED)
    return output


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `F.rms_norm` (arXiv:1910.07467) of ``[N, columns]``, adjacent; it rounds once."""
    rows, columns = hidden.shape
    output = hidden.new_empty(hidden.shape)
    block = triton.next_power_of_2(columns)
    _rms_norm[(rows,)](
        *(hidden, weight, output, columns, epsilon, block, _exact(hidden)),
        num_warps=warps(block),
        **ROUNDED,
    )
    return output


def warps(block: int) -> int:
    """So that a thread has 16 numbers of a row; more in a very long one."""
    return min(16, max(1, block // 512))


def _exact(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def _rotate_into(
    cos,
    sin,
    query,
    key,
    value,
    tokens,
    rotated,
    keys,
    values,
    query_stride,
    key_stride,
    value_stride,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    blocks: tl.constexpr,
    kv_blocks: tl.constexpr,
    block_heads: tl.constexpr,
    block_half: tl.constexpr,
    exact: tl.constexpr,
):
    """One row, and a block of heads of either query, key or value."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    block = tl.program_id(1)
    column = tl.arange(0, block_half)[None, :]
    head = tl.arange(0, block_heads)[:, None]
    if block < blocks:
        head += block * block_heads
        is_there = (head < heads) & (column < half)
        at = head * (2 * half) + column
        source, target = query + row * query_stride, rotated + row * (heads * 2 * half)
        _rotate(cos, sin, row, source + at, target + at, column, is_there, half, exact)
    elif block < blocks + kv_blocks:
        head += (block - blocks) * block_heads
        is_there = (head < kv_heads) & (column < half)
        at = head * (2 * half) + column
        source, target = key + row * key_stride, keys + token * (kv_heads * 2 * half)
        _rotate(cos, sin, row, source + at, target + at, column, is_there, half, exact)
    else:
        head += (block - blocks - kv_blocks) * block_heads
        is_there = (head < kv_heads) & (column < half)
        at = head * (2 * half) + column
        source, target = value + row * value_stride, values + token * (kv_heads * 2 * half)
        tl.store(target + at, tl.load(source + at, mask=is_there), mask=is_there)
        at += half
        tl.store(target + at, tl.load(source + at, mask=is_there), mask=is_there)


@triton.jit
def _rotate(
    cos, sin, row, source, target, column, is_there, half: tl.constexpr, exact: tl.constexpr
):
    dtype = source.dtype.element_ty
    angle = row * (2 * half) + half + column
    c = tl.load(cos + angle, mask=column < half).to(exact)
    s = tl.load(sin + angle, mask=column < half).to(exact)
    first = tl.load(source, mask=is_there).to(exact)
    second = tl.load(source + half, mask=is_there).to(exact)
    first_c, first_s = (first * c).to(dtype).to(exact), (first * s).to(dtype).to(exact)
    second_c, second_s = (second * c).to(dtype).to(exact), (second * s).to(dtype).to(exact)
    tl.store(target, (first_c - second_s).to(dtype), mask=is_there)
    tl.store(target + half, (second_c + first_s).to(dtype), mask=is_there)


@triton.jit
def _gated(both, output, columns, block: tl.constexpr, exact: tl.constexpr):
    dtype = both.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_there = column < columns
    at = row * (2 * columns) + column
    gate = tl.load(both + at, mask=is_there).to(exact)
    up = tl.load(both + at + columns, mask=is_there).to(exact)
    activated = (gate / (1 + tl.exp(-gate))).to(dtype).to(exact)
    tl.store(output + row * columns + column, (activated * up).to(dtype), mask=is_there)


@triton.jit
def _rms_norm(
    hidden,
    weight,
    output,
    columns: tl.constexpr,
    epsilon: tl.constexpr,
    block: tl.constexpr,
    exact: tl.constexpr,
):
    """One row, read once."""
    column = tl.arange(0, block)
    is_there = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    row = tl.load(hidden + at, mask=is_there, other=0.0).to(exact)
    scale = tl.load(weight + column, mask=is_there, other=0.0).to(exact)
    mean = tl.sum(row * row, 0) / columns
    normed = row * (1 / tl.sqrt(mean + epsilon)) * scale
    tl.store(output + at, normed.to(output.dtype.element_ty), mask=is_there)
