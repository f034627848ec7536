"""Do masked thought, rejection sampling and both together score more than plain fine-tuning?

python benchmarks/accuracy.py
python benchmarks/accuracy.py --seeds 0 --output accuracy-of-seed-0
python benchmarks/accuracy.py --model real/model --dataset real/data --rows 2000 --k 8 \\
  --seeds 0 --epochs 3 --masked_epochs 10 --config real/settings.yaml --output real/accuracy

For each seed, these are trained from the same model, and scored on the same test problems:

- plain: fine-tuning on the rows as they are.
- mft: masked thought (arXiv:2403.02178), with more epochs, as it is published.
- rft-K: rejection sampling (arXiv:2308.01825). The plain model samples each row K times, and the
  new solutions that are right are added to the rows. As many epochs as plain.
- mft-rft-K: masked thought on these rows.
- plain-long: plain with at least as many optimizer steps as mft and rft-K, whichever has more.
  What is not better than this may owe its gain to the longer training.

Without --model and --dataset, the rows are generated problems of two to six steps, each with one of
several valid solutions, and the model is the small Llama of demo.py, first trained on the demo's
problems of one and two steps. `before` is the model that all start from.

Everything is done by train.py, evaluate.py and augment.py, whose commands are printed. What is
finished is not done again, so the same command goes on after a stop. Exact match is that of greedy
decoding, and p is McNemar's exact test against plain with the same seed. All that was made, and the
seconds of each command, stay in --output.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy_results import (
    BEFORE,
    LONG,
    PLAIN,
    RESULTS,
    SECONDS_FILE,
    TRAIN_SAMPLES,
    Method,
    data_of,
    is_scored,
    name_of,
    num_samples,
    report,
    steps_of,
)
from multi_step import make_problems

import demo
import standin
from grading.dataset import load_problems
from grading.results import PREDICTIONS_FILE
from run.arguments import ArgumentParser, not_negative_int, positive_float, positive_int
from run.config import CONFIG_FILE, load_config
from run.errors import Stopped, UserError
from run.files import replace_file
from run.manifest import BEST, FINISHED_FILE
from run.script import run_script
from run.shell import command_line
from run.signals import StopSignal

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = Path(__file__).with_suffix(".yaml")
ROWS, TEST_ROWS = 1300, 1000  # of the generated problems
DEMO_CONFIG = ROOT / "demo.yaml"
ARGUMENTS_FILE = "arguments.json"
FREE = ("seeds", "output")  # what may change from one call to the next with the same --output


def methods(arguments: argparse.Namespace) -> list[Method]:
    """The methods in the order in which they can be trained."""
    epochs, masked, rate = arguments.epochs, arguments.masked_epochs, arguments.mask_rate
    return [
        Method(PLAIN, epochs),
        Method("mft", masked, mask_rate=rate),
        *(Method(f"rft-{k}", epochs, k) for k in arguments.k),
        Method(f"mft-rft-{arguments.k[-1]}", masked, arguments.k[-1], rate),
        Method(LONG, None),
    ]


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a pretrained Llama (a small one that is made here)")
    add("--dataset", metavar="DIR", help="train and test rows (problems that are made here)")
    add("--config", type=Path, metavar="FILE", help="settings that differ from config.yaml")
    add("--rows", type=positive_int, metavar="N", help="only the first N train rows (1300 or all)")
    add("--test_rows", type=positive_int, metavar="N", help="only the first N test rows (all)")
    add("--k", type=positive_int, nargs="+", default=[4, 16], help="samples a row (4 16)")
    add("--temperature", type=positive_float, default=0.7, metavar="T", help="of samples (0.7)")
    add("--seeds", type=not_negative_int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--epochs", type=positive_int, default=8, metavar="N", help="of plain and rft (8)")
    add("--masked_epochs", type=positive_int, default=12, metavar="N", help="of mft (12)")
    add("--mask_rate", type=positive_float, default=0.4, metavar="SHARE", help="of mft (0.4)")
    add("--votes", type=positive_int, default=4, metavar="K", help="for maj@K and pass@K (4)")
    add("--output", type=Path, default=Path("accuracy"), metavar="DIR", help="(accuracy)")
    arguments = parser.parse_args(argv)
    if (arguments.model is None) != (arguments.dataset is None):
        raise UserError("command line: --model and --dataset go together: add the other one")
    if arguments.model is None and arguments.config is None:
        arguments.config = SETTINGS
    arguments.k = sorted(set(arguments.k))
    return arguments


def main(argv: list[str]) -> None:
    arguments = read_arguments(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    check_arguments(arguments)
    ladder = methods(arguments)
    work = Work(arguments)
    work.prepare()
    for seed in arguments.seeds:
        for method in ladder:
            work.climb(method, seed)
        print("\n" + report(arguments.output, ladder, arguments.seeds), flush=True)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError if --output has results of other arguments; else record them there."""
    content = {key: value for key, value in vars(arguments).items() if key not in FREE}
    content["config"] = arguments.config and arguments.config.read_text(encoding="utf-8")
    file = arguments.output / ARGUMENTS_FILE
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else content
    changed = [f"--{key}" for key in content if before.get(key) != content[key]]
    if changed:
        raise UserError(
            f"{arguments.output}: was made with another {', '.join(changed)}: name another "
            "--output, or give the same"
        )
    replace_file(file, json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------- model, data, training, samples


class Work:
    """The commands that train and score. Those whose results are there already are left out."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.output = arguments, arguments.output
        self.data, self.base = self.output / "data", self.output / "base"
        self.model = Path(arguments.model) if arguments.model else self.base / BEST
        # A GPU would gain nothing with the small model, and may need another driver.
        hidden = {} if arguments.model else {"CUDA_VISIBLE_DEVICES": ""}
        self.environment = os.environ | hidden

    def prepare(self) -> None:
        """Make the rows and the model that all start from, unless they are given, and score it."""
        if not self.data.exists():
            make_data(self.data, self.arguments)
        if self.arguments.model is None:
            start = self.output / "start"
            if not (start / "model" / "model.safetensors").exists():
                start.mkdir(exist_ok=True)
                demo.make_stand_in(start)
            self.train(self.base, start / "model", start / "data", DEMO_CONFIG)
        results = self.output / BEFORE
        # Of the demo's model it would be that of the demo, whose answers are shorter.
        longest = load_config(self.arguments.config or CONFIG_FILE, {}).max_new_tokens
        flags = ("--dataset", str(self.data), "--max_new_tokens", str(longest))
        flags += ("--output", str(results), *from_config(self.arguments.config))
        self.score(self.model, results, *flags)

    def climb(self, method: Method, seed: int) -> None:
        """Make the rows of ``method``, train on them, and score the model."""
        folder = self.output / f"seed-{seed}"
        if method.k:
            self.augment(folder, method.k)
        flags = ("--seed", str(seed), "--epochs", str(self.epochs(method, folder)))
        if method.mask_rate:
            flags += ("--mask_rate", str(method.mask_rate))
        run_folder = folder / method.name
        data = data_of(self.output, method, seed)
        self.train(run_folder, self.model, data, self.arguments.config, *flags)
        self.score(run_folder / BEST, run_folder / RESULTS)

    def epochs(self, method: Method, folder: Path) -> int:
        if method.epochs is not None:
            return method.epochs
        others = [f"rft-{self.arguments.k[-1]}", "mft"]
        longest = max(steps_of(folder / name) for name in others)
        return math.ceil(longest * self.arguments.epochs / steps_of(folder / PLAIN))

    def train(
        self, run_folder: Path, model: Path, data: Path, config: Path | None, *flags: str
    ) -> None:
        if (run_folder / FINISHED_FILE).exists():
            return
        place = ("--output_dir", str(run_folder.parent), "--run_name", run_folder.name)
        # Without its state, a finished run takes little space, and has a file that says so.
        ending = ("--keep_state", "false", "--wandb_mode", "disabled")
        source = (*from_config(config), "--model", str(model), "--dataset", str(data))
        self.run(run_folder, "train.py", *source, *place, *flags, *ending)

    def score(self, checkpoint: Path, results: Path, *flags: str) -> None:
        if is_scored(results):
            return
        asked = self.sampling(self.arguments.votes)
        if self.arguments.test_rows:
            asked += ("--limit", str(self.arguments.test_rows))
        self.run(results, "evaluate.py", "--ckpt", str(checkpoint), *asked, *flags)

    def augment(self, folder: Path, k: int) -> None:
        """Sample the train rows with the plain model, and add what is right and new to them.

        The first samples of a larger ``k`` are those of a smaller one.
        """
        samples, data = folder / PLAIN / TRAIN_SAMPLES, folder / f"data-{k}"
        if data.exists():
            return
        if num_samples(samples) < k:
            source = ("--ckpt", str(folder / PLAIN / BEST), "--split", "train")
            self.run(samples, "evaluate.py", *source, *self.sampling(k))
        file = str(samples / PREDICTIONS_FILE)
        self.run(data, "augment.py", "--samples", file, "--output", str(data))

    def sampling(self, count: int) -> tuple[str, ...]:
        return ("--samples", str(count), "--temperature", str(self.arguments.temperature))

    def run(self, result: Path, script: str, *flags: str) -> None:
        """Run a script, and add its time to the seconds of ``result``.

        A signal is passed on to it, and this script ends after it has ended.
        """
        command = (os.path.relpath(ROOT / script), *flags)
        print(f"\n$ {command_line(*command)}", flush=True)
        started = time.time()
        with StopSignal() as stop:
            process = subprocess.Popen([sys.executable, *command], env=self.environment)
            stop.tell(process.send_signal)
            code = process.wait()
        line = {"result": name_of(result, self.output), "seconds": time.time() - started}
        with (self.output / SECONDS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if stop.signal_number is not None:
            raise Stopped(stop.signal_number, "what was finished is kept: type the same command")
        if code:
            raise UserError(f"{script}: ended with {code}, see above; then type the same command")


def from_config(file: Path | None) -> tuple[str, ...]:
    return ("--config", str(file)) if file else ()


def make_data(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the train and test rows that all methods use."""
    if arguments.dataset:
        train, test = (load_problems(arguments.dataset, split) for split in ("train", "test"))
        splits = [
            [{"question": row.question, "answer": row.answer} for row in problems]
            for problems in (train[: arguments.rows], test)
        ]
    else:
        num_train = arguments.rows or ROWS
        problems = make_problems(num_train + TEST_ROWS, seed=0)
        splits = [problems[:num_train], problems[num_train:]]
    staged = folder.with_name("data.partial")
    write_data(staged, *splits)
    staged.rename(folder)


def write_data(folder: Path, train: list[dict[str, str]], test: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    standin.write_jsonl(train, folder / "train.jsonl")
    standin.write_jsonl(test, folder / "test.jsonl")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
