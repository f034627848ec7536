"""GSM8K: from rows to prompts, token ids and labels, and on to packed micro-batches.

Nothing is ever padded. A micro-batch is one row of concatenated sequences with the borders
between them; see `Batch`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import scoring
from config import local_path
from errors import UserError, one_line

if TYPE_CHECKING:
    from tokenizer import Tokenizer

IGNORE = -100  # the label of a token that is not supervised, as in torch's cross_entropy


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Problem:
    """One row of GSM8K: ``answer`` holds the reasoning and ends in ``#### NUMBER``.

    Attributes:
        line: where it stands, from 1: the line of its file, or the row of an array, of Parquet files or of the hub.
    """

    question: str
    answer: str
    line: int = field(default=0, compare=False)

    @property
    def gold(self) -> str:
        """The final number as the data set writes it, commas included."""
        return scoring.gold_answer(self.answer)


def load_problems(dataset: str, split: str) -> list[Problem]:
    """Load and check every row of ``split`` (``train`` or ``test``).

    Args:
        dataset: a local folder that holds each split in one of `FORMS`, or a hub id.

    Raises:
        UserError: there is no such data set, or a row is not valid; names the file and the line.
    """
    folder = local_path(dataset)
    if folder.is_dir():
        problems = _read_folder(folder, split)
    elif folder.exists():
        raise UserError(f"dataset {dataset!r} is a file: name the folder that holds it; {_forms('train')}")
    elif not is_hub_id(dataset):
        raise UserError(f"dataset {dataset!r} is no folder here and no hub id such as openai/gsm8k: check the path")
    else:
        problems = _download(dataset, split)
    scoring.say_odd_golds({f"row {problem.line}": problem.gold for problem in problems}, f"{dataset}, {split}")
    return problems


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a hub id, ``owner/name``, rather than that of a path."""
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and not name.startswith((".", "~", "/"))


# ---------------------------------------------------------------- rows in files

LFS_POINTER = b"version https://git-lfs"  # how a file begins that git has not fetched
LINE_FORMS, TABLE_FORM = ("{split}.jsonl", "{split}.json"), "{split}.parquet"
SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.parquet")


def _forms(split: str) -> str:
    """What a folder may hold a split as, for people."""
    return (
        f"a data set folder holds {split}.jsonl (one object a line), {split}.json (or one array of all), "
        f"{split}.parquet or {split}-00000-of-00001.parquet (these two also in its folder main or data), and the same "
        f"of {'test' if split == 'train' else 'train'}"
    )


def _read_folder(folder: Path, split: str) -> list[Problem]:
    """The rows of ``split``, in whichever form it is there.

    Raises:
        UserError: it is there in no form or in several, or a row is not valid.
    """
    found = _find_forms(folder, split)
    if len(found) > 1:
        names = ", ".join(str(files[0].relative_to(folder)) for files in found)
        raise UserError(f"{folder}: holds {split} in {len(found)} forms ({names}): leave the one that is meant")
    files = found[0] if found else [folder / f"{split}.jsonl"]
    problems: list[Problem] = []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: can't be read ({error.strerror}): {_forms(split)}") from None
        if content.startswith(LFS_POINTER):
            raise UserError(f"{file}: is a pointer to a file that git has not fetched: run git lfs pull in its folder")
        if file.suffix == ".parquet":
            problems += _parse_parquet(content, file, len(problems))
        else:
            problems += _parse_json(content, file)
    if not problems:
        raise UserError(f"{files[0]}: is empty: it needs rows with question and answer")
    return problems


def _find_forms(folder: Path, split: str) -> list[list[Path]]:
    """The files of each form in which ``split`` is there; those of a form with several in their order."""
    found: list[list[Path]] = []
    # main or data: of a clone of a hub's repository, which may hold another configuration beside it.
    for place in (folder, folder / "main", folder / "data"):
        try:
            names = {file.name for file in place.iterdir()} if place.is_dir() else set()
        except OSError as error:
            raise UserError(f"{place}: can't be read ({error.strerror}): {_forms(split)}") from None
        single = [TABLE_FORM] if place != folder else [*LINE_FORMS, TABLE_FORM]
        found += [[place / name] for form in single if (name := form.format(split=split)) in names]
        shards = sorted(name for name in names if name.startswith(split) and SHARD.fullmatch(name[len(split) :]))
        if shards:
            _check_shards(place, split, shards)
            found.append([place / name for name in shards])
    return found


