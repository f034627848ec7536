"""The whole job in miniature: makes a stand-in for model and data set, trains, evaluates.

python demo.py

The stand-in is a Llama of about 0.9 M random parameters with a SentencePiece tokenizer trained
on the spot, and generated one- and two-step word problems in GSM8K's format. What runs on them
is the very train.py and evaluate.py that run on Llama-2-7B, with the settings of demo.yaml.
Everything is made anew in the folder demo, which the next demo replaces.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import ArgumentParser
from errors import UserError, run_script

ROOT = Path(__file__).parent
FOLDER = ROOT / "demo"
MARKER = ".made-by-demo"
NUM_TRAIN, NUM_TEST = 8000, 200

NAMES = {
    "she": ("Ann", "Mia", "Sara", "Lily", "Emma", "Nora", "Ruth", "Zoe"),
    "he": ("Tom", "Ben", "Sam", "Leo", "Max", "Paul", "Carl", "Jack"),
}
THINGS = ("apples", "books", "coins", "stamps", "pens", "cards", "shells", "eggs", "cups", "toys", "balls", "nuts")
BOXES = ("boxes", "bags", "jars", "crates")


def main() -> None:
    prepare_folder(FOLDER)
    problems = make_problems(NUM_TRAIN + NUM_TEST, seed=0)
    write_jsonl(problems[:NUM_TRAIN], FOLDER / "data" / "train.jsonl")
    write_jsonl(problems[NUM_TRAIN:], FOLDER / "data" / "test.jsonl")
    texts = [f"Question: {problem['question']}\nAnswer: {problem['answer']}" for problem in problems[:NUM_TRAIN]]
    make_tokenizer(texts, FOLDER / "model", vocab_size=512)
    make_model(FOLDER / "model", hidden_size=128, intermediate_size=352, layers=4, heads=4)
    print(f"demo: {NUM_TRAIN} + {NUM_TEST} problems and a model with random weights are in {FOLDER.name}/")
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


def run(*command: str) -> None:
    print(f"\n$ python {' '.join(command)}", flush=True)
    result = subprocess.run([sys.executable, *command], cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)


def report(run_folder: Path) -> None:
    scores = json.loads((run_folder / "eval" / "test" / "scores.json").read_text())
    shown = run_folder.relative_to(ROOT)
    print(f"\nexact match {scores['exact_match']:.1%} on {scores['num_problems']} problems the model never saw")
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


# ---------------------------------------------------------------- the data set


def make_problems(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` different one- and two-step word problems, in GSM8K's format."""
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < count:
        question, answer = rng.choice(TEMPLATES)(rng)
        problems.setdefault(question, answer)
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def _people(rng: random.Random) -> tuple[str, str, str]:
    pronoun = rng.choice(tuple(NAMES))
    return rng.choice(NAMES[pronoun]), pronoun.capitalize(), rng.choice(THINGS)


def _step(left: int, sign: str, right: int) -> tuple[int, str]:
    """One annotated calculation as GSM8K writes it: ``3 + 4 = <<3+4=7>>7``."""
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return result, f"{left} {sign} {right} = <<{left}{sign}{right}={result}>>{result}"


def _buys(rng: random.Random) -> tuple[str, str]:
    name, pronoun, things = _people(rng)
    first, second = rng.randint(2, 20), rng.randint(2, 20)
    total, step = _step(first, "+", second)
    return (
        f"{name} has {first} {things}. {pronoun} buys {second} more. How many {things} does {name} have now?",
        f"{name} has {step} {things} now.\n#### {total}",
    )


def _gives(rng: random.Random) -> tuple[str, str]:
    name, pronoun, things = _people(rng)
    first = rng.randint(5, 30)
    left, step = _step(first, "-", rng.randint(1, first - 1))
    second = first - left
    return (
        f"{name} has {first} {things}. {pronoun} gives {second} of them away. How many {things} are left?",
        f"{name} has {step} {things} left.\n#### {left}",
    )


def _fills(rng: random.Random) -> tuple[str, str]:
    name, _, things = _people(rng)
    box, count, each = rng.choice(BOXES), rng.randint(2, 9), rng.randint(2, 9)
    total, step = _step(count, "*", each)
    return (
        f"{name} fills {count} {box} with {each} {things} each. How many {things} are there?",
        f"There are {step} {things}.\n#### {total}",
    )


def _fills_and_adds(rng: random.Random) -> tuple[str, str]:
    name, pronoun, things = _people(rng)
    box, count, each, more = rng.choice(BOXES), rng.randint(2, 5), rng.randint(2, 9), rng.randint(2, 20)
    product, first = _step(count, "*", each)
    total, second = _step(product, "+", more)
    return (
        f"{name} has {count} {box} of {each} {things} each. {pronoun} finds {more} more {things}. "
        f"How many {things} does {name} have?",
        f"In the {box} there are {first} {things}.\n{name} has {second} {things}.\n#### {total}",
    )


def _buys_and_gives(rng: random.Random) -> tuple[str, str]:
    name, pronoun, things = _people(rng)
    start, more = rng.randint(2, 20), rng.randint(2, 20)
    total, first = _step(start, "+", more)
    left, second = _step(total, "-", rng.randint(1, total - 1))
    return (
        f"{name} has {start} {things}. {pronoun} buys {more} more and gives {total - left} away. "
        f"How many {things} does {name} have left?",
        f"First {name} has {first} {things}.\nThen {name} has {second} {things} left.\n#### {left}",
    )


TEMPLATES = (_buys, _gives, _fills, _fills_and_adds, _buys_and_gives)


def write_jsonl(rows: Iterable[dict[str, Any]], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- the model


def make_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Train a SentencePiece BPE as Llama-2's was (digits apart, bytes as fallback) and write it for Transformers."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_model(folder: Path, *, hidden_size: int, intermediate_size: int, layers: int, heads: int) -> None:
    """Write a Llama with random weights for the tokenizer in ``folder``."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    run_script(lambda: (ArgumentParser(__doc__).parse_args(), main()))
