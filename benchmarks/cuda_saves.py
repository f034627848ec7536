"""The step save of cuda.py: how long training waits for a save, and what save and load cost."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

# This benchmark's neighbours, of which one also puts the repository on the path.
from cuda_disk import Rates, cached_share, check_room, forget, measure_disk, times_plain
from cuda_work import TINY, Work, random_llama, read_rows, write_random_llama

import train
from engine.llama import Llama
from engine.loading import load_model, load_tokenizer
from engine.optimizer import build_optimizer, checkpoint_bytes
from engine.packing import Example
from engine.state import copied, copy_to_host, pack_state, save_from_device, unpack_state
from run.checkpoint import newest_intact, save_checkpoint
from run.folder import restore
from run.manifest import LAST
from run.metrics_log import MetricsLog
from run.progress import Progress
from run.saves import Saves
from run.wandb_run import NoTracker

# 1.1 G parameters: a checkpoint of 9.1 GB, of which a save needs three on the disk.
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
}
ROUNDS = 2  # the first also locks pages and fills the optimizer's caches
# On a slow disk, a round is left out if it would end later than this.
MOST_SECONDS = 70.0


@dataclass
class Training:
    """A run that makes the same step again and again, and saves when it is told to.

    Attributes:
        ended: when each save was complete.
    """

    model: Llama
    optimizer: torch.optim.Optimizer
    rows: list[Example]
    log: MetricsLog
    progress: Progress = field(default_factory=Progress)
    ended: list[float] = field(default_factory=list)

    def step(self) -> None:
        train.train_step(self.model, self.optimizer, self.rows, 1e-5, 8192, 1.0)
        self.progress.step += 1

    def write_line(self) -> None:
        """A line of metrics.jsonl, which on some file systems waits for what a save has written."""
        self.log.write(self.progress.step, 0.0, {"train/loss": 1.0})

    def save(self, *arguments: Any, **removals: Any) -> None:
        save_from_device(save_checkpoint, *arguments, **removals)
        self.ended.append(time.perf_counter())

    def start_save(self, saves: Saves) -> None:
        self.ended.clear()
        state = pack_state(self.optimizer, asdict(self.progress))
        saves.save_last(self.model, self.progress, *state)


def measure_saves(work: Work) -> None:
    rows = read_rows("train", 4 if work.is_dry else 32)
    started, rates = time.perf_counter(), Rates()
    model = random_llama(work.device, torch.bfloat16, TINY if work.is_dry else SHAPE).train()
    size = sum(checkpoint_bytes(model.parameters()))
    check_room(work, 31 * size // 10)
    work.attempt("disk", measure_disk, size, rates)
    optimizer = optimizer_of(model)
    folder = work.scratch / "run"
    folder.mkdir()
    training = Training(model, optimizer, rows, MetricsLog(folder, NoTracker()))
    write_random_llama(work.scratch / "model", hidden_size=64, layers=1, heads=1)
    copy = copied_from_cpu if work.is_dry else copy_to_host
    saves = Saves(
        folder=folder,
        settings={"checkpoint_steps": None},
        plan={},
        steps_per_epoch=len(rows),
        base=None,
        data_hashes={},
        tokenizer=load_tokenizer(work.scratch / "model"),
        parts=train.Parts(save=training.save, copy=copy),
    )
    training.step()
    alone = [seconds(work, training.step) for _ in range(3)]
    lines = [seconds(work, training.write_line) for _ in range(3)]
    work.results.write("steps", s_per_step=median(alone), s_per_line=median(lines))
    before = time.perf_counter()
    work.attempt("save", measure_save_at_once, training, saves, rates)
    last = time.perf_counter() - before
    work.attempt("load", measure_load, training, saves, rates)
    with training.log, saves:
        for number in range(ROUNDS):
            before = time.perf_counter()
            if before + last - started > MOST_SECONDS:
                work.results.write("save", rounds_left_out=ROUNDS - number)
                break
            work.attempt("save", measure_save_beside_training, training, saves, rates)
            last = time.perf_counter() - before


def optimizer_of(model: Llama) -> torch.optim.Optimizer:
    return build_optimizer(
        model.parameters(), learning_rate=1e-5, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
    )


def copied_from_cpu(
    model: Llama, tensors: Mapping[str, torch.Tensor], *others: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    return copied(tensors)


def measure_save_at_once(work: Work, training: Training, saves: Saves, rates: Rates) -> None:
    waited = seconds(work, lambda: training.start_save(saves))
    size = bytes_of(saves.folder / LAST)
    work.results.write(
        "save",
        how="at once",
        bytes=size,
        training_waits_s=waited,
        whole_s=waited,
        times_plain_file=times_plain(size, waited, rates.write),
    )


def measure_load(work: Work, training: Training, saves: Saves, rates: Rates) -> None:
    """As a run that is resumed loads what the run before it, still as it was saved, has saved."""
    files = [file for file in (saves.folder / LAST).iterdir() if file.is_file()]
    for file in files:
        forget(file)
    cached = cached_share(max(files, key=lambda file: file.stat().st_size))
    ends = [work.time()]
    checkpoint = newest_intact(saves.folder)
    ends.append(work.time())
    model = load_model(checkpoint, training.model.dtype, work.device)
    ends.append(work.time())
    optimizer = optimizer_of(model)
    restore(checkpoint, partial(unpack_state, optimizer=optimizer), 10**9, None, 8192)
    ends.append(work.time())
    size = bytes_of(checkpoint)
    tensors, expected = (
        dict(each.named_parameters()) | states_of(of)
        for each, of in ((model, optimizer), (training.model, training.optimizer))
    )
    work.results.write(
        "load",
        bytes=size,
        verify_s=ends[1] - ends[0],
        weights_s=ends[2] - ends[1],
        state_s=ends[3] - ends[2],
        whole_s=ends[3] - ends[0],
        times_plain_file=times_plain(size, ends[3] - ends[0], rates.read),
        share_read_from_cache=cached,
        tensors=len(expected),
        same=sum(is_same(tensors[name], each) for name, each in expected.items()),
    )


def is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.device == other.device and torch.equal(tensor, other)


def states_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    packed, _ = pack_state(optimizer, {})
    return {name: tensor for name, tensor in packed.items() if name.startswith("optimizer.")}


def measure_save_beside_training(
    work: Work, training: Training, saves: Saves, rates: Rates
) -> None:
    training.step()
    started = work.time()
    training.start_save(saves)
    waited = work.time() - started
    steps, lines = [], []
    while not training.ended:
        saves.is_due(training.progress)  # as in training, so that a failed save ends the loop
        steps.append(seconds(work, training.step))
        lines.append(seconds(work, training.write_line))
    size = bytes_of(saves.folder / LAST)
    work.results.write(
        "save",
        how="beside training",
        bytes=size,
        training_waits_s=waited,
        GB_per_s_of_copy=size / waited / 1e9,
        whole_s=training.ended[0] - started,
        times_plain_file=times_plain(size, training.ended[0] - started, rates.write),
        steps_meanwhile=len(steps),
        s_per_step_meanwhile=median(steps) if steps else None,
        s_of_slowest_line=max(lines, default=None),
    )


def seconds(work: Work, run: Callable[[], object]) -> float:
    started = work.time()
    run()
    return work.time() - started


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
