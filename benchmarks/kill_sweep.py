"""Kills training at every point of its saves and at random moments, and checks what resumes.

python benchmarks/kill_sweep.py
python benchmarks/kill_sweep.py --points 12 --random 4

A tiny Llama is trained for 2 epochs of 3 steps, with saves between and after them, which go on
beside training as on a GPU. A point is the begin or end of a step, or a file operation of the run,
in which a file is opened, written by safetensors, synced, renamed or removed. A first run lists the
points. Then, for each point, a process sends itself SIGKILL just before it. Random kills come from
outside, at any moment of a run. After each kill

- if the first save has finished, there is a checkpoint whose files match the hashes in its
  manifest;
- the same command finishes the run, and last and best equal those of a run that was never killed,
  weights and optimizer state bit for bit;
- metrics.jsonl has every step exactly once, with the losses of that run;
- no half-written file or folder is left.

Processes are forked from one that has done the imports, which only saves their time. The kills are
real.
"""

import argparse
import gc
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # since this process forks
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small for more
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch

import train
from engine.state import copied
from run import manifest, training_json
from run.config import CONFIG_FILE, Config, load_config
from run.script import run_script
from standin import make_model, make_problems, make_tokenizer, write_jsonl

WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
KEPT = {"best", "last", "previous", "config.yaml", "metrics.jsonl"}
STEPS = 6
LATER = (  # what a run imports only when it uses it
    "sentencepiece.sentencepiece_model_pb2",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.tokenization_llama",
)
POINT_SECONDS = 1e-3  # a pause at each point of a save, so that some steps fit beside it


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, help="how many points, evenly spread; default: all")
    parser.add_argument("--random", type=int, default=50, help="how many kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- a run in its own process


def prepare(folder: Path) -> None:
    """Make model and data in a separate process, since this one must not have threads at a fork."""
    if process := os.fork():
        if end_of(process)[0]:
            sys.exit("model and data can't be made")
        return
    problems = make_problems(30, seed=0)
    write_jsonl(problems[:26], folder / "train.jsonl")
    write_jsonl(problems[26:], folder / "test.jsonl")
    (folder / "model").mkdir()
    make_tokenizer(
        [f"Question: {p['question']}\nAnswer: {p['answer']}" for p in problems],
        folder / "model",
        420,
    )
    make_model(folder / "model", hidden_size=32, intermediate_size=48, layers=2, heads=2)
    os._exit(0)


def settings(folder: Path, name: str) -> Config:
    values = {
        "model": str(folder / "model"),
        "dataset": str(folder),
        "output_dir": str(folder / "runs"),
    }
    values |= {
        "validation_size": "2",
        "epochs": "2",
        "batch_size": "8",
        "checkpoint_steps": "2",
        "dtype": "float32",
    }
    values |= {
        "max_length": "256",
        "micro_batch_tokens": "1024",
        "max_new_tokens": "2",
        "wandb_mode": "disabled",
    }
    return load_config(CONFIG_FILE, values | {"run_name": name})


def no_report(folder: Path) -> None:
    """In place of a run's report, which takes longer than these runs."""


def start(config: Config, log: Path, on_point: Callable[[str], None] | None = None) -> int:
    """Fork a process that trains, and return its number."""

    def training() -> None:
        if on_point is not None:
            watch(str(Path(config.output_dir) / config.run_name), on_point)
        step = watched(train.train_step, "step", on_point) if on_point else train.train_step
        train.main(config, step=step, copy=copy, report=no_report)

    return forked(log, training)


def forked(log: Path, story: Callable[[], None]) -> int:
    """Fork a process that calls ``story`` as a script's last line does, and return its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        run_script(story)
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def copy(
    model: Any, tensors: Mapping[str, torch.Tensor], *others: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """As on a GPU with enough host memory."""
    return copied(tensors)


def watch(folder: str, on_point: Callable[[str], None]) -> None:
    """Call ``on_point`` before each file operation in ``folder``."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event in WATCHED else ""
        in_removed_folder = (
            event in ("os.remove", "os.rmdir") and arguments[1] != -1
        )  # shutil.rmtree passes relative paths
        if path.startswith(folder) or in_removed_folder:
            on_point(f"{event} {path.removeprefix(folder)}")
            if threading.current_thread() is not threading.main_thread():
                time.sleep(POINT_SECONDS)

    sys.addaudithook(audit)
    # Python's audit hooks miss these: safetensors writes from Rust, and fsync has no event.
    safetensors.torch.serialize_file = watched(
        safetensors.torch.serialize_file, "safetensors", on_point
    )
    os.fsync = watched(os.fsync, "os.fsync", on_point)


def watched(
    original: Callable[..., Any], name: str, on_point: Callable[[str], None]
) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        on_point(f"{name} begins")
        result = original(*arguments, **keywords)
        on_point(f"{name} ended")
        return result

    return call


def end_of(process: int) -> tuple[int, bool]:
    """The exit code of a process, and whether it was killed."""
    status = os.waitpid(process, 0)[1]
    return os.waitstatus_to_exitcode(status), os.WIFSIGNALED(status)


# ---------------------------------------------------------------- checks after a kill


def outcome(folder: Path) -> dict[str, Any]:
    """The results of a finished run that must not depend on kills."""
    found: dict[str, Any] = {"files": {path.name for path in folder.iterdir()}}
    for name in ("best", "last"):
        found[f"fault of {name}"] = manifest.fault_of(folder / name)
        files = json.loads((folder / name / manifest.MANIFEST_FILE).read_text())["files"]
        found[name] = {
            file: entry for file, entry in files.items() if file.endswith(".safetensors")
        }
        found[f"step of {name}"] = training_json.read_description(folder / name)["step"]
    lines = [json.loads(line) for line in (folder / manifest.METRICS_FILE).read_text().splitlines()]
    clock = ("time", "train/tokens_per_second", "train/memory_gib")
    found["metrics"] = [
        {key: value for key, value in line.items() if key not in clock} for line in lines
    ]
    return found


def check_after_kill(folder: Path) -> None:
    """Check that there is a complete checkpoint, once the first has been saved."""
    names = ("last", "previous", ".last.staged")
    began = any((folder / name).exists() for name in ("last", "previous", manifest.METRICS_FILE))
    if began and all(manifest.fault_of(folder / name) for name in names):
        sys.exit(
            f"LOST: no complete checkpoint in {folder}: "
            f"{[manifest.fault_of(folder / name) for name in names]}"
        )


def resume_and_compare(config: Config, log: Path, expected: dict[str, Any], what: str) -> None:
    folder = Path(config.output_dir) / config.run_name
    check_after_kill(folder)
    code, _ = end_of(start(config, log))
    said = log.read_text(errors="replace")
    if code != 0 and not (code == 2 and "this run is finished" in said):
        sys.exit(f"LOST after a kill at {what}: the resumed run ended with {code}: {said[-500:]}")
    found = outcome(folder)
    for key, value in expected.items():
        if found[key] != value:
            sys.exit(
                f"LOST after a kill at {what}: {key} is {found[key]}, "
                f"without the kill {value} ({folder})"
            )


# ---------------------------------------------------------------- the sweep


def list_points(config: Config, folder: Path) -> list[str]:
    """The file operations of an uninterrupted run, in order."""
    file = folder / "points.txt"
    with file.open("w") as stream:

        def write(point: str) -> None:
            stream.write(point + "\n")
            stream.flush()

        code, _ = end_of(start(config, folder / "whole.log", write))
    if code:
        sys.exit(
            f"the run without a kill ended with {code}: {(folder / 'whole.log').read_text()[-500:]}"
        )
    return file.read_text().splitlines()


def beside_training(points: list[str]) -> set[int]:
    """The numbers of the points during saves beside which a step began or ended."""
    found: set[int] = set()
    begin = None
    for number, point in enumerate(points):
        if begin is None and re.fullmatch(r"os\.mkdir /\.\w+\.staged", point):
            begin = number
        elif begin is not None and re.fullmatch(r"os\.rename /\.\w+\.staged", point):
            if any(each.startswith("step") for each in points[begin:number]):
                found |= set(range(begin, number + 1))
            begin = None
    return found


def kill_at(number: int) -> Callable[[str], None]:
    seen = iter(range(number + 1))

    def on_point(_: str) -> None:
        if next(seen, number) == number:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # SIGKILL may reach the other threads first

    return on_point


def sweep_points(
    points: list[str], count: int, folder: Path, expected: dict[str, Any]
) -> Counter[str]:
    """Kill at ``count`` of ``points``; returns the number of kills at each kind of point."""
    killed: Counter[str] = Counter()
    beside = beside_training(points)
    for position in range(count):
        number = position * len(points) // count
        config = settings(folder, f"point-{number}")
        code, was_killed = end_of(start(config, folder / "log", kill_at(number)))
        if was_killed:
            where = " beside training" if number in beside else ""
            killed[points[number].split()[0] + where] += 1
        elif (
            code
        ):  # 0 is possible: threads interleave differently each time, so the point may not occur
            sys.exit(f"the run that was to be killed at point {number} ended with {code}")
        resume_and_compare(
            config, folder / f"log-{number}", expected, f"point {number} ({points[number]})"
        )
    return killed


def sweep_moments(
    count: int, seed: int, seconds: float, folder: Path, expected: dict[str, Any]
) -> int:
    """Kill ``count`` times within the ``seconds`` of a run.

    Returns:
        The number of kills that came before the end of the run.
    """
    moments, killed = random.Random(seed), 0
    for number in range(count):
        config, moment = settings(folder, f"moment-{number}"), moments.uniform(0, seconds)
        process = start(config, folder / "log")
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        killed += end_of(process)[1]
        resume_and_compare(config, folder / f"log-moment-{number}", expected, f"{moment:.3f} s")
    return killed


def make_forks_fast() -> None:
    """Do here, once, what each process would do again before its first step."""
    for name in LATER:
        import_module(name)
    patterns = import_module("transformers.conversion_mapping")
    patterns.get_checkpoint_conversion_mapping("llama")  # compiles a thousand, and keeps them
    gc.collect()
    gc.freeze()  # what is here is not looked through, and so not copied, in each process


def main(arguments: argparse.Namespace, folder: Path) -> None:
    prepare(folder)
    make_forks_fast()
    points = list_points(settings(folder, "whole"), folder)
    began = time.perf_counter()
    end_of(start(settings(folder, "timed"), folder / "log"))  # without the pauses at each point
    seconds = time.perf_counter() - began
    expected = outcome(folder / "runs" / "whole")
    logged = [line["step"] for line in expected["metrics"] if "train/loss" in line]
    if expected["files"] != KEPT or logged != list(range(1, STEPS + 1)):
        sys.exit(f"the run without a kill has {expected['files']}, and logged steps {logged}")
    if not beside_training(points):
        sys.exit("the run without a kill made no step while it saved")
    count = min(arguments.points or len(points), len(points))
    print(
        f"{len(points)} points in {STEPS} steps; killing at {count} of them, "
        f"and {arguments.random} times at random"
    )
    at_points = sweep_points(points, count, folder, expected)
    at_random = sweep_moments(arguments.random, arguments.seed, seconds, folder, expected)
    kinds = ", ".join(f"{number} at {kind}" for kind, number in sorted(at_points.items()))
    print(f"{at_points.total() + at_random} kills: {kinds}; {at_random} at random moments")
    print(
        "each time a complete checkpoint, and a resumed run equal to the one that was not killed: "
        "0 losses"
    )


if __name__ == "__main__":
    parsed = read_arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        main(parsed, Path(name))
