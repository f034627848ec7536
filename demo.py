"""The whole job in miniature: makes a stand-in for model and data set, trains, evaluates.

python demo.py

The stand-in is a Llama of about 0.9 M random parameters with a SentencePiece tokenizer trained
on the spot, and generated one- and two-step word problems in GSM8K's format. What runs on them
is the very train.py and evaluate.py that run on Llama-2-7B, with the settings of demo.yaml.
Everything is made anew in the folder demo, which the next demo replaces.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from run.errors import UserError
from run.script import check_platform, run_script
from run.signals import StopSignal

check_platform()  # before the imports that would fail

from run.arguments import ArgumentParser
from run.shell import command_line
from standin import make_model, make_problems, make_tokenizer, write_jsonl

ROOT = Path(__file__).parent
FOLDER = ROOT / "demo"
MARKER = ".made-by-demo"
NUM_TRAIN, NUM_TEST = 8000, 200


def main() -> None:
    prepare_folder(FOLDER)
    make_stand_in(FOLDER)
    print(
        f"demo: {NUM_TRAIN} + {NUM_TEST} problems and a model with random weights are in {FOLDER.name}/"
    )
    run("train.py", "--config", "demo.yaml")
    run("evaluate.py", "--ckpt", "demo/run/best")
    report(FOLDER / "run")


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` anew; refuses one that no demo made."""
    if folder.exists():
        if not (folder / MARKER).is_file():
            raise UserError(f"{folder}: was not made by demo.py and is not replaced: move it away")
        shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True)
    (folder / MARKER).touch()


def make_stand_in(folder: Path) -> None:
    """Write the data set into ``folder/data``, and model and tokenizer into ``folder/model``."""
    problems = make_problems(NUM_TRAIN + NUM_TEST, seed=0)
    (folder / "data").mkdir(exist_ok=True)
    write_jsonl(problems[:NUM_TRAIN], folder / "data" / "train.jsonl")
    write_jsonl(problems[NUM_TRAIN:], folder / "data" / "test.jsonl")
    texts = [
        f"Question: {problem['question']}\nAnswer: {problem['answer']}"
        for problem in problems[:NUM_TRAIN]
    ]
    make_tokenizer(texts, folder / "model", vocab_size=512)
    make_model(folder / "model", hidden_size=128, intermediate_size=352, layers=4, heads=4)


def run(*command: str) -> None:
    """Run a script; a signal is passed on to it, and ends the demo only when the script has saved and ended."""
    print(f"\n$ {command_line(*command)}", flush=True)
    with StopSignal() as stop:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        stop.tell(process.send_signal)
        code = process.wait()
    if code < 0:
        print(f"error: {command[0]} was killed by {signal.Signals(-code).name}", file=sys.stderr)
        code = 128 - code
    if stop.signal_number is not None:
        code = 128 + stop.signal_number
    if code:
        sys.exit(code)


def report(run_folder: Path) -> None:
    scores = json.loads((run_folder / "eval" / "test" / "scores.json").read_text(encoding="utf-8"))
    shown = run_folder.relative_to(ROOT)
    print(
        f"\nexact match {scores['exact_match']:.1%} on {scores['num_problems']} problems the model never saw"
    )
    for path, what in (
        ("best", "the best checkpoint, a Hugging Face folder"),
        ("last", "the last one, with all that resuming needs"),
        ("metrics.jsonl", "every logged number"),
        ("config.yaml", "the settings as resolved"),
        ("eval/test/predictions.jsonl", "what the model wrote for each problem"),
        ("eval/test/scores.json", "the scores"),
        ("wandb", "the W&B run: 'wandb sync' uploads it"),
    ):
        print(f"  {shown / path!s:<38} {what}")


if __name__ == "__main__":
    run_script(lambda: (ArgumentParser(__doc__).parse_args(), main()))
