"""The plan of a run, from its settings: what fits, and what a run chooses for itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from engine import memory
from engine.device import Kernels, check_computes, cuda_kernels, kernels_for, pick_device
from engine.footprint import footprint
from engine.hub import fetch
from engine.optimizer import Schedule, check_optimizer
from engine.packing import IGNORE, Example
from engine.plan import GIB, Device, Plan, Wishes, choose, saved_plan
from engine.plan_report import (
    Job,
    decoding_table,
    memory_table,
    proposal_lines,
    proposals,
    scale_table,
    speed_line,
)
from engine.ranks import ALONE, Ranks
from engine.recipe import Recipe, Recomputation, Rows
from engine.roofline import CPU, Card, card_named, card_of_size
from engine.shape import ModelShape, read_shape
from engine.sharding import check_divides
from engine.usage import Usage, usage_of
from run.config import Config
from run.errors import UserError
from run.looks import Look, PlanFor
from run.method import check_packages
from run.paths import local_path
from run.script import check_printed
from run.streams import is_one_of_several
from run.training_json import read_description

# GSM8K's training rows with Llama-2's tokenizer, for a plan that reads no data: tokens on average
# and at most, and the supervised share of them. Then the longest prompt of the test split.
ROW_TOKENS, LONGEST_ROW, SUPERVISED, LONGEST_PROMPT = 201.4, 577, 0.648, 196
# Of a card that is not here: what its driver leaves of its memory, and what the CUDA context and
# the libraries take. Of one that is here, the libraries alone are still to come.
USABLE, CONTEXT, LIBRARIES = 0.985, int(0.7 * GIB), int(0.2 * GIB)


# ---------------------------------------------------------------- before training is imported


def look_early(config: Config, wanted: PlanFor | Look | None) -> bool:
    """Print the plan, if it is ``wanted``; otherwise see whether a new run can train here.

    Neither needs what training imports, which takes seconds. A run that is there has trained. Of
    several processes, each says later what only it can see, such as a GPU that it lacks.

    Returns:
        Whether there is nothing else to do.

    Raises:
        UserError: a package is missing, or training exceeds the memory of the device.
    """
    if isinstance(wanted, PlanFor):
        print_plan(config, wanted)
        return True
    is_new = not (local_path(config.output_dir) / config.run_name).exists()
    if is_new and not is_one_of_several():
        check_trains(config, None)
    return False


# ---------------------------------------------------------------- in a run


def recipe_of(settings: Mapping[str, Any], devices: int = 1) -> Recipe:
    """What a run with these ``settings`` trains."""
    return Recipe(
        method=settings["method"],
        rank=settings["lora_rank"],
        has_dropout=settings["lora_dropout"] > 0,
        optimizer=settings["optimizer"],
        fp8=settings["fp8"],
        shard_over=settings["shard_over"],
        reshards=settings["reshard_after_forward"],
        devices=devices,
    )


def wishes_of(config: Config) -> Wishes:
    chosen = config.micro_batch_tokens, config.gradient_checkpointing, config.compile
    when = config.reduce_gradients
    return Wishes(*chosen, None if when is None else when == "each")


def schedule_of(config: Config, steps: int) -> Schedule:
    """The learning rate of each of a run's ``steps``."""
    shape = config.lr_schedule, config.warmup_ratio, config.min_lr_ratio
    return Schedule(steps, config.learning_rate, *shape)


def rows_of(examples: Sequence[Example], batch_size: int) -> Rows:
    lengths = [len(example.input_ids) - 1 for example in examples]
    labels = sum(len(example.labels) - example.labels.count(IGNORE) for example in examples)
    mean = sum(lengths) / len(lengths)
    in_a_step = min(batch_size, len(examples))
    return Rows(mean, max(lengths) + 1, labels / sum(lengths), in_a_step, len({*lengths}))


