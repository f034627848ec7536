"""Linear layers whose products add to the gradients of their weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Keep(torch.autograd.Function):
    """Saves the input of a product before the product is computed.

    A Function's inputs are saved after its forward pass. When a block is recomputed, the pass stops
    as soon as everything is saved, so this spares the block's last product.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Product(torch.autograd.Function):
    """``hidden @ weight.T + bias``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Any) -> Tensor:
        # Hooks on saved tensors, as in `recomputed`, would replace the parameter by another tensor.
        ctx.weight, ctx.kept = weight, kept
        return F.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_weight = add_gradient_of_weight(ctx, grad) if needs_weight else None
        grad_hidden = grad @ ctx.weight if needs_hidden else None
        return grad_hidden, grad_weight, grad.sum(0) if needs_bias else None, None


def add_gradient_of_weight(ctx: Any, grad: Tensor) -> Tensor | None:
    """Add it to ``weight.grad``; it is returned instead if there is nothing to add it to.

    Args:
        ctx: of a product, with its ``weight`` and what `Keep` has ``kept`` of its input.
        grad: of its output.
    """
    [hidden] = ctx.kept.saved_tensors
    if ctx.weight.grad is None or ctx.weight._backward_hooks:  # which wait for autograd's gradient
        return grad.T @ hidden
    ctx.weight.grad.addmm_(grad.T, hidden)
    return None


class Linear(torch.nn.Linear):
    """A linear layer whose backward pass adds to ``weight.grad`` by the product itself.

    Autograd would write each micro-batch's gradient of a weight to memory, and then read it and the
    sum so far to add them: four passes over memory instead of two, and one more rounding.

    For ``backward()`` only: ``torch.autograd.grad`` misses the weights that have a ``grad``.
    """

    @classmethod
    def like(cls, layer: torch.nn.Linear) -> "Linear":
        """A layer that shares the parameters of ``layer``."""
        with torch.device("meta"):
            new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        new.weight, new.bias = layer.weight, layer.bias
        return new.train(layer.training)

    def forward(self, hidden: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and hidden.requires_grad and hidden.dim() == 2):
            return F.linear(hidden, self.weight, self.bias)
        kept = Keep.apply(hidden)
        return _Product.apply(kept, self.weight, self.bias, kept.grad_fn)


def replace_linear_layers(model: torch.nn.Module) -> None:
    """Replace each linear layer by a `Linear` with the same parameters."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(parent, name, Linear.like(layer))
