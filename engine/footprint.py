"""The memory that training takes, counted from a model's shape by what holds each byte."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from engine.recipe import (
    Recipe,
    Recomputation,
    Rows,
    adapter_parameters,
    gradient_bytes,
    state_bytes,
    trained_parameters,
    weight_bytes,
)

if TYPE_CHECKING:
    from engine.device import Kernels
    from engine.shape import ModelShape


@dataclass(frozen=True)
class Footprint:
    """Bytes on each device when most are in use.

    Attributes:
        weights, gradients, states: of the model and the optimizer, as far as this device has them.
        gathered: the weights and gradients of other devices that are needed at the same time.
        activations: what is kept for the backward pass.
        head: what is needed for a moment: by the loss, or by the backward pass of one block.
        heap: what a CPU takes beyond the tensors.
    """

    weights: int
    gradients: int
    states: int
    gathered: int
    activations: int
    head: int
    heap: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def gathered_bytes(shape: "ModelShape", recipe: Recipe, *, accumulates: bool) -> int:
    """What FSDP has on each device, beyond its own share.

    The weights of the block that computes and of the next. The gradients of the block, and those of
    the block before while they are summed over the devices in float32 or better. All of what lies
    outside the blocks, with its gradients. In a step that ``accumulates`` over micro-batches: all
    gradients, if they are summed at its end; otherwise, if groups of devices have a copy each, the
    group's sums of this device's share. If no weights are freed, all weights.
    """
    if recipe.devices == 1:
        return 0
    each, exact = shape.dtype.itemsize, torch.promote_types(shape.dtype, torch.float32).itemsize
    block, outside = shape.block_parameters, shape.other_parameters
    whole = 0
    if accumulates and not recipe.reduces_each:
        whole += trained_parameters(shape, recipe) * exact
    elif accumulates and recipe.shards < recipe.devices:
        whole += math.ceil(trained_parameters(shape, recipe) / recipe.shards) * exact
    if not recipe.reshards:
        whole += (shape.layers - 2) * block * each
    if recipe.method != "full":
        trained = adapter_parameters(shape, recipe.rank) // shape.layers
        return (2 * block + outside) * each + trained * (each + exact) + whole
    return block * (3 * each + exact) + outside * (each + exact) + whole


# ---------------------------------------------------------------- activations


def block_bytes(shape: "ModelShape", kernels: "Kernels", longest: int, *, parts: bool) -> int:
    """What a block keeps of a token for its backward pass.

    With hidden size H and intermediate size I, it keeps

    - H: its input, for the first norm,
    - what attention keeps (`Kernels.attention_bytes`), with its output, for o_proj,
    - H: the sum of both, for the second norm,
    - 2 I: gate and up, for SwiGLU,
    - two numbers in float32 or better: the factors of the norms,
    - 2 H + I: the norms and silu(gate) * up, unless ``parts`` are computed again
      (`functions.recomputed`).
    """
    heads = shape.heads, shape.kv_heads, shape.head_dim
    attention = kernels.attention_bytes(*heads, longest, shape.dtype)
    kept = 2 * shape.hidden + 2 * shape.intermediate
    kept += 0 if parts else 2 * shape.hidden + shape.intermediate
    exact = torch.promote_types(shape.dtype, torch.float32).itemsize
    return attention + kept * shape.dtype.itemsize + 2 * exact


def adapter_activations(shape: "ModelShape", recipe: Recipe) -> int:
    """What the adapters of a block keep of a token, beside their inputs, which are kept anyway.

    What their second weights are multiplied by, and with dropout what it leaves of their inputs,
    and which.
    """
    if recipe.method == "full":
        return 0
    numbers = len(shape.products) * recipe.rank
    if recipe.has_dropout:
        numbers += 2 * sum(inputs for inputs, _ in shape.products.values())
    return numbers * shape.dtype.itemsize


def activation_bytes(
    shape: "ModelShape",
    recipe: Recipe,
    kernels: "Kernels",
    rows: Rows,
    tokens: int,
    recomputation: Recomputation,
) -> tuple[int, int, int]:
    """What is kept of a micro-batch when its loss is computed, and what is needed beyond that.

    Args:
        tokens: of the micro-batch.

    Returns:
        Bytes kept, and the most that is needed in addition: by the loss, and by the backward pass
        of a block.
    """
    each, exact = shape.dtype.itemsize, torch.promote_types(shape.dtype, torch.float32).itemsize
    wanted = math.ceil(rows.supervised * tokens)
    hidden, intermediate = shape.hidden * each, shape.intermediate * each
    adapters = adapter_activations(shape, recipe)
    whole = block_bytes(shape, kernels, rows.longest, parts=False) + adapters
    block = block_bytes(shape, kernels, rows.longest, parts=recomputation.parts) + adapters
    recomputed, blocks = recomputation.blocks, shape.layers
    # The last block computes its MLP for the supervised tokens only.
    spared = hidden + 2 * intermediate
    spared += 0 if recomputation.parts else hidden + intermediate
    kept = tokens * (recomputed * hidden + (blocks - recomputed) * block)
    kept -= spared * (tokens - wanted) if recomputed < blocks else 0
    kept += 2 * wanted * hidden  # the last norm's input, and the gradient of its output
    chunk = min(kernels.logits_at_once, wanted * shape.config.vocab_size)
    # In its own dtype and in float32 or better; one tensor serves both if they are the same.
    loss = chunk * (exact if exact == each else exact + each)
    if recipe.method == "full":
        loss += shape.head_parameters * exact  # the gradient of the head, summed in this precision
    # SwiGLU's backward pass has three tensors of its size, but its output is no longer needed, if
    # that was kept at all. The residual has a gradient.
    backward = wanted * ((3 if recomputation.parts else 2) * intermediate + hidden)
    if recomputed:
        alone = (recomputed - 1) * hidden + whole + 2 * intermediate + hidden
        backward = max(backward, tokens * alone - kept)
    if recipe.fp8:
        # Before that, down_proj's has its weight and the gradient of its output in 8 bits.
        own = (2 if recomputation.parts else 1) * intermediate + hidden + shape.hidden
        backward = max(backward, wanted * own + shape.hidden * shape.intermediate)
    if recipe.method == "qlora":  # the weight of one product at a time
        backward += shape.hidden * intermediate
    return kept, loss, backward


def most_in_a_step(rows: Rows, devices: int) -> int:
    """The most tokens of a step on each device, but for steps of unusually long rows."""
    return max(rows.longest, int(1.25 * rows.tokens * rows.batch_size / devices))


def products_of_shapes(shape: "ModelShape", recipe: Recipe, rows: Rows, micro_batches: int) -> int:
    """How many matrix products of different shapes a step of so many micro-batches computes.

    For each micro-batch, and for each size of a linear layer: its output, and the gradients of its
    input and, if trained, of its weight. For each length of a row: six of attention.
    """
    is_full, layers = recipe.method == "full", set(shape.products.values())
    count = len(layers) * (3 if is_full else 2)
    if not is_full:
        rank = recipe.rank
        count += 3 * len({pair for a, b in layers for pair in ((a, rank), (rank, b))})
    return 6 * (rows.lengths or rows.longest) + count * micro_batches


def footprint(
    shape: "ModelShape",
    recipe: Recipe,
    kernels: "Kernels",
    rows: Rows,
    tokens: int,
    recomputation: Recomputation,
) -> Footprint:
    """All of it, on each device."""
    accumulates = tokens < most_in_a_step(rows, recipe.devices)
    # A longer row is a micro-batch too.
    tokens = max(tokens, rows.longest - 1)
    kept, loss, backward = activation_bytes(shape, recipe, kernels, rows, tokens, recomputation)
    micro_batches = math.ceil(rows.tokens * rows.batch_size / recipe.devices / tokens)
    products = products_of_shapes(shape, recipe, rows, micro_batches)
    return Footprint(
        weights=math.ceil(weight_bytes(shape, recipe) / recipe.shards),
        gradients=math.ceil(gradient_bytes(shape, recipe) / recipe.shards),
        states=math.ceil(state_bytes(shape, recipe) / recipe.shards),
        gathered=gathered_bytes(shape, recipe, accumulates=accumulates),
        activations=kept,
        head=max(loss, backward),
        heap=kernels.heap_bytes(shape.dtype, loss, backward, products),
    )
