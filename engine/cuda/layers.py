"""How a layer computes in decoding on a GPU: few products, and few small kernels between them.

A step reads all weights for a few rows, so a product takes as long as reading its weight, and many
small products and kernels leave the memory idle between them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.cuda.attention_check import wrong_attention
from engine.functions import LayerParts, Rope
from run.errors import cause_of

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

FUSED = "fused"  # where attention and MLP keep the tensors of their fused layers


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


def _norm(hidden: Tensor, norm: "LlamaRMSNorm") -> Tensor:
    if fused := small_kernels(hidden.device.type):
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
    layer: "LlamaDecoderLayer", hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Any, ...]:
    """Query, key and value; not yet rotated if there is a fourth part, which does that."""
    attention = layer.self_attn
    states = _products(attention, _norm(hidden, layer.input_layernorm))
    states = states.unflatten(-1, (-1, attention.head_dim))
    queries, keys = (
        linear.out_features // attention.head_dim for linear in _linears(attention)[:2]
    )
    fused = small_kernels(hidden.device.type)
    rotated = states[:, : queries + keys]
    rotated = rotated if fused else _rotated(rotated, cos, sin)
    parts = rotated[:, :queries], rotated[:, queries:], states[:, queries + keys :]
    return (*parts, partial(fused.rotate_into, cos, sin)) if fused else parts


def _after_attention(layer: "LlamaDecoderLayer", hidden: Tensor, attended: Tensor) -> Tensor:
    mlp = layer.mlp
    # The products add the residual connection, so a norm need not: fewer passes over memory, and as
    # many kernels.
    hidden = _plus_product(hidden, layer.self_attn.o_proj, attended.flatten(-2))
    both = _products(mlp, _norm(hidden, layer.post_attention_layernorm))
    fused = small_kernels(hidden.device.type)
    activated = fused.gated(both) if fused else _gated(both)
    return _plus_product(hidden, mlp.down_proj, activated)


DECODING = LayerParts(_rope, _before_attention, _after_attention)


# ---------------------------------------------------------------- the fused kernels


@cache
def small_kernels(kind: str) -> ModuleType | None:
    """`engine.cuda.small_kernels`; None where PyTorch's operators compute the same.

    That is so on other kinds of device, and on a GPU where these kernels do not run or make
    mistakes, which a line says.
    """
    if kind != "cuda":
        return None
    return _usable(kind, _import_small_kernels, wrong_results)


def decode_attention(
    kind: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> ModuleType | None:
    """`engine.cuda.attention_kernel`; None where `attend_to_lengths` computes the same.

    That is so where there are no `small_kernels`, and where this one does not run or makes
    mistakes, which a line says.
    """
    # A compiler that is missing has had its line.
    return small_kernels(kind) and _decode_attention(kind, dtype, heads, kv_heads, head_dim)


@cache
def _decode_attention(kind: str, *sizes: Any) -> ModuleType | None:
    if kind != "cuda":
        return None
    return _usable(kind, _import_attention_kernel, partial(wrong_attention, *sizes))


def _usable(
    kind: str,
    load: Callable[[], ModuleType],
    wrong_results: Callable[[ModuleType, torch.device], list[str]],
) -> ModuleType | None:
    """The kernels that ``load`` imports; None, and a line, if they do not run or are wrong.

    Args:
        wrong_results: finds what they compute otherwise than PyTorch's operators, by name.
    """
    try:
        kernels = load()
        wrong = wrong_results(kernels, torch.device(kind))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # Triton and its compilers raise many types
        _say_slower(
            f"do not run here ({cause_of(error)})",
            "install a C compiler and Python's headers (Debian, Ubuntu: apt install gcc "
            "python3-dev)",
        )
        return None
    if wrong:
        _say_slower(
            f"compute another {', '.join(wrong)} than PyTorch",
            f"install another torch than {torch.__version__}",
        )
    return None if wrong else kernels


def _say_slower(fault: str, cure: str) -> None:
    print(
        f"decoding: its fused kernels {fault}; using PyTorch's operations, which are slower: {cure}"
    )


def _import_small_kernels() -> ModuleType:
    """Raises ImportError where there is no Triton."""
    from engine.cuda import small_kernels as kernels

    return kernels


def _import_attention_kernel() -> ModuleType:
    from engine.cuda import attention_kernel as kernel

    return kernel


def wrong_results(kernels: ModuleType, device: torch.device) -> list[str]:
    """What ``kernels`` compute otherwise than PyTorch's operators.

    Compilers have made wrong kernels without a word (pytorch #180642).
    """
    half = torch.linspace(-1, 2, 12, device=device).view(3, 1, 4)
    cos, sin = _rope(half.repeat(1, 1, 2), half.flip(0).repeat(1, 1, 2))
    states = torch.linspace(-3, 3, 3 * 4 * 8, device=device).view(3, 4, 8)
    tokens, (keys, values) = torch.tensor([4, 0, 3], device=device), states.new_zeros(2, 6, 1, 8)
    query = kernels.rotate_into(cos, sin, *states.split([2, 1, 1], dim=1), tokens, keys, values)
    rotated, both = _rotated(states[:, :3], cos, sin), states.flatten(1)
    weight = torch.linspace(-1, 1, 32, device=device)
    pairs = {
        "query": (query, rotated[:, :2]),
        "key": (keys[tokens], rotated[:, 2:]),
        "value": (values[tokens], states[:, 3:]),
        "activation": (kernels.gated(both), _gated(both)),
        "norm": (kernels.rms_norm(both, weight, 0.1), F.rms_norm(both, (32,), weight, 0.1)),
    }
    rounding = {"rtol": 1e-4, "atol": 1e-5}
    return [name for name, pair in pairs.items() if not torch.allclose(*pair, **rounding)]
