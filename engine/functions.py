"""The parts of a layer, and operations in them that save little memory for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Rope = tuple[torch.Tensor, torch.Tensor]
# (grad_total, grad_normed, total, weight, scale, is_trained) to the gradients of total, which was
# normed, and of the norm's weight (None unless it is trained). grad_total is the gradient by the
# other use of total, or None. All are ``[N, hidden]`` but weight, ``[hidden]``, and scale, one
# number per token, ``[N, 1]``.
NormGradients = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class LayerParts:
    """How a block computes everything but its attention.

    Attributes:
        rope: converts the rotary embedding's cos and sin, ``[N, 1, head_dim]``, for the next.
        before_attention: (layer, hidden, cos, sin) to what attention takes: query, key and value.
        after_attention: (layer, hidden, attention's output) to the next ``hidden``.
    """

    rope: Callable[[torch.Tensor, torch.Tensor], Rope]
    before_attention: Callable[..., tuple[Any, ...]]
    after_attention: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Elementwise:
    """How training computes what lies between the matrix products of a block.

    Attributes:
        norm: (hidden, norm) to its norm, and a function that makes the same bits again.
        add_norm: (hidden, update, norm) to their sum, its norm, and such a function.
        rotate: (query, key, cos, sin) to query and key, rotated.
        swiglu: (gate, up) to silu(gate) * up.
    """

    norm: Callable[..., tuple[torch.Tensor, Callable[[], torch.Tensor]]]
    add_norm: Callable[..., tuple[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]]]
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Rotate(torch.autograd.Function):
    """Rotary position embedding (arXiv:2104.09864).

    Its gradient is the inverse rotation, so no activation is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """``heads``: ``[N, heads, head_dim]``; ``cos`` and ``sin``: ``[N, 1, head_dim / 2]``."""
        ctx.rope = cos, sin
        return _rotate(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rotate(grad, *ctx.rope, -1), None, None


def rotate_both(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin)


def _rotate(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int
) -> torch.Tensor:
    halves = heads.unflatten(-1, (2, -1))
    rotated = halves * cos[..., None, :]
    rotated[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-direction)
    rotated[..., 1, :].addcmul_(halves[..., 0, :], sin, value=direction)
    return rotated.flatten(-2)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202).

    Saves its two inputs, and computes silu(gate) again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


@contextmanager
def recomputed(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Inside this context autograd saves ``make`` instead of ``tensor``, and calls it in backward.

    Meant for tensors that are cheap to compute from others that are saved anyway (selective
    activation recomputation, arXiv:2205.05198). If ``make`` returns the same bits as ``tensor``,
    the gradients are bit-identical too. ``tensor`` is recognised by its memory and shape.
    """
    target = [tensor]  # cleared below: the hooks live as long as the graph, and must not keep it
    made: list[torch.Tensor] = []  # one result shared by all who need it, freed with the last

    def pack(saved: torch.Tensor) -> torch.Tensor | None:
        is_target = saved.data_ptr() == target[0].data_ptr() and saved.shape == target[0].shape
        return None if is_target else saved

    def unpack(packed: torch.Tensor | None) -> torch.Tensor:
        if packed is not None:
            return packed
        if not made:
            with torch.no_grad():
                made.append(make())
        return made[0]

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        target.clear()


def saved(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> AbstractContextManager[None]:
    """The alternative to `recomputed`: autograd saves ``tensor`` as usual."""
    return nullcontext()
