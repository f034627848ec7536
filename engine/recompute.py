"""How many blocks must compute their activations again in the backward pass, to fit into memory."""

from typing import TYPE_CHECKING

import torch

from engine.memory import free_bytes
from engine.optimizer import checkpoint_bytes
from engine.sharding import slices_of

if TYPE_CHECKING:
    from engine.llama import Llama

FRAGMENTED_SHARE = 0.03  # of free memory: what the allocator can't use


def choose_recomputed(
    model: "Llama", micro_batch_tokens: int, longest: int, free: int | None = None
) -> int:
    """The smallest `Llama.recomputed_blocks` with which training fits into memory; prints it.

    It changes no bit of the result.

    Args:
        longest: tokens of the longest sequence.
        free: bytes that are free once the model is loaded; None: measured.
    """
    free = free_bytes(model.device) if free is None else free
    micro_batch_tokens = max(micro_batch_tokens, longest - 1)  # a longer row is a micro-batch too
    block = block_bytes(model, micro_batch_tokens, longest)
    room = free - bytes_to_come(model) - head_bytes(model) - int(FRAGMENTED_SHARE * free)
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
    """
    config, dtype = model.config, model.dtype
    heads = config.num_attention_heads, config.num_key_value_heads, model.head_dim
    attention = model.kernels.attention_bytes(*heads, longest, dtype)
    states = (2 * config.hidden_size + 2 * config.intermediate_size) * dtype.itemsize
    factors = 2 * torch.promote_types(dtype, torch.float32).itemsize
    return tokens * (states + factors + attention)


def head_bytes(model: "Llama") -> int:
    """The most that `engine.loss` needs at a time.

    A chunk of logits in the model's dtype and in float32 or better, their gradient in the model's
    dtype, and the gradient of the head's weight, summed in float32 or better.
    """
    dtype = model.dtype
    exact = torch.promote_types(dtype, torch.float32).itemsize
    logits = model.kernels.logits_at_once * (exact + 2 * dtype.itemsize)
    return logits + model.head.weight.numel() * exact


def bytes_to_come(model: "Llama") -> int:
    """What training adds to a model that has just been loaded: gradients and optimizer states.

    If it is spread over ranks: of their slices, and the whole gradients until they are summed, and
    the weights that are gathered at a time, those of two blocks and of all that is no block.
    """
    weights, states = checkpoint_bytes(model.parameters())
    if (slices := slices_of(model.head.weight)) > 1:
        blocks = sum(weight.nbytes for weight in model.blocks.parameters())
        gathered = weights - blocks + 2 * blocks // len(model.blocks)
        exact = torch.promote_types(model.dtype, torch.float32).itemsize // model.dtype.itemsize
        whole = gathered if model.reduces_each else weights
        return (weights + states) // slices + gathered + exact * whole
    # On a CPU they are mapped from their file, and take memory once they are changed.
    return states + (2 if model.device.type == "cpu" else 1) * weights
