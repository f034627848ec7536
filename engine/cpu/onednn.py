"""Matrix products on the CPU by the library that is fast on its processor.

PyTorch gives float32 products to MKL, which on AMD's processors leaves half of their vector units
unused; oneDNN, which comes with PyTorch too, does not. Elsewhere PyTorch's choice stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from engine import memory
from engine.packing import ROWS

# Rows of a product that exist beside the sum they are added to.
ADDED_ROWS = 4096


def _prefer_onednn() -> bool:
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


ONEDNN = _prefer_onednn()


def _by_onednn(tensor: torch.Tensor) -> bool:
    return ONEDNN and tensor.dtype == torch.float32 and not tensor.is_cuda


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of two matrices, without a gradient of its own.

    To be called with few different shapes: oneDNN never gives back what it keeps for each.
    """
    if not _by_onednn(left):
        return left @ right
    return _compiled_onednn(left, right) if torch.compiler.is_compiling() else _onednn(left, right)


def _onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


# For compiled code one call that the compiler does not look into: its own rule for this operator fails on our operands.
_compiled_onednn = torch.library.custom_op("gsm8k::product", _onednn, mutates_args=())


_compiled_onednn.register_fake(lambda left, right: left.new_empty(left.shape[0], right.shape[1]))


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``, in ``total``'s dtype, and never the whole product beside it."""
    if total.dtype == left.dtype and not _by_onednn(left):
        total.addmm_(left, right)
        return
    for start in range(0, len(left), ADDED_ROWS):
        total[start : start + ADDED_ROWS] += product(left[start : start + ADDED_ROWS], right)


class Linear(torch.nn.Linear):
    """Transformers' layer, its three products by `product`."""

    packed: torch.Tensor | None = None  # see `packed_weights`

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if _is_packed(self, hidden):
            return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, None, "none", [], "")
        plain = self.bias is not None or hidden.dim() != 2 or not _by_onednn(hidden)
        # Compiled code must not depend on the number of rows; nor need it, it sees no other than full batches.
        if plain or not (
            torch.compiler.is_compiling() or hidden.shape[0] < ROWS or hidden.shape[0] % ROWS == 0
        ):
            return F.linear(hidden, self.weight, self.bias)
        return _Linear.apply(hidden, self.weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return product(hidden, weight.T)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        hidden, weight = ctx.saved_tensors
        return (
            product(grad, weight) if ctx.needs_input_grad[0] else None,
            product(grad.T, hidden) if ctx.needs_input_grad[1] else None,
        )


def _is_packed(layer: torch.nn.Linear, hidden: torch.Tensor) -> bool:
    packed = getattr(layer, "packed", None)
    return packed is not None and hidden.dim() == 2 and not torch.is_grad_enabled()


def product_times(
    layer: torch.nn.Linear, hidden: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    """``layer(hidden) * other``, in one pass with `packed_weights`; so is the next."""
    if _is_packed(layer, hidden):
        return torch.ops.mkldnn._linear_pointwise.binary(hidden, other, layer.packed, None, "mul")
    return layer(hidden).mul_(other)


def product_plus(layer: torch.nn.Linear, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``layer(hidden) + other``."""
    if _is_packed(layer, hidden):
        return torch.ops.mkldnn._linear_pointwise.binary(hidden, other, layer.packed, None, "add")
    return layer(hidden).add_(other)


@contextmanager
def packed_weights(model: LlamaForCausalLM) -> Iterator[None]:
    """Keep a second copy of the weights, in oneDNN's own layout, while nothing but decoding goes on in here.

    Products of few rows spend their time on reading the weights, and this layout is read faster.
    The weights must not change meanwhile. Nothing happens where oneDNN does not compute, or where
    a copy would take more than half of the free memory.
    """
    layers = [layer for layer in model.modules() if type(layer) is Linear and layer.bias is None]
    size, free = sum(layer.weight.nbytes for layer in layers), memory.free_bytes(model.device)
    try:
        for layer in layers:
            if _by_onednn(layer.weight) and size <= free / 2:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def use_fast_products(model: LlamaForCausalLM) -> None:
    """Let the linear layers of ``model`` compute by `product`, where that is faster on this machine."""
    if ONEDNN:
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear
