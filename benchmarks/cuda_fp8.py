"""Products in 8-bit floats, for the steps facts and small of cuda.py."""

from functools import partial

import torch
import torch.nn.functional as F

# This benchmark's neighbour, which also puts the repository on the path.
from cuda_work import Work, relative_error
from torch import Tensor

from engine.cuda import fp8
from engine.cuda.kernels import fp8_kernels


def measure_fp8_products(work: Work, rows: int, inputs: int, outputs: int) -> None:
    """One product of `engine.cuda.fp8`, and each rounding that it needs, beside bfloat16's.

    "fast" adds with fewer bits, which is not how a layer does it.
    """
    like = {"dtype": torch.bfloat16, "device": work.device}
    hidden, weight = torch.randn(rows, inputs, **like), torch.randn(outputs, inputs, **like) * 0.02
    rounding = fp8_kernels(work.device.type) or fp8.PYTORCH
    (tokens, token_scales), (columns, scales) = map(rounding.quantised, (hidden, weight))
    factors = torch.rand(inputs, device=work.device)
    ours = partial(fp8.scaled_product, tokens, columns.T, token_scales, scales.T)
    fast = fp8.scaled_product if work.is_dry else product_in_a_hurry
    timed = {
        "bfloat16": partial(F.linear, hidden, weight),
        "fp8": ours,
        "fast": partial(fast, tokens, columns.T, token_scales, scales.T),
        "hidden": partial(rounding.quantised, hidden),
        "gradient": partial(rounding.quantised, hidden, factors),
        "weight": partial(rounding.quantised, weight),
        "transpose": partial(rounding.transposed, weight, scales.flatten()),
    }
    us = {name: work.milliseconds(function) * 1e3 for name, function in timed.items()}
    exact = F.linear(hidden.double(), weight.double())
    rounded = (tokens.double() * token_scales) @ (columns.double() * scales).T
    work.results.write(
        "fp8 product",
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        us=us,
        TFLOP_per_s=2 * rows * inputs * outputs / us["fp8"] / 1e6,
        hidden_TB_per_s=3 * hidden.numel() / us["hidden"] / 1e6,
        transpose_TB_per_s=3 * weight.numel() / us["transpose"] / 1e6,
        error=relative_error(ours(), exact),
        error_but_for_rounding=relative_error(ours(), rounded),
        error_of_fast=relative_error(timed["fast"](), rounded),
        same_bits_twice=torch.equal(ours(), ours()),
    )


def product_in_a_hurry(
    left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor
) -> Tensor:
    by_row = F.ScalingType.RowWise
    scales = left_scales, by_row, right_scales.contiguous(), by_row
    return F.scaled_mm(left, right, *scales, use_fast_accum=True)
