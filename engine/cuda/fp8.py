"""Linear layers that train with products in 8-bit floats (FP8, arXiv:2209.05433).

GPUs that have such products (H100, RTX 4090 and newer) compute them twice as fast as in bfloat16.
The outputs and the gradients of the inputs are computed so. All else remains: weights and what is
saved for the backward pass are bfloat16, and the gradient of a weight is a product in bfloat16 that
adds to the one before. torchao names this recipe rowwise_with_gw_hp.

A float of 8 bits has 3 of them for its mantissa, and reaches from 0.002 to 448. So each token is
divided by a scale, after which its largest number is 448, and so is each row of a weight. A token's
numbers do not depend on the tokens beside it. So the gradient still depends on how a step is split
into micro-batches by nothing but the order of additions.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from engine.cuda.linear import Linear, add_gradient_of_weight
from engine.device_errors import is_out_of_memory
from run.errors import UserError, cause_of

if TYPE_CHECKING:
    from engine.llama import Llama

E4M3 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
LARGEST = torch.finfo(E4M3).max
SMALLEST = torch.finfo(torch.float32).tiny  # scale, as of a row of zeros: its inverse is finite
MULTIPLE = 16  # of which the sizes of a layer must be one
# Of a product, relative to the same in bfloat16. Rounding to 3 bits of mantissa causes 0.04.
MOST_ERROR = 0.1


class Fp8Linear(Linear):
    """A linear layer that trains with products in 8-bit floats, and else is like any other.

    Attributes:
        rounding: has `quantised` and `transposed`; None: those of this module.
    """

    rounding: ModuleType | None = None

    def product(self, *inputs: Any) -> Tensor:
        rounding = self.rounding
        return Fp8Product.apply(
            rounding.quantised if rounding else quantised,
            rounding.transposed if rounding else transposed,
            *inputs,
        )


class Fp8Product(torch.autograd.Function):
    """``hidden @ weight.T + bias``, of both in 8-bit floats."""

    @staticmethod
    def forward(
        ctx: Any,
        quantised: Callable[..., tuple[Tensor, Tensor]],
        transposed: Callable[..., Tensor],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Any,
    ) -> Tensor:
        tokens, token_scales = quantised(hidden)
        rows, scales = quantised(weight)
        ctx.weight, ctx.kept, ctx.scales = weight, kept, scales.flatten()
        ctx.quantised, ctx.transposed = quantised, transposed
        output = product(tokens, rows.T, token_scales, scales.T)
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *_, needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_weight = add_gradient_of_weight(ctx, grad) if needs_weight else None
        grad_hidden = None
        if needs_hidden:
            # This product sums over the weight's rows, so their scales can't follow it.
            tokens, token_scales = ctx.quantised(grad, ctx.scales)
            columns = ctx.transposed(ctx.weight, ctx.scales)
            ones = token_scales.new_ones(1, len(columns))
            grad_hidden = product(tokens, columns.T, token_scales, ones)
        return None, None, grad_hidden, grad_weight, grad.sum(0) if needs_bias else None, None


def product(left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor) -> Tensor:
    """``(left * left_scales) @ (right * right_scales)`` in bfloat16, summed in float32.

    Args:
        left, right: ``[N, K]``, and ``[K, M]`` whose columns are adjacent in memory.
        left_scales, right_scales: ``[N, 1]`` and ``[1, M]``.
    """
    by_row = ScalingType.RowWise
    return F.scaled_mm(left, right, left_scales, by_row, right_scales.contiguous(), by_row)


# ---------------------------------------------------------------- rounding


def quantised(numbers: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[N, K]`` in 8-bit floats, and the scales ``[N, 1]`` by which they must be multiplied.

    Args:
        factors: ``[K]``, by which the columns are multiplied before; None: by nothing.
    """
    exact = numbers.float() if factors is None else numbers * factors
    scales = exact.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_(min=SMALLEST)
    return (exact * (1 / scales)).to(E4M3), scales


def transposed(numbers: Tensor, scales: Tensor) -> Tensor:
    """The transpose of what `quantised` makes of ``[N, K]``, given its ``[N]`` scales."""
    return (numbers.float() * (1 / scales)[:, None]).to(E4M3).T.contiguous()


# ---------------------------------------------------------------- a model's layers


def use_fp8(find_kernels: Callable[[], ModuleType | None], model: "Llama") -> None:
    """Let the linear layers of all blocks train with products in 8-bit floats, in place.

    Adapters beside them remain as they are, and so does the head, whose logits make the loss.

    Args:
        find_kernels: finds `engine.cuda.fp8_kernels`; None where PyTorch's operators are to round.

    Raises:
        UserError: such products fail on this device, or are wrong.
    """
    layers, rounding = list(_layers(model)), find_kernels()
    for outputs, inputs in sorted({(one.out_features, one.in_features) for one in layers}):
        check_product(outputs, inputs, model.kernels.device, rounding)
    for layer in layers:
        # The same objects, by which FSDP knows the layers that it has spread.
        layer.__class__, layer.rounding = Fp8Linear, rounding


def _layers(model: "Llama") -> Iterator[nn.Linear]:
    """The linear layers of the blocks, also those under adapters."""
    for block in model.blocks:
        of_attention = (getattr(block.layer.self_attn, f"{name}_proj") for name in "qkvo")
        of_mlp = (getattr(block.layer.mlp, f"{name}_proj") for name in ("gate", "up", "down"))
        yield from (getattr(layer, "base_layer", layer) for layer in (*of_attention, *of_mlp))


def check_product(
    outputs: int, inputs: int, device: torch.device, rounding: ModuleType | None = None
) -> None:
    """Raises UserError if a layer of this size computes something else than in bfloat16."""
    if outputs % MULTIPLE or inputs % MULTIPLE:
        raise UserError(
            f"fp8 true: the model has layers of {inputs} inputs and {outputs} outputs, and both "
            f"must be multiples of {MULTIPLE}: set fp8 false"
        )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(MULTIPLE + outputs, inputs, generator=generator)
    hidden, weight = drawn.to(device, torch.bfloat16).split([MULTIPLE, outputs])
    expected = F.linear(hidden, weight)
    layer = Fp8Linear(inputs, outputs, bias=False, device="meta")
    layer.weight, layer.rounding = nn.Parameter(weight, requires_grad=False), rounding
    try:
        found = layer(hidden.requires_grad_())
        found.backward(expected)
        pairs = (found, expected), (hidden.grad, expected @ weight)
        error = max(((one - other).norm() / other.norm()).item() for one, other in pairs)
    except Exception as fault:  # PyTorch and cuBLAS raise many types
        if is_out_of_memory(fault):
            raise
        raise UserError(
            f"fp8 true: products in 8-bit floats fail here ({cause_of(fault)}): set fp8 false"
        ) from None
    if not error <= MOST_ERROR:
        raise UserError(
            f"fp8 true: a product of {inputs} inputs and {outputs} outputs differs by {error:.0%} "
            f"from one in bfloat16, more than the {MOST_ERROR:.0%} of rounding: set fp8 false, or "
            f"install another torch than {torch.__version__}"
        )
