"""GSM8K: from rows to token ids and labels, and from those to the batches of an epoch.

The first row of train.jsonl:

    question  Natalia sold clips to 48 of her friends in April, and then she sold half as many
              clips in May. How many clips did Natalia sell altogether in April and May?
    answer    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
              Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
              #### 72

With the prompt "Question: {question}\\nAnswer:" and Llama-2's tokenizer it becomes 110 tokens. The
model reads all of them, and learns to write those that have a label, which are the answer and EOS.

    token      <s> ▁Question     : ▁Natal   ia ... Answer     : ▁Natal   ia ...     2 </s>
    input_ids    1       894 29901  26259  423 ...  22550 29901  26259  423 ... 29906    2
    labels    -100      -100  -100   -100 -100 ...   -100  -100  26259  423 ... 29906    2
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.masking import Masking, replacements
from engine.packing import IGNORE, Example
from engine.shape import read_config
from grading.answer_parts import classes_of
from grading.dataset import Problem, check_disjoint, load_problems
from run.errors import UserError

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

# ---------------------------------------------------------------- splits


@dataclass(frozen=True)
class TrainingProblems:
    """The rows that a run trains on, and the rows that it validates on.

    Attributes:
        sha256: fingerprints of the rows, as recorded in training.json: ``train_sha256`` (train and
            validation rows together, in file order), ``validation_sha256`` and ``test_sha256``.
    """

    train: list[Problem]
    validation: list[Problem]
    sha256: dict[str, str]


def load_for_training(dataset: str, validation_size: int, seed: int) -> TrainingProblems:
    """The rows to train on and to validate on, after checking that none is a test question."""
    rows, test = load_problems(dataset, "train"), load_problems(dataset, "test")
    check_disjoint(rows, test)
    train, validation = carve_validation(rows, validation_size, seed)
    splits = {"train": rows, "validation": validation, "test": test}
    sha256 = {f"{name}_sha256": fingerprint(problems) for name, problems in splits.items()}
    return TrainingProblems(train, validation, sha256)


def load_split(
    dataset: str, split: str, validation_size: int, seed: int
) -> tuple[list[Problem], dict[str, str]]:
    """The rows of ``train`` (without the validation rows), ``validation`` or ``test``.

    Returns:
        The rows, and by the name of a split the fingerprint of its rows, as in `TrainingProblems`,
        which show whether a run used them.
    """
    if split == "test":
        problems = load_problems(dataset, "test")
        return problems, {"test": fingerprint(problems)}
    rows = load_problems(dataset, "train")
    train, validation = carve_validation(rows, validation_size, seed)
    sha256 = {"validation": fingerprint(validation)}
    if split == "validation":
        return validation, sha256
    return train, {"train": fingerprint(rows)} | sha256


def load_questions(
    dataset: str, split: str, validation_size: int, seed: int
) -> tuple[list[Problem], dict[str, str]]:
    """`load_split`, but only the first row of each question of ``train``.

    Augmented data has several rows of one question, whose samples would be the same.
    """
    problems, sha256 = load_split(dataset, split, validation_size, seed)
    if split != "train":
        return problems, sha256
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.question, problem)
    if len(first) < len(problems):
        print(f"train: {len(problems)} rows of {len(first)} questions, each of which is asked once")
    return list(first.values()), sha256


def carve_validation(
    problems: Sequence[Problem], size: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Split the train rows into rows to train on and rows to validate on.

    Questions are ranked by a hash of seed and text, so the split is the same on every machine and
    with every library version. All rows of one question (augmented data) are on the same side.

    Returns:
        The rows to train on, and at most ``size`` rows to validate on, both in original order.
    """
    count = Counter(problem.question for problem in problems)
    if len(count) == 1:
        raise UserError("the train rows have only one question: add others, to validate on them")
    if size >= len(problems):
        raise UserError(
            f"validation_size {size} leaves nothing of the {len(problems)} train rows to train on: "
            "make it smaller"
        )
    chosen, room = set(), size
    for question in sorted(count, key=lambda question: _digest("validation", seed, question)):
        if count[question] <= room:
            chosen.add(question)
            room -= count[question]
    if not chosen:
        raise UserError(
            f"validation_size {size} is too small: every question has more rows than that"
        )
    train = [problem for problem in problems if problem.question not in chosen]
    return train, [problem for problem in problems if problem.question in chosen]


