"""Optimizer steps per second: this repository against Transformers' Trainer and TRL's SFTTrainer.

python benchmarks/training.py
python benchmarks/training.py --steps 6 --contenders ours trainer --compile
python benchmarks/training.py --profile
python benchmarks/training.py --hidden_size 4096 --intermediate_size 11008 --layers 32 \\
  --heads 32 --dtype bfloat16

Each contender runs in its own process. They take their steps in turn, one process at a time, so
that drifts in the machine's speed affect all of them alike. Medians are over the steps after the
first. All train the same random Llama on the same rows, 32 sequences per step, with fused AdamW:

- ours: packed micro-batches, as train.py makes them.
- trainer: 8 rows padded to the longest, accumulated 4 times, Transformers' own attention.
- trl: SFTTrainer's defaults with prompt and completion rows, 8 rows 4 times. Its default of bf16 is
  turned off if the others compute in float32.

The rows come from GSM8K if GSM8K_DIR and TOKENIZER_DIR name data and tokenizer. Otherwise they are
random tokens of the same lengths. The FLOPs of a step are the ones that the task requires, equal
for all contenders: 6 per token and weight of the layers, 6 per supervised token and weight of the
head, and 6 * layers * hidden * length^2 for the causal attention of each sequence. Everything after
the last layer's attention is subtracted for tokens without a label, which do not need it. The FLOPs
are compared with the rate of a 2048^3 matrix product in the same dtype, by the library that is
faster on this machine, measured between the steps.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine  # noqa: F401  (before Transformers, which it keeps quiet)

ROOT = Path(__file__).resolve().parents[1]
BATCH, ROWS, ACCUMULATION = 32, 8, 4
PROMPT = "Question: {question}\nAnswer:"
# Prompt and answer lengths, in tokens, of 64 GSM8K training rows, evenly spaced by length.
# fmt: off
LENGTHS = (
    (33, 58), (41, 60), (43, 63), (36, 75), (53, 62), (37, 82), (45, 77),
    (59, 66), (79, 49), (56, 75), (51, 83), (50, 87), (50, 89), (74, 68),
    (56, 88), (61, 85), (44, 105), (59, 92), (66, 88), (63, 94), (80, 79),
    (76, 86), (73, 92), (52, 115), (63, 106), (62, 110), (55, 119), (74, 103),
    (70, 109), (72, 110), (83, 101), (51, 137), (42, 148), (58, 135), (58, 138),
    (57, 142), (90, 112), (58, 147), (55, 153), (47, 164), (63, 152), (77, 142),
    (73, 149), (99, 127), (108, 122), (60, 173), (86, 152), (96, 146), (75, 170),
    (66, 183), (79, 175), (88, 171), (77, 188), (135, 136), (95, 182), (84, 200),
    (70, 222), (93, 209), (75, 236), (66, 258), (144, 194), (103, 252), (108, 270),
    (72, 368),
)
# fmt: on


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", choices=tuple(WORKERS), default=list(WORKERS))
    parser.add_argument(
        "--steps", type=int, default=4, help="timed optimizer steps, after one untimed"
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--intermediate_size", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--micro_batch_tokens", type=int, default=1536, help="our own contender's")
    parser.add_argument("--compile", action="store_true", help="compile our own contender")
    parser.add_argument(
        "--profile", action="store_true", help="profile our last step instead of the race"
    )
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the work


def prepare(folder: Path, arguments: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Write model and rows into ``folder``.

    Returns:
        The rows, each with ``input_ids`` and unshifted ``labels``.
    """
    import data
    from engine import packing
    from engine.loading import load_tokenizer
    from grading import dataset

    rows = (arguments.steps + 1) * BATCH
    write_model(folder, arguments)
    if os.environ.get("GSM8K_DIR") and os.environ.get("TOKENIZER_DIR"):
        problems = dataset.load_problems(os.environ["GSM8K_DIR"], "train")[:rows]
        encoded = data.encode(load_tokenizer(folder), problems, PROMPT)
        examples = [
            {"input_ids": example.input_ids, "labels": example.labels} for example in encoded
        ]
        print(f"rows: the first {rows} of GSM8K's train split, Llama-2's tokenizer")
    else:
        rng = random.Random(0)
        examples = []
        for _ in range(rows):
            prompt, answer = rng.choice(LENGTHS)
            ids = [1, *(rng.randrange(3, 32_000) for _ in range(prompt + answer - 2)), 2]
            examples.append({"input_ids": ids, "labels": [packing.IGNORE] * prompt + ids[prompt:]})
        print(f"rows: {rows} of random tokens with GSM8K's lengths")
    (folder / "rows.json").write_text(json.dumps(examples))
    return examples


