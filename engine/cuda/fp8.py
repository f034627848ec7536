"""Linear layers that train with products in 8-bit floats (FP8, arXiv:2209.05433).

GPUs that have such products (H100, RTX 4090 and newer) compute them at up to twice the rate of
bfloat16. The outputs and the gradients of the inputs are computed so. All else remains: weights and
what is saved for the backward pass are bfloat16, and the gradient of a weight is a product in
bfloat16 that adds to the one before.

A float of 8 bits has 3 of them for its mantissa, and reaches from 0.002 to 448. So each token is
divided by a scale, after which its largest number is 448, and so is each row of a weight. A token's
numbers do not depend on the tokens beside it, so neither does a gradient on how a step is split
into micro-batches, but for what rounding makes of the order of additions. torchao's recipe
rowwise_with_gw_hp is alike, but rounds a weight twice: by row, and as a whole for the gradient of
the input. Here both passes have the same rounded weight, whose scales the gradient takes on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from engine.cuda.linear import Keep, Linear, add_gradient_of_weight
from engine.device_errors import is_lasting_fault, is_out_of_memory
from run.errors import UserError, cause_of

if TYPE_CHECKING:
    from engine.llama import Llama

E4M3 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
LARGEST = torch.finfo(E4M3).max
SMALLEST = torch.finfo(torch.float32).tiny  # scale, as of a row of zeros: its inverse is finite
NUMBERS_AT_ONCE = 2**20  # that PyTorch's operators round: what they need beside the result is small
MULTIPLE = 16  # of which the sizes of a layer must be one
ROWS_CHECKED = 1027  # of a product before training: as in most micro-batches, no multiple of 8
# Of a product, relative to the same in bfloat16. Rounding to 3 bits of mantissa causes 0.04, and
# cutting off instead of rounding 0.09.
MOST_ERROR = 0.06


# ---------------------------------------------------------------- rounding


@dataclass(frozen=True)
class Rounding:
    """How numbers become 8-bit floats.

    Attributes:
        quantised: see `quantised`.
        transposed: see `transposed`.
    """

    quantised: Callable[..., tuple[Tensor, Tensor]]
    transposed: Callable[[Tensor, Tensor], Tensor]


def quantised(numbers: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[N, K]`` in 8-bit floats, and the scales ``[N, 1]`` by which they must be multiplied.

    Args:
        factors: ``[K]``, by which the columns are multiplied before; None: by nothing.
    """
    rounded = torch.empty(numbers.shape, dtype=E4M3, device=numbers.device)
    scales = numbers.new_empty(len(numbers), 1, dtype=torch.float32)
    for rows in _slices(numbers):
        exact = numbers[rows].float() if factors is None else numbers[rows] * factors
        scales[rows] = exact.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_(min=SMALLEST)
        rounded[rows] = exact * (1 / scales[rows])
    return rounded, scales


def transposed(numbers: Tensor, scales: Tensor) -> Tensor:
    """The transpose of what `quantised` makes of ``[N, K]``, given its ``[N]`` scales."""
    rounded = torch.empty(numbers.T.shape, dtype=E4M3, device=numbers.device)
    for rows in _slices(numbers):
        rounded[:, rows] = (numbers[rows].float() * (1 / scales[rows])[:, None]).T
    return rounded


