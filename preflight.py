"""A look before the run (train.py --preflight): rows, tokens, batches, plan, time and disk."""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import data
from engine.hub import fetch
from engine.measure import StepResult
from engine.optimizer import Schedule
from engine.packing import IGNORE, Example
from engine.plan import Plan
from engine.ranks import Ranks
from engine.recipe import Recipe, gradient_bytes, state_bytes
from engine.shape import read_shape
from engine.tokenizer_files import FILES
from engine.trial import filled, time_facts, try_steps
from run.config import CONFIG_FILE, Config, load_config
from run.errors import UserError, counted, one_line
from run.files import gigabytes
from run.model_source import find_start
from run.paths import local_path
from run.retention import disk_space
from run.script import check_printed
from run.setting_types import in_yaml
from run.terminal import (
    draw_curve,
    draw_histogram,
    draw_tokens,
    facts,
    is_plain,
    lines,
    open_console,
    title,
)
from run.time_left import count_saves
from run.training_json import read_description, tokenizer_record

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tools:
    """What training works with: `run.folder.find_opening`, `engine.loading.load_tokenizer`,
    `plan.plan_run`, `plan.schedule_of`, `train.build` and `train.train_step`.
    """

    find_opening: Callable[[Config, str, int], Path | None]
    load_tokenizer: Callable[..., "Tokenizer"]
    plan_run: Callable[..., Plan]
    schedule_of: Callable[[Config, int], Schedule]
    build: Callable[..., tuple[Any, torch.optim.Optimizer]]
    step: Callable[..., StepResult]


@dataclass(frozen=True)
class Prospect:
    """What a run would learn from, and how.

    Attributes:
        num_rows: of train, with the validation rows and those that are left out.
        prompts: of the validation rows.
        plan_line: what training prints of ``planned``.
        sizes: of a checkpoint in bytes: its weights, and its optimizer state.
        resume_from: the checkpoint that it would go on from; None if it is new.
    """

    config: Config
    ranks: Ranks
    resume_from: Path | None
    tokenizer: "Tokenizer"
    num_rows: int
    rows: list[Example]
    held_out: list[Example]
    prompts: list[list[int]]
    planned: Plan
    plan_line: str
    batches: data.Batches
    schedule: Schedule
    sizes: tuple[int, int]

    @property
    def folder(self) -> Path:
        return local_path(self.config.output_dir) / self.config.run_name


def look(config: Config, ranks: Ranks, tools: Tools) -> None:
    """Print what a run with ``config`` would be, and time two of its steps. Nothing is written.

    Raises:
        UserError: training would be refused, or this can't be printed.
    """
    console = open_console()
    run = heard(console, prospect, config, ranks, tools)
    show_run(console, run)
    show_rows(console, run)
    show_tokens(console, run.rows[0], run.tokenizer)
    show_borders(console, run.rows + run.held_out, run.tokenizer)
    show_batches(console, run)
    show_steps(console, run)
    show_disk(console, run)
    show_time(console, run, tools)
    title(console, "Nothing was written. To train, type the same without --preflight.")
    check_printed()


def prospect(config: Config, ranks: Ranks, tools: Tools) -> Prospect:
    """All that can be said before the model is loaded."""
    model = fetch(config.model, ["config.json", *FILES])
    tokenizer = tools.load_tokenizer(model, tokenizer_record(model))
    problems = data.load_for_training(config.dataset, config.validation_size, config.seed)
    rows, held_out = data.encode_for_training(tokenizer, problems, config.prompt, config.max_length)
    batches = data.batches_of(rows, asdict(config), tokenizer, model)
    steps, train_sha256 = config.epochs * batches.per_epoch, problems.sha256["train_sha256"]
    shape = read_shape(model, getattr(torch, config.dtype))
    with redirect_stdout(io.StringIO()) as line:  # which is one of the facts below
        planned = tools.plan_run(config, model, rows, None, ranks)
    recipe = Recipe(**planned.recipe)
    return Prospect(
        config=config,
        ranks=ranks,
        resume_from=tools.find_opening(config, train_sha256, steps),
        tokenizer=tokenizer,
        num_rows=len(problems.train) + len(problems.validation),
        rows=rows,
        held_out=held_out,
        prompts=data.encode_prompts(tokenizer, problems.validation, config.prompt),
        planned=planned,
        plan_line=line.getvalue().strip() or planned.describe(shape.layers),
        batches=batches,
        schedule=tools.schedule_of(config, steps),
        sizes=(gradient_bytes(shape, recipe), state_bytes(shape, recipe)),
    )


