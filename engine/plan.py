"""Chooses how a model is trained on a device: as fast as memory allows, with the same result.

Only what changes no result is chosen: how many tokens a micro-batch has, and what the backward pass
computes again. The choice depends on shapes alone, before anything is loaded.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine.footprint import Recipe, Recomputation, Rows, footprint, most_in_a_step

if TYPE_CHECKING:
    from engine.device import Kernels
    from engine.shape import ModelShape

GIB = 2**30
FRAGMENTED_SHARE = 0.03  # of free memory: what the allocator can't use
ROUND = 256  # micro_batch_tokens is a multiple of this
# The most tokens of a micro-batch that are chosen. More would hardly be faster.
MOST_TOKENS = 8192
# With fewer tokens, a GPU would wait for its host, or for its weights, longer than it takes to
# compute more activations again.
FEW_TOKENS = 2048
# Norms and SwiGLU take about 2 % of a step to compute again. Keeping them is worth the memory once
# micro-batches are this large.
KEEPING_PARTS = 8192


@dataclass(frozen=True)
class Wishes:
    """What the user has set; None: to be chosen.

    Attributes:
        micro_batch_tokens: exactly so many.
        gradient_checkpointing: of all layers, or of none but for norms and SwiGLU.
        compile: as in `engine.compiling.prepare`, which also chooses it.
    """

    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool | None = None
    compile: bool | None = None


@dataclass(frozen=True)
class Device:
    """What training runs on.

    Attributes:
        name: of its kind, such as ``NVIDIA H100 80GB HBM3``, or ``cpu``.
        free: bytes, before the weights are loaded.
        count: how many of them.
    """

    name: str
    free: int
    count: int = 1


@dataclass(frozen=True)
class Plan:
    """What was chosen, and for what: the kind of device, the recipe, and the wishes.

    Attributes:
        needed: bytes on each device, by the count of `engine.footprint`.
    """

    micro_batch_tokens: int
    recomputed_blocks: int
    recomputes_parts: bool
    compiles: bool
    device: str
    needed: int
    recipe: dict[str, Any]
    wishes: dict[str, Any]

    @property
    def recomputation(self) -> Recomputation:
        return Recomputation(self.recomputed_blocks, self.recomputes_parts)

    def describe(self, layers: int, free: int | None = None) -> str:
        """One line."""
        parts = " but for norms and SwiGLU" if self.recomputes_parts else ""
        recomputed = f"{self.recomputed_blocks} of {layers} layers are recomputed"
        if not self.recomputed_blocks:
            recomputed = f"no layer is recomputed{parts}"
        of = "" if free is None else f" of the {free / GIB:.2f} GiB that are free"
        return (
            f"plan: micro_batch_tokens {self.micro_batch_tokens}, {recomputed}, "
            f"{self.needed / GIB:.2f} GiB{of}"
        )


def saved_plan(record: Any, recipe: Recipe, device: Device, wishes: Wishes) -> Plan | None:
    """The plan in a checkpoint's ``record`` of it, if it was made for the same.

    Args:
        record: None, or anything else that is no plan, if the checkpoint has none.
    """
    try:
        plan = Plan(**record)
    except TypeError:
        return None
    made_for = plan.device, plan.recipe, plan.wishes
    return plan if made_for == (device.name, asdict(recipe), asdict(wishes)) else None


def choose(
    shape: "ModelShape",
    recipe: Recipe,
    kernels: "Kernels",
    rows: Rows,
    device: Device,
    wishes: Wishes,
) -> Plan:
    """The first of `candidates` that fits into the free memory, or else the smallest.

    The smallest is tried even if it does not fit by this count, which may be off by a few percent.
    """
    room = (1 - FRAGMENTED_SHARE) * device.free
    for tokens, recomputation in candidates(shape.layers, rows, kernels, wishes):
        counted = min(tokens, most_in_a_step(rows, device.count))
        needed = footprint(shape, recipe, kernels, rows, counted, recomputation)
        if needed.total <= room:
            break
    return Plan(
        micro_batch_tokens=tokens,
        recomputed_blocks=recomputation.blocks,
        recomputes_parts=recomputation.parts,
        compiles=kernels.compiles_layers if wishes.compile is None else wishes.compile,
        device=device.name,
        needed=needed.total,
        recipe=asdict(recipe),
        wishes=asdict(wishes),
    )


def candidates(
    layers: int, rows: Rows, kernels: "Kernels", wishes: Wishes
) -> Iterator[tuple[int, Recomputation]]:
    """What there is to choose from, as tokens and recomputation, the fastest first.

    A device is kept busy by `FEW_TOKENS`, so with these as little as possible is recomputed, and
    then micro-batches are as large as fits. Below them, everything is recomputed first.
    """
    most = MOST_TOKENS
    longest = -(-max(rows.longest - 1, 1) // ROUND) * ROUND
    few = min(max(FEW_TOKENS, longest), most)
    if wishes.micro_batch_tokens is not None:
        most = few = longest = wishes.micro_batch_tokens
    everything, parts = Recomputation(layers, True), Recomputation(0, True)
    if wishes.gradient_checkpointing is not None:
        levels = [everything if wishes.gradient_checkpointing else parts]
    else:
        levels = [Recomputation(number, True) for number in range(layers + 1)]
        if kernels.device.type == "cuda":
            keeping = max(few, min(KEEPING_PARTS, most))
            yield from ((tokens, Recomputation(0, False)) for tokens in _down(most, keeping))
    for level in levels:
        yield from ((tokens, level) for tokens in _down(most, few))
    yield from ((tokens, levels[-1]) for tokens in _down(few, longest))


def _down(most: int, fewest: int) -> Iterator[int]:
    """From ``most`` to ``fewest``, both included."""
    yield from range(most, fewest, -ROUND)
    yield fewest
