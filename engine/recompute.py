"""How many blocks must compute their activations again in the backward pass, to fit into memory."""

from typing import TYPE_CHECKING

import torch

from engine.memory import free_bytes
from engine.optimizer import ADAMW, checkpoint_bytes

if TYPE_CHECKING:
    from engine.llama import Llama

FRAGMENTED_SHARE = 0.03  # of free memory: what the allocator can't use


def choose_recomputed(
    model: "Llama",
    micro_batch_tokens: int,
    longest: int,
    free: int | None = None,
    optimizer: str = ADAMW,
) -> int:
    """The smallest `Llama.recomputed_blocks` with which training fits into memory; prints it.

    It changes no bit of the result.

    Args:
        longest: tokens of the longest sequence.
        free: bytes that are free once the model is loaded; None: measured.
        optimizer: its name, as in `build_optimizer`.
    """
    free = free_bytes(model.device) if free is None else free
    micro_batch_tokens = max(micro_batch_tokens, longest - 1)  # a longer row is a micro-batch too
    block = block_bytes(model, micro_batch_tokens, longest)
    room = free - bytes_to_come(model, optimizer) - head_bytes(model) - int(FRAGMENTED_SHARE * free)
    # While a block is in its backward pass, it needs its activations and as many gradients.
    room -= 2 * block
    inputs = micro_batch_tokens * model.config.hidden_size * model.dtype.itemsize
    blocks = len(model.blocks)
    number = fewest_recomputed(blocks, room, block, inputs)
    print(
        f"gradient_checkpointing: {number} of {blocks} layers are recomputed; a layer keeps "
        f"{block / 1e9:.2g} GB for {micro_batch_tokens} tokens, of {max(0, room) / 1e9:.2g} GB"
    )
    return number


def fewest_recomputed(blocks: int, room: int, block: int, inputs: int) -> int:
    """How many of ``blocks`` must be recomputed to stay within ``room`` bytes, if that is possible.

    Args:
        block: bytes that a block keeps.
        inputs: bytes that it keeps if it is recomputed.
    """
    kept = (room - blocks * inputs) // (block - inputs)
    return blocks - min(max(kept, 0), blocks)


def block_bytes(model: "Llama", tokens: int, longest: int) -> int:
    """What a block keeps for its backward pass in training, for ``tokens`` tokens.

    With hidden size H and intermediate size I, it keeps of each token

    - H: its input, for the first norm,
    - what attention keeps (`Kernels.attention_bytes`), with its output, for o_proj,
    - H: the sum of both, for the second norm,
    - 2 I: gate and up, for SwiGLU,
    - two numbers in float32 or better: the factors of the norms.

    The norms and silu(gate) * up are computed again (`functions.recomputed`).

    Adapters keep what they multiply by their second weight, and with dropout what it leaves of
    their inputs, and which.
    """
    config, dtype = model.config, model.dtype
    heads = config.num_attention_heads, config.num_key_value_heads, model.head_dim
    attention = model.kernels.attention_bytes(*heads, longest, dtype)
    numbers = 2 * config.hidden_size + 2 * config.intermediate_size
    numbers += getattr(model.stored, "kept_numbers", 0) // config.num_hidden_layers  # adapters
    states = numbers * dtype.itemsize
    factors = 2 * torch.promote_types(dtype, torch.float32).itemsize
    return tokens * (states + factors + attention)


def head_bytes(model: "Llama") -> int:
    """The most that `engine.loss` needs at a time.

    A chunk of logits in the model's dtype and in float32 or better, their gradient in the model's
    dtype, and the gradient of the head's weight, summed in float32 or better, if it is trained.
    """
    dtype = model.dtype
    exact = torch.promote_types(dtype, torch.float32).itemsize
    logits = model.kernels.logits_at_once * (exact + 2 * dtype.itemsize)
    weight = model.head.weight
    return logits + (weight.numel() * exact if weight.requires_grad else 0)


def bytes_to_come(model: "Llama", optimizer: str = ADAMW) -> int:
    """What training adds to a model that has just been loaded: gradients and optimizer states."""
    gradients, states = checkpoint_bytes(model.trained, optimizer)
    # On a CPU, weights are mapped from their file, and take memory once they are used.
    mapped = [weight for weight in model.parameters() if weight.is_floating_point()]
    is_cpu = model.device.type == "cpu"
    return states + gradients + (sum(weight.nbytes for weight in mapped) if is_cpu else 0)