def _slices(numbers: Tensor) -> Iterator[slice]:
    rows = max(1, NUMBERS_AT_ONCE // numbers.shape[1])
    return (slice(start, start + rows) for start in range(0, len(numbers), rows))


PYTORCH = Rounding(quantised, transposed)


# ---------------------------------------------------------------- one layer


class Fp8Linear(Linear):
    """A linear layer that trains with products in 8-bit floats, and else is like any other."""

    rounding = PYTORCH

    def forward(self, hidden: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.training and hidden.dim() == 2):
            return F.linear(hidden, self.weight, self.bias)
        kept = Keep.apply(hidden)
        return Fp8Product.apply(self.rounding, kept, self.weight, self.bias, kept.grad_fn)


class Fp8Product(torch.autograd.Function):
    """``hidden @ weight.T + bias``, of both in 8-bit floats."""

    @staticmethod
    def forward(
        ctx: Any,
        rounding: Rounding,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Any,
    ) -> Tensor:
        tokens, token_scales = rounding.quantised(hidden)
        rows, scales = rounding.quantised(weight)
        ctx.rounding, ctx.weight, ctx.kept, ctx.scales = rounding, weight, kept, scales.flatten()
        output = scaled_product(tokens, rows.T, token_scales, scales.T)
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_weight = add_gradient_of_weight(ctx, grad) if needs_weight else None
        grad_hidden = None
        if needs_hidden:
            # This product sums over the weight's rows, so their scales can't follow it.
            tokens, token_scales = ctx.rounding.quantised(grad, ctx.scales)
            columns = ctx.rounding.transposed(ctx.weight, ctx.scales)
            ones = token_scales.new_ones(1, len(columns))
            grad_hidden = scaled_product(tokens, columns.T, token_scales, ones)
        return None, grad_hidden, grad_weight, grad.sum(0) if needs_bias else None, None


def scaled_product(
    left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor
) -> Tensor:
    """``(left * left_scales) @ (right * right_scales)`` in bfloat16, summed in float32.

    Args:
        left, right: ``[N, K]``, and ``[K, M]`` whose columns are adjacent in memory.
        left_scales, right_scales: ``[N, 1]`` and ``[1, M]``.
    """
    if left.device.type == "cpu" and torch.__version__ < (2, 13):  # which has it for GPUs only
        return ((left.float() * left_scales) @ (right.float() * right_scales)).bfloat16()
    by_row = ScalingType.RowWise
    return F.scaled_mm(left, right, left_scales, by_row, right_scales.contiguous(), by_row)


# ---------------------------------------------------------------- a model's layers


def use_fp8(find_kernels: Callable[[], ModuleType | None], model: "Llama") -> None:
    """Let the linear layers of all blocks train with products in 8-bit floats, in place.

    Adapters beside them remain as they are, and so does the head, whose logits make the loss.

    Args:
        find_kernels: finds `engine.cuda.fp8_kernels`; None where PyTorch's operators are to round.

    Raises:
        UserError: such products fail on this device, or are wrong.
    """
    layers, kernels = list(_layers(model)), find_kernels()
    rounding = Rounding(kernels.quantised, kernels.transposed) if kernels else PYTORCH
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
    outputs: int, inputs: int, device: torch.device, rounding: Rounding = PYTORCH
) -> None:
    """Raises UserError if a layer of this size computes something else than in bfloat16."""
    if outputs % MULTIPLE or inputs % MULTIPLE:
        raise UserError(
            f"fp8 true: the model has layers of {inputs} inputs and {outputs} outputs, and both "
            f"must be multiples of {MULTIPLE}: set fp8 false"
        )
    like = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    drawn = torch.randn(ROWS_CHECKED + outputs, inputs, dtype=torch.bfloat16, **like)
    hidden, weight = drawn.split([ROWS_CHECKED, outputs])
    expected = F.linear(hidden, weight)
    layer = Fp8Linear(inputs, outputs, bias=False, device="meta")
    layer.weight, layer.rounding = nn.Parameter(weight, requires_grad=False), rounding
    try:
        found = layer(hidden.requires_grad_())
        found.backward(expected)
        pairs = (found, expected), (hidden.grad, expected @ weight)
        errors = [((one - other).norm() / other.norm()).item() for one, other in pairs]
    except Exception as fault:  # PyTorch and cuBLAS raise many types
        if is_out_of_memory(fault) or is_lasting_fault(fault):
            raise
        raise UserError(
            f"fp8 true: products in 8-bit floats fail here ({cause_of(fault)}): set fp8 false"
        ) from None
    if wrong := [error for error in errors if not error <= MOST_ERROR]:
        raise UserError(
            f"fp8 true: a product of {inputs} inputs and {outputs} outputs differs by "
            f"{wrong[0]:.0%} from one in bfloat16, more than the {MOST_ERROR:.0%} of rounding: set "
            f"fp8 false, or install another torch than {torch.__version__}"
        )
