"""The forward pass over packed sequences.

Weights, files and configuration are Transformers' Llama as it is. The forward pass is our own,
over the same modules, since three things cost others a third of their time and memory: padding,
what elementwise operations keep for the backward pass, and copies between layouts. What attends
to what is a parameter of it (`Attend`): packed sequences in training and validation, a cache in
decoding.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from engine import functions
from engine.attention import PackedAttention
from engine.cpu.onednn import product_plus, product_times
from engine.functions import RMSNorm, Rotate, SwiGLU
from engine.packing import Batch, Example, collate
from run.errors import UserError, cause_of

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


# attend(layer, query, key, value) with [N, heads, head_dim] and [N, kv_heads, head_dim] gives
# [N, heads, head_dim], for N tokens of whichever sequences.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# remade(tensor, make): what is computed under it keeps make for its backward pass, not tensor.
Remade = Callable[[torch.Tensor, Callable[[], torch.Tensor]], AbstractContextManager[None]]


def _kept(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


def forward(
    model: LlamaForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attend: Attend,
    wanted: torch.Tensor | None = None,
) -> torch.Tensor:
    """The hidden states before the head.

    Args:
        input_ids, position_ids: ``[N]``, tokens of whichever sequences.
        attend: which of them attend to what; see `Attend`.
        wanted: ``[W]``, which tokens' states to give; None: all. The last layer computes nothing
            but keys and values of the others.

    Returns:
        ``[N, hidden]``, or ``[W, hidden]``.
    """
    hidden = model.model.embed_tokens(input_ids)
    cos, sin = model.model.rotary_emb(hidden, position_ids[None])
    recompute = model.model.gradient_checkpointing and model.training and torch.is_grad_enabled()
    prepare_rope, *parts = _parts(model, recompute)
    rope = prepare_rope(cos[0, :, None], sin[0, :, None])
    *layers, last = model.model.layers
    for layer, positions in [*((layer, None) for layer in layers), (last, wanted)]:
        if recompute:
            hidden = checkpoint(
                _layer, layer, hidden, *rope, attend, positions, *parts, use_reentrant=False
            )
        else:
            hidden = _layer(layer, hidden, *rope, attend, positions, *parts)
    return _norm(hidden, model.model.norm)


def forward_packed(
    model: LlamaForCausalLM, batch: Batch, wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """`forward` over packed sequences, each blind to the others."""
    attend = PackedAttention(batch, model.config.attention_dropout if model.training else 0.0)
    return forward(model, batch.input_ids[0], batch.position_ids[0], attend, wanted)


def _parts(model: LlamaForCausalLM, recompute: bool) -> tuple[Callable[..., Any], ...]:
    """What becomes of the rotary embedding's cos and sin, and what a layer does before and after its attention.

    As it is, compiled, keeping less for the backward pass, or without one.
    """
    # Not under no_grad: that is also where tensors are made again for a backward pass, bit for bit.
    if torch.is_inference_mode_enabled():
        return _signed_rope, _before_attention_in_decoding, _after_attention_in_decoding
    if torch.is_grad_enabled() and getattr(model.model, "compiled", False):
        return _half_rope, *_compiled_parts()
    if torch.is_grad_enabled() and not recompute:
        kept_less = (
            partial(part, remade=functions.remade) for part in (_before_attention, _after_attention)
        )
        return _half_rope, *kept_less
    return _half_rope, _before_attention, _after_attention


def _half_rope(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For `_rotate`: of ``[N, 1, head_dim]`` one half, since both are the same."""
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def _signed_rope(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For `_rotate_in_decoding`: sin with the sign that each half takes."""
    half = cos.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


@cache
def _compiled_parts() -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Not in compiled code: attention, whose kernels are as good as they get, and whose sequences differ each time.
    # dynamic: one graph for every number of tokens; and since a layer's weights are inputs of it, for every layer.
    return tuple(
        torch.compile(part, dynamic=True, fullgraph=True)
        for part in (_before_attention, _after_attention)
    )


def _layer(
    layer: "LlamaDecoderLayer",
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attend: Attend,
    wanted: torch.Tensor | None,
    before_attention: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    after_attention: Callable[..., torch.Tensor],
) -> torch.Tensor:
    attended = attend(layer.self_attn.layer_idx, *before_attention(layer, hidden, cos, sin))
    if wanted is not None:
        hidden, attended = hidden.index_select(0, wanted), attended.index_select(0, wanted)
    return after_attention(layer, hidden, attended)


def _before_attention(
    layer: "LlamaDecoderLayer",
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    remade: Remade = _kept,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attention, norm = layer.self_attn, layer.input_layernorm
    normed = _norm(hidden, norm)
    with remade(normed, lambda: _norm(hidden, norm)):
        query, key, value = (
            attention.q_proj(normed),
            attention.k_proj(normed),
            attention.v_proj(normed),
        )
    query, key, value = (
        tensor.unflatten(-1, (-1, attention.head_dim)) for tensor in (query, key, value)
    )
    return Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin), value


def _after_attention(
    layer: "LlamaDecoderLayer", hidden: torch.Tensor, attended: torch.Tensor, remade: Remade = _kept
) -> torch.Tensor:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    hidden = hidden + layer.self_attn.o_proj(attended.flatten(-2))
    normed = _norm(hidden, norm)
    with remade(normed, lambda: _norm(hidden, norm)):
        gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
    activated = SwiGLU.apply(gate, up)
    with remade(activated, lambda: SwiGLU.apply(gate, up)):
        return hidden + mlp.down_proj(activated)


def _before_attention_in_decoding(
    layer: "LlamaDecoderLayer", hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attention, normed = layer.self_attn, _norm_in_decoding(hidden, layer.input_layernorm)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return _rotate_in_decoding(query, cos, sin), _rotate_in_decoding(key, cos, sin), value


def _rotate_in_decoding(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`_rotate` in fewer passes, by what `_signed_rope` gives."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def _after_attention_in_decoding(
    layer: "LlamaDecoderLayer", hidden: torch.Tensor, attended: torch.Tensor
) -> torch.Tensor:
    mlp = layer.mlp
    hidden = product_plus(layer.self_attn.o_proj, attended.flatten(-2), hidden)
    normed = _norm_in_decoding(hidden, layer.post_attention_layernorm)
    activated = product_times(mlp.up_proj, normed, F.silu(mlp.gate_proj(normed), inplace=True))
    return product_plus(mlp.down_proj, activated, hidden)


def _norm_in_decoding(hidden: torch.Tensor, norm: "LlamaRMSNorm") -> torch.Tensor:
    if hidden.is_cuda or hidden.dtype != torch.float32:
        return _norm(hidden, norm)
    length = torch.linalg.vector_norm(
        hidden, dim=-1, keepdim=True
    )  # fewer passes over it than `RMSNorm`
    scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return (hidden * scale).mul_(norm.weight)


def _norm(hidden: torch.Tensor, norm: "LlamaRMSNorm") -> torch.Tensor:
    if hidden.is_cuda:  # one kernel there
        return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
    return RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)


def checkpoint_activations(model: LlamaForCausalLM) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    model.model.gradient_checkpointing = True


def compile_layers(model: LlamaForCausalLM) -> None:
    """Compile what a layer does before and after its attention, for passes with gradients.

    Raises:
        UserError: this machine can't, mostly for want of a C++ compiler.
    """
    model.model.compiled = True
    example = Example([0] * 8, [0] * 8)
    batch = collate([example, example]).to(model.device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's notes about its own ways
            forward_packed(model, batch, batch.loss_positions[::2]).sum().backward()
    except Exception as error:  # the compiler's layers raise many types
        raise UserError(
            f"compile true: torch.compile fails here ({cause_of(error)}): install a C++ compiler, or set compile false"
        ) from None
    model.zero_grad()
