"""Tries a run before it starts: how it packs its rows, and how long two steps take."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.measure import StepResult, measure
from engine.optimizer import Schedule, make_state
from engine.packing import Batches, Example, Packer, distribute, lengths_of
from engine.ranks import Ranks
from run.errors import UserError, counted
from run.files import gigabytes
from run.progress_bar import clock

if TYPE_CHECKING:
    from engine.llama import Llama

DISK_SPEED = 1e9  # bytes a second: assumed, since nothing is written


def count_tokens(rows: Sequence[Example]) -> int:
    return sum(len(row.input_ids) for row in rows)


def filled(batches: Batches, steps: int, micro_batch_tokens: int, ranks: Ranks) -> list[list[int]]:
    """The tokens of each micro-batch of this rank in each of the first ``steps``, unpadded."""
    found = []
    for step in range(steps):
        lengths = lengths_of(batches[step])
        bins = distribute(lengths, micro_batch_tokens, ranks)
        found.append([sum(lengths[index] for index in members) for members in bins if members])
    return found


@dataclass(frozen=True)
class Trial:
    """Two measured steps, and a measured validation.

    Attributes:
        losses, seconds, tokens: of each of the two steps.
        micro_batch_tokens: the limit with which they fit into memory.
        is_reduced: whether that is less than was planned.
        measured_per_second: tokens of a validation.
    """

    losses: tuple[float, float]
    seconds: tuple[float, float]
    tokens: tuple[int, int]
    micro_batch_tokens: int
    is_reduced: bool
    measured_per_second: float

    @property
    def tokens_per_second(self) -> float:
        """Of the second step, since the first one compiles and allocates."""
        return self.tokens[1] / self.seconds[1]


def try_steps(
    model: "Llama",
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    schedule: Schedule,
    micro_batch_tokens: int,
    max_grad_norm: float | None,
    held_out: Sequence[Example],
    ranks: Ranks,
    step: Callable[..., StepResult],
) -> Trial:
    """Make the first two steps of a run, and validate on a part of ``held_out``.

    Args:
        step: `train.train_step`.

    Raises:
        UserError: the optimizer's state or a single sequence does not fit into memory, or a loss or
            gradient is not finite.
    """
    make_state(optimizer)
    packer = Packer(batches, ranks)
    losses, seconds, tokens, budget = [], [], [], micro_batch_tokens
    for number in (0, 1):
        batch = packer.batch(number)
        started = time.perf_counter()
        rate = schedule.learning_rate(number)
        result = step(model, optimizer, batch, rate, budget, max_grad_norm, packer)
        if not result.is_finite:
            cure = "lower the learning_rate" if number else "copy the model again"
            raise UserError(
                f"step {number + 1}: loss {result.loss}, grad_norm {result.grad_norm} must be "
                f"finite, or training stops there: {cure}"
            )
        _wait_for(model.device)
        seconds.append(time.perf_counter() - started)
        losses.append(result.loss)
        tokens.append(count_tokens(batch))
        budget = result.micro_batch_tokens
    started = time.perf_counter()
    some = held_out[: len(batches[0])]
    measure(model, some, budget)
    speed = count_tokens(some) / (time.perf_counter() - started)
    of_steps = tuple(losses), tuple(seconds), tuple(tokens)
    return Trial(*of_steps, budget, budget < micro_batch_tokens, speed)


def _wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_facts(
    trial: Trial,
    rows: Sequence[Example],
    held_out: Sequence[Example],
    epochs: int,
    num_saves: int,
    sizes: tuple[int, int],
) -> dict[str, str]:
    """How long a run takes, in words.

    Args:
        rows, held_out: of an epoch, and of its validation.
        num_saves: of ``last``, after a step.
        sizes: of a checkpoint in bytes: its weights, and its optimizer state.
    """
    # The first save, before the first step, has no optimizer state, and ``best`` never does.
    written = num_saves * sum(sizes) + (1 + epochs) * sizes[0]
    training = epochs * count_tokens(rows) / trial.tokens_per_second
    validation = epochs * count_tokens(held_out) / trial.measured_per_second
    saving = written / DISK_SPEED
    reduced = ""
    if trial.is_reduced:
        reduced = f", after memory ran out, with micro_batch_tokens {trial.micro_batch_tokens:,}"
    (first, second), losses = trial.seconds, trial.losses
    return {
        "the two steps": f"{first:.3g} s and {second:.3g} s, loss {losses[0]:.4f} and "
        f"{losses[1]:.4f}, then {trial.tokens_per_second:,.0f} tokens a second{reduced}",
        "training": clock(training),
        "validation": f"{clock(validation)} in {counted(epochs, 'epoch')}, by the speed on some of "
        "its rows",
        "saves": f"{clock(saving)} for {gigabytes(written)}, {counted(num_saves, 'time')} last and "
        f"up to {counted(epochs, 'time')} best, at an assumed 1 GB a second",
        "in all": f"about {clock(training + validation + saving)}, and what decoding takes",
    }