def fingerprint(problems: Iterable[Problem]) -> str:
    """SHA-256 over all questions and answers in order; equal only for equal data sets."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.question, problem.answer]).encode())
    return digest.hexdigest()


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


# ---------------------------------------------------------------- tokens


def answer_separator(prompt: str) -> str:
    """The text between prompt and answer: a space, unless the prompt ends in whitespace.

    The space is lm-evaluation-harness's target delimiter. Llama's tokenizer makes it part of the
    answer's first token.
    """
    return "" if prompt[-1:].isspace() else " "


def encode_prompts(
    tokenizer: "Tokenizer", problems: Sequence[Problem], prompt: str
) -> list[list[int]]:
    """BOS and the prompt of each problem, as the model reads them in training and decoding."""
    lines = [problem.line for problem in problems]
    encoded = tokenizer.encode(_fill_in(tokenizer, prompt, problems), lines)
    return [[tokenizer.bos_token_id, *ids] for ids in encoded]


def encode(
    tokenizer: "Tokenizer", problems: Sequence[Problem], prompt: str, by_class: bool = False
) -> list[Example]:
    """Token ids and labels of each problem; ``by_class`` with `grading.answer_parts.classes_of`.

    Raises:
        UserError: the tokenizer merges the end of the prompt with the beginning of the answer, so
            the prompt would have different ids in training and in decoding.
    """
    prompts, separator = _fill_in(tokenizer, prompt, problems), answer_separator(prompt)
    texts = [
        f"{text}{separator}{problem.answer}"
        for text, problem in zip(prompts, problems, strict=True)
    ]
    prompt_ids = tokenizer.ids_of(prompts)
    joint_ids = tokenizer.encode(texts, [problem.line for problem in problems])
    starts = tokenizer.starts_of(texts) if by_class else []
    examples = []
    for n, (problem, alone, joint) in enumerate(zip(problems, prompt_ids, joint_ids, strict=True)):
        if joint[: len(alone)] != alone:
            raise UserError(
                f"prompt {prompt!r}: the tokenizer merges its end with the beginning of the answer "
                f"in line {problem.line}, so training would differ from decoding: let the prompt "
                "end in a visible character such as ':'"
            )
        input_ids = [tokenizer.bos_token_id, *joint, tokenizer.eos_token_id]
        prompt_length = 1 + len(alone)  # BOS is part of the prompt
        labels = [IGNORE] * prompt_length + input_ids[prompt_length:]
        classes = []
        if by_class:
            classes = classes_of(problem.answer, len(texts[n]), starts[n][len(alone) :])
        examples.append(Example(input_ids, labels, problem.line, classes))
    return examples


def _fill_in(tokenizer: "Tokenizer", prompt: str, problems: Sequence[Problem]) -> list[str]:
    tokenizer.say_special(prompt)
    # Not by str.format, since a question may contain braces.
    return [prompt.replace("{question}", problem.question) for problem in problems]


def leave_out_long(examples: Sequence[Example], max_length: int, name: str) -> list[Example]:
    """The examples of at most ``max_length`` tokens; prints how many were left out.

    Longer ones are not truncated, because a truncated answer would teach a wrong ending.
    """
    kept = [example for example in examples if len(example.input_ids) <= max_length]
    if len(kept) < len(examples):
        print(
            f"{name}: left out {len(examples) - len(kept)} of {len(examples)} rows, which have "
            f"more than {max_length} tokens"
        )
    if not kept:
        raise UserError(f"max_length {max_length}: no {name} row is that short: make it larger")
    return kept


def encode_for_training(
    tokenizer: "Tokenizer", problems: TrainingProblems, prompt: str, max_length: int
) -> tuple[list[Example], list[Example]]:
    """The examples to train on and to validate on, without those that are too long."""
    train = leave_out_long(encode(tokenizer, problems.train, prompt), max_length, "train")
    validation = encode(tokenizer, problems.validation, prompt, by_class=True)
    return train, leave_out_long(validation, max_length, "validation")


# ---------------------------------------------------------------- batches


class Batches:
    """The batch of each optimizer step: ``batches[step]``, counted from 0 over all epochs.

    Every epoch contains every example once, in a different order. Its last batch contains the
    remaining examples, and may be smaller. The order depends only on seed and epoch, and what
    ``masking`` replaces in a row only on seed, epoch, the row's line and the rate of the step. So a
    resumed run does not have to replay anything.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        masking: Masking | None = None,
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.masking = masking
        self.per_epoch = math.ceil(len(examples) / batch_size)
        self._epoch, self._order = -1, []  # the last order that was computed

    def __getitem__(self, step: int) -> list[Example]:
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = stable_permutation(len(self.examples), self.seed, epoch)
        first = number * self.batch_size
        batch = [self.examples[index] for index in self._order[first : first + self.batch_size]]
        rate = self.mask_rate(step)
        if rate is None:
            return batch
        return [self.masking.mask(row, rate, self.seed, epoch, row.line) for row in batch]

    def mask_rate(self, step: int) -> float | None:
        """The share of the answers' tokens that is replaced in ``step``; None without masking."""
        return self.masking.rate_after(step / self.per_epoch) if self.masking else None


def stable_permutation(length: int, *key: object) -> list[int]:
    """A random order of ``range(length)`` that depends only on ``key``, on every machine."""
    return sorted(range(length), key=lambda index: _digest("order", *key, index))


def batches_of(
    examples: Sequence[Example], settings: Mapping[str, Any], tokenizer: "Tokenizer", folder: Path
) -> Batches:
    """The batches that a run's ``settings`` ask for.

    Args:
        folder: of the model.
    """
    masking, rate = None, settings["mask_rate"]
    if rate > 0:
        embedded = read_config(folder).vocab_size
        drawn_from = replacements(settings["mask_token"], tokenizer, embedded)
        masking = Masking(rate, settings["mask_warmup_ratio"] * settings["epochs"], drawn_from)
    return Batches(examples, settings["batch_size"], settings["seed"], masking)
