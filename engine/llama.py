"""A Llama whose blocks are called as modules, over packed sequences.

Weights, their names, files and configuration remain Transformers' own (`Llama.pretrained`). The
forward pass over those submodules is ours. It avoids three costs that take a third of the time and
memory elsewhere: padding, activations saved by elementwise operations, and copies between layouts.
Attention is an argument (`Attend`): over packed sequences in training and validation, to a cache in
decoding.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.device import Kernels, kernels_for
from engine.functions import Elementwise, LayerParts, Rope, SwiGLU, recomputed, rotate_both, saved
from engine.loss import LinearCrossEntropy
from engine.ranks import ALONE

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

    from engine.packing import MicroBatch

# attend(layer, query, key, value) takes [N, heads, head_dim] and twice [N, kv_heads, head_dim], and
# returns [N, heads, head_dim], for N tokens of any sequences. (A GPU's cache can also rotate them.)
Attend = Callable[..., Tensor]
Recomputed = Callable[[Tensor, Callable[[], Tensor]], AbstractContextManager[None]]


class Llama(nn.Module):
    """Called with a `MicroBatch`, it returns the loss.

    Attributes:
        pretrained: Transformers' model, which holds the weights.
        kernels: operations that depend on the device.
        recomputed_blocks: how many blocks compute their activations again in the backward pass: the
            first ones, since what the later blocks kept is free when their turn comes.
        recomputes_parts: whether the others compute their norms and SwiGLU again.
        elementwise: how blocks compute in training between their products.
        stored: what a checkpoint contains: ``pretrained``, or `engine.lora.Adapters`.
        ranks: the processes among which micro-batches are dealt.
        in_turn: gives a step's micro-batches (`engine.sharding.reducing_last`, if it is spread).
    """

    def __init__(self, pretrained: "LlamaForCausalLM", kernels: Kernels | None = None):
        super().__init__()
        # Not a submodule: a layer that is reached by two ways can't be sharded.
        object.__setattr__(self, "pretrained", pretrained)
        object.__setattr__(self, "stored", pretrained)
        self.embedding, self.rotary = pretrained.model.embed_tokens, pretrained.model.rotary_emb
        self.blocks = nn.ModuleList(Block(layer) for layer in pretrained.model.layers)
        self.norm, self.head = pretrained.model.norm, pretrained.lm_head
        self.config = pretrained.config
        self.head_dim = pretrained.model.layers[0].self_attn.head_dim
        self.kernels = kernels or kernels_for(pretrained.device)
        self.recomputed_blocks, self.recomputes_parts, self.elementwise = 0, True, EAGER
        self.ranks, self.in_turn = ALONE, iter

    def forward(self, micro_batch: "MicroBatch") -> Tensor:
        """The summed negative log-likelihood of all supervised tokens, in nats: a float64 scalar.

        A sum, not a mean. If it is divided by the number of supervised tokens in the entire step,
        all of them weigh the same, so the gradient does not depend on how the step is split into
        micro-batches. (A mean of micro-batch means does depend on it: transformers #34191.) Each
        token's own loss, in float32 or better, is returned after the sum if tokens have classes.
        """
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = partial(self.kernels.attention, micro_batch, dropout)
        inputs = micro_batch.input_ids, micro_batch.position_ids, attend
        outputs = self.hidden_states(*inputs, micro_batch.output_positions)
        arguments = self.head.weight, micro_batch.labels, torch.is_grad_enabled(), self.kernels
        nats = LinearCrossEntropy.apply(outputs, *arguments, micro_batch.classes is not None)
        return nats * 0 if micro_batch.is_filler else nats

    def next_logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attend: Attend,
        wanted: Tensor | None = None,
        count: int | None = None,
    ) -> Tensor:
        """For decoding: logits ``[count, vocabulary]`` after the first ``count`` of ``wanted``."""
        parts = self.kernels.decoding_parts or DECODING
        hidden = self.hidden_states(input_ids, position_ids, attend, wanted, parts)
        return self.head(hidden[:count])

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attend: Attend,
        wanted: Tensor | None = None,
        parts: LayerParts | None = None,
    ) -> Tensor:
        """The hidden states before the head, ``[N, hidden]`` or ``[W, hidden]``.

        Args:
            input_ids, position_ids: ``[N]``, tokens of any sequences.
            wanted: ``[W]``, which tokens' states are needed; None: all. For the other tokens the
                last block computes only keys and values.
            parts: how a block computes; None: as in training or measuring, whichever this is.
        """
        num_recomputed = self.recomputed_blocks if self.training and parts is None else 0
        if parts is None:
            keep = recomputed if self.recomputes_parts else saved
            parts = layer_parts(self.elementwise, keep) if self.training else KEEPING_LESS
        hidden = self.embedding(input_ids)
        cos, sin = self.rotary(hidden, position_ids[None])
        rope = parts.rope(cos[0, :, None], sin[0, :, None])
        for number, block in enumerate(self.blocks, start=1):
            last = wanted if number == len(self.blocks) else None
            if number <= num_recomputed:  # which leaves nothing more to save
                plain = layer_parts(self.elementwise, saved)
                hidden = checkpoint(block, hidden, rope, attend, plain, last, use_reentrant=False)
            else:
                hidden = block(hidden, rope, attend, parts, last)
        return _norm(hidden, self.norm)

    def train(self, mode: bool = True) -> "Llama":
        self.pretrained.train(mode)  # for its own forward pass and generate
        return super().train(mode)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that get gradients."""
        return [weight for weight in self.parameters() if weight.requires_grad]

    @property
    def device(self) -> torch.device:
        return self.pretrained.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pretrained.dtype


class Block(nn.Module):
    """One decoder layer: attention, then the MLP, each applied to a norm and added to its input."""

    def __init__(self, layer: "LlamaDecoderLayer"):
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden: Tensor, rope: Rope, attend: Attend, parts: LayerParts, wanted: Tensor | None
    ) -> Tensor:
        """From ``[N, hidden]`` to the same shape, or to ``[W, hidden]`` for W ``wanted`` tokens."""
        states = parts.before_attention(self.layer, hidden, *rope)
        attended = attend(self.layer.self_attn.layer_idx, *states)
        if wanted is not None:
            hidden, attended = hidden.index_select(0, wanted), attended.index_select(0, wanted)
        return parts.after_attention(self.layer, hidden, attended)


