"""What is trained, on which rows, and what its weights, gradients and states take."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engine.shape import ModelShape

# Of a frozen weight in NF4: half a byte, an 8-bit scale for 64 weights, and a float32 scale for 256
# of those (double quantisation, arXiv:2305.14314).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
ADAMW, ADAMW_8BIT = "adamw", "adamw_8bit"  # the names that the setting optimizer allows
# Of two moments in 8 bits, with a float32 scale for 256 values of each.
STATE_BYTES_8BIT = 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        method: ``full``, ``lora`` or ``qlora``.
        rank: of an adapter to every linear layer of the blocks.
        has_dropout: whether some of the adapters' inputs are dropped.
        optimizer: one of the names above.
        fp8: whether the blocks' products are computed in 8-bit floats.
        devices: how many compute the rows of a step.
        shard_over: how many of them share one copy of weights, gradients and optimizer states
            (FSDP); None: all.
        reshards: whether a block's gathered weights are freed until its backward pass.
        reduces_each: whether gradients are summed over the devices after each micro-batch, instead
            of once after the last one, until when each device has all of them.
    """

    method: str = "full"
    rank: int = 0
    has_dropout: bool = False
    optimizer: str = ADAMW
    fp8: bool = False
    devices: int = 1
    shard_over: int | None = None
    reshards: bool = True
    reduces_each: bool = False

    @property
    def shards(self) -> int:
        return self.shard_over or self.devices

    @property
    def spreads(self) -> bool:
        """Whether several devices can share the weights and the optimizer's state."""
        return self.method != "qlora" and self.optimizer != ADAMW_8BIT


@dataclass(frozen=True)
class Rows:
    """The training rows, as far as memory and speed depend on them.

    Attributes:
        tokens: of a row, on average.
        longest: tokens of the longest row.
        supervised: the share of tokens that are.
        batch_size: rows in an optimizer step.
        lengths: how many different lengths they have; None: as many as tokens in the longest.
    """

    tokens: float
    longest: int
    supervised: float
    batch_size: int
    lengths: int | None = None


@dataclass(frozen=True)
class Recomputation:
    """What the backward pass computes again, instead of keeping it.

    Attributes:
        blocks: how many blocks compute everything again.
        parts: whether the others compute their norms and SwiGLU again.
    """

    blocks: int
    parts: bool


# ---------------------------------------------------------------- weights, gradients, states


def adapter_parameters(shape: "ModelShape", rank: int) -> int:
    """Two matrices for each linear layer of the blocks (LoRA, arXiv:2106.09685)."""
    return shape.layers * rank * sum(a + b for a, b in shape.products.values())


def trained_parameters(shape: "ModelShape", recipe: Recipe) -> int:
    full = recipe.method == "full"
    return shape.parameters if full else adapter_parameters(shape, recipe.rank)


def weight_bytes(shape: "ModelShape", recipe: Recipe) -> int:
    """All weights, frozen and trained, on all devices together."""
    each = shape.dtype.itemsize
    if recipe.method == "full":
        return shape.parameters * each
    adapter = adapter_parameters(shape, recipe.rank) * each
    quantised = shape.layers * shape.block_products if recipe.method == "qlora" else 0
    return (shape.parameters - quantised) * each + math.ceil(quantised * NF4_BYTES) + adapter


def gradient_bytes(shape: "ModelShape", recipe: Recipe) -> int:
    return trained_parameters(shape, recipe) * shape.dtype.itemsize


def state_bytes(shape: "ModelShape", recipe: Recipe) -> int:
    """Two moments; in bfloat16 and 32-bit AdamW also the rounding error of each weight."""
    trained, each = trained_parameters(shape, recipe), shape.dtype.itemsize
    if recipe.optimizer == ADAMW_8BIT:
        return math.ceil(trained * STATE_BYTES_8BIT)
    check_is_adamw(recipe.optimizer, "recipe.py, state_bytes")
    return trained * each * (3 if shape.dtype == torch.bfloat16 else 2)


def check_is_adamw(optimizer: str, where: str) -> None:
    """Raises ValueError for an ``optimizer`` that has no case of its own in ``where``.

    It would be AdamW, or be counted as AdamW, under a name of its own.
    """
    if optimizer != ADAMW:
        raise ValueError(f"optimizer {optimizer!r} is unknown to engine/{where}: add a case for it")
