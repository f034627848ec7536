"""How fast a training step can be, from its arithmetic, its bytes and those that are communicated.

A model to rank settings by, not a promise: whatever is not a matrix product, a pass over memory or
communication takes no time in it. The shares of a card's peak that products and passes reach are
those of well-tuned kernels at the shapes of Llama-2-7B.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.recipe import (
    Recipe,
    Recomputation,
    Rows,
    gradient_bytes,
    state_bytes,
    trained_parameters,
)

if TYPE_CHECKING:
    from engine.shape import ModelShape

PRODUCTS, PASSES, LINKS = 0.70, 0.78, 0.80  # attained shares of what a data sheet says
FP8_PRODUCTS = 0.60  # likewise: they soon reach the limit of a card's power
GPUS_IN_A_NODE = 8
NETWORK = 50e9  # bytes a second into each GPU from other nodes: 400 Gb/s
LAUNCHES = 2.5e-3  # seconds that the host takes for a block, forward and backward
# Passes over memory of one block, forward and backward, compiled, in units of its hidden and of its
# intermediate states. Those that are not compiled are about twice as many.
FORWARD, BACKWARD = (11, 3), (12, 5)
PARTS = (4, 3)  # of norms and SwiGLU, to compute them again
# Bytes of each parameter that could be passed over while `adamw_8bit` makes its step: torchao's
# kernels compute more than they read (34 ms for 1e9 parameters on an H200).
STEP_8BIT = 128


@dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet.

    Attributes:
        name: as in the name that PyTorch gives it.
        memory: in GB, as it is sold.
        flops: dense products of bfloat16 with sums in float32, a second.
        fp8_flops: the same of 8-bit floats; 0 if it has none.
        bandwidth: of its memory, in bytes a second.
        link: bytes a second into it from the other GPUs of its node.
    """

    name: str
    memory: int
    flops: float
    fp8_flops: float
    bandwidth: float
    link: float


CARDS = (
    Card("4080", 16, 97e12, 195e12, 0.72e12, 25e9),
    Card("4090", 24, 165e12, 330e12, 1.01e12, 25e9),
    Card("A10", 24, 125e12, 0, 0.60e12, 25e9),
    Card("5090", 32, 210e12, 419e12, 1.79e12, 50e9),
    Card("L40S", 48, 362e12, 733e12, 0.86e12, 25e9),
    Card("A6000", 48, 155e12, 0, 0.77e12, 25e9),
    Card("H100", 80, 989e12, 1979e12, 3.35e12, 450e9),
    Card("A100", 80, 312e12, 0, 2.04e12, 300e9),
    Card("H200", 141, 989e12, 1979e12, 4.80e12, 450e9),
    Card("B200", 180, 2250e12, 4500e12, 7.70e12, 900e9),
)
# A core pair of a desktop, to rank settings by; its figures are not shown.
CPU = Card("CPU", 0, 100e9, 0, 20e9, 5e9)


def card_named(name: str) -> Card | None:
    """The card in PyTorch's ``name`` of a device, as a word: an A100 is no A10."""
    return next((card for card in CARDS if re.search(rf"\b{card.name}\b", name)), None)


def card_of_size(gigabytes: float) -> Card:
    """The first card of `CARDS` whose memory is nearest to ``gigabytes``."""
    return min(CARDS, key=lambda card: abs(math.log(card.memory / gigabytes)))


@dataclass(frozen=True)
class Step:
    """What an optimizer step takes.

    Attributes:
        seconds: expected for it.
        tokens: that it trains on, on all devices.
        flops: of the same step without recomputation, on all devices: 6 for each parameter but the
            embedding's and each token, and those of attention; 4 for a frozen one.
        communicated: bytes that each device receives.
        card: on which.
    """

    seconds: float
    tokens: float
    flops: float
    communicated: float
    card: Card
    devices: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def share(self) -> float:
        """Of the peak of all devices."""
        return self.flops / self.seconds / (self.card.flops * self.devices)


def expected_step(
    shape: "ModelShape",
    recipe: Recipe,
    rows: Rows,
    card: Card,
    micro_batch_tokens: int,
    recomputation: Recomputation,
    compiles: bool,
) -> Step:
    """The step of a plan, by the roofline of ``card``."""
    tokens = rows.tokens * rows.batch_size
    # The rows are dealt out to the devices; at least one each, or some have nothing to do.
    own = max(tokens / recipe.devices, rows.tokens)
    micro_batches = max(1, math.ceil(own / micro_batch_tokens))
    useful, done = _flops_per_token(shape, recipe, rows, recomputation)
    is_slow = shape.dtype == torch.float32 and card is not CPU  # about an eighth of bfloat16's
    products = own * done / (card.flops * PRODUCTS) * (8 if is_slow else 1)
    if recipe.fp8 and card.fp8_flops:
        faster = 1 - card.flops * PRODUCTS / (card.fp8_flops * FP8_PRODUCTS)
        share = 2 * _fp8_weights(shape, recomputation) / done
        products *= 1 - share * faster
    passes = own * _pass_bytes_per_token(shape, recipe, recomputation, compiles)
    passes += micro_batches * _micro_batch_bytes(shape, recipe, recomputation)
    passes += _optimizer_bytes(shape, recipe) / recipe.shards
    computing = products + passes / (card.bandwidth * PASSES)
    launched = shape.layers * LAUNCHES * micro_batches * (0 if card is CPU else 1)
    inside, across = communicated_bytes(shape, recipe, micro_batches)
    waiting = inside / (card.link * LINKS) + across / (NETWORK * LINKS)
    # Communication runs beside computation, but for the first gathering and the last sum.
    seconds = max(computing, launched, waiting) + waiting / shape.layers
    return Step(seconds, tokens, tokens * useful, inside + across, card, recipe.devices)