def write_model(folder: Path, arguments: argparse.Namespace) -> None:
    """A random Llama of the given shape, with TOKENIZER_DIR's tokenizer or a stand-in."""
    import shutil

    import standin

    if os.environ.get("TOKENIZER_DIR"):
        for file in Path(os.environ["TOKENIZER_DIR"]).glob("tokenizer*"):
            shutil.copyfile(file, folder / file.name)
    else:
        texts = [
            f"{row['question']}\n{row['answer']}" for row in standin.make_problems(2000, seed=0)
        ]
        standin.make_tokenizer(texts, folder, vocab_size=512)
    standin.make_model(
        folder,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        layers=arguments.layers,
        heads=arguments.heads,
        vocab_size=32_000,
    )


def flops(rows: list[dict[str, list[int]]], arguments: argparse.Namespace) -> float:
    """FLOPs of one optimizer step over ``rows`` by the formula above."""
    hidden, layers = arguments.hidden_size, arguments.layers
    body = layers * (4 * hidden * hidden + 3 * hidden * arguments.intermediate_size)
    head = 32_000 * hidden
    tokens = sum(len(row["input_ids"]) for row in rows)
    labels = sum(label != -100 for row in rows for label in row["labels"])
    attention = layers * hidden * sum(len(row["input_ids"]) ** 2 for row in rows)
    needless = (hidden * hidden + 3 * hidden * arguments.intermediate_size) * (tokens - labels)
    return 6.0 * (body * tokens + head * labels + attention - needless)


# ---------------------------------------------------------------- contenders, one process each


def wait_for_turn() -> None:
    if sys.stdin.readline() != "go\n":
        sys.exit("the benchmark has gone")


def report(**values: Any) -> None:
    print("@" + json.dumps(values), flush=True)


def peak_memory() -> float:
    """Peak memory of this process in GB, on the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def our_steps(
    arguments: argparse.Namespace, rows: list[dict[str, list[int]]]
) -> Iterator[dict[str, float]]:
    """Makes an optimizer step on request; reports seconds, seconds for packing, and the loss."""
    import torch

    import train
    from engine.compiling import compile_layers
    from engine.device import pick_device, prepare_process
    from engine.loading import load_model
    from engine.optimizer import build_optimizer
    from engine.packing import Example, pack

    device = pick_device()
    prepare_process(device)
    examples = [Example(**row) for row in rows]
    model = load_model(arguments.folder, getattr(torch, arguments.dtype), device).train()
    model.recomputed_blocks = len(model.blocks) if device.type == "cuda" else 0
    if arguments.compile:
        compile_layers(model)
    optimizer = build_optimizer(
        model.parameters(), learning_rate=2e-5, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
    )
    yield {}  # everything is loaded
    for first in range(0, len(examples), BATCH):
        started = time.perf_counter()
        batch = examples[first : first + BATCH]
        micro_batches = pack(batch, arguments.micro_batch_tokens, model.kernels)
        packed = time.perf_counter()
        nats, num_labels, _ = train.accumulate_gradients(model, micro_batches, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=model.kernels.frees_gradients)
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield {
            "seconds": time.perf_counter() - started,
            "packing": packed - started,
            "loss": nats / num_labels,
        }


def work_ours(arguments: argparse.Namespace, rows: list[dict[str, list[int]]]) -> None:
    steps = our_steps(arguments, rows)
    next(steps)
    for _ in range(0, len(rows), BATCH):
        wait_for_turn()
        report(**next(steps), peak=peak_memory())


def profile(arguments: argparse.Namespace, rows: list[dict[str, list[int]]]) -> None:
    """Print the time of our last step by operator."""
    import torch

    steps = our_steps(arguments, rows)
    for _ in range(arguments.steps + 1):
        next(steps)
    with torch.profiler.profile() as result:
        next(steps)
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(result.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))


def _paced_trainer(base: type, **settings: Any) -> None:
    """Run a Trainer that waits for its turn before each step and reports after it."""
    import torch
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        started = seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_for_turn()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                report(seconds=self.seconds, loss=logs["loss"], peak=peak_memory())

    base(callbacks=[Pace()], **settings).train()


def training_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(arguments.folder / "trainer"),
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": arguments.dtype == "bfloat16",
    }


def collate_padded(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Rows padded to the longest, as Transformers' models read them."""
    import torch

    longest = max(len(row["input_ids"]) for row in batch)

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": pad([row["input_ids"] for row in batch], 0),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in batch], 0),
        "labels": pad([row["labels"] for row in batch], -100),
    }


def work_trainer(arguments: argparse.Namespace, rows: list[dict[str, list[int]]]) -> None:
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    settings = training_settings(arguments) | {"gradient_checkpointing": torch.cuda.is_available()}
    _paced_trainer(
        Trainer,
        model=LlamaForCausalLM.from_pretrained(
            arguments.folder, dtype=getattr(torch, arguments.dtype)
        ),
        args=TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=collate_padded,
    )


