"""The steps train, selftest and real of cuda.py: the product's own work, and its time."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

import torch

# This benchmark's neighbour, which also puts the repository on the path.
from cuda_work import (
    Work,
    dataset_folder,
    flops,
    random_llama_2_7b,
    read_rows,
    tokens_of,
    write_random_llama,
)

from engine.compiling import compile_layers
from engine.cuda.linear import Linear
from engine.footprint import Recipe
from engine.llama import EAGER, Llama
from engine.memory import free_bytes
from engine.optimizer import ADAMW, ADAMW_8BIT, build_optimizer, make_state, training_bytes
from engine.packing import Example, pack
from engine.plan import Device, Wishes, choose
from engine.shape import ModelShape
from plan import rows_of

BATCH_SIZE = 128
# Steps of each variant: tokens of a micro-batch, recomputed layers (None: as train.py chooses),
# compiled layers, products that add their gradients.
VARIANTS = (
    (8192, 32, False, False),
    (8192, 32, True, True),
    (8192, None, True, True),
    (4096, 0, False, False),
    (4096, 0, True, False),
    (4096, None, True, True),
)
# Of an H100 or H200 for dense products in bfloat16, by its data sheet.
PEAK_FLOPS = 989e12


# ---------------------------------------------------------------- train


def measure_training(work: Work) -> None:
    import train

    has_torchao = find_spec("torchao") is not None
    for name in (ADAMW, ADAMW_8BIT) if has_torchao else (ADAMW,):
        work.attempt("optimizer", measure_optimizer, name)
    batch_size, steps = (4, 2) if work.is_dry else (BATCH_SIZE, 3)
    rows = read_rows("train", batch_size * steps)
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    model = random_llama_2_7b(work).train()
    work.results.write("model", parameters=sum(one.numel() for one in model.parameters()))
    optimizer = build_optimizer(
        model.parameters(), learning_rate=2e-5, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
    )
    free = free_bytes(model.device)
    here = Device("", free + sum(weight.nbytes for weight in model.parameters()))
    shape, kinds = ModelShape(model.config, model.dtype), rows_of(rows, batch_size)
    for tokens, recomputed, is_compiled, adds in VARIANTS[::5] if work.is_dry else VARIANTS:
        plan = choose(shape, Recipe(), model.kernels, kinds, here, Wishes(tokens))
        model.recomputed_blocks = plan.recomputed_blocks if recomputed is None else recomputed
        model.recomputes_parts = plan.recomputes_parts if recomputed is None else True
        model.elementwise = EAGER
        use_linear_layers(model, Linear if adds else torch.nn.Linear)
        if is_compiled:
            work.attempt("compile", compile_for_training, model)
        work.attempt("training", measure_steps, model, optimizer, batches, tokens)
        model.zero_grad()  # after a failure

    def step() -> None:
        train.accumulate_gradients(model, pack(rows[:40], 8192, model.kernels), 1.0)
        optimizer.step()

    work.attempt("profile", Work.profile, "train", step)


def measure_optimizer(work: Work, name: str) -> None:
    """A step of one bfloat16 weight, as large as Llama-2-7B's embedding."""
    size = 2**13 if work.is_dry else 32000 * 4096
    weight = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device=work.device))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer([weight], 2e-5, (0.9, 0.999), 1e-8, 0.0, name)
    make_state(optimizer)
    work.reset_peak()
    milliseconds = work.milliseconds(optimizer.step)
    work.results.write(
        "optimizer",
        name=name,
        ms_per_1e9=milliseconds / size * 1e9,
        bytes_per_parameter=training_bytes(weight.dtype, name),
        **work.peak_gib(),
    )


def use_linear_layers(model: Llama, kind: type[torch.nn.Linear]) -> None:
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.__class__ = kind


