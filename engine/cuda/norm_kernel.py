"""A Triton kernel for the backward pass of a norm in training.

By hand: torch.compile sums over tokens, for the weight, in a kernel of its own, which reads the
inputs once more. This module imports Triton, so it is imported only where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # that a program computes
# Products are rounded before they are added, as by separate operators: no fused multiply-add.
ROUNDED = {"enable_fp_fusion": False}


def norm_gradients(
    grad_total: Tensor | None,
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor,
    is_trained: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `engine.fused.rms_norm_backward`, or with ``grad_total`` as `add_rms_norm_backward`.

    Args:
        grad_total, grad, hidden: ``[N, hidden]``.
        weight: ``[hidden]``.
        scale: ``[N, 1]``, the factor of each token.
    """
    grad, hidden = grad.contiguous(), hidden.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    rows, columns = hidden.shape
    programs, block = triton.cdiv(rows, TOKENS), triton.next_power_of_2(columns)
    grad_hidden = torch.empty_like(hidden)
    # A sum for each program. They are added in the same order every time, unlike by atomics.
    sums = scale.new_empty(programs if is_trained else 0, columns)
    _norm_backward[programs,](
        *(grad_total, grad, hidden, weight, scale, grad_hidden, sums, rows),
        *(columns, block, TOKENS, is_trained),
        *(tl.float64 if scale.dtype == torch.float64 else tl.float32,),
        num_warps=warps(block),
        **ROUNDED,
    )
    return grad_hidden, sums.sum(0).to(weight.dtype) if is_trained else None


def warps(block: int) -> int:
    """With them each thread reads 16 bytes of 2-byte numbers at a time, or several times."""
    return min(max(block // 256, 1), 16)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    grad_total,
    grad,
    hidden,
    weight,
    scale,
    grad_hidden,
    sums,
    rows,
    columns: tl.constexpr,
    block: tl.constexpr,
    tokens: tl.constexpr,
    is_trained: tl.constexpr,
    exact: tl.constexpr,
):
    """Some tokens, one after the other, each as a whole."""
    dtype = grad.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    w = tl.load(weight + column, mask=column < columns, other=0).to(exact)
    total = tl.full([block], 0, exact)
    for number in range(tokens):
        row = program * tokens + number
        at = row * columns + column
        is_there = column < tl.where(row < rows, columns, 0)
        # All is read before the sum below, for which the program's threads wait for each other.
        s = tl.load(scale + row, mask=row < rows, other=0)
        g = tl.load(grad + at, mask=is_there, other=0).to(exact)
        normed = tl.load(hidden + at, mask=is_there, other=0).to(exact) * s
        if grad_total is not None:
            before = tl.load(grad_total + at, mask=is_there, other=0).to(exact)
        if is_trained:
            total += g * normed
        grad_normed = (g * w).to(dtype).to(exact)
        along = tl.sum(grad_normed * normed) / columns
        result = ((grad_normed - normed * along) * s).to(dtype)
        if grad_total is not None:
            result = (before + result.to(exact)).to(dtype)
        tl.store(grad_hidden + at, result, mask=is_there)
    if is_trained:
        tl.store(sums + program * columns + column, total, mask=column < columns)
