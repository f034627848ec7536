"""Reads samples of train rows, and refuses any that must not be trained on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from grading.dataset import Problem
from grading.results import (
    IDENTITY_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    completion_id,
    read_identity,
    read_predictions,
)
from grading.rules import visible
from grading.selection import Sample
from run.errors import UserError

EVALUATE = "evaluate.py --split train --samples K"

# Samples that agree in all of these have the same random numbers, and so are the same.
DRAWN_BY = ("weights", "tokenizer", "prompt", "dtype", "temperature", "seed", "with_calculator")


USUAL_TEMPERATURE = 0.7  # has the random numbers that all temperatures had once


def random_stream(weights: str, temperature: float, seed: int) -> str:
    """The name of the random numbers of samples of train rows.

    Another model and another temperature have others, since their samples are to be trained on
    together: with the same numbers, samples at 0.7 and at 1.0 are often the same text.
    """
    name = f"{seed}/{weights}"
    return name if temperature == USUAL_TEMPERATURE else f"{name}/{temperature}"


@dataclass(frozen=True)
class SampleFile:
    """A ``predictions.jsonl`` of samples.

    Attributes:
        sha256: of its content.
        identity: the content of the ``evaluation.json`` next to it; empty if there is none.
        rows: its lines, as `read_predictions` returns them.
    """

    file: Path
    sha256: str
    identity: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def read_samples(files: Sequence[Path]) -> list[SampleFile]:
    """Read files of samples, those of this program with what is recorded next to them.

    Raises:
        UserError: a file can't be read, is incomplete or of other rows than train rows, or two of
            them contain the same draws.
    """
    read = [_read_file(file) for file in files]
    for earlier, one in combinations(read, 2):
        if _have_same_draws(earlier, one):
            raise UserError(
                f"{one.file}: contains the same draws as {earlier.file}: leave one of them out; a "
                "larger --samples draws others"
            )
    return read


def _have_same_draws(one: SampleFile, other: SampleFile) -> bool:
    if "weights" in one.identity and "weights" in other.identity:
        return all(one.identity.get(key) == other.identity.get(key) for key in DRAWN_BY)
    return one.sha256 == other.sha256


def _read_file(file: Path) -> SampleFile:
    if file.exists() and not file.is_file():  # a pipe would have no end
        raise UserError(f"{file}: is not a file: name a {PREDICTIONS_FILE}, as {EVALUATE} writes")
    rows = read_predictions(file)
    if not rows:
        raise UserError(f"{file}: is empty: name one with samples, as {EVALUATE} writes them")
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    identity = _read_identity(file)
    if "num_problems" in identity:
        expected = identity["num_problems"] * identity.get("num_samples", 1)
        found = len({completion_id(row) for row in rows})
        if not len(rows) == found == expected:
            raise UserError(
                f"{file}: contains {found} different samples in {len(rows)} lines, but "
                f"{expected} were asked for: run evaluate.py again, it resumes where it stopped"
            )
    return SampleFile(file, sha256, identity, rows)


def _read_identity(file: Path) -> dict[str, Any]:
    """What is recorded of the samples in ``file``, after checking that they are of train rows."""
    if file.name != PREDICTIONS_FILE:  # next to it are records of other predictions
        return {}
    records = [file.with_name(name) for name in (IDENTITY_FILE, SCORES_FILE)]
    identity = read_identity(records[0]) or read_identity(records[1])
    temperature, split = identity.get("temperature"), identity.get("split", "train")
    if temperature is not None and type(temperature) not in (int, float):
        raise UserError(
            f"{records[0]}: its temperature is {str(temperature)[:40]!r}, not a number: restore it "
            "or evaluate again"
        )
    if split != "train":
        raise UserError(
            f"{file}: contains samples of the {str(split)[:40]} rows, which must not be trained "
            f"on: sample the train rows ({EVALUATE})"
        )
    return identity


def by_question(
    files: Sequence[SampleFile],
    train: Sequence[Problem],
    validation: Sequence[Problem],
    test: Sequence[Problem],
    dataset: str,
) -> dict[str, list[Sample]]:
    """The samples of each question, in the order of ``files`` and of the samples' numbers.

    Not in the order of their lines, in which they were finished: that differs between machines.

    Args:
        train: the rows to train on, without the ``validation`` rows.
        dataset: their name in messages.

    Raises:
        UserError: a sample's question is not one of ``train``, or has another gold answer there.
    """
    golds = {problem.question: problem.gold for problem in reversed(train)}
    others = {problem.question: "validation" for problem in validation}
    others |= {problem.question: "test" for problem in test}
    samples: dict[str, list[Sample]] = {}
    for source, one in enumerate(files):
        for number, row in enumerate(one.rows, start=1):
            if fault := _fault_of(row, golds, others, dataset):
                raise UserError(f"{one.file}, line {number}: {fault}")
        for row in sorted(one.rows, key=lambda row: row.get("sample", 0)):
            samples.setdefault(row["question"], []).append(Sample(source, row["completion"]))
    return samples


def _fault_of(
    row: Mapping[str, Any], golds: Mapping[str, str], others: Mapping[str, str], dataset: str
) -> str | None:
    """Why a row must not be trained on, and what to do about it."""
    question, gold = row.get("question"), row["gold"]
    if not isinstance(question, str):
        return f"has no question: each line must have one, as {EVALUATE} writes them"
    shown = visible(question[:80])[:120]
    if question in others:
        return (
            f"{shown} is a {others[question]} question of {dataset}, which must not be trained "
            f"on: sample the train rows ({EVALUATE}), with the same validation_size and seed"
        )
    if question not in golds:
        return (
            f"{shown} is not a train question of {dataset}: name the data set that was sampled "
            "with --dataset"
        )
    if gold.replace(",", "") != golds[question].replace(",", ""):
        return (
            f"the gold answer is {visible(gold[:40])}, but {golds[question][:40]} in {dataset}: "
            "name the data set that was sampled with --dataset"
        )
    return None