def plan_run(
    config: Config,
    folder: Path,
    examples: Sequence[Example],
    resume_from: Path | None,
    ranks: Ranks = ALONE,
) -> Plan:
    """What a run chooses, before it loads the model in ``folder``; prints it in one line.

    A resumed run keeps what it had chosen on the same kind of device.

    Raises:
        UserError: even the smallest choice exceeds the memory of the device.
    """
    device = pick_device()
    shape = read_shape(folder, getattr(torch, config.dtype))
    # All ranks make the same choice, even if their devices differ.
    free, kind = min(ranks.gather(free_here(device))), ranks.broadcast(memory.kind(device))
    here = Device(kind, free, ranks.size, card_of(device, kind, free))
    wishes = wishes_of(config)
    record = read_description(resume_from).get("plan") if resume_from else None
    recipe = recipe_of(asdict(config), ranks.size)
    if plan := saved_plan(record, recipe, here, wishes):
        return plan
    rows = rows_of(examples, config.batch_size)
    plan = choose(shape, recipe, kernels_for(device), rows, here, wishes)
    summing = wishes.reduces_each if ranks.size > 1 else False  # of no others
    if None in (wishes.micro_batch_tokens, wishes.gradient_checkpointing, summing):
        print(plan.describe(shape.layers, here.free) + (", made anew" if record else ""))
    return plan


def usage(config: Config, folder: Path, examples: Sequence[Example], ranks: Ranks = ALONE) -> Usage:
    """How much of its devices a run uses that trains the model in ``folder``."""
    shape = read_shape(folder, getattr(torch, config.dtype))
    recipe = recipe_of(asdict(config), ranks.size)
    return usage_of(shape, recipe, rows_of(examples, config.batch_size), pick_device())


def check_trains(config: Config, resume_from: Path | None, devices: int = 1) -> None:
    """Raises UserError if a package is missing, or training exceeds the memory of the device.

    This is before anything is loaded.
    """
    check_packages(config.method)
    check_optimizer(config.optimizer)
    check_spreads(config, devices)
    device = pick_device()
    total = memory.total_bytes(device)
    if total is None:  # a CPU can swap
        return
    # A checkpoint of adapters has no model.
    has_model = resume_from is not None and (resume_from / "config.json").is_file()
    name = str(resume_from) if has_model else config.model
    shape = read_shape(fetch(name, ["config.json"]), getattr(torch, config.dtype))
    refuse_too_large(config, name, shape, kernels_for(device), total, devices)


def check_spreads(config: Config, devices: int) -> None:
    """Raises UserError if what is trained can't be spread over several devices."""
    if devices > 1 and not recipe_of(asdict(config)).spreads:
        is_qlora = config.method == "qlora"
        setting, other = ("method qlora", "lora") if is_qlora else ("optimizer adamw_8bit", "adamw")
        raise UserError(
            f"{setting}: does not spread over {devices} devices: use one, or set "
            f"{setting.split()[0]} {other}"
        )
    check_divides(config.shard_over, devices)


def refuse_too_large(
    config: Config, name: str, shape: ModelShape, kernels: Kernels, total: int, devices: int = 1
) -> None:
    """Raises UserError if not even one token can be trained in ``total`` bytes of each device."""
    rows = Rows(1, 2, 1, 1)
    recipe = recipe_of(asdict(config), devices)
    summing = replace(recipe, reduces_each=config.reduce_gradients != "last")
    least = footprint(shape, summing, kernels, rows, 1, Recomputation(shape.layers, True))
    if least.total <= total:
        return
    job = job_of(config, shape, kernels, recipe.devices)
    card = card_of_size(total / GIB)
    fitting = proposals(job, Device("", total, devices, card), card)
    cures = [one.flags for one in fitting if one.flags.startswith("--")]
    cures.append("a larger device or a smaller model")
    raise UserError(
        f"model {name}: training its {shape.size} takes "
        f"{least.total / GIB:.1f} GiB (weights {least.weights / GIB:.1f}, gradients "
        f"{least.gradients / GIB:.1f}, optimizer states {least.states / GIB:.1f}), over the "
        f"{total / GIB:.1f} GiB of the device: take {', or '.join(cures)}"
    )


def free_here(device: torch.device) -> int:
    free = memory.free_bytes(device)
    return free - LIBRARIES if device.type == "cuda" else free