def heard(console: Console, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returns; what it prints is shown in lines that fit."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            return function(*arguments)
    finally:
        lines(console, text.getvalue())


# ---------------------------------------------------------------- what it learns from


def show_run(console: Console, run: Prospect) -> None:
    state = "new"
    if run.resume_from is not None:
        step = read_description(run.resume_from)["step"]
        state = f"has a checkpoint of step {step}, from which training would go on"
    values, usual = asdict(run.config), asdict(load_config(CONFIG_FILE, {}))
    others = [f"{key} {in_yaml(value)}" for key, value in values.items() if value != usual[key]]
    title(console, "Run")
    facts(
        console,
        {
            "folder": f"{one_line(run.folder)}: {state}",
            "settings": one_line(", ".join(others) or "those of config.yaml"),
        },
    )


def show_rows(console: Console, run: Prospect) -> None:
    rows, held_out = run.rows, run.held_out
    lengths = [len(row.input_ids) for row in rows]
    labels = sum(len(row.labels) - row.labels.count(IGNORE) for row in rows)
    left_out = run.num_rows - len(rows) - len(held_out)
    longer = f"more than {run.config.max_length:,} tokens (max_length)"
    title(console, "Rows")
    facts(
        console,
        {
            "train": f"{len(rows):,}, with {sum(lengths):,} tokens, of which {labels:,} "
            f"({labels / sum(lengths):.1%}) are supervised",
            "validation": f"{len(held_out):,}",
            "left out": f"{left_out:,} with {longer}",
            "length": f"{mean(lengths):.0f} tokens on average, median {median(lengths):g}, "
            f"longest {max(lengths):,}",
        },
    )
    draw_histogram(console, lengths, "tokens")


def show_tokens(console: Console, row: Example, tokenizer: "Tokenizer") -> None:
    how = "underlined" if is_plain(console) else "in colour"
    title(console, f"Line {row.line} of train, its supervised tokens {how}")
    pieces = [tokenizer.piece(index) or "?" for index in row.input_ids]
    supervised = [label != IGNORE for label in row.labels]
    draw_tokens(console, zip(pieces, supervised, strict=True))


def show_borders(console: Console, rows: Sequence[Example], tokenizer: "Tokenizer") -> None:
    """In how many rows BOS and EOS are where they should be, and only there."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = sum(row.input_ids[0] == bos and row.labels[0] == IGNORE for row in rows)
    end = sum(row.input_ids[-1] == row.labels[-1] == eos for row in rows)
    once = sum(row.input_ids.count(bos) == row.input_ids.count(eos) == 1 for row in rows)
    of = f"of {len(rows):,} rows"
    title(console, "Beginning and end")
    facts(
        console,
        {
            "BOS": f"{tokenizer.piece(bos)} (id {bos}) begins {begin:,} {of}, not supervised",
            "EOS": f"{tokenizer.piece(eos)} (id {eos}) ends {end:,} {of}, supervised",
            "only there": f"{once:,} {of}",
        },
    )


# ---------------------------------------------------------------- what it does with them


def show_batches(console: Console, run: Prospect) -> None:
    planned, batches, ranks = run.planned, run.batches, run.ranks
    steps = filled(batches, batches.per_epoch, planned.micro_batch_tokens, ranks)
    counts = sorted(map(len, steps))
    shares = [tokens / planned.micro_batch_tokens for step in steps for tokens in step]
    fewest, most = counts[0], counts[-1]
    number = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    each = f" on each of {ranks.size} devices" if ranks.size > 1 else ""
    title(console, "Micro-batches")
    facts(
        console,
        {
            "device": planned.device,
            "plan": run.plan_line.removeprefix("plan: "),
            "in a step": f"{number}{each}, {sum(counts):,} in the first epoch",
            "full to": f"{mean(shares):.1%} on average, from {min(shares):.1%} to "
            f"{max(shares):.1%}",
        },
    )


def show_steps(console: Console, run: Prospect) -> None:
    batches, schedule, rate = run.batches, run.schedule, run.config.mask_rate
    steps, peak_step = schedule.total_steps, max(schedule.warmup_steps, 1)
    first, last = len(batches[0]), len(batches[batches.per_epoch - 1])
    smaller = "" if last == first else f", {last:,} in the last of an epoch"
    title(console, "Steps and learning rate")
    facts(
        console,
        {
            "steps": f"{steps:,}: {counted(run.config.epochs, 'epoch')} of {batches.per_epoch:,}",
            "rows in a step": f"{first:,}{smaller}",
            "learning rate": f"{schedule.peak:g} at most, first in step {peak_step:,}; "
            f"{schedule.shape}; {schedule.learning_rate(steps - 1):.3g} at the end",
        }
        | ({"masked": f"{rate:.0%} of the answers' tokens, at the end"} if rate else {}),
    )
    draw_curve(console, schedule.learning_rate, steps, schedule.peak, "step")


# ---------------------------------------------------------------- what it takes


def show_disk(console: Console, run: Prospect) -> None:
    sizes = run.sizes
    needed, available = disk_space(run.folder, *sizes)
    verdict = "enough" if needed <= available else "NOT ENOUGH: training would be refused"
    title(console, "Disk")
    facts(
        console,
        {
            "needed": f"{gigabytes(needed)}: best {gigabytes(sizes[0])}; last, previous and one "
            f"being written {gigabytes(sum(sizes))} each",
            "available": f"{gigabytes(available)}, {verdict}",
        },
    )


def show_time(console: Console, run: Prospect, tools: Tools) -> None:
    config, ranks, batches = run.config, run.ranks, run.batches
    title(console, "Time, by two steps with the model itself, which are discarded")
    torch.manual_seed(config.seed + ranks.rank)
    try:
        start = find_start(asdict(config), None, fetch)
        given = run.planned, run.rows + run.held_out, run.prompts, ranks
        learner = heard(console, tools.build, config, start, *given)
        limits = run.planned.micro_batch_tokens, config.max_grad_norm
        trial = try_steps(*learner, batches, run.schedule, *limits, run.held_out, ranks, tools.step)
    except UserError as error:
        if ranks.size > 1:  # the others wait in their step
            raise
        return facts(console, {"not measured": one_line(error)})
    num_saves = count_saves(config.epochs, batches.per_epoch, config.checkpoint_steps)
    how_often = config.epochs, num_saves, run.sizes
    facts(console, time_facts(trial, run.rows, run.held_out, *how_often))
