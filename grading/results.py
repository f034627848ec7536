"""Reads the files in an evaluation's folder, and checks them."""

import codecs
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from run.errors import UserError, one_line
from run.setting_types import quoted

PREDICTIONS_FILE, SCORES_FILE, IDENTITY_FILE = "predictions.jsonl", "scores.json", "evaluation.json"

RESUME = "run evaluate.py again, it resumes where it stopped"

# The decodings of an evaluation. These are also the names of the additional ones' folders, next to
# the greedy predictions, and their keys in the greedy scores.json.
GREEDY, CALCULATOR, SAMPLES = "greedy", "calculator", "samples"

# The keys of a row that we use, with their types, and those that are required.
TYPES = {"id": int, "gold": str, "completion": str, "stop": str, "correct": bool, "sample": int}
REQUIRED = ("id", "gold", "completion")

# What is the same however its path is spelt: hashes say which model and which rows these are.
PATHS = ("checkpoint", "dataset")

# What scores.json records about the decoding itself, which can't be measured later, with its types.
TIMING = {"seconds": (int, float), "tokens_per_second": (int, float), "verified_batching": dict}

# What scoring counts in the predictions themselves, of greedy decoding or of samples. Some depend
# on what the rows have, so an earlier scores.json may contain one that a later one must not.
NUMBERS = (
    *("exact_match", "num_correct", "ci95", "rules", "stopped_by_length", "stop_unknown"),
    *("errors", "rules_disagree", "by_steps", "by_question_words"),
    *("maj_at", "pass_at", "num_tokens"),
)


def folders_of(
    output: Path, split: str, with_calculator: bool, num_samples: int | None
) -> dict[str, Path]:
    """The folder of each decoding of an evaluation, in the order of the decodings.

    Samples of the train rows are decoded alone, since the greedy score of rows that the model has
    seen says nothing.
    """
    if split == "train" and num_samples:
        return {SAMPLES: output / SAMPLES}
    folders = {GREEDY: output}
    if with_calculator:
        folders[CALCULATOR] = output / CALCULATOR
    if num_samples:
        folders[SAMPLES] = output / SAMPLES
    return folders


class CompletionId(NamedTuple):
    """Identifies the completion in a row. Greedy decoding has one sample per problem, number 0."""

    problem: int
    sample: int


def completion_id(row: dict[str, Any]) -> CompletionId:
    return CompletionId(row["id"], row.get("sample", 0))


def read_predictions(
    file: Path, drop_cut_line: bool = False, damaged: list[int] | None = None
) -> list[dict[str, Any]]:
    """The rows of a ``predictions.jsonl``, after checking that each has what scoring needs.

    Rows from other programs may lack ``correct`` and ``stop``, or have a ``stop`` of null.

    Args:
        drop_cut_line: drop a last line that a kill cut short, instead of raising an error.
        damaged: collects the numbers of invalid lines. If None, the first one raises an error.
    """
    rows = []
    for number, line in enumerate(_lines(file, drop_cut_line), start=1):
        try:
            rows.append(_parse_row(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if damaged is None:
                raise UserError(
                    f"{file}, line {number}: is not a valid prediction ({type(error).__name__}: "
                    f"{one_line(error)[:120]}): each line must be an object with "
                    f"{', '.join(REQUIRED)}, as evaluate.py writes them; restore it or evaluate "
                    "again"
                ) from None
            damaged.append(number)
    return rows


def _lines(file: Path, drop_cut_line: bool) -> Iterator[bytes]:
    """The lines of ``file`` without their ends, one at a time: a file of samples may be large."""
    try:
        with file.open("rb") as stream:
            mark = codecs.BOM_UTF8  # which some editors add
            for line in stream:
                line, mark = line.removeprefix(mark), b""
                if line.endswith(b"\n"):
                    yield line[:-1]
                    continue
                if line and not drop_cut_line:
                    yield line
                return  # not on to what another process may have added by now
    except OSError as error:
        raise UserError(
            f"{file}: can't be read ({error.strerror}): name a predictions.jsonl"
        ) from None


def _parse_row(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode("utf-8"))  # given bytes, json would guess the encoding
    if row.get("stop", "") is None:
        del row["stop"]
    for key, kind in TYPES.items():
        if (key in row or key in REQUIRED) and type(row[key]) is not kind:
            raise ValueError(f"{key!r} is {row[key]!r}, not of type {kind.__name__}")
    if type(row.get("question")) is str:
        row["question"] = sys.intern(row["question"])
    # Samples of a problem share its question, and all rows share their keys.
    return {sys.intern(key): value for key, value in row.items()}


def read_identity(file: Path) -> dict[str, Any]:
    """The content of an ``evaluation.json``, or of a ``scores.json``, which contains it.

    Empty if there is no such file.
    """
    try:
        identity = json.loads(file.read_bytes()) if file.exists() else {}
        counts = [identity.get(key, 1) for key in ("num_problems", "num_samples")]
        if not all(isinstance(count, int) for count in counts):
            raise ValueError("num_problems and num_samples must be integers")
        return identity
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: is damaged ({one_line(error)[:120]}): move it away or evaluate again"
        ) from None


def read_scores(file: Path) -> dict[str, Any]:
    """A ``scores.json``; empty if it is missing or damaged, since it can be computed again."""
    try:
        return read_identity(file)
    except UserError:
        return {}


def previous_timing(folder: Path) -> dict[str, Any]:
    """What is recorded of an earlier decoding: how long it took, and whether it was verified."""
    recorded = read_scores(folder / IDENTITY_FILE).get("timing")
    found = recorded if isinstance(recorded, dict) else {}
    before = found or read_scores(folder / SCORES_FILE)
    return {key: before[key] for key, kind in TIMING.items() if isinstance(before.get(key), kind)}


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How two evaluations differ, apart from their size and the path of the checkpoint."""
    return [
        f"{key} was {quoted(before.get(key))} and is {quoted(now.get(key))}"
        for key in (before | now)
        if key not in ("num_problems", "num_samples", *PATHS, "timing")
        and before.get(key) != now.get(key)
        and not (key == "tokenizer" and "tokenizer" not in before and _reads_as_before(now[key]))
    ]


def _reads_as_before(tokenizer: object) -> bool:
    """Whether an older version, which did not record the tokenizer, gave the same ids with it.

    Only a lone ``tokenizer.model`` was read differently.
    """
    return not str(tokenizer).startswith("tokenizer.model")
