"""Trains with random settings and models, and checks what must hold for all of them.

python benchmarks/any_settings.py --seeds 60
python benchmarks/any_settings.py --first 17 --seeds 1      # one of them again

For each seed a tiny Llama (heads, keys and values, biases, tied embeddings, position scaling, dtype
and number of files), the settings of a run and its deaths are drawn. Then

- the run is killed or asked to stop, once or twice, each time just before a random step; resumed,
  it equals one that nothing stopped, in weights, optimizer state and logged numbers, bit for bit;
- best has the loss that was logged when it was saved;
- greedy completions, those with the calculator and samples do not depend on how many are decoded at
  a time (in float32);
- neither do loss and gradient of the first step depend on the size of micro-batches (without
  dropout);
- a merged adapter has the same loss.

So settings are found that work alone and fail together: no list of tests has all combinations.
Each process is forked, as in kill_sweep.py.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

# This benchmark's neighbour, which also puts the repository on the path.
from kill_sweep import (
    end_of,
    forked,
    make_forks_fast,
    outcome,
    prepare,
    resume_and_compare,
    start,
)

# isort: split

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import evaluate
import merge
import perplexity
from engine.ranks import ALONE
from run.config import CONFIG_FILE, Config, load_config
from run.manifest import BEST, METRICS_FILE
from run.model_source import resolve_source
from run.training_json import read_description

# Of a loss, relative: how far it may be from the same loss that is computed in another way.
MOST_APART = {"float32": 1e-6, "bfloat16": 2e-3}
MICRO_BATCHES = 256, 2000  # tokens
SCALINGS = (
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 64, "rope_theta": 5e5},
    },
)


@dataclass(frozen=True)
class Drawn:
    """What a seed stands for.

    Attributes:
        shape: keywords of a LlamaConfig.
        is_half: whether the base model is saved in bfloat16.
        file_size: the most that a file of its weights may have, as Transformers takes it.
        settings: of the run.
        deaths: each a signal, and the step before which it comes, as a share of all steps.
        slots: with how many completions at a time it is decoded, beside one.
    """

    shape: dict[str, Any]
    is_half: bool
    file_size: str
    settings: dict[str, str]
    deaths: list[tuple[signal.Signals, float]]
    slots: str


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="how many runs are drawn")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- what is drawn


def draw(seed: int) -> Drawn:
    chance = random.Random(seed)
    pick, happens = chance.choice, lambda share: chance.random() < share
    method = pick(["full", "full", "full", "lora", "lora", "qlora"])
    sizes = [64, 128] if method == "qlora" else [32, 64, 128]  # 4 bits need blocks of 64
    hidden, heads = pick(sizes), pick([2, 4, 8])
    shape = {
        "hidden_size": hidden,
        "intermediate_size": pick(sizes),
        "num_hidden_layers": pick([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": pick([count for count in (1, 2, 4, 8) if heads % count == 0]),
        "tie_word_embeddings": happens(0.4),
        "attention_bias": happens(0.2),
        "mlp_bias": happens(0.2),
    }
    if happens(0.3) and method != "qlora":
        shape["head_dim"] = pick([8, 16, 32])
    if happens(0.4):
        shape["rope_parameters"] = pick(SCALINGS)
    head = shape.get("head_dim", hidden // heads)
    settings = _settings(pick, happens, method, hidden)
    if head * shape["num_key_value_heads"] % 16:
        settings["fp8"] = "false"  # which it must be
    return Drawn(
        shape=shape,
        is_half=happens(0.4),
        file_size=pick(["5GB", "5GB", "60KB"]),
        settings=settings,
        deaths=[
            (pick([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), chance.random())
            for _ in range(pick([1, 2]))
        ],
        slots=pick(["2", "3", "null"]),
    )


def _settings(
    pick: Callable[[list[str]], str], happens: Callable[[float], bool], method: str, hidden: int
) -> dict[str, str]:
    dtype = pick(["float32", "float32", "bfloat16"])
    drawn = {
        "validation_size": pick(["1", "2", "5"]),
        "epochs": pick(["1", "2", "3"]),
        "batch_size": pick(["1", "3", "3", "8", "64"]),
        "max_length": "256",
        "micro_batch_tokens": pick(["256", "300", "2000", "null"]),
        "learning_rate": pick(["3e-3", "1e-2"]),
        "lr_schedule": pick(["cosine", "linear", "constant"]),
        "warmup_ratio": pick(["0.0", "0.03", "0.5"]),
        "min_lr_ratio": pick(["0.0", "0.1"]),
        "weight_decay": pick(["0.0", "0.1"]),
        "max_grad_norm": pick(["1.0", "0.1", "null"]),
        "dtype": dtype,
        "method": method,
        # In 8 bits are only weights that are large enough.
        "optimizer": pick(["adamw", "adamw", "adamw_8bit"] if hidden >= 64 else ["adamw"]),
        "gradient_checkpointing": pick(["true", "false", "null"]),
        "log_every": pick(["1", "3", "100"]),
        "checkpoint_steps": pick(["1", "1", "2", "5", "null"]),
        "best_by": pick(["val_loss", "val_loss", "val_exact_match"]),
        "prompt": pick(["Question: {question}\nAnswer:", "{question}\n", "Q: {question} A:"]),
        "seed": pick(["0", "1", "12345"]),
        "max_new_tokens": pick(["1", "8", "20"]),
    }
    if dtype == "bfloat16" and method != "qlora" and happens(0.3):
        drawn["fp8"] = "true"
    if happens(0.3):
        drawn["mask_rate"], drawn["mask_token"] = pick(["0.1", "0.4"]), pick(["random", "<unk>"])
        drawn["mask_warmup_ratio"] = pick(["0.0", "0.5"])
    if method != "full":
        drawn["lora_rank"], drawn["lora_alpha"] = pick(["1", "4", "8"]), pick(["8", "16"])
        drawn["lora_dropout"] = pick(["0.0", "0.0", "0.2"])
        drawn["lora_rslora"] = pick(["true", "false"])
    return drawn


# ---------------------------------------------------------------- what each process does


def make_llama(folder: Path, tokenizer: Path, drawn: Drawn) -> None:
    """Save a Llama with random weights."""
    disable_progress_bar()
    folder.mkdir()
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    others = {"max_position_embeddings": 1024, "initializer_range": 0.1}
    config = LlamaConfig(
        vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **others, **drawn.shape
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if drawn.is_half else torch.float32)
    model.save_pretrained(folder, max_shard_size=drawn.file_size)


def measure(checkpoint: Path, file: Path) -> None:
    """Write the validation loss of ``checkpoint``, as perplexity.py measures it."""
    arguments, typed = perplexity.read_arguments(["--ckpt", str(checkpoint)])
    source = resolve_source(arguments.ckpt, arguments.config, typed)
    _, measured = perplexity.measure_source(source, "validation", None, ALONE)
    file.write_text(repr(measured.loss))


def decode(checkpoint: Path, slots: str, output: Path) -> None:
    words = "--ckpt", str(checkpoint), "--decode_slots", slots, "--output", str(output)
    evaluate.main(*evaluate.read_arguments([*words, "--samples", "3", "--calculator", "true"]))


def merge_into(checkpoint: Path, output: Path) -> None:
    merge.main(*merge.read_arguments(["--ckpt", str(checkpoint), "--output", str(output)]))


def dies(number: int, how: signal.Signals) -> Callable[[str], None]:
    """Sends itself a signal just before step ``number``, from 1, of those that it makes."""
    steps = count(1)

    def on_point(point: str) -> None:
        if point == "step begins" and next(steps) == number:
            os.kill(os.getpid(), how)

    return on_point


# ---------------------------------------------------------------- what must hold


class Different(Exception):
    """Something that must be equal is not."""


@dataclass(frozen=True)
class Place:
    """Where the runs of a seed are.

    Attributes:
        config: of the run that nothing stops.
    """

    folder: Path
    config: Config

    @property
    def run(self) -> Path:
        return Path(self.config.output_dir) / self.config.run_name

    def do(self, story: Callable[..., None], *arguments: Any) -> None:
        self.must_succeed(forked(self.folder / "log", partial(story, *arguments)))

    def must_succeed(self, process: int) -> None:
        code, _ = end_of(process)
        if code:
            raise Different(f"a process ended with {code}: {self.said()}")

    def said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def train(self, name: str, **changes: Any) -> list[dict[str, Any]]:
        """Train a run to its end; returns its metrics."""
        config = replace(self.config, run_name=name, **changes)
        self.must_succeed(start(config, self.folder / "log"))
        return metrics_of(self.run.parent / name)

    def loss_of(self, checkpoint: Path) -> float:
        file = self.folder / "loss"
        self.do(measure, checkpoint, file)
        return float(file.read_text())

    def check_close(self, found: float, expected: float, what: str) -> None:
        if not abs(found - expected) <= MOST_APART[self.config.dtype] * abs(expected):
            raise Different(f"{what}: {found!r}, not {expected!r}")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]


def check_deaths(place: Place, drawn: Drawn, steps: int) -> None:
    config, log = replace(place.config, run_name="resumed"), place.folder / "log"
    for how, share in drawn.deaths:
        code, _ = end_of(start(config, log, dies(1 + int(share * steps), how)))
        if code == 0:  # it had fewer steps left
            break
        if code not in (-how, 128 + how):
            raise Different(f"after {how.name} it ended with {code}: {place.said()}")
    what = ", ".join(f"{how.name} at {share:.2f} of its steps" for how, share in drawn.deaths)
    resume_and_compare(config, place.folder / "log-resumed", outcome(place.run), what)


def check_best(place: Place, metrics: Sequence[dict[str, Any]]) -> None:
    best = place.run / BEST
    step = read_description(best)["step"]
    logged = next(
        line["val/loss"] for line in metrics if line["step"] == step and "val/loss" in line
    )
    place.check_close(place.loss_of(best), logged, "the loss of best")


def check_decoding(place: Place, slots: str) -> None:
    found = []
    for name in ("1", slots):
        output = place.folder / f"decoded-{name}"
        place.do(decode, place.run / BEST, name, output)
        files = sorted(output.rglob("predictions.jsonl"))
        found.append([sorted(file.read_text().splitlines()) for file in files])
    if len(found[0]) != 3 or (place.config.dtype == "float32" and found[0] != found[1]):
        raise Different(f"completions in 1 and in {slots} slots differ")


def check_merged(place: Place) -> None:
    merged = place.folder / "merged"
    place.do(merge_into, place.run / BEST, merged)
    place.check_close(place.loss_of(merged), place.loss_of(place.run / BEST), "the merged loss")


def check_micro_batches(place: Place) -> None:
    changes = {"batch_size": 8, "log_every": 1, "epochs": 1, "checkpoint_steps": None}
    one, other = (
        place.train(f"in-{tokens}", micro_batch_tokens=tokens, **changes)[0]
        for tokens in MICRO_BATCHES
    )
    for name in ("train/loss", "train/grad_norm"):
        place.check_close(one[name], other[name], f"{name} in other micro-batches")


def check(folder: Path, data: Path, drawn: Drawn) -> None:
    """Raises Different if something does not hold for what was ``drawn``."""
    values = {"model": str(folder / "model"), "dataset": str(data), "wandb_mode": "disabled"}
    values |= {"output_dir": str(folder / "runs"), "run_name": "whole"}
    place = Place(folder, load_config(CONFIG_FILE, drawn.settings | values))
    place.do(make_llama, folder / "model", data / "model", drawn)
    metrics = place.train("whole")
    check_deaths(place, drawn, metrics[-1]["step"])
    check_best(place, metrics)
    check_decoding(place, drawn.slots)
    if place.config.method != "full":
        check_merged(place)
    if place.config.method == "full" or place.config.lora_dropout == 0:
        check_micro_batches(place)


def main(arguments: argparse.Namespace, folder: Path) -> int:
    """Returns how many seeds failed."""
    prepare(folder)
    make_forks_fast()
    failed = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        drawn, place = draw(seed), folder / str(seed)
        place.mkdir()
        shown = ", ".join(f"{key} {value}" for key, value in drawn.settings.items())
        print(f"{seed}: {shown!r}; {drawn.shape}", flush=True)
        try:
            check(place, folder, drawn)
        except (Different, SystemExit) as fault:
            failed += 1
            print(f"{seed} FAILED: {fault}", flush=True)
    print(f"{arguments.seeds} runs drawn, {failed} failed")
    return failed


if __name__ == "__main__":
    parsed = read_arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        sys.exit(main(parsed, Path(name)) > 0)
