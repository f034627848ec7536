"""The elementwise operations of a block in training, compiled.

Each operation becomes one kernel, and so does its backward pass; that of norms has one by hand on
a GPU (`engine.cuda.norm_kernel`). Both are compiled as plain functions of tensors, without
autograd: what is saved for the backward pass is said here. The products between them stay outside,
where gradients are added in place (`engine.cuda.linear`).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.functions import Elementwise, NormGradients

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm


# For a run that resumes with the same bits, in another process and on another machine.
OPTIONS = {
    # Intermediate results are rounded as in separate operations, so that those that are computed
    # again in the backward pass have the same bits.
    "emulate_precision_casts": True,
    # The fastest of several kernels, by a measurement, might sum in another order the next time.
    "deterministic": True,
    # It compiles different kernels for few and for many tokens, and splits sums by the number of
    # tokens that it meets first.
    "triton.mix_order_reduction": False,
}


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Compiled for the first number of tokens, and a second time for any number, while the other
    # sizes stay constants: kernels for a hidden size that is not known read memory more slowly.
    return torch.compile(function, fullgraph=True, options=OPTIONS)


# ---------------------------------------------------------------- norms


class Norm(torch.autograd.Function):
    """`engine.llama.RMSNorm`; the second result is the factor of each token."""

    @staticmethod
    def forward(
        ctx: Any, gradients: NormGradients, hidden: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        normed, scale = compiled(rms_norm)(*_plain(hidden, weight), epsilon)
        ctx.gradients = gradients
        ctx.save_for_backward(hidden, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return normed, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        inputs = _plain(grad, *ctx.saved_tensors)
        return None, *ctx.gradients(None, *inputs, ctx.needs_input_grad[2]), None


class AddNorm(torch.autograd.Function):
    """A sum and its norm; the third result is the factor of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        gradients: NormGradients,
        hidden: Tensor,
        update: Tensor,
        weight: Tensor,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = _plain(hidden, update, weight)
        total, normed, scale = compiled(add_rms_norm)(*inputs, epsilon)
        ctx.gradients = gradients
        ctx.save_for_backward(total, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return total, normed, scale

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor, grad_normed: Tensor, _: None
    ) -> tuple[Tensor | None, ...]:
        inputs = _plain(grad_total, grad_normed, *ctx.saved_tensors)
        grad, grad_weight = ctx.gradients(*inputs, ctx.needs_input_grad[3])
        return None, grad, grad, grad_weight, None


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return scaled(hidden, weight, scale), scale


def scaled(hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (hidden.to(scale.dtype) * scale).to(hidden.dtype) * weight


def rms_norm_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, is_trained: bool
) -> tuple[Tensor, Tensor | None]:
    normed = hidden.to(scale.dtype) * scale
    grad_weight = (grad * normed).sum(0).to(weight.dtype) if is_trained else None
    grad_normed = (grad * weight).to(scale.dtype)
    along = (grad_normed * normed).mean(-1, keepdim=True)
    return ((grad_normed - normed * along) * scale).to(hidden.dtype), grad_weight


def add_rms_norm(
    hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden + update
    return total, *rms_norm(total, weight, epsilon)


def add_rms_norm_backward(
    grad_total: Tensor,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    is_trained: bool,
) -> tuple[Tensor, Tensor | None]:
    grad, grad_weight = rms_norm_backward(grad_normed, total, weight, scale, is_trained)
    return grad_total + grad, grad_weight


def norm_gradients(
    grad_total: Tensor | None, grad_normed: Tensor, *others: Any
) -> tuple[Tensor, Tensor | None]:
    if grad_total is None:
        return compiled(rms_norm_backward)(grad_normed, *others)
    return compiled(add_rms_norm_backward)(grad_total, grad_normed, *others)


def norm_and_again(
    gradients: NormGradients, hidden: Tensor, norm: "LlamaRMSNorm"
) -> tuple[Tensor, Callable[[], Tensor]]:
    normed, scale = Norm.apply(gradients, hidden, norm.weight, norm.variance_epsilon)
    return normed, partial(compiled(scaled), *_plain(hidden, norm.weight, scale))


def add_norm(
    gradients: NormGradients, hidden: Tensor, update: Tensor, norm: "LlamaRMSNorm"
) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    inputs = hidden, update, norm.weight, norm.variance_epsilon
    total, normed, scale = AddNorm.apply(gradients, *inputs)
    return total, normed, partial(compiled(scaled), *_plain(total, norm.weight, scale))


# ---------------------------------------------------------------- rotation and activation


class RotateBoth(torch.autograd.Function):
    """`engine.functions.Rotate` of query and key."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.rope = cos, sin
        return compiled(rotate_both)(*_plain(query, key, cos, sin))

    @staticmethod
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        return *compiled(rotate_back)(*_plain(grad_query, grad_key, *ctx.rope)), None, None


def rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def rotate_back(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(query, cos, -sin), _rotated(key, cos, -sin)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SwiGLU(torch.autograd.Function):
    """`engine.functions.SwiGLU`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return compiled(swiglu)(*_plain(gate, up))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return compiled(swiglu_backward)(*_plain(grad, *ctx.saved_tensors))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad


def _plain(*tensors: Tensor) -> list[Tensor]:
    """Neither parameters nor parts of a graph, of which the compiler would compile each kind."""
    return [tensor.detach() for tensor in tensors]


def fused(gradients: NormGradients) -> Elementwise:
    """The compiled operations, with ``gradients`` for the backward pass of norms."""
    norms = partial(norm_and_again, gradients), partial(add_norm, gradients)
    return Elementwise(*norms, RotateBoth.apply, SwiGLU.apply)


FUSED = fused(norm_gradients)
