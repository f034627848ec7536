"""The complete job in miniature: make a stand-in model and data set, then train and evaluate.

python demo.py

The stand-in is a Llama with about 0.9 M random parameters, a SentencePiece tokenizer trained for
it, and generated one- and two-step word problems in GSM8K's format. Training and evaluation use the
same train.py and evaluate.py as Llama-2-7B, with the settings in demo.yaml. All output goes to the
folder demo, which the next demo replaces.
"""

import json
import os
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
# A GPU would gain nothing with a model this small, and may need another driver.
ON_THE_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    ArgumentParser(__doc__).parse_args()  # only for --help
    prepare_folder(FOLDER)
    make_stand_in(FOLDER)
    print(
        f"demo: {NUM_TRAIN} + {NUM_TEST} problems and a model with random weights are in "
        f"{FOLDER.name}/"
    )
    run("train.py", "--config", "demo.yaml")
    run("evaluate.py", "--ckpt", "demo/run/best")
    report(FOLDER / "run")


def prepare_folder(folder: Path) -> None:
    """Make ``folder``, replacing an earlier demo's, but refuse to replace any other folder."""
    if folder.exists():
        if not (folder / MARKER).is_file():
            raise UserError(f"{folder}: was not made by demo.py, so it is kept: move it away")
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
    """Run a script. A signal is passed on to it, and the demo ends after the script has ended."""
    print(f"\n$ {command_line(*command)}", flush=True)
    with StopSignal() as stop:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ON_THE_CPU)
        stop.tell(process.send_signal)
        code = process.wait()
    if code < 0:
        print(f"error: {command[0]} was killed by {signal.Signals(-code).name}", file=sys.stderr)
        code = 128 - code
    if stop.signal_number is not None:
        code = 128 + stop.signal_number
    if code:
        sys.exit(code)


def report(run_folder: Path, root: Path = ROOT) -> None:
    """Print the score, and the location of every output, relative to ``root``."""
    scores = json.loads((run_folder / "eval" / "test" / "scores.json").read_text(encoding="utf-8"))
    shown = run_folder.relative_to(root)
    print(
        f"\nexact match {scores['exact_match']:.1%} on {scores['num_problems']} problems the model "
        "never saw"
    )
    for path, what in (
        ("best", "the best checkpoint, a Hugging Face folder"),
        ("last", "the last one, with everything that resuming needs"),
        ("report.html", "all of it to look at, in a browser"),
        ("metrics.jsonl", "every logged number"),
        ("config.yaml", "the settings as resolved"),
        ("eval/test/predictions.jsonl", "what the model wrote for each problem"),
        ("eval/test/scores.json", "the scores"),
        ("wandb", "the W&B run: 'wandb sync' uploads it"),
    ):
        print(f"  {shown / path!s:<38} {what}")


if __name__ == "__main__":
    run_script(main)
