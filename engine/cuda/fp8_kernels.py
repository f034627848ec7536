"""Triton kernels that round to 8-bit floats for `engine.cuda.fp8`.

By hand: they read each number once. torch.compile would read it twice, for the largest and then to
round, and compile anew for each width. This module imports Triton, so it is imported only where
there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST, SMALLEST = torch.finfo(E4M3).max, torch.finfo(torch.float32).tiny
ROWS, COLUMNS = 128, 64  # that a program transposes: it writes 128 adjacent bytes of each column
# Products are rounded as by separate operators: no fused multiply-add.
ROUNDED = {"enable_fp_fusion": False}


def quantised(numbers: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `engine.cuda.fp8.quantised`."""
    numbers = numbers.contiguous()
    rows, columns = numbers.shape
    rounded = torch.empty_like(numbers, dtype=E4M3)
    scales = numbers.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    _quantise[(rows,)](
        *(numbers, factors, rounded, scales, columns, block),
        *(LARGEST, SMALLEST),
        num_warps=warps(block),
        **ROUNDED,
    )
    return rounded, scales


def transposed(numbers: Tensor, scales: Tensor) -> Tensor:
    """As `engine.cuda.fp8.transposed`."""
    rows, columns = numbers.shape
    rounded = numbers.new_empty(columns, rows, dtype=E4M3)
    grid = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    _transpose[grid](numbers, scales, rounded, rows, columns, ROWS, COLUMNS, **ROUNDED)
    return rounded


def warps(block: int) -> int:
    """With them each thread has 16 numbers of a row; 32 of a very long one."""
    return min(max(block // 512, 1), 16)


@triton.jit
def _quantise(
    numbers,
    factors,
    rounded,
    scales,
    columns: tl.constexpr,
    block: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
):
    """One row, read once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    is_there = column < columns
    number = tl.load(numbers + row * columns + column, mask=is_there, other=0).to(tl.float32)
    if factors is not None:
        number *= tl.load(factors + column, mask=is_there, other=0)
    scale = tl.maximum(tl.max(tl.abs(number), 0) / largest, smallest)
    tl.store(scales + row, scale)
    number = (number * (1 / scale)).to(rounded.dtype.element_ty)
    tl.store(rounded + row * columns + column, number, mask=is_there)


@triton.jit
def _transpose(
    numbers,
    scales,
    rounded,
    rows: tl.constexpr,
    columns: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1).to(tl.int64) * block_columns + tl.arange(0, block_columns)
    is_row, is_there = row < rows, (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    number = tl.load(numbers + at, mask=is_there, other=0).to(tl.float32)
    scale = tl.load(scales + row, mask=is_row, other=1)
    number = (number * (1 / scale)[:, None]).to(rounded.dtype.element_ty)
    at = column[:, None] * rows + row[None, :]
    tl.store(rounded + at, tl.trans(number), mask=tl.trans(is_there))