def work_trl(arguments: argparse.Namespace, rows: list[dict[str, list[int]]]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    # As SFTTrainer tokenizes prompt and completion: ids of both, and a mask of the completion.
    masked = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(label != -100) for label in row["labels"]],
        }
        for row in rows
    ]
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    tokenizer.pad_token = tokenizer.unk_token
    _paced_trainer(
        SFTTrainer,
        model=LlamaForCausalLM.from_pretrained(
            arguments.folder, dtype=getattr(torch, arguments.dtype)
        ),
        args=SFTConfig(**training_settings(arguments), completion_only_loss=True),
        train_dataset=Dataset.from_list(masked),
        processing_class=tokenizer,
    )


WORKERS: dict[str, Callable[[argparse.Namespace, list[dict[str, list[int]]]], None]] = {
    "ours": work_ours,
    "trainer": work_trainer,
    "trl": work_trl,
}


# ---------------------------------------------------------------- the race


@dataclass
class Contender:
    """A worker process and its reports, step by step."""

    name: str
    process: subprocess.Popen[str]
    reports: list[dict[str, float]]

    def step(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"):
                self.reports.append(json.loads(line[1:]))
                return
        sys.exit(f"{self.name} ended before its last step: its messages are above")


def launch(script: str, name: str, options: list[str]) -> Contender:
    """Start the worker ``name`` of a benchmark, a process that waits for its turns."""
    command = [sys.executable, script, "--worker", name, *options]
    return Contender(
        name,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True),
        [],
    )


def matrix_rate(dtype: str) -> float:
    """FLOP/s of a 2048^3 matrix product by the faster library, the median of several."""
    import torch

    from engine.device import kernels_for, pick_device

    device = pick_device()
    product = kernels_for(device).product
    a, b = (torch.randn(2048, 2048, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        product(a, b)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds[2:])


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        if arguments.worker is None:
            rows = prepare(arguments.folder, arguments)
            profile(arguments, rows) if arguments.profile else race(arguments, rows)


def race(arguments: argparse.Namespace, rows: list[dict[str, list[int]]]) -> None:
    options = [
        f"--{key}={getattr(arguments, key)}" for key in ("folder", "dtype", "micro_batch_tokens")
    ]
    options += ["--compile"] * arguments.compile
    contenders = [launch(__file__, name, options) for name in arguments.contenders]
    rates = []
    for step in range(arguments.steps + 1):
        for contender in contenders:
            contender.step()
            print(
                f"step {step} {contender.name}: {contender.reports[-1]['seconds']:.2f} s",
                file=sys.stderr,
            )
        rates.append(
            matrix_rate(arguments.dtype)
        )  # only now, since contenders use the processor while they start
    for contender in contenders:
        contender.process.kill()
    print_table(arguments, rows, contenders, statistics.median(rates))


def print_table(
    arguments: argparse.Namespace,
    rows: list[dict[str, list[int]]],
    contenders: list[Contender],
    rate: float,
) -> None:
    windows = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)][1:]
    tokens = [sum(len(row["input_ids"]) for row in window) for window in windows]
    work = [flops(window, arguments) for window in windows]
    compiled = "compiled layers" if arguments.compile else "layers not compiled"
    print(f"ours: micro-batches of {arguments.micro_batch_tokens} tokens, {compiled}")
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s in {arguments.dtype}")
    print(
        "| contender | tokens per second | s per step | peak memory, GB "
        "| share of the matrix rate | first loss |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    speeds = {}
    for contender in contenders:
        timed = [entry["seconds"] for entry in contender.reports[1:]]
        speeds[contender.name] = statistics.median(
            t / s for t, s in zip(tokens, timed, strict=True)
        )
        share = statistics.median(w / s for w, s in zip(work, timed, strict=True)) / rate
        peak, loss = contender.reports[-1]["peak"], contender.reports[0]["loss"]
        print(
            f"| {contender.name} | {speeds[contender.name]:.0f} | {statistics.median(timed):.2f} "
            f"| {peak:.2f} | {share:.0%} | {loss:.6f} |"
        )
    for contender in contenders:
        if "packing" in contender.reports[0]:
            packing = statistics.median(
                entry["packing"] / entry["seconds"] for entry in contender.reports[1:]
            )
            print(f"{contender.name}: {packing:.2%} of a step goes into packing")
    for contender in contenders[1:]:
        memory = contenders[0].reports[-1]["peak"] / contender.reports[-1]["peak"]
        speed = speeds[contenders[0].name] / speeds[contender.name]
        print(
            f"{contenders[0].name} against {contender.name}: "
            f"{speed:.2f} x the speed, {memory:.2f} x the memory"
        )
    losses = [contender.reports[0]["loss"] for contender in contenders]
    tolerance = 1e-4 if arguments.dtype == "float32" else 3e-2
    if max(losses) - min(losses) > tolerance:
        sys.exit(
            f"the first losses differ by {max(losses) - min(losses):.6f}, more than {tolerance}: "
            "not the same work"
        )


if __name__ == "__main__":
    options = read_arguments(sys.argv[1:])
    if options.worker:
        WORKERS[options.worker](options, json.loads((options.folder / "rows.json").read_text()))
    else:
        main(options)
