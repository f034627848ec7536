"""Measurements on one CUDA device, at the size of Llama-2-7B, and one real model's real score.

python benchmarks/cuda.py --group first
python benchmarks/cuda.py --group second
python benchmarks/cuda.py --group third --smollm DIR
python benchmarks/cuda.py --group fourth
python benchmarks/cuda.py --steps facts small train
python benchmarks/cuda.py --dry --steps facts small train adapters decode selftest save contenders

- facts: versions, rates of copies and matrix products, attention against float64.
- small: a small model's gradients and completions against those of a CPU, and those where memory
  ran out against those where it did not.
- train: seconds, tokens and memory of optimizer steps of a random Llama-2-7B, in FP8 too.
- adapters: the same with LoRA and QLoRA, and steps of the optimizers alone.
- decode: the test split's prompts completed to the lengths of their answers, by the same model, and
  the fused kernels of a step.
- selftest: train.py --selftest.
- real: perplexity and exact match of a real small model before and after three epochs.
- save: how long training waits for a save of 1.1 G parameters, and how long the save and its
  loading take, beside a plain file of the same size.
- contenders: steps of Transformers' Trainer and completions of its generate, and ours beside them.

Each step is a process of its own that is stopped at its time limit. A step that fails is a result
too, and the next one runs. The limits of each group add up to at most 330 seconds. Every result is
one line of JSON, on standard output and in results.jsonl, with the step, the part of it, and the
seconds since this command was started ("at"). Profiles are written beside it. The exit code is 1
if any step failed.

Rows are GSM8K's where GSM8K_DIR and TOKENIZER_DIR name data and tokenizer, and otherwise random
tokens of its lengths, or problems that are made up. With --dry everything is tiny and runs on the
CPU, to find mistakes before a device is there.
"""

import argparse
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_disk import scratch_parent  # this benchmark's neighbour

from run.script import check_platform

# In a benchmark, torch's `import cuda.bindings` finds this file first. This lets it find the rest.
__path__ = pkgutil.extend_path([], "cuda")

RESULTS_FILE = "results.jsonl"
# Seconds that each step may take.
LIMITS = {
    "facts": 45,
    "small": 90,
    "train": 150,
    "adapters": 90,
    "decode": 70,
    "selftest": 160,
    "real": 220,
    "save": 90,
    "contenders": 110,
}
# Where each is.
STEPS = {
    "facts": ("cuda_facts", "measure_facts"),
    "small": ("cuda_small", "measure_small_model"),
    "train": ("cuda_train", "measure_training"),
    "adapters": ("cuda_train", "measure_adapters"),
    "decode": ("cuda_decode", "measure_decoding"),
    "selftest": ("cuda_steps", "run_selftest"),
    "real": ("cuda_steps", "measure_real_model"),
    "save": ("cuda_saves", "measure_saves"),
    "contenders": ("cuda_contenders", "measure_contenders"),
}
GROUPS = {
    "first": ("facts", "small", "train"),
    "second": ("adapters", "decode", "selftest"),
    "third": ("real", "save"),
    "fourth": ("contenders",),
}


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--steps", nargs="+", choices=tuple(LIMITS))
    chosen.add_argument("--group", choices=tuple(GROUPS), help="of steps")
    chosen.add_argument("--worker", choices=tuple(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="everything tiny, on the CPU")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT") or "cuda-results"),
        metavar="DIR",
        help="where results go (default: $OUT, or cuda-results)",
    )
    parser.add_argument(
        "--smollm", type=Path, metavar="DIR", help="the real small model, in Hugging Face format"
    )
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="of each step, instead of its own"
    )
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.steps or GROUPS.get(arguments.group, ())
    if "real" in arguments.steps and arguments.smollm is None:
        parser.error("the step real needs a model: name its folder with --smollm")
    return arguments


@dataclass
class Results:
    """The lines of one step.

    Attributes:
        step: its name.
        folder: where they are kept.
        started: when the command was, in seconds since 1970.
        failed: whether anything has.
    """

    step: str
    folder: Path
    started: float
    failed: bool = False

    def write(self, part: str, **values: Any) -> None:
        self.failed |= "failed" in values
        at = round(time.time() - self.started, 1)
        line = json.dumps({"step": self.step, "part": part, "at": at} | values, default=str)
        print(line, file=sys.__stdout__, flush=True)
        with (self.folder / RESULTS_FILE).open("a") as file:
            file.write(line + "\n")

    def attempt(self, part: str, measure: Callable[..., None], *arguments: Any) -> None:
        """Call ``measure(*arguments)``. If it raises, that is the result of the part."""
        try:
            measure(*arguments)
        except Exception as error:
            where = [line.strip() for line in traceback.format_tb(error.__traceback__)[-3:]]
            self.write(part, failed=f"{type(error).__name__}: {str(error)[:300]}", where=where)


# ---------------------------------------------------------------- the steps, a process each


def run_step(step: str, arguments: argparse.Namespace) -> bool:
    """Run ``step`` within its limit; gives whether all of it succeeded."""
    limit = arguments.limit or LIMITS[step]
    results = Results(step, arguments.output, arguments.started)
    with tempfile.TemporaryDirectory(dir=scratch_parent(arguments.dry)) as scratch:
        command = [sys.executable, __file__, "--worker", step, "--scratch", scratch]
        command += ["--output", str(arguments.output), "--started", str(arguments.started)]
        command += ["--dry"] * arguments.dry
        command += ["--smollm", str(arguments.smollm)] if arguments.smollm else []
        no_device = {"CUDA_VISIBLE_DEVICES": ""} if arguments.dry else {}
        began = time.perf_counter()
        # A group of its own, so that what the step starts is stopped with it.
        process = subprocess.Popen(command, env=os.environ | no_device, process_group=0)
        try:
            code = process.wait(limit)
            failure = {"failed": f"exit code {code}"} if code else {}
        except subprocess.TimeoutExpired:
            failure = {"failed": f"stopped at its limit of {limit:g} s"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        results.write("end", seconds=round(time.perf_counter() - began, 1), **failure)
    return not results.failed


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """The work of the step ``arguments.worker``."""
    check_platform()  # before CUDA is initialised
    from cuda_work import Work, compile_no_code

    from engine.device import pick_device, prepare_process

    if arguments.dry:
        compile_no_code()
    work = Work(arguments.dry, results, arguments.output, arguments.scratch, arguments.smollm)
    prepare_process(pick_device())
    module, function = STEPS[arguments.worker]
    getattr(import_module(module), function)(work)


def main(arguments: argparse.Namespace) -> int:
    if arguments.worker:
        results = Results(arguments.worker, arguments.output, arguments.started)
        with redirect_stdout(sys.stderr):  # what the product prints is not a result
            results.attempt("step", measure, arguments, results)
        return int(results.failed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    # As with an interrupt, the step in progress is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    succeeded = [run_step(step, arguments) for step in arguments.steps]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main(read_arguments(sys.argv[1:])))
