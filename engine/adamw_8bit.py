"""AdamW with moments of 8 bits, and with stochastic rounding of bfloat16 weights.

The quantization and the rounding are torchao's; it is imported only by those who use it. The loop
over the weights is ours: torchao's own optimizer compiles its step for every shape of a weight
anew, on a CPU too, and keeps the moments of small weights in the weights' dtype. In bfloat16 a
second moment that decays by 0.1 % a step never becomes smaller.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from run.errors import UserError, cause_of

TORCHAO = "0.18.0"  # as in requirements.txt
USED = (  # of its `quant_utils`
    "create_dynamic_map",
    "scale_tensor",
    "quantize_8bit_with_qmap",
    "dequant_with_qmap",
    "_fp32_to_bf16_sr",
)
BLOCK = 256  # codes that share a scale
# Smaller tensors keep moments in float32, as in bitsandbytes and torchao.
SMALLEST = 4096
# Weights that are updated at a time. On a CPU their float32 copies fit into its cache; on a GPU
# they are bounded where no kernel keeps them in registers.
PIECES = {"cpu": 2**16, "cuda": 2**24}
MOMENTS = ("exp_avg", "exp_avg_sq")

Layout = dict[str, tuple[torch.Size, torch.dtype]]


def check_torchao() -> None:
    """Raises UserError if torchao, or what is used of it, can't be imported."""
    try:
        from torchao.optim import quant_utils

        for name in USED:
            getattr(quant_utils, name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"optimizer adamw_8bit needs torchao {TORCHAO} ({cause_of(error)}): "
            f"pip install torchao=={TORCHAO}, or set optimizer adamw"
        ) from None


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with blockwise 8-bit moments (arXiv:2110.02861).

    Each block of 256 moments has a scale, its largest absolute value, and for each moment the code
    of one of 256 shares of it. The update is computed in float32, with the moments as they were
    before they were quantized again. A bfloat16 weight is then rounded up or down at random, so
    that it is right on average (arXiv:2010.06192): the draws come from the generator of the
    weight's device.

    Args:
        compiled: whether each piece of a weight is updated by compiled kernels.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        compiled: bool,
    ) -> None:
        # The steps are counted in the group: no weight of a Llama is ever left out.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(parameters, defaults)
        self._quantized_step = (
            torch.compile(quantized_step, fullgraph=True, dynamic=True)
            if compiled
            else quantized_step
        )
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            rows = [weight for weight in group["params"] if weight.grad is not None]
            numbers = {device: _numbers(group, device) for device in {row.device for row in rows}}
            for weight in rows:
                self._update(weight, numbers[weight.device])

    def _update(self, weight: Tensor, numbers: Tensor) -> None:
        state = self.state[weight]
        if not state:
            state.update(new_state(weight))
        if state["exp_avg"].dtype == torch.float32:
            exact_step(weight, weight.grad, *(state[name] for name in MOMENTS), numbers)
            return
        size = PIECES[weight.device.type]
        columns = [pieces(weight, size), pieces(weight.grad.contiguous(), size)]
        for name in MOMENTS:
            columns.append(pieces(state[name], size))
            columns.append(pieces(state[f"{name}_scale"], size // BLOCK))
        maps = self._maps_on(weight.device)
        for piece in zip(*columns, strict=True):
            self._quantized_step(*piece, *maps, numbers)

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The share of its scale that each code stands for, in the first and second moment."""
        if device not in self._maps:
            from torchao.optim.quant_utils import create_dynamic_map

            signed, unsigned = (create_dynamic_map(signed=signed) for signed in (True, False))
            self._maps[device] = tuple(
                torch.tensor(shares, device=device) for shares in (signed, unsigned)
            )
        return self._maps[device]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Like the base class's, which would give each tensor the dtype of its weight.

        Raises:
            ValueError: the state is that of a weight of another shape.
        """
        super().load_state_dict({**state_dict, "state": {}})
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            weight = weights[index]
            found = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}
            if found != layout(weight.shape):
                raise ValueError(f"state {index} is not that of a weight of {list(weight.shape)}")
            self.state[weight] = {name: tensor.to(weight.device) for name, tensor in saved.items()}


# ---------------------------------------------------------------- one step


def _numbers(group: Mapping[str, Any], device: torch.device) -> Tensor:
    """The numbers of a step, as a tensor, since compiled code is made for each other constant."""
    (beta1, beta2), rate, step = group["betas"], group["lr"], group["step"]
    numbers = (
        1 - rate * group["weight_decay"],
        rate / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        group["eps"],
        1 - beta1,
        1 - beta2,
    )
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def pieces(tensor: Tensor, size: int) -> list[Tensor]:
    """Parts of ``size`` elements, [size] each; the last one may be smaller.

    They do not say of which tensor they are a part. Compiled code would be made for each number of
    its dimensions.
    """
    return [part.data for part in tensor.view(-1).split(size)]


def exact_step(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, numbers: Tensor
) -> None:
    """Update a weight and its moments in float32, all of one shape."""
    exact, *moments = updated(weight, grad, first, second, numbers)
    write(weight, exact)
    first.copy_(moments[0])
    second.copy_(moments[1])


def quantized_step(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    signed: Tensor,
    unsigned: Tensor,
    numbers: Tensor,
) -> None:
    """Update N weights and the codes of their moments, all [N], in place.

    Args:
        first_scale, second_scale: [N / BLOCK], of each block of codes.
        signed, unsigned: [256], the shares that the codes of the two moments stand for.
        numbers: from `_numbers`.
    """
    from torchao.optim import quant_utils

    before = (
        quant_utils.dequant_with_qmap(first, signed, first_scale),
        quant_utils.dequant_with_qmap(second, unsigned, second_scale),
    )
    exact, *after = updated(weight, grad, *before, numbers)
    codes_and_scales = (first, first_scale, signed), (second, second_scale, unsigned)
    for moment, (codes, scale, shares) in zip(after, codes_and_scales, strict=True):
        scaled, new_scale = quant_utils.scale_tensor(moment, BLOCK)
        codes.copy_(quant_utils.quantize_8bit_with_qmap(scaled, shares))
        scale.copy_(new_scale)
    write(weight, exact)


def updated(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight and its moments after a step of AdamW, in float32."""
    kept, rate, correction, epsilon, rest1, rest2 = numbers.unbind()
    grad = grad.float()
    first = first.lerp(grad, rest1)
    second = second.lerp(grad.square(), rest2)
    update = first / (second.sqrt() * correction + epsilon)
    return weight.float() * kept - rate * update, first, second


def write(weight: Tensor, exact: Tensor) -> None:
    """Give ``weight`` the float32 values ``exact``, to bfloat16 rounded up or down at random."""
    from torchao.optim.quant_utils import _fp32_to_bf16_sr

    weight.copy_(_fp32_to_bf16_sr(exact) if weight.dtype == torch.bfloat16 else exact)


# ---------------------------------------------------------------- its state


def layout(shape: torch.Size) -> Layout:
    """Shape and dtype of each tensor in the state of a weight of ``shape``."""
    size = math.prod(shape)
    if size < SMALLEST or size % BLOCK:
        return {name: (torch.Size(shape), torch.float32) for name in MOMENTS}
    codes, scales = (torch.Size(shape), torch.uint8), (torch.Size([size // BLOCK]), torch.float32)
    return {
        name + suffix: of for name in MOMENTS for suffix, of in (("", codes), ("_scale", scales))
    }


def state_bytes(shape: torch.Size) -> int:
    """What the state of a weight of ``shape`` takes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout(shape).values())


def new_state(weight: Tensor) -> dict[str, Tensor]:
    """The state of a weight before its first step: scales of zero, whatever the codes."""
    return {
        name: torch.zeros(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in layout(weight.shape).items()
    }


def try_step(device: torch.device, dtype: torch.dtype, compiled: bool = True) -> None:
    """Make a step of one weight that is a piece, the size for which kernels are compiled."""
    weight = torch.nn.Parameter(torch.zeros(PIECES[device.type], dtype=dtype, device=device))
    weight.grad = torch.zeros_like(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's remarks on its own internals
        AdamW8bit([weight], 0.0, (0.9, 0.999), 1e-8, 0.0, compiled).step()
