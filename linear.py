"""Matrix products on the CPU by the library that is fast on its processor.

PyTorch gives float32 products to MKL, which on AMD's processors leaves half of their vector units
unused; oneDNN, which comes with PyTorch too, does not. Elsewhere PyTorch's choice stands.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM


def _prefer_onednn() -> bool:
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


ONEDNN = _prefer_onednn()


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of two matrices, without a gradient of its own."""
    if ONEDNN and left.dtype == torch.float32 and not left.is_cuda:
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return left @ right


class Linear(torch.nn.Linear):
    """Transformers' layer, its three products by `product`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        plain = self.bias is not None or hidden.dim() != 2 or hidden.dtype != torch.float32 or hidden.is_cuda
        if plain or torch.compiler.is_compiling():
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


def use_fast_products(model: LlamaForCausalLM) -> None:
    """Let the linear layers of ``model`` compute by `product`, where that is faster on this machine."""
    if ONEDNN:
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = Linear
