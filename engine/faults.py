"""Finds the rows that cause a step to fail, and says what failed."""

import math
from collections.abc import Sequence

from engine.device_errors import is_out_of_memory
from engine.gradients import gradient_norm
from engine.llama import Llama
from engine.packing import Example, pack
from run.errors import OutOfMemory, UserError, cause_of

MOST_LINES = 8  # named in a message


def rows_at_fault(model: Llama, batch: Sequence[Example]) -> str:
    """Names the rows of ``batch`` that have, each on its own, a NaN or infinite loss or gradient.

    Discards the gradients of ``model``.
    """
    lines = sorted(row.line for row in batch if not _is_finite(model, row))
    model.zero_grad()
    if not lines:
        return f"none of its {len(batch)} rows on its own, but all of them together"
    shown = ", ".join(map(str, lines[:MOST_LINES])) + (", ..." if len(lines) > MOST_LINES else "")
    return f"{len(lines)} of its {len(batch)} rows of train, line {shown}"


def _is_finite(model: Llama, row: Example) -> bool:
    model.zero_grad()
    [micro_batch] = pack([row], len(row.input_ids), model.kernels)
    loss = model(micro_batch)
    (loss / micro_batch.num_labels).backward()
    norm = gradient_norm(model.parameters())
    return math.isfinite(loss.item()) and math.isfinite(norm.item())


def is_each_alone(batch: Sequence[Example], micro_batch_tokens: int) -> bool:
    """Whether `pack` gives each row of ``batch`` a micro-batch of its own."""
    shortest, *others = sorted(len(row.input_ids) - 1 for row in batch)
    return not others or shortest + others[0] > micro_batch_tokens


def does_not_fit(batch: Sequence[Example]) -> UserError:
    """The error for a batch that runs out of memory even one row at a time."""
    longest = max(len(row.input_ids) for row in batch)
    return UserError(
        f"out of memory with each sequence alone, the longest of {longest} tokens: set "
        "gradient_checkpointing true, dtype bfloat16 or a smaller max_length, or take a larger "
        "device"
    )


def out_of_memory_on(rank: int, micro_batch_tokens: int) -> OutOfMemory:
    """The error for one of several ranks that runs out of memory, in which the others can't go on.

    They wait for it in the middle of a layer, and its share of the step is lost.
    """
    half = micro_batch_tokens // 2
    return OutOfMemory(
        half,
        f"rank {rank} is out of memory with micro_batch_tokens {micro_batch_tokens}: the run goes "
        f"on from what was saved, with {half}, if you type the same command again, or by itself "
        "with torchrun --max-restarts 3",
    )


def exact_match_failed(error: Exception) -> UserError:
    """The error for a model whose completions of the validation rows failed with ``error``."""
    if isinstance(error, UserError):
        return error
    cure = "with a smaller decode_slots" if is_out_of_memory(error) else "to try again"
    return UserError(
        f"best_by val_exact_match: decoding the validation rows failed ({cause_of(error)}): type "
        f"the same command {cure}, or start another run with best_by val_loss"
    )
