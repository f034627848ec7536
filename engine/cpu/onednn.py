"""Matrix products in float32 by oneDNN, for processors on which PyTorch's own choice is slow.

PyTorch uses MKL for float32 products, which leaves half of the vector units of AMD's processors
idle. oneDNN, which comes with PyTorch too, does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ADDED_ROWS = 4096  # rows of a product that are computed at a time and added to a sum
ROWS = 64  # row counts are multiples of this, since oneDNN caches data for each count forever


def is_faster_here() -> bool:
    """Whether this is an AMD processor, and this PyTorch has both libraries."""
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return is_amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of two matrices, not differentiable.

    Call it with few different shapes, since oneDNN never frees the data that it caches for each.
    """
    if left.dtype != torch.float32:
        return left @ right
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, added_rows: int = ADDED_ROWS
) -> None:
    """``total += left @ right`` in ``total``'s dtype, a few rows of the product at a time."""
    if total.dtype == left.dtype != torch.float32:
        total.addmm_(left, right)
        return
    for start in range(0, len(left), added_rows):
        end = start + added_rows
        total[start:end] += product(left[start:end], right)


class Linear(torch.nn.Linear):
    """A linear layer without bias that computes its output and gradients by `product`.

    In decoding it uses a second copy of its weight, in oneDNN's own layout (`packed_weights`), and
    can add or multiply in the same pass (`plus`, `times`).
    """

    packed: torch.Tensor | None = None

    @classmethod
    def like(cls, layer: torch.nn.Linear) -> "Linear":
        """A layer that shares the weight of ``layer``."""
        with torch.device("meta"):
            new = cls(layer.in_features, layer.out_features, bias=False)
        new.weight = layer.weight
        return new.train(layer.training)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._is_packed(hidden):
            return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, None, "none", [], "")
        is_plain = hidden.dim() != 2 or hidden.dtype != torch.float32
        if is_plain or (hidden.shape[0] >= ROWS and hidden.shape[0] % ROWS):
            return F.linear(hidden, self.weight)
        return _Linear.apply(hidden, self.weight)

    def plus(self, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``self(hidden) + other``, not differentiable."""
        if self._is_packed(hidden):
            return torch.ops.mkldnn._linear_pointwise.binary(
                hidden, other, self.packed, None, "add"
            )
        return self(hidden).add_(other)

    def times(self, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``self(hidden) * other``, not differentiable."""
        if self._is_packed(hidden):
            return torch.ops.mkldnn._linear_pointwise.binary(
                hidden, other, self.packed, None, "mul"
            )
        return self(hidden).mul_(other)

    def _is_packed(self, hidden: torch.Tensor) -> bool:
        return self.packed is not None and hidden.dim() == 2 and not torch.is_grad_enabled()


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


def replace_linear_layers(model: torch.nn.Module) -> None:
    """Replace each linear layer without bias by a `Linear` with the same weight."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and layer.bias is None:
                setattr(parent, name, Linear.like(layer))


@contextmanager
def packed_weights(model: torch.nn.Module, free_bytes: int) -> Iterator[None]:
    """A context for decoding, with a second copy of the weights in oneDNN's own layout.

    Products of few rows spend their time reading the weights, and this layout is read faster. The
    weights must not change inside the context. No copy is made if it would take more than half of
    ``free_bytes``.
    """
    layers = [layer for layer in model.modules() if type(layer) is Linear]
    layers = [layer for layer in layers if layer.weight.dtype == torch.float32]
    try:
        if sum(layer.weight.nbytes for layer in layers) <= free_bytes / 2:
            for layer in layers:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
        yield
    finally:
        for layer in layers:
            layer.packed = None
