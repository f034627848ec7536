"""How a layer computes in decoding on a GPU: few products, and few small kernels between them.

A step reads all weights for a few rows, so a product takes as long as reading its weight, and many
small products and kernels leave the memory idle between them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.functions import LayerParts, Rope

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

FUSED = "fused"  # where attention and MLP keep the tensors of their fused layers
# Finds `engine.cuda.small_kernels`; None where PyTorch's operators are to compute the same.
SmallKernels = Callable[[], ModuleType | None]


@contextmanager
def fused_weights(model: nn.Module) -> Iterator[None]:
    """A context for decoding, in which layers that read the same input are one product.

    Those are the projections to queries, keys and values, and those to gate and up. Their weights
    become views of one tensor, without a second copy. Afterwards each has memory of its own again,
    as whatever saves or shards them expects. The parameters remain the same objects. The adapters
    beside them (`engine.lora`) become two products of copies. Layers in 4 bits are not fused.
    """
    fused = [each for each in model.modules() if _linears(each)]
    # The allocator would place the fused weights where an earlier decoding had its cache, which is
    # one large tensor. Then there would be no room of that size for the next one.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        for module in fused:
            _fuse(module)
        yield
    finally:
        for module in fused:
            _part(module)


def _linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of ``module``, an attention or MLP, that read the same input."""
    names = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    return next(
        ([getattr(module, name) for name in each] for each in names if hasattr(module, each[0])), []
    )


# Not in inference mode: tensors made there could not be trained any more.
@torch.inference_mode(False)
@torch.no_grad()
def _fuse(module: nn.Module) -> None:
    linears = _linears(module)
    if not linears[0].weight.is_floating_point():
        return
    rows = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    has_bias = linears[0].bias is not None
    bias = torch.cat([linear.bias for linear in linears]) if has_bias else None
    for linear, view in zip(linears, weight.split(rows), strict=True):
        linear.weight.data = view
    setattr(module, FUSED, (weight, bias, _fused_adapters(linears)))


def _fused_adapters(linears: list[nn.Module]) -> tuple[Tensor, Tensor] | None:
    """One weight to the small outputs of all adapters, and one from these to all large outputs."""
    if not _has_adapter(linears[0]):
        return None
    down = torch.cat([linear.down.weight * linear.scale for linear in linears])
    return down, torch.block_diag(*[linear.up.weight for linear in linears])


def _has_adapter(linear: nn.Module) -> bool:
    return hasattr(linear, "base_layer")


@torch.inference_mode(False)
@torch.no_grad()
def _part(module: nn.Module) -> None:
    if hasattr(module, FUSED):
        delattr(module, FUSED)
        for linear in _linears(module):
            linear.weight.data = linear.weight.data.clone()


def _products(module: nn.Module, hidden: Tensor) -> Tensor:
    """The outputs ``[N, ...]`` of all layers of ``module`` that read ``hidden``, side by side."""
    if fused := getattr(module, FUSED, None):
        weight, bias, adapters = fused
        states = F.linear(hidden, weight, bias)
        if adapters:
            down, up = adapters
            states.addmm_(hidden @ down.T, up.T)
        return states
    return torch.cat([linear(hidden) for linear in _linears(module)], dim=-1)


def _plus_product(hidden: Tensor, linear: nn.Linear, other: Tensor) -> Tensor:
    """``hidden + linear(other)`` in the memory of ``hidden``: the product itself adds."""
    if not linear.weight.is_floating_point():  # in 4 bits
        return hidden.add_(linear(other))
    hidden.addmm_(other, linear.weight.T)
    if _has_adapter(linear):
        hidden.addmm_(linear.down(other) * linear.scale, linear.up.weight.T)
    return hidden if linear.bias is None else hidden.add_(linear.bias)


def _norm(fused: ModuleType | None, hidden: Tensor, norm: "LlamaRMSNorm") -> Tensor:
    if fused:
        return fused.rms_norm(hidden, norm.weight, norm.variance_epsilon)
    return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def _rope(cos: Tensor, sin: Tensor) -> Rope:
    """sin, negated in the first half, by which the other half is multiplied."""
    half = cos.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def _gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _before_attention(
    small_kernels: SmallKernels,
    layer: "LlamaDecoderLayer",
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Any, ...]:
    """Query, key and value; not yet rotated if there is a fourth part, which does that."""
    attention, fused = layer.self_attn, small_kernels()
    states = _products(attention, _norm(fused, hidden, layer.input_layernorm))
    states = states.unflatten(-1, (-1, attention.head_dim))
    queries, keys = (
        linear.out_features // attention.head_dim for linear in _linears(attention)[:2]
    )
    rotated = states[:, : queries + keys]
    rotated = rotated if fused else _rotated(rotated, cos, sin)
    parts = rotated[:, :queries], rotated[:, queries:], states[:, queries + keys :]
    return (*parts, partial(fused.rotate_into, cos, sin)) if fused else parts


def _after_attention(
    small_kernels: SmallKernels, layer: "LlamaDecoderLayer", hidden: Tensor, attended: Tensor
) -> Tensor:
    mlp, fused = layer.mlp, small_kernels()
    # The products add the residual connection, so a norm need not: fewer passes over memory, and as
    # many kernels.
    hidden = _plus_product(hidden, layer.self_attn.o_proj, attended.flatten(-2))
    both = _products(mlp, _norm(fused, hidden, layer.post_attention_layernorm))
    activated = fused.gated(both) if fused else _gated(both)
    return _plus_product(hidden, mlp.down_proj, activated)


def decoding_parts(small_kernels: SmallKernels) -> LayerParts:
    """How a layer computes in decoding.

    Args:
        small_kernels: called when a layer is computed, since finding them compiles them.
    """
    before = partial(_before_attention, small_kernels)
    return LayerParts(_rope, before, partial(_after_attention, small_kernels))