def _half_rope(cos: Tensor, sin: Tensor) -> Rope:
    """For `Rotate`: only the first half, since both halves are equal."""
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def _before_attention(
    elementwise: Elementwise,
    recomputed: Recomputed,
    layer: "LlamaDecoderLayer",
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    attention = layer.self_attn
    normed, again = elementwise.norm(hidden, layer.input_layernorm)
    with recomputed(normed, again):
        states = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    query, key, value = (state.unflatten(-1, (-1, attention.head_dim)) for state in states)
    return *elementwise.rotate(query, key, cos, sin), value


def _after_attention(
    elementwise: Elementwise,
    recomputed: Recomputed,
    layer: "LlamaDecoderLayer",
    hidden: Tensor,
    attended: Tensor,
) -> Tensor:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    hidden, normed, again = elementwise.add_norm(
        hidden, layer.self_attn.o_proj(attended.flatten(-2)), norm
    )
    with recomputed(normed, again):
        gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
    activated = elementwise.swiglu(gate, up)
    with recomputed(activated, partial(elementwise.swiglu, gate, up)):
        return hidden + mlp.down_proj(activated)


def layer_parts(elementwise: Elementwise, recomputed: Recomputed) -> LayerParts:
    """The parts of a block in training."""
    before = partial(_before_attention, elementwise, recomputed)
    return LayerParts(_half_rope, before, partial(_after_attention, elementwise, recomputed))


def _norm_and_again(hidden: Tensor, norm: "LlamaRMSNorm") -> tuple[Tensor, Callable[[], Tensor]]:
    return _norm(hidden, norm), partial(_norm, hidden, norm)


def _add_norm(
    hidden: Tensor, update: Tensor, norm: "LlamaRMSNorm"
) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    hidden = hidden + update
    return hidden, *_norm_and_again(hidden, norm)


def _norm(hidden: Tensor, norm: "LlamaRMSNorm") -> Tensor:
    if hidden.is_cuda:  # where this is one kernel
        return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
    return RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)


class RMSNorm(torch.autograd.Function):
    """Root mean square norm (arXiv:1910.07467) that saves its input and one number per token.

    Computed in float32 or better, like Transformers' own.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return (exact * scale).to(hidden.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.to(scale.dtype) * scale
        is_trained = ctx.needs_input_grad[1]
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if is_trained else None
        grad_normed = (grad * weight).to(scale.dtype)
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_hidden = grad_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return grad_hidden.to(hidden.dtype), grad_weight, None


EAGER = Elementwise(_norm_and_again, _add_norm, rotate_both, SwiGLU.apply)
KEEPING_LESS = layer_parts(EAGER, recomputed)


def _signed_rope(cos: Tensor, sin: Tensor) -> Rope:
    """For `_rotated`: sin, negated in the first half."""
    half = cos.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def _before_attention_in_decoding(
    layer: "LlamaDecoderLayer", hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    attention, normed = layer.self_attn, _norm_in_decoding(hidden, layer.input_layernorm)
    states = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    query, key, value = (state.unflatten(-1, (-1, attention.head_dim)) for state in states)
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def _after_attention_in_decoding(
    layer: "LlamaDecoderLayer", hidden: Tensor, attended: Tensor
) -> Tensor:
    mlp = layer.mlp
    hidden = _fused(layer.self_attn.o_proj, "plus", attended.flatten(-2), hidden)
    normed = _norm_in_decoding(hidden, layer.post_attention_layernorm)
    activated = _fused(mlp.up_proj, "times", normed, F.silu(mlp.gate_proj(normed), inplace=True))
    return _fused(mlp.down_proj, "plus", activated, hidden)


def _fused(linear: nn.Module, name: str, hidden: Tensor, other: Tensor) -> Tensor:
    """``linear(hidden)`` plus or times ``other``, in one pass if the layer provides that."""
    if method := getattr(linear, name, None):
        return method(hidden, other)
    return linear(hidden).add_(other) if name == "plus" else linear(hidden).mul_(other)


def _norm_in_decoding(hidden: Tensor, norm: "LlamaRMSNorm") -> Tensor:
    """`_norm` in fewer passes, unless it is a single kernel or needs another dtype."""
    if hidden.is_cuda or hidden.dtype != torch.float32:
        return _norm(hidden, norm)
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return (hidden * scale).mul_(norm.weight)


DECODING = LayerParts(_signed_rope, _before_attention_in_decoding, _after_attention_in_decoding)
