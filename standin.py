"""A small data set, tokenizer and model for the demo, the tests and the benchmarks.

The problems have GSM8K's format. The model is a real Llama in Hugging Face format, small and with
random weights.
"""

import io
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import engine  # noqa: F401  (before Transformers, which it keeps quiet)

NAMES = {
    "she": ("Ann", "Mia", "Sara", "Lily", "Emma", "Nora", "Ruth", "Zoe"),
    "he": ("Tom", "Ben", "Sam", "Leo", "Max", "Paul", "Carl", "Jack"),
}
THINGS = (
    "apples",
    "books",
    "coins",
    "stamps",
    "pens",
    "cards",
    "shells",
    "eggs",
    "cups",
    "toys",
    "balls",
    "nuts",
)
BOXES = ("boxes", "bags", "jars", "crates")


# ---------------------------------------------------------------- the data set


def make_problems(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` distinct one- and two-step word problems, in GSM8K's format.

    As with many authors, some answers say ``3 + 4`` where others say ``4 + 3``, so that samples of
    a model that learns from them can differ from the written answer.
    """
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < count:
        question, answer = rng.choice(TEMPLATES)(rng)
        problems.setdefault(question, swap_operands(answer, random.Random(question)))
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def swap_operands(answer: str, rng: random.Random) -> str:
    """``answer`` with about half of its sums and products in the other order."""
    orders = (r"\g<0>", r"\3 \2 \1 = <<\3\2\1=")
    return re.sub(
        r"(\d+) ([+*]) (\d+) = <<\1\2\3=", lambda step: step.expand(rng.choice(orders)), answer
    )


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
        f"{name} has {first} {things}. {pronoun} buys {second} more. "
        f"How many {things} does {name} have now?",
        f"{name} has {step} {things} now.\n#### {total}",
    )


def _gives(rng: random.Random) -> tuple[str, str]:
    name, pronoun, things = _people(rng)
    first = rng.randint(5, 30)
    left, step = _step(first, "-", rng.randint(1, first - 1))
    second = first - left
    return (
        f"{name} has {first} {things}. {pronoun} gives {second} of them away. "
        f"How many {things} are left?",
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
    box, count, each, more = (
        rng.choice(BOXES),
        rng.randint(2, 5),
        rng.randint(2, 9),
        rng.randint(2, 20),
    )
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
    """Train a SentencePiece BPE model like Llama-2's, and save it for Transformers.

    Like Llama-2's, it splits numbers into digits, and falls back to bytes.
    """
    import sentencepiece

    model = io.BytesIO()  # not a file, whose path would become part of the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_writer=model,
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
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


def make_model(
    folder: Path,
    *,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    vocab_size: int | None = None,
) -> None:
    """Save a Llama with random weights into ``folder``, for the tokenizer that is there.

    Args:
        vocab_size: rows of the embedding; None for the number of tokens in the tokenizer.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from engine.tokenizer import Tokenizer
    from engine.tokenizer_files import read_files

    disable_progress_bar()
    tokenizer = Tokenizer(read_files(folder), str(folder))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size or len(tokenizer),
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