def _check_shards(place: Path, split: str, shards: Sequence[str]) -> None:
    """Raises UserError where they are not all of one whole."""
    total = int(shards[-1].rpartition("-of-")[2].removesuffix(".parquet"))
    expected = {f"{split}-{number:05}-of-{total:05}.parquet" for number in range(min(total, 10**5))}
    missing, foreign = sorted(expected - set(shards)), sorted(set(shards) - expected)
    if missing or foreign:
        what = f"lacks {scoring.some(missing)}" if missing else f"holds {scoring.some(foreign)} beside {total} others"
        raise UserError(f"{place}: {what}: fetch every part of one {split}, and leave no part of another")


def _parse_json(content: bytes, file: Path) -> list[Problem]:
    """Rows from one JSON object a line, or from one array of objects."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        return _parse_array(content, file)
    if keys := _keys_of_arrays(content):
        raise UserError(
            f"{file}, line 1: 'question' is missing: the file is one object, and its rows stand under {keys}: write "
            "that array alone, or one object a line"
        )
    # Bytes, and split at \n alone: U+2028, which GSM8K holds, would break str.splitlines().
    lines = content.removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        return []
    return [_parse_line(line, file, number) for number, line in enumerate(lines, start=1)]


def _keys_of_arrays(content: bytes) -> str:
    """Under which keys a file that is one JSON object, and no row, holds arrays; empty where it is none."""
    try:
        whole = json.loads(content.decode())
    except (ValueError, RecursionError):  # as of one object a line
        return ""
    if not isinstance(whole, dict) or "question" in whole:
        return ""
    return scoring.some(json.dumps(key)[:40] for key, value in whole.items() if isinstance(value, list))


def _parse_line(line: bytes, file: Path, number: int) -> Problem:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))  # of bytes json would guess the encoding
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON ({one_line(error)[:120]}): write one object a line") from None
    return _check_row(row, where, number)


def _parse_array(content: bytes, file: Path) -> list[Problem]:
    try:
        rows = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        if isinstance(error, UnicodeDecodeError):
            line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file}, line {line}: is no JSON ({one_line(error)[:120]}): write one array of objects, or one object a "
            "line without brackets around them"
        ) from None
    return [_check_row(row, f"{file}, row {number}", number) for number, row in enumerate(rows, start=1)]


def _parse_parquet(content: bytes, file: Path, rows_before: int) -> list[Problem]:
    import pyarrow
    import pyarrow.parquet

    types = pyarrow.types
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content), page_checksum_verification=True)
        for name in ("question", "answer"):
            if (count := table.schema_arrow.names.count(name)) != 1:
                raise UserError(f"{file}: has {count} columns {name!r}: it must have one, of text")
            kind = table.schema_arrow.field(name).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
                raise UserError(f"{file}: its column {name!r} is of type {one_line(kind)[:60]}: it must be of text")
        rows = table.read(columns=["question", "answer"]).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{file}: is damaged, or no Parquet file ({one_line(error)[:120]}): fetch it again, or name a whole one"
        ) from None
    return [_check_row(row, f"{file}, row {n}", rows_before + n) for n, row in enumerate(rows, start=1)]


def _check_row(row: Any, where: str, number: int) -> Problem:
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no JSON object: write {{'question': ..., 'answer': ...}}")
    for name in ("question", "answer"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            shown = "is missing" if name not in row else f"is {json.dumps(value)[:60]}"
            raise UserError(f"{where}: {name!r} {shown}: it must be a text that is not empty")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where}: {name!r} holds half a surrogate pair: write it as valid Unicode") from None
    try:
        scoring.gold_answer(row["answer"])
    except ValueError as error:
        raise UserError(f"{where}: the answer {error}") from None
    return Problem(row["question"], row["answer"], number)


def _download(dataset: str, split: str) -> list[Problem]:
    import datasets
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # its retries would be lines before our one line
    try:
        rows = datasets.load_dataset(dataset, "main", split=split)
    except Exception as error:  # the hub's client raises many types: all mean that the rows can't be had
        raise UserError(
            f"dataset {dataset!r}: is no folder here, and can't be loaded from the hub "
            f"({type(error).__name__}: {one_line(error)[:200]}): "
            f"check the id and the network, or name a local folder: {_forms(split)}"
        ) from None
    return [_check_row(row, f"{dataset}, {split} row {number}", number) for number, row in enumerate(rows, start=1)]


# ---------------------------------------------------------------- splits


def carve_validation(problems: Sequence[Problem], size: int, seed: int) -> tuple[list[Problem], list[Problem]]:
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
        raise UserError(f"validation_size {size} is too small: each question stands in more rows than that")
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


@dataclass(frozen=True)
class Example:
    """One sequence: BOS, prompt, answer, EOS.

    ``labels`` has the length of ``input_ids`` and is not shifted: a token that the model learns
    to write (answer and EOS) is its own label, every other label is -100; ``line`` is its `Problem`'s.
    """

    input_ids: list[int]
    labels: list[int]
    line: int = field(default=0, compare=False)


def answer_separator(prompt: str) -> str:
    """What stands between prompt and answer: one space, unless the prompt ends in white space.

    The space is lm-evaluation-harness's target delimiter, and with Llama's tokenizer it belongs
    to the answer's first token.
    """
    return "" if prompt[-1:].isspace() else " "


def encode_prompts(tokenizer: "Tokenizer", problems: Sequence[Problem], prompt: str) -> list[list[int]]:
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
    texts = [f"{text}{separator}{problem.answer}" for text, problem in zip(beginnings, problems, strict=True)]
    lines = [problem.line for problem in problems]
    examples = []
    for problem, prompt_ids, joint in zip(problems, prompts, tokenizer.encode(texts, lines), strict=True):
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
        print(f"{name}: {len(examples) - len(kept)} of {len(examples)} rows have over {max_length} tokens: left out")
    if not kept:
        raise UserError(f"max_length {max_length}: no {name} row is that short: make it larger")
    return kept


# ---------------------------------------------------------------- micro-batches


def stable_permutation(length: int, *key: object) -> list[int]:
    """A random order of ``range(length)`` that depends on ``key`` alone, on every machine and version."""
    return sorted(range(length), key=lambda index: _digest("order", *key, index))


# Matrix products have a multiple of this many rows: they run best so, and a library that keeps
# something for every shape it has seen, as oneDNN does, sees few.
ROWS = 64


@dataclass(frozen=True)
class Batch:
    """A micro-batch: sequences one behind the other, none padded, S of them with T tokens in all.

    The last token of each sequence is a label and no input: nothing comes after it. Up to
    `ROWS` - 1 tokens that mean nothing fill up T to a multiple; they are the last sequence.

    Attributes:
        input_ids: ``[1, T]``.
        position_ids: ``[1, T]``, counted from 0 in each sequence.
        cu_seqlens: ``[S + 1]``, int32: where each sequence begins, and T at the end.
        seqlens: the S lengths as Python numbers, for code that must not wait for the device.
        loss_positions: ``[M]``: where in T the hidden states stand whose next token is supervised;
            behind these N, others that fill up M to a multiple of `ROWS`.
        labels: ``[N]``: these next tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    seqlens: tuple[int, ...]
    loss_positions: torch.Tensor
    labels: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_labels(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type != "cuda":
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)  # pinned: the copy does not wait for the device

        return Batch(
            move(self.input_ids),
            move(self.position_ids),
            move(self.cu_seqlens),
            self.seqlens,
            move(self.loss_positions),
            move(self.labels),
        )


