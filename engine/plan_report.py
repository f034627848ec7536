"""A plan in words: what takes the memory, what fits otherwise, and how fast it can be."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from engine.footprint import Recipe, Rows, footprint, weight_bytes
from engine.memory import CACHE_SHARE
from engine.plan import FRAGMENTED_SHARE, GIB, Device, Plan, Wishes, choose, most_in_a_step
from engine.roofline import CPU, Card, Step, expected_step

if TYPE_CHECKING:
    from engine.device import Kernels
    from engine.shape import ModelShape

# Doubling the devices pays while a step takes at most 1 / 1.5 of the time.
PAYS = 1.5


@dataclass(frozen=True)
class Job:
    """What is planned.

    Attributes:
        longest_sequence: tokens of a prompt and its completion, at most.
    """

    shape: "ModelShape"
    recipe: Recipe
    kernels: "Kernels"
    rows: Rows
    wishes: Wishes
    longest_sequence: int

    def on(self, device: Device) -> Plan:
        recipe = replace(self.recipe, devices=device.count)
        return choose(self.shape, recipe, self.kernels, self.rows, device, self.wishes)

    def fits(self, device: Device) -> bool:
        return self.on(device).needed <= (1 - FRAGMENTED_SHARE) * device.free

    def step(self, plan: Plan, card: Card) -> Step:
        recipe = replace(self.recipe, devices=plan.devices)
        tokens, recomputation = plan.micro_batch_tokens, plan.recomputation
        return expected_step(
            self.shape, recipe, self.rows, card, tokens, recomputation, plan.compiles
        )


# ---------------------------------------------------------------- one plan


def memory_table(job: Job, plan: Plan, device: Device) -> list[str]:
    """What training takes on each device, by part."""
    recipe = replace(job.recipe, devices=device.count)
    tokens = min(plan.micro_batch_tokens, most_in_a_step(job.rows, device.count))
    used = footprint(job.shape, recipe, job.kernels, job.rows, tokens, plan.recomputation)
    lost = int(FRAGMENTED_SHARE * device.free)
    parts = [("weights", used.weights), ("gradients", used.gradients)]
    parts += [("optimizer states", used.states)]
    parts += [("of other devices", used.gathered)] if device.count > 1 else []
    parts += [("activations", used.activations), ("head, or a layer's backward", used.head)]
    parts += [("heap", used.heap)] if used.heap else []
    parts += [("fragmentation", lost), ("total", used.total + lost)]
    lines = [f"  {name:<28}{_gib(size):>7}" for name, size in parts]
    return ["training" + " " * 24 + "GiB", *lines]


def decoding_table(job: Job, device: Device) -> list[str]:
    """What evaluate.py takes, which decodes on one device."""
    weights = weight_bytes(job.shape, job.recipe)
    each = job.kernels.cache.slot_bytes(job.shape, job.longest_sequence)
    free = device.free - weights
    regions = int(CACHE_SHARE * max(free, 0) / each)
    slots = min(job.kernels.most_slots, _sequences(job, regions))
    cache = min(regions, slots) * each
    what = f"{slots} slots for up to {job.longest_sequence} tokens"
    lines = ["decoding" + " " * 24 + "GiB", f"  {'weights':<28}{_gib(weights):>7}"]
    return [*lines, f"  {'cache':<28}{_gib(cache):>7}  {what if slots else 'does not fit'}"]


def _sequences(job: Job, regions: int) -> int:
    """`Kernels.sequences_in`, which asks a tensor on the device."""
    is_half = job.shape.dtype == torch.bfloat16 and job.shape.head_dim % 8 == 0
    if job.kernels.device.type == "cuda" and is_half and job.shape.head_dim <= 256:
        return max(0, 2 * regions - 1)
    return regions


def speed_line(step: Step) -> str:
    return (
        f"expected at best: {step.tokens_per_second:,.0f} tokens a second, "
        f"{step.seconds:.2f} s a step, {step.share:.0%} of the peak of {step.card.name}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


# ---------------------------------------------------------------- other settings


@dataclass(frozen=True)
class Proposal:
    """Settings that fit, as ``flags`` to paste, and their step."""

    flags: str
    plan: Plan
    step: Step


def proposals(job: Job, device: Device, card: Card) -> list[Proposal]:
    """What fits with other settings of method, optimizer, dtype and devices, the fastest first."""
    found = []
    for flags, other, count in _variants(job, device):
        there = replace(device, count=count)
        if other.fits(there):
            plan = other.on(there)
            found.append(Proposal(flags, plan, other.step(plan, card)))
    return sorted(found, key=lambda proposal: -proposal.step.tokens_per_second)


def _variants(job: Job, device: Device) -> Iterator[tuple[str, Job, int]]:
    shape, recipe = job.shape, job.recipe
    changes: list[tuple[str, Job]] = [("", job)]
    dtypes = {"": shape}
    if shape.dtype == torch.float32:
        dtypes["--dtype bfloat16"] = replace(shape, dtype=torch.bfloat16)
    recipes = {"": recipe}
    if recipe.method == "full":
        if recipe.optimizer == "adamw":
            recipes["--optimizer adamw_8bit"] = replace(recipe, optimizer="adamw_8bit")
        lora = replace(recipe, method="lora", rank=recipe.rank)
        recipes["--method lora"] = lora
        recipes["--method qlora"] = replace(lora, method="qlora")
    elif recipe.method == "lora":
        recipes["--method qlora"] = replace(recipe, method="qlora")
    changes = [
        (" ".join(filter(None, (dtype, method))), replace(job, shape=a, recipe=b))
        for dtype, a in dtypes.items()
        for method, b in recipes.items()
    ]
    yield from ((flags, other, device.count) for flags, other in changes)
    if device.count == 1 and job.kernels.device.type == "cuda":
        for count in (2, 4, 8):
            yield f"torchrun --nproc_per_node {count}", job, count


def proposal_lines(found: Sequence[Proposal], card: Card) -> list[str]:
    shows_speed = card is not CPU
    lines = [
        "settings that fit, the fastest first" + (", in tokens a second" if shows_speed else "")
    ]
    for one in found:
        speed = f"{one.step.tokens_per_second:>8,.0f}  " if shows_speed else "  "
        lines.append(f"{speed}{one.flags or 'as they are'}  ({_short(one.plan)})")
    return lines if found else ["no setting fits: take a larger device, or a smaller model"]


def _short(plan: Plan) -> str:
    return (
        f"{plan.micro_batch_tokens} tokens, {plan.recomputed_blocks} layers recomputed, "
        f"{_gib(plan.needed)} GiB"
    )


# ---------------------------------------------------------------- more devices


def scale_table(job: Job, device: Device, card: Card) -> list[str]:
    """What 1, 2, 4 and so on devices need, and gain."""
    lines = ["devices  GiB each  tokens  recomputed  GB received a step  tokens/s  of peak  gain"]
    counts = [2**power for power in range(device.count.bit_length())]
    last_speed, pays = 0.0, 0
    for count in sorted({*counts, device.count}):
        there = replace(device, count=count)
        if not job.fits(there):
            lines.append(f"{count:>7}  does not fit")
            continue
        plan = job.on(there)
        step = job.step(plan, card)
        speed = step.tokens_per_second
        gain = f"{speed / last_speed:.2f}" if last_speed else ""
        pays = count if not last_speed or speed >= PAYS * last_speed else pays
        lines.append(
            f"{count:>7}  {_gib(plan.needed):>8}  {plan.micro_batch_tokens:>6}  "
            f"{plan.recomputed_blocks:>10}  {step.communicated / 1e9:>18.1f}  {speed:>8,.0f}  "
            f"{step.share:>7.0%}  {gain:>4}"
        )
        last_speed = speed
    if pays and pays < device.count:
        rows = job.rows.batch_size
        lines.append(f"on {rows} rows a step, more than {pays} devices no longer pay")
    return lines
