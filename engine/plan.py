"""Chooses how a model is trained on a device: as fast as memory allows, with the same result.

Only what changes no result is chosen: how many tokens a micro-batch has, what the backward pass
computes again, and when several devices sum their gradients. The choice depends on shapes alone,
before anything is loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.footprint import footprint, most_in_a_step
from engine.recipe import Recipe, Recomputation, Rows
from engine.roofline import CPU, Card, expected_step

if TYPE_CHECKING:
    from engine.device import Kernels
    from engine.shape import ModelShape

GIB = 2**30
FRAGMENTED_SHARE = 0.03  # of free memory: what the allocator can't use
ROUND = 256  # micro_batch_tokens is a multiple of this
# The most tokens of a micro-batch that are chosen. More would hardly be faster. On a GPU, twice as
# many make a step about 3 % faster: larger products, and half as many passes over the gradients.
MOST_TOKENS = 8192
MOST_TOKENS_OF_A_GPU = 16384
# With fewer tokens, a GPU would wait for its host, or for its weights, longer than it takes to
# compute more activations again.
FEW_TOKENS = 2048
# Norms and SwiGLU take about 2 % of a step to compute again. Keeping them is worth the memory once
# micro-batches are this large.
KEEPING_PARTS = 8192
# Gradients are summed after each micro-batch if a step then takes so much less time. What is nearer
# the roofline can't tell.
CLEARLY_FASTER = 0.99


@dataclass(frozen=True)
class Wishes:
    """What the user has set; None: to be chosen.

    Attributes:
        micro_batch_tokens: exactly so many.
        gradient_checkpointing: of all layers, or of none but for norms and SwiGLU.
        compile: as in `engine.compiling.prepare`, which also chooses it.
        reduces_each: as in `Recipe`; for one device it means nothing.
    """

    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool | None = None
    compile: bool | None = None
    reduces_each: bool | None = None


@dataclass(frozen=True)
class Device:
    """What training runs on.

    Attributes:
        name: of its kind, such as ``NVIDIA H100 80GB HBM3``, or ``cpu``.
        free: bytes, before the weights are loaded.
        count: how many of them.
        card: whose data sheet says what is faster.
    """

    name: str
    free: int
    count: int = 1
    card: Card = CPU

    @property
    def room(self) -> float:
        """Bytes that tensors can take."""
        return (1 - FRAGMENTED_SHARE) * self.free


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

    @property
    def reduces_each(self) -> bool:
        return self.recipe["reduces_each"]

    def fits(self, device: Device) -> bool:
        return self.needed <= device.room

    def describe(self, layers: int, free: int | None = None) -> str:
        """One line."""
        parts = " but for norms and SwiGLU" if self.recomputes_parts else ""
        recomputed = f"{self.recomputed_blocks} of {layers} layers are recomputed"
        if not self.recomputed_blocks:
            recomputed = f"no layer is recomputed{parts}"
        summed = ""
        if self.recipe["devices"] > 1:
            when = "each" if self.reduces_each else "the last"
            summed = f"gradients are summed after {when} micro-batch, "
        of = "" if free is None else f" of the {free / GIB:.2f} GiB that are free"
        return (
            f"plan: micro_batch_tokens {self.micro_batch_tokens}, {recomputed}, {summed}"
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
    wished = plan.wishes
    if "reduces_each" not in wished:  # older: it was not chosen yet, and a free choice keeps it
        each = None if wishes.reduces_each is None else plan.reduces_each
        wished = wished | {"reduces_each": each}
    recipe = replace(recipe, reduces_each=plan.reduces_each)  # which is chosen or wished
    if not isinstance(plan.recipe, Mapping):
        return None
    made_for = plan.device, _counted(plan.recipe), wished
    wanted_for = device.name, _counted(asdict(recipe)), asdict(wishes)
    return plan if made_for == wanted_for else None


def _counted(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What has an effect: not the rank of adapters that there are not, say."""
    idle = {"rank", "has_dropout"} if recipe.get("method") == "full" else set()
    idle |= set() if recipe.get("fp8") else {"fp8"}  # which older plans do not have
    return {name: value for name, value in recipe.items() if name not in idle}


def choose(
    shape: "ModelShape",
    recipe: Recipe,
    kernels: "Kernels",
    rows: Rows,
    device: Device,
    wishes: Wishes,
) -> Plan:
    """The fastest that fits into the free memory, or else the smallest.

    Gradients that are summed once in a step need less communication, but until then each device has
    all of them, and less memory for everything else. The roofline of the card weighs this.

    Args:
        recipe: of its ``reduces_each`` nothing is kept.
    """
    wished = [False, True] if wishes.reduces_each is None else [wishes.reduces_each]
    plans = [
        first_that_fits(shape, replace(recipe, reduces_each=each), kernels, rows, device, wishes)
        for each in (wished if recipe.devices > 1 else [False])
    ]
    once, *others = plans
    if not others:
        return once
    each = others[0]
    if not once.fits(device):
        return each
    seconds = [
        expected_step(
            shape,
            Recipe(**plan.recipe),
            rows,
            device.card,
            plan.micro_batch_tokens,
            plan.recomputation,
            plan.compiles,
        ).seconds
        for plan in plans
    ]
    return each if seconds[1] < CLEARLY_FASTER * seconds[0] else once


def first_that_fits(
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
    for tokens, recomputation in candidates(shape.layers, rows, kernels, wishes):
        counted = min(tokens, most_in_a_step(rows, device.count))
        needed = footprint(shape, recipe, kernels, rows, counted, recomputation)
        if needed.total <= device.room:
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
    is_cuda = kernels.device.type == "cuda"
    most = MOST_TOKENS_OF_A_GPU if is_cuda else MOST_TOKENS
    longest = -(-max(rows.longest - 1, 1) // ROUND) * ROUND
    few = min(max(FEW_TOKENS, longest), most)
    if wishes.micro_batch_tokens is not None:
        most = few = longest = wishes.micro_batch_tokens
    everything, parts = Recomputation(layers, True), Recomputation(0, True)
    if wishes.gradient_checkpointing is not None:
        levels = [everything if wishes.gradient_checkpointing else parts]
    else:
        levels = [Recomputation(number, True) for number in range(layers + 1)]
        if is_cuda:
            keeping = max(few, min(KEEPING_PARTS, most))
            yield from ((tokens, Recomputation(0, False)) for tokens in _down(most, keeping))
    for level in levels:
        yield from ((tokens, level) for tokens in _down(most, few))
    yield from ((tokens, levels[-1]) for tokens in _down(few, longest))


def _down(most: int, fewest: int) -> Iterator[int]:
    """From ``most`` to ``fewest``, both included; of many tokens, not each ``ROUND`` is tried."""
    while most > fewest:
        yield most
        most -= ROUND if most <= MOST_TOKENS else 4 * ROUND
    yield fewest
