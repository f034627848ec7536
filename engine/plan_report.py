"""A plan in words: what takes the memory, what fits otherwise, and how fast it can be."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import torch

from engine.footprint import footprint, most_in_a_step
from engine.memory import CACHE_SHARE
from engine.plan import FRAGMENTED_SHARE, GIB, Device, Plan, Wishes, choose
from engine.recipe import Recipe, Rows, weight_bytes
from engine.roofline import CPU, GPUS_IN_A_NODE, Card, Step, expected_step

if TYPE_CHECKING:
    from engine.device import Kernels
    from engine.shape import ModelShape

SUMMING_EACH = "--reduce_gradients each"
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

    def recipe_on(self, devices: int) -> Recipe:
        """Several nodes have a copy of the weights each, unless something else was asked for."""
        shard_over = self.recipe.shard_over
        if shard_over is None and devices > GPUS_IN_A_NODE and devices % GPUS_IN_A_NODE == 0:
            shard_over = GPUS_IN_A_NODE
        return replace(self.recipe, devices=devices, shard_over=shard_over)

    def on(self, device: Device) -> Plan:
        recipe = self.recipe_on(device.count)
        return choose(self.shape, recipe, self.kernels, self.rows, device, self.wishes)

    def step(self, plan: Plan, card: Card) -> Step:
        recipe = Recipe(**plan.recipe)
        tokens, recomputation = plan.micro_batch_tokens, plan.recomputation
        return expected_step(
            self.shape, recipe, self.rows, card, tokens, recomputation, plan.compiles
        )


# ---------------------------------------------------------------- one plan


def memory_table(job: Job, plan: Plan, device: Device) -> list[str]:
    """What training takes on each device, by part; below the total, what has to remain free."""
    recipe = Recipe(**plan.recipe)
    tokens = min(plan.micro_batch_tokens, most_in_a_step(job.rows, device.count))
    used = footprint(job.shape, recipe, job.kernels, job.rows, tokens, plan.recomputation)
    lost = int(FRAGMENTED_SHARE * device.free)
    parts = [("weights", used.weights), ("gradients", used.gradients)]
    parts += [("optimizer states", used.states)]
    parts += [("of other devices", used.gathered)] if device.count > 1 else []
    parts += [("activations", used.activations), ("head, or a layer's backward", used.head)]
    parts += [("heap", used.heap)] if used.heap else []
    parts += [("total", used.total), ("lost to fragmentation", lost)]
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
    found: dict[str, Proposal] = {}
    for flags, other, count in _variants(job, device):
        there = replace(device, count=count)
        plan = other.on(there)
        if not plan.fits(there):
            continue
        one = Proposal(flags, plan, other.step(plan, card))
        # When gradients are summed matters only if it is faster, or all that fits.
        without = flags.removesuffix(SUMMING_EACH).rstrip()
        before = found.get(without)
        if before is None or one.step.seconds < 0.99 * before.step.seconds:
            found[without] = one
    return sorted(found.values(), key=lambda proposal: proposal.step.seconds)


def _variants(job: Job, device: Device) -> Iterator[tuple[str, Job, int]]:
    """Flags, with what they plan, and the number of devices."""
    shape, recipe = job.shape, job.recipe
    shapes = {"": shape}
    if shape.dtype == torch.float32:
        shapes["--dtype bfloat16"] = replace(shape, dtype=torch.bfloat16)
    recipes = {"": recipe}
    if recipe.method == "full":
        if recipe.optimizer == "adamw":
            recipes["--optimizer adamw_8bit"] = replace(recipe, optimizer="adamw_8bit")
        recipes["--method lora"] = replace(recipe, method="lora")
    if recipe.method != "qlora":
        flags = "--method qlora" + (" --fp8 false" if recipe.fp8 else "")
        recipes[flags] = replace(recipe, method="qlora", fp8=False)
    counts = [device.count]
    if device.count == 1 and job.kernels.device.type == "cuda":
        counts += [2, 4, 8]
    for count, dtype, method in product(counts, shapes, recipes):
        if count != device.count and (dtype or method):
            continue
        if (count > 1 and not recipes[method].spreads) or count % (recipe.shard_over or 1):
            continue
        other = replace(job, shape=shapes[dtype], recipe=recipes[method])
        many = f"torchrun --nproc_per_node {count} train.py" if count != device.count else ""
        yield _joined(many, dtype, method), other, count
        if count > 1 and job.wishes.reduces_each is False:
            each = replace(other, wishes=replace(job.wishes, reduces_each=True))
            yield _joined(many, dtype, method, SUMMING_EACH), each, count


def _joined(*flags: str) -> str:
    return " ".join(filter(None, flags))


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
    last_speed, last_count, pays = 0.0, 0, 0
    for count in sorted({*counts, device.count}):
        if count % (job.recipe.shard_over or 1):
            continue
        there = replace(device, count=count)
        plan = job.on(there)
        if not plan.fits(there):
            lines.append(f"{count:>7}  does not fit")
            continue
        step = job.step(plan, card)
        speed = step.tokens_per_second
        gain = f"{speed / last_speed:.2f}" if last_speed else ""
        # Of 8 and 12 devices, say, it is not a doubling.
        if not last_speed or speed >= PAYS ** math.log2(count / last_count) * last_speed:
            pays = count
        lines.append(
            f"{count:>7}  {_gib(plan.needed):>8}  {plan.micro_batch_tokens:>6}  "
            f"{plan.recomputed_blocks:>10}  {step.communicated / 1e9:>18.1f}  {speed:>8,.0f}  "
            f"{step.share:>7.0%}  {gain:>4}"
        )
        last_speed, last_count = speed, count
    if pays and pays < device.count:
        rows = job.rows.batch_size
        lines.append(f"on {rows} rows a step, more than {pays} devices no longer pay")
    return lines