def compile_for_training(work: Work, model: Llama) -> None:
    started = time.perf_counter()
    compile_layers(model)
    work.results.write("compile", seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class TimedStep:
    """An optimizer step; ``seconds`` of each of its parts."""

    batch: list[Example]
    seconds: dict[str, float]
    micro_batches: int
    loss: float
    grad_norm: float

    @property
    def tokens_per_s(self) -> float:
        return tokens_of(self.batch) / sum(self.seconds.values())


def measure_steps(
    work: Work,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[list[Example]],
    micro_batch_tokens: int,
) -> None:
    work.reset_peak()
    steps = [time_step(work, model, optimizer, batch, micro_batch_tokens) for batch in batches]
    fastest = max(steps[1:], key=lambda step: step.tokens_per_s)
    flop_per_s = flops(model, fastest.batch) / sum(fastest.seconds.values())
    work.results.write(
        "training",
        micro_batch_tokens=micro_batch_tokens,
        recomputed=model.recomputed_blocks,
        compiled=model.elementwise is not EAGER,
        adds_gradients=type(model.head) is Linear,
        micro_batches=fastest.micro_batches,
        seconds=fastest.seconds,
        tokens_per_s=fastest.tokens_per_s,
        TFLOP_per_s=flop_per_s / 1e12,
        share_of_peak=flop_per_s / PEAK_FLOPS,
        loss=fastest.loss,
        grad_norm=fastest.grad_norm,
        **work.peak_gib(),
    )


def time_step(
    work: Work,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batch: list[Example],
    micro_batch_tokens: int,
) -> TimedStep:
    import train

    ends = [work.time()]
    micro_batches = pack(batch, micro_batch_tokens, model.kernels)
    ends.append(work.time())
    nats, num_labels, grad_norm = train.accumulate_gradients(model, micro_batches, 1.0)
    ends.append(work.time())
    optimizer.step()
    ends.append(work.time())
    optimizer.zero_grad(set_to_none=model.kernels.frees_gradients)
    ends.append(work.time())
    names = "packing", "gradients", "optimizer", "clearing"
    seconds = [end - start for start, end in pairwise(ends)]
    parts = dict(zip(names, seconds, strict=True))
    return TimedStep(batch, parts, len(micro_batches), nats / num_labels, grad_norm)


# ---------------------------------------------------------------- selftest


def run_selftest(work: Work) -> None:
    """Is a run that was killed resumed bit for bit on this device?"""
    hidden_size, layers, heads = (128, 2, 2) if work.is_dry else (1024, 4, 8)
    model = work.scratch / "model"
    write_random_llama(model, hidden_size, layers, heads)
    options = ["--model", model, "--dataset", dataset_folder(work), "--wandb_mode", "disabled"]
    options += ["--output_dir", work.scratch / "runs"]
    options += ["--batch_size", "2", "--max_new_tokens", "1"] if work.is_dry else []
    work.run_script("selftest", "train.py", "--selftest", *options)


# ---------------------------------------------------------------- real


def measure_real_model(work: Work) -> None:
    """The scripts themselves: before, three epochs, and after."""
    base, run = work.smollm.resolve(), work.scratch / "runs" / "smollm"
    rows = ["--dataset", dataset_folder(work), "--dtype", "bfloat16"]
    short = ["--max_new_tokens", "16"] if work.is_dry else []
    few = ["--epochs", "1", "--batch_size", "8", "--validation_size", "4"] if work.is_dry else []
    before = ["--ckpt", base, *rows]
    work.run_script("perplexity before", "perplexity.py", *before)
    work.run_script(
        "score before", "evaluate.py", *before, *short, "--output", work.scratch / "before"
    )
    work.run_script(
        "training",
        "train.py",
        *("--model", base, *rows, *few, *short),
        *("--output_dir", run.parent, "--run_name", run.name, "--wandb_mode", "disabled"),
        *("--learning_rate", "1e-4", "--gradient_checkpointing", "false"),
    )
    after = ["--ckpt", run / "best"]
    work.run_script("perplexity after", "perplexity.py", *after)
    sampled = ["--calculator", "true", "--samples", "4"]
    work.run_script("score after", "evaluate.py", *after, *sampled)
    kept = {
        "smollm_before.json": work.scratch / "before" / "scores.json",
        "smollm_metrics.jsonl": run / "metrics.jsonl",
        "smollm_after.json": run / "eval" / "test" / "scores.json",
    }
    for name, file in kept.items():
        if file.exists():
            shutil.copy(file, work.output / name)
