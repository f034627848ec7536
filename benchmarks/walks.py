"""Traces the two walks in docs/walks.md: the functions that a batch and a problem pass through.

python benchmarks/walks.py

A tiny Llama of one layer takes one optimizer step of one micro-batch, and decodes one problem to
its line in predictions.jsonl. Every function of this repository that is called on the way is
recorded, in order. Lambdas and comprehensions belong to the function that contains them. Autograd's
backward passes are left out, since no code calls them by name. A crossing is counted when a
function is in a different file from the one before it.
"""

import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data
import evaluate
import standin
import train
from engine.device import cpu_kernels
from engine.llama import Llama
from engine.loading import load_model, load_tokenizer
from engine.strategy import Decoder, Greedy
from engine.tokenizer import Tokenizer
from grading.dataset import Problem
from grading.predictions import PredictionsFile
from run.arguments import ArgumentParser
from run.script import run_script

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Question: {question}\nAnswer:"
Step = tuple[str, str]  # file, function


def main() -> None:
    ArgumentParser(__doc__).parse_args()  # only for --help
    print("\n\n".join(map(report, trace().items())))


def trace() -> dict[str, list[Step]]:
    """The two walks, by title."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, problems = prepare(Path(folder))
        return {
            "One micro-batch through one layer": micro_batch_walk(model, tokenizer, problems),
            "One problem to its line": problem_walk(model, tokenizer, problems, Path(folder)),
        }


def report(walk: tuple[str, list[Step]]) -> str:
    """The number of crossings and files in a walk, and the functions called in each file."""
    title, steps = walk
    num_files = len({file for file, _ in steps})
    return (
        f"{title}: {crossings(steps)} crossings between {num_files} files."
        f"\n\n```\n{listing(steps)}\n```"
    )


def prepare(folder: Path) -> tuple[Llama, Tokenizer, list[Problem]]:
    """A model of one layer, which uses PyTorch's own matrix products on every processor."""
    rows = standin.make_problems(400, seed=0)
    standin.make_tokenizer(
        [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows], folder, 512
    )
    standin.make_model(folder, hidden_size=32, intermediate_size=64, layers=1, heads=2)
    kernels = cpu_kernels(with_onednn=False)
    model = load_model(folder, torch.float32, torch.device("cpu"), kernels)
    return model, load_tokenizer(folder), [Problem(**row) for row in rows]


def micro_batch_walk(model: Llama, tokenizer: Tokenizer, problems: list[Problem]) -> list[Step]:
    """From the packing of a batch to its loss."""
    batch = data.encode(tokenizer, problems[:2], PROMPT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with entered() as steps:
        train.train_step(model, optimizer, batch, 0.0, 1024, 1.0)
    first = next(number for number, step in enumerate(steps) if step[1] == "pack")
    forward = [step for step in steps[first:] if not step[1].endswith(".backward")]
    last = max(number for number, step in enumerate(forward) if step[0] == "engine/loss.py")
    return [("train.py", "train_step"), *forward[: last + 1]]


def problem_walk(
    model: Llama, tokenizer: Tokenizer, problems: list[Problem], folder: Path
) -> list[Step]:
    """From reading a problem's prompt, through one decoding step, to its line."""
    problem = problems[0]
    assert problem.gold  # computed and cached, as when rows are loaded
    prompts = data.encode_prompts(tokenizer, [problem], PROMPT)
    decoder = Decoder(model, tokenizer, [problem.question], prompts, 2, frozenset(), 1)
    with PredictionsFile(folder / "predictions", {}, 1) as predictions, entered() as steps:
        evaluate.decode_missing(decoder, [problem], predictions, Greedy())
    first = next(number for number, step in enumerate(steps) if step[1] == "CachedModel.prefill")
    last = max(number for number, step in enumerate(steps) if step[1] == "PredictionsFile.write")
    return [("evaluate.py", "decode_missing"), *steps[first : last + 1]]


@contextmanager
def entered() -> Iterator[list[Step]]:
    """Records the functions of this repository that are called in this context."""
    steps: list[Step] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        name = frame.f_code.co_qualname
        if event == "call" and "<" not in name and is_product(file):
            steps.append((file.relative_to(ROOT).as_posix(), name))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield steps
    finally:
        sys.setprofile(before)


def is_product(file: Path) -> bool:
    places = [ROOT, *(ROOT / room for room in ("engine", "engine/cpu", "grading", "run"))]
    return file.parent in places


def crossings(steps: list[Step]) -> int:
    return len(list(groupby(steps, key=lambda step: step[0]))) - 1


def listing(steps: list[Step]) -> str:
    """One line for each visit to a file, with the functions called there, each once."""
    lines = []
    for file, stay in groupby(steps, key=lambda step: step[0]):
        names = ", ".join(dict.fromkeys(name for _, name in stay))
        lines += textwrap.wrap(f"{file}: {names}", width=98, subsequent_indent=" " * 4)
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