def collate(examples: Sequence[Example], rows: int = ROWS) -> Batch:
    """Concatenate ``examples`` into one `Batch`, filled up to a multiple of ``rows`` (where `Batch` says `ROWS`)."""
    if filler := -sum(len(example.input_ids) - 1 for example in examples) % rows:
        examples = [*examples, Example([0] * (filler + 1), [IGNORE] * (filler + 1))]
    input_ids, position_ids, borders, loss_positions, labels = [], [], [0], [], []
    for example in examples:
        for position, label in enumerate(example.labels[1:]):
            if label != IGNORE:
                loss_positions.append(borders[-1] + position)
                labels.append(label)
        input_ids += example.input_ids[:-1]
        position_ids += range(len(example.input_ids) - 1)
        borders.append(len(input_ids))
    loss_positions += [0] * (-len(labels) % rows)
    return Batch(
        torch.tensor([input_ids]),
        torch.tensor([position_ids]),
        torch.tensor(borders, dtype=torch.int32),
        tuple(len(example.input_ids) - 1 for example in examples),
        torch.tensor(loss_positions, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
    )


def pack(examples: Sequence[Example], micro_batch_tokens: int) -> list[Batch]:
    """Distribute ``examples`` over few micro-batches of at most ``micro_batch_tokens``: first-fit decreasing.

    What fills up a micro-batch does not count. A sequence that is longer than that has a
    micro-batch of its own. Which sequences share one changes no result: attention does not cross
    their borders, and each supervised token weighs the same (see `perplexity.summed_loss`).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids)):
        length = len(examples[index].input_ids) - 1
        fit = next((number for number, free in enumerate(room) if free >= length), len(bins))
        if fit == len(bins):
            bins.append([])
            room.append(micro_batch_tokens)
        bins[fit].append(index)
        room[fit] -= length
    return [collate([examples[index] for index in sorted(members)]) for members in bins]


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
            self._epoch, self._order = epoch, stable_permutation(len(self.examples), self.seed, epoch)
        first = window * self.batch_size
        return [self.examples[index] for index in self._order[first : first + self.batch_size]]
