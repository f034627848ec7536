"""Transformers' Trainer in the step contenders of cuda.py, at several settings.

Padded rows are sorted by length, as group_by_length sorts each 50 micro-batches. They are measured
with the largest micro-batch that fits without recomputation, and with a larger one with it. Rows
that are flattened into one sequence have no padding, but as many attention scores as if that
sequence were one row: there is no FlashAttention for them without another package.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# This benchmark's neighbour, which also puts the repository on the path.
from cuda_work import Work, tokens_of
from training import collate_padded, training_settings
from transformers import (
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from engine import device_errors, memory
from engine.packing import Example
from run.errors import one_line

SECONDS = 18.0  # after which it gets no other setting


@dataclass(frozen=True)
class Setting:
    """How the Trainer trains.

    Attributes:
        batch: rows of a micro-batch.
        flattened: whether they become one sequence; otherwise they are sorted and padded.
        recomputed: whether the backward pass computes the layers again.
    """

    batch: int
    flattened: bool = False
    recomputed: bool = False

    @property
    def is_plain(self) -> bool:
        return not (self.flattened or self.recomputed)


SETTINGS = (
    Setting(16),
    Setting(8),
    Setting(4),
    Setting(8, flattened=True),
    Setting(16, recomputed=True),
)


def train_with_trainer(
    work: Work, pretrained: LlamaForCausalLM, batches: list[list[Example]], speeds: list[float]
) -> None:
    began, plain_fits = time.perf_counter(), False
    for setting in SETTINGS:
        if setting.is_plain and plain_fits:
            continue  # with smaller micro-batches it would only be slower
        if time.perf_counter() - began > SECONDS:
            work.results.write("Trainer", **asdict(setting), skipped="no time is left")
            continue
        before = len(speeds)
        work.attempt("Trainer", try_setting, pretrained, batches, setting, speeds)
        pretrained.zero_grad(set_to_none=True)
        disable_recomputation(pretrained)
        if not work.is_dry:
            memory.release()
        plain_fits |= setting.is_plain and len(speeds) > before


def try_setting(
    work: Work,
    pretrained: LlamaForCausalLM,
    batches: list[list[Example]],
    setting: Setting,
    speeds: list[float],
) -> None:
    """Running out of memory is a result of the setting, not a fault."""
    try:
        return measure_trainer(work, pretrained, batches, setting, speeds)
    except Exception as error:
        if not device_errors.is_out_of_memory(error):
            raise
        why = one_line(error)[:200]
    # Here the traceback holds no tensors any more.
    work.results.write("Trainer", **asdict(setting), out_of_memory=why, **work.peak_gib())


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self, work: Work):
        self.work, self.ends = work, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(self.work.time())


def measure_trainer(
    work: Work,
    pretrained: LlamaForCausalLM,
    batches: list[list[Example]],
    setting: Setting,
    speeds: list[float],
) -> None:
    first, timed = batches[0], [row for rows in batches[1:] for row in rows]
    batch = max(1, setting.batch // 8) if work.is_dry else setting.batch
    if not setting.flattened:
        first, timed = by_length(first), by_length(timed)
    folder = argparse.Namespace(folder=work.scratch, dtype="float32")  # which adds no autocast
    settings = training_settings(folder) | {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": len(first) // batch,
        "learning_rate": 0.0,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # which would wait for each micro-batch's loss
        "dataloader_pin_memory": not work.is_dry,
        recomputation_setting(): setting.recomputed,
    }
    clock = Clock(work)
    trainer = Trainer(
        model=pretrained,
        args=TrainingArguments(**settings),
        train_dataset=[asdict(row) for row in (*first, *timed)],
        data_collator=DataCollatorWithFlattening() if setting.flattened else collate_padded,
        callbacks=[clock],
    )
    work.reset_peak()
    loss = trainer.train().training_loss
    peak = work.peak_gib()
    trainer.accelerator.free_memory()
    seconds = clock.ends[-1] - clock.ends[0]
    speeds.append(tokens_of(timed) / seconds)
    work.results.write(
        "Trainer",
        **asdict(setting),
        attention=pretrained.config._attn_implementation,
        padding=padding(timed, batch) if not setting.flattened else 0.0,
        steps=len(clock.ends) - 1,
        seconds=seconds,
        tokens_per_s=speeds[-1],
        loss=loss,
        **peak,
    )


def by_length(rows: Sequence[Example]) -> list[Example]:
    return sorted(rows, key=lambda row: len(row.input_ids), reverse=True)


def padding(rows: list[Example], batch: int) -> float:
    """The share of padding in micro-batches of ``batch`` sorted rows."""
    longest = [len(row.input_ids) for row in rows[::batch]]
    return 1 - tokens_of(rows) / (batch * sum(longest))


def recomputation_setting() -> str:
    """Newer versions of Transformers have another name for it."""
    name = "activation_checkpointing"
    return name if hasattr(TrainingArguments, name) else "gradient_checkpointing"


def disable_recomputation(pretrained: LlamaForCausalLM) -> None:
    name = f"{recomputation_setting()}_disable"
    getattr(pretrained, name)()
