"""Operations of a Llama layer that keep little for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F


@contextmanager
def remade(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> Iterator[None]:
    """What is computed in here keeps ``make`` for its backward pass instead of ``tensor``, and calls it there.

    For what is cheap to compute from tensors that are kept anyway (a form of selective activation
    recomputation, arXiv:2205.05198). The gradients are the same bit for bit where ``make`` gives
    ``tensor`` bit for bit.
    """
    target = [
        tensor
    ]  # empty once we have left: the hooks live as long as the graph, and must not keep it
    again: list[torch.Tensor] = []

    def pack(saved: torch.Tensor) -> torch.Tensor | None:
        is_target = saved.data_ptr() == target[0].data_ptr() and saved.shape == target[0].shape
        return None if is_target else saved

    def unpack(packed: torch.Tensor | None) -> torch.Tensor:
        if packed is not None:
            return packed
        if not again:  # one for all that keep it; gone with the last of them
            with torch.no_grad():
                again.append(make())
        return again[0]

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        target.clear()


class RMSNorm(torch.autograd.Function):
    """Root mean square norm (arXiv:1910.07467) that keeps its input and one number a token.

    Computed in float32 or better, like Transformers' own.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return (exact * scale).to(hidden.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.to(scale.dtype) * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = (grad * weight).to(scale.dtype)
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_hidden = grad_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return grad_hidden.to(hidden.dtype), grad_weight, None


class Rotate(torch.autograd.Function):
    """Rotary position embedding (arXiv:2104.09864); its gradient is the rotation back, so nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """``heads`` is ``[N, heads, head_dim]``; ``cos`` and ``sin`` are ``[N, 1, head_dim / 2]``."""
        ctx.rope = cos, sin
        return _rotate(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rotate(grad, *ctx.rope, -1), None, None


def _rotate(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int
) -> torch.Tensor:
    halves = heads.unflatten(-1, (2, -1))
    rotated = halves * cos[..., None, :]
    rotated[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-direction)
    rotated[..., 1, :].addcmul_(halves[..., 0, :], sin, value=direction)
    return rotated.flatten(-2)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202), keeping the two and computing silu(gate) again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