def card_of(device: torch.device, kind: str, free: int) -> Card:
    """The card that ``kind`` names, or one with about as many bytes ``free``."""
    if device.type != "cuda":
        return CPU
    return card_named(kind) or card_of_size(free / GIB)


# ---------------------------------------------------------------- train.py --plan


def job_of(config: Config, shape: ModelShape, kernels: Kernels, devices: int) -> Job:
    longest = min(LONGEST_ROW, config.max_length)
    rows = Rows(min(ROW_TOKENS, longest), longest, SUPERVISED, config.batch_size)
    recipe = recipe_of(asdict(config), devices)
    sequence = LONGEST_PROMPT + config.max_new_tokens
    return Job(shape, recipe, kernels, rows, wishes_of(config), sequence)


def print_plan(config: Config, wanted: PlanFor) -> None:
    """Print what ``train.py --plan`` shows. Nothing is downloaded but config.json."""
    check_spreads(config, wanted.devices)
    shape = read_shape(fetch(config.model, ["config.json"]), getattr(torch, config.dtype))
    for line in report(config, shape, wanted):
        print(line)
    check_printed()


def report(config: Config, shape: ModelShape, wanted: PlanFor) -> list[str]:
    here, card, kernels, found = find_devices(wanted, shape.dtype, config.fp8)
    job = job_of(config, shape, kernels, here.count)
    lines = [
        *found,
        f"model: {shape.size}, method {job.recipe.method}, "
        f"{job.recipe.optimizer} in {config.arithmetic}",
        f"rows: as in GSM8K, {ROW_TOKENS:.0f} tokens on average, {job.rows.longest} at most, "
        f"{job.rows.batch_size} in a step",
    ]
    plan = job.on(here)
    lines += ["", *memory_table(job, plan, here), "", *decoding_table(job, here), ""]
    if plan.fits(here):
        lines.append(plan.describe(shape.layers, here.free))
        if card is not CPU:
            lines.append(speed_line(job.step(plan, card)))
    else:
        lines.append(
            f"does not fit: {plan.needed / GIB:.2f} GiB and what is lost to fragmentation, of "
            f"{here.free / GIB:.2f} GiB"
        )
    lines += ["", *proposal_lines(proposals(job, here, card), card)]
    if here.count > 1:
        lines += ["", *scale_table(job, here, card)]
    return lines


def find_devices(
    wanted: PlanFor, dtype: torch.dtype = torch.bfloat16, fp8: bool = False
) -> tuple[Device, Card, Kernels, list[str]]:
    """The devices to plan for, by which card's data sheet, with what kernels; lines about them.

    Raises:
        UserError: this machine's own can't compute in ``dtype``, or products in 8-bit floats.
    """
    if wanted.device_memory is not None:
        free = max(0, int(wanted.device_memory * USABLE * GIB) - CONTEXT)
        card = card_of_size(wanted.device_memory)
        line = (
            f"devices: {wanted.devices} of {wanted.device_memory:g} GB, not looked for here, with "
            f"{free / GIB:.2f} GiB free beside the CUDA context; speed as of {card.name}"
        )
        kernels = cuda_kernels(torch.device("cuda"))
        here = Device(f"{wanted.device_memory:g} GB", free, wanted.devices, card)
        return here, card, kernels, [line]
    device = pick_device()
    check_computes(device, dtype, fp8)
    name = memory.kind(device)
    lines, frees = [], [free_here(device)]
    if device.type == "cuda":
        frees = [free_here(torch.device("cuda", n)) for n in range(torch.cuda.device_count())]
    for number, free in enumerate(frees):
        place = f"cuda:{number}" if device.type == "cuda" else "cpu"
        lines.append(f"device: {place}, {name}, {free / GIB:.2f} GiB free")
    card = card_of(device, name, frees[0])
    if card is not CPU:
        lines.append(f"speed as of {card.name}, by its data sheet")
    here = Device(name, min(frees[: wanted.devices]), wanted.devices, card)
    return here, card, kernels_for(device), lines