def communicated_bytes(
    shape: "ModelShape", recipe: Recipe, micro_batches: int
) -> tuple[float, float]:
    """What each device receives in a step: from its own node, and from others.

    Weights are gathered for each forward and each backward pass, and gradients are summed in
    float32 or better (FSDP, arXiv:2304.11277). If several groups of devices have a copy each, the
    sums of the groups are added up, once in a step (HSDP).
    """
    shards, exact = recipe.shards, torch.promote_types(shape.dtype, torch.float32).itemsize
    weights = shape.parameters * shape.dtype.itemsize
    gradients = trained_parameters(shape, recipe) * exact
    sums = micro_batches if recipe.reduces_each else 1
    gathers = micro_batches * (2 if recipe.reshards else 1)
    gathered = (gathers * weights + sums * gradients) * (shards - 1) / shards
    copies = recipe.devices / shards
    added = 2 * gradients / shards * (copies - 1) / copies
    # A ring that leaves the node is as slow as its slowest link.
    is_inside = shards <= GPUS_IN_A_NODE
    inside = gathered * is_inside + added * (recipe.devices <= GPUS_IN_A_NODE)
    return inside, gathered + added - inside


def useful_flops(shape: "ModelShape", recipe: Recipe, rows: Rows) -> float:
    """Of each token, as `Step.flops` counts them."""
    return _flops_per_token(shape, recipe, rows, Recomputation(0, False))[0]


def _flops_per_token(
    shape: "ModelShape", recipe: Recipe, rows: Rows, recomputation: Recomputation
) -> tuple[float, float]:
    """Of all devices together: useful ones, and those that are done."""
    block = 2 * shape.block_products
    # Causal attention, with the tokens of a row before this one: scores and their weighted sum.
    block += 2 * shape.heads * shape.head_dim * rows.tokens
    head = 2 * shape.head_parameters * rows.supervised
    passes = 3 if recipe.method == "full" else 2  # a frozen weight has no gradient
    useful = shape.layers * block * passes + head * passes
    done = useful + head * (3 - passes)  # which computes all of its gradients with the loss
    if recipe.method != "full":
        done += 6 * sum(a + b for a, b in shape.products.values()) * recipe.rank * shape.layers
    return useful, done + recomputation.blocks * (block - 2 * shape.hidden * shape.intermediate)


def _fp8_weights(shape: "ModelShape", recomputation: Recomputation) -> int:
    """Of the products that `engine.cuda.fp8` computes: all forward, and half of those back."""
    again = recomputation.blocks * (shape.block_products - shape.hidden * shape.intermediate)
    return 2 * shape.layers * shape.block_products + again


def _pass_bytes_per_token(
    shape: "ModelShape", recipe: Recipe, recomputation: Recomputation, compiles: bool
) -> float:
    again = recomputation.blocks
    counts = [FORWARD] * (shape.layers + again) + [BACKWARD] * shape.layers
    counts += [PARTS] * (shape.layers - again if recomputation.parts else 0)
    sizes = shape.hidden, shape.intermediate
    states = sum(count * size for pair in counts for count, size in zip(pair, sizes, strict=True))
    if recipe.method != "full":  # each adapter reads its input and adds to its output
        states += shape.layers * 6 * sum(a + b for a, b in shape.products.values()) / 4
    # Inputs, and gradients of outputs, are read and written in 8 bits.
    sides = shape.products.values()
    inputs, outputs = (sum(side) for side in zip(*sides, strict=True))
    rounded = shape.layers * (inputs + outputs) + again * (inputs - shape.intermediate)
    rounded = rounded if recipe.fp8 else 0
    rounding = rounded * (shape.dtype.itemsize + 1)
    return states * shape.dtype.itemsize * (1 if compiles else 2) + rounding


def _micro_batch_bytes(shape: "ModelShape", recipe: Recipe, recomputation: Recomputation) -> float:
    """Each micro-batch reads and writes the gradients, and converts weights.

    Those in NF4 become bfloat16 twice. For products in FP8, all are rounded for each pass.
    """
    gradients = 2 * gradient_bytes(shape, recipe)
    quantised = shape.layers * shape.block_products if recipe.method == "qlora" else 0
    weights = _fp8_weights(shape, recomputation) if recipe.fp8 else 0
    rounding = weights * (shape.dtype.itemsize + 1)
    return gradients + 2 * quantised * (0.5 + 2 + 2) + rounding


def _optimizer_bytes(shape: "ModelShape", recipe: Recipe) -> float:
    """The norm of the gradients, their scaling, and reading and writing weights and states."""
    gradients, states = gradient_bytes(shape, recipe), state_bytes(shape, recipe)
    if recipe.optimizer == "adamw_8bit":
        return 4 * gradients + STEP_8BIT * trained_parameters(shape, recipe)
    return 4 * gradients + 2 * (gradients + states)  # weights are as large as gradients
