"""GSM8K: from rows to prompts, token ids and labels, and on to packed micro-batches.

Nothing is ever padded. A micro-batch is one row of concatenated sequences with the borders
between them; see `Batch`.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from engine.packing import IGNORE, Example
from grading.dataset import Problem, load_problems
from run.errors import UserError, one_line

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


# ---------------------------------------------------------------- rows


# ---------------------------------------------------------------- rows in files


# ---------------------------------------------------------------- splits


def carve_validation(
    problems: Sequence[Problem], size: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Split the train rows into those to train on and those to validate on.

    Questions are ranked by a hash of seed and text, so the split is the same on every machine
    and with every library version, and a question that stands in several rows (augmented data)
    never falls on both sides.

    Returns:
        The rows to train on, and at most ``size`` rows to validate on, each in their old order.
    """
    if size >= len(problems):
        raise UserError(
            f"validation_size {size} leaves nothing of the {len(problems)} train rows to train on: make it smaller"
        )
    count: dict[str, int] = {}
    for problem in problems:
        count[problem.question] = count.get(problem.question, 0) + 1
    chosen, room = set(), size
    for question in sorted(count, key=lambda question: _digest("validation", seed, question)):
        if count[question] <= room:
            chosen.add(question)
            room -= count[question]
        if not room:
            break
    if not chosen:
        raise UserError(
            f"validation_size {size} is too small: each question stands in more rows than that"
        )
    train = [problem for problem in problems if problem.question not in chosen]
    return train, [problem for problem in problems if problem.question in chosen]


def load_split(dataset: str, split: str, validation_size: int, seed: int) -> list[Problem]:
    """The rows of ``train`` (without those of validation), ``validation`` or ``test``."""
    if split == "test":
        return load_problems(dataset, "test")
    train, validation = carve_validation(load_problems(dataset, "train"), validation_size, seed)
    return train if split == "train" else validation


def check_disjoint(train: Iterable[Problem], test: Iterable[Problem]) -> None:
    """Raises UserError if a test question stands among ``train``: its score would be worth nothing."""
    shared = {problem.question for problem in train} & {problem.question for problem in test}
    if shared:
        raise UserError(
            f"{len(shared)} questions stand both in train and in test, one is "
            f"{one_line(min(shared))[:80]!r}: remove them from train"
        )


def fingerprint(problems: Iterable[Problem]) -> str:
    """SHA-256 over all questions and answers in order: two data sets with the same one are equal."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.question, problem.answer]).encode())
    return digest.hexdigest()


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


# ---------------------------------------------------------------- tokens


def answer_separator(prompt: str) -> str:
    """What stands between prompt and answer: one space, unless the prompt ends in white space.

    The space is lm-evaluation-harness's target delimiter, and with Llama's tokenizer it belongs
    to the answer's first token.
    """
    return "" if prompt[-1:].isspace() else " "


def encode_prompts(
    tokenizer: "Tokenizer", problems: Sequence[Problem], prompt: str
) -> list[list[int]]:
    """Token ids of BOS and prompt for each problem, as the model reads them in training and decoding."""
    texts = [prompt.replace("{question}", problem.question) for problem in problems]
    lines = [problem.line for problem in problems]
    return [[tokenizer.bos_token_id, *ids] for ids in tokenizer.encode(texts, lines)]


def encode(tokenizer: "Tokenizer", problems: Sequence[Problem], prompt: str) -> list[Example]:
    """Token ids and labels of each problem.

    Raises:
        UserError: the ids of a prompt are not the beginning of the ids of prompt and answer
            together (the tokenizer merged across the border), so that what is trained would
            differ from what is decoded.
    """
    separator = answer_separator(prompt)
    beginnings = [prompt.replace("{question}", problem.question) for problem in problems]
    prompts = [[tokenizer.bos_token_id, *ids] for ids in tokenizer.ids_of(beginnings)]
    texts = [
        f"{text}{separator}{problem.answer}"
        for text, problem in zip(beginnings, problems, strict=True)
    ]
    lines = [problem.line for problem in problems]
    examples = []
    for problem, prompt_ids, joint in zip(
        problems, prompts, tokenizer.encode(texts, lines), strict=True
    ):
        input_ids = [tokenizer.bos_token_id, *joint, tokenizer.eos_token_id]
        if input_ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                f"prompt {prompt!r}: the tokenizer merges its end with the beginning of the answer, line {problem.line}"
                ", so training would differ from decoding: let the prompt end in a visible character such as ':'"
            )
        labels = [IGNORE] * len(prompt_ids) + input_ids[len(prompt_ids) :]
        examples.append(Example(input_ids, labels, problem.line))
    return examples


def leave_out_long(examples: Sequence[Example], max_length: int, name: str) -> list[Example]:
    """The examples of at most ``max_length`` tokens; says how many were left out.

    A longer one is left out, not cut: a cut answer would teach a wrong ending.
    """
    kept = [example for example in examples if len(example.input_ids) <= max_length]
    if len(kept) < len(examples):
        print(
            f"{name}: {len(examples) - len(kept)} of {len(examples)} rows have over {max_length} tokens: left out"
        )
    if not kept:
        raise UserError(f"max_length {max_length}: no {name} row is that short: make it larger")
    return kept


# ---------------------------------------------------------------- micro-batches


def stable_permutation(length: int, *key: object) -> list[int]:
    """A random order of ``range(length)`` that depends on ``key`` alone, on every machine and version."""
    return sorted(range(length), key=lambda index: _digest("order", *key, index))


class TrainingData:
    """The training examples and the order in which an epoch takes them, computed and never replayed."""

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int):
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(examples) // batch_size)
        self._epoch, self._order = -1, []

    def window(self, step: int) -> list[Example]:
        """The sequences of optimizer step ``step`` (counted from 0 over all epochs).

        The last window of an epoch holds what is left, and may be smaller than ``batch_size``.
        """
        epoch, window = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                stable_permutation(len(self.examples), self.seed, epoch),
            )
        first = window * self.batch_size
        return [self.examples[index] for index in self._order[first : first + self.batch_size]]
