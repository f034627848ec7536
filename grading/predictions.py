"""Writes predictions.jsonl: one line per completion, each safe as soon as it is written."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from grading.dataset import Problem
from grading.results import (
    CALCULATOR,
    GREEDY,
    IDENTITY_FILE,
    PREDICTIONS_FILE,
    SAMPLES,
    SCORES_FILE,
    CompletionId,
    changed_settings,
    completion_id,
    folders_of,
    previous_timing,
    read_identity,
    read_predictions,
)
from grading.rules import count_steps, grade, grade_row
from run.errors import UserError
from run.files import has_only, naming, replace_file, sync_open
from run.locks import locked

# A kill loses no line that was written. A power cut may lose the lines since the last sync, which
# takes milliseconds.
SECONDS_BETWEEN_SYNCS = 1.0

FIRST_BYTES = b'{"id": '  # the beginning of every line


@contextmanager
def writing_into(*folders: Path) -> Iterator[None]:
    """Make ``folders``, keep other evaluations out, and remove those that are empty at the end."""
    with ExitStack() as stack:
        for folder in folders:
            refusal = (
                f"{folder}: another process is evaluating into it: wait for it, or choose another "
                "--output"
            )
            try:
                stack.enter_context(locked(folder, refusal))
            except OSError as error:
                raise UserError(
                    f"{folder}: can't be written ({error.strerror}): choose another --output"
                ) from None
        yield


class PredictionsFile:
    """A growing ``predictions.jsonl``, which may begin with rows of an interrupted evaluation.

    Attributes:
        rows: the predictions by `CompletionId`.
        num_correct: correct rows so far, by the headline rule.
        identity: everything that a completion depends on, plus ``num_problems``, and
            ``num_samples`` if there are samples.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        num_problems: int,
        num_samples: int | None = None,
        *,
        seconds_between_syncs: float = SECONDS_BETWEEN_SYNCS,
    ):
        """Read the rows of an interrupted evaluation with the same identity. Write nothing yet.

        Args:
            num_samples: per problem; None for greedy decoding, which has one completion.

        Raises:
            UserError: the folder belongs to another evaluation, contains more completions than are
                now asked for, or can't be read.
        """
        self.folder, self.file = folder, folder / PREDICTIONS_FILE
        self.identity = identity | {"num_problems": num_problems}
        if num_samples:
            self.identity |= {"num_samples": num_samples}
        self._num_problems, self._num_samples = num_problems, num_samples or 1
        self._seconds_between_syncs = seconds_between_syncs
        self._synced = time.monotonic()
        self.rows: dict[CompletionId, dict[str, Any]] = {}
        self._dropped: list[str] = []
        try:
            self._read_finished()
        except OSError as error:
            raise UserError(
                f"{folder}: can't be read ({error.strerror}): choose another --output"
            ) from None
        self.num_correct = sum(grade_row(row).correct for row in self.rows.values())

    @property
    def size(self) -> int:
        """The number of rows in the complete file."""
        return self._num_problems * self._num_samples

    def missing(self) -> list[CompletionId]:
        """The completions that have not been written yet, problem by problem."""
        asked = (
            CompletionId(problem, sample)
            for problem in range(self._num_problems)
            for sample in range(self._num_samples)
        )
        return [completion for completion in asked if completion not in self.rows]

    def _read_finished(self) -> None:
        if not self.file.exists():
            others = [
                name for name in (SCORES_FILE, IDENTITY_FILE) if (self.folder / name).exists()
            ]
            if others:
                raise UserError(
                    f"{self.folder}: contains {' and '.join(others)} of something else: "
                    "choose another --output"
                )
            return
        cure = f"choose another --output, or move {self.folder} away"
        not_ours = f"{self.file}: is not a {PREDICTIONS_FILE} of this program: {cure}"
        with self.file.open("rb") as stream:
            first = stream.readline()
        if b"\n" not in first:  # stopped before its first completion, so there is nothing to mix
            if first[: len(FIRST_BYTES)] != FIRST_BYTES[: len(first)]:
                raise UserError(not_ours)
            return
        try:
            before = read_identity(self.folder / IDENTITY_FILE)
        except UserError as error:
            raise UserError(f"{str(error).partition(': move')[0]}: {cure}") from None
        if changed := changed_settings(before, self.identity):
            raise UserError(
                f"{self.file}: belongs to another evaluation ({'; '.join(changed)}): {cure}"
            )
        self.rows, self._dropped = _read_repaired(self.file)
        if not self.rows and first[: len(FIRST_BYTES)] != FIRST_BYTES:
            raise UserError(not_ours)
        self._check_size(cure)

    def _check_size(self, cure: str) -> None:
        """Raises UserError if there are more problems or samples than are asked for."""
        for unit, asked, found in (
            ("problems", self._num_problems, {row.problem for row in self.rows}),
            ("samples", self._num_samples, {row.sample for row in self.rows}),
        ):
            count = max(found, default=-1) + 1
            if count > asked:
                raise UserError(
                    f"{self.file}: contains {count} {unit}, but {asked} are asked for now: {cure}"
                )

    def __enter__(self) -> "PredictionsFile":
        """Open the file for more rows.

        Raises:
            UserError: the folder can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            intact = partial(map, _json_line, self.rows.values())
            if self.file.exists() and not has_only(self.file, intact()):
                replace_file(self.file, "".join(intact()))  # without a line that a kill cut short
            if self._dropped:
                print(
                    f"{self.file}: dropped {' and '.join(self._dropped)}, probably left by two "
                    "processes writing at the same time"
                )
            self._stream = self.file.open("a", encoding="utf-8")
            try:
                self.record({} if self.missing() else previous_timing(self.folder))
            except OSError:
                self._stream.close()
                raise
        except OSError as error:
            raise UserError(
                f"{self.folder}: can't be written ({error.strerror}): choose another --output"
            ) from None
        return self

    def record(self, timing: dict[str, Any]) -> None:
        """Write ``evaluation.json``, with what no later process can measure of the decoding.

        So a kill before the scores are written does not lose it.
        """
        content = self.identity | ({"timing": timing} if timing else {})
        replace_file(self.folder / IDENTITY_FILE, json.dumps(content, indent=2) + "\n")

    def write(self, row: dict[str, Any]) -> None:
        """Append a prediction as a complete line."""
        try:
            self._stream.write(_json_line(row))
            self._stream.flush()
        except OSError as error:  # which does not name the file
            error.filename = error.filename or str(self.file)
            raise
        if time.monotonic() - self._synced >= self._seconds_between_syncs:
            self._sync()
        self.rows[completion_id(row)] = row
        self.num_correct += row["correct"]

    def _sync(self) -> None:
        sync_open(self._stream.fileno(), self.file)
        self._synced = time.monotonic()

    def __exit__(self, *_: object) -> None:
        try:
            self._sync()
        finally:
            with naming(self.file):
                self._stream.close()


def open_files(
    open_file: Callable[..., PredictionsFile],
    folder: Path,
    identity: dict[str, Any],
    num_problems: int,
    num_samples: int | None,
    with_calculator: bool,
    sampling: dict[str, Any],
) -> dict[str, PredictionsFile]:
    """The files of an evaluation, by the name of the decoding, in the order of the decodings.

    Args:
        open_file: `PredictionsFile`, or what a test puts in its place.
        num_samples: for each problem; None if there are no samples.
        sampling: what the samples depend on beside ``identity``.

    Raises:
        UserError: one of the files can't be continued; see `PredictionsFile`.
    """
    more = {
        GREEDY: ({}, None),
        CALCULATOR: ({"with_calculator": True}, None),
        SAMPLES: (sampling | {"with_calculator": with_calculator}, num_samples),
    }
    files = {}
    for name, place in folders_of(folder, identity["split"], with_calculator, num_samples).items():
        settings, number = more[name]
        files[name] = open_file(place, identity | settings, num_problems, number)
    return files


def graded_row(
    problem_id: int,
    sample: int | None,
    problem: Problem,
    completion: str,
    stop: str,
    num_tokens: int,
) -> dict[str, Any]:
    """One completion with its verdict, as a row of ``predictions.jsonl``.

    Args:
        sample: its number; None in greedy decoding.
    """
    steps = count_steps(problem.answer)
    verdict = grade(completion, problem.gold, stop)
    return {
        "id": problem_id,
        **({} if sample is None else {"sample": sample}),
        "question": problem.question,
        "gold": problem.gold,
        "completion": completion,
        "answer": verdict.answer,
        "correct": verdict.correct,
        "stop": stop,
        "num_tokens": num_tokens,
        "label": verdict.label,
        "false_equation": verdict.false_equation,
        "steps": steps,
    }


def _json_line(row: dict[str, Any]) -> str:
    """In ASCII, so that no program mistakes a U+2028 in a question for the end of the line."""
    return json.dumps(row) + "\n"


def _read_repaired(file: Path) -> tuple[dict[CompletionId, dict[str, Any]], list[str]]:
    """The first row of each completion, and descriptions of the lines that were dropped."""
    damaged: list[int] = []
    read = read_predictions(file, drop_cut_line=True, damaged=damaged)
    possible = [row for row in read if min(completion_id(row)) >= 0]
    rows: dict[CompletionId, dict[str, Any]] = {}
    for row in possible:
        rows.setdefault(completion_id(row), row)
    duplicate, invalid = len(possible) - len(rows), len(damaged) + len(read) - len(possible)
    counts = ((duplicate, "duplicate"), (invalid, "invalid"))
    return rows, [f"{count} {kind} line{'s' * (count > 1)}" for count, kind in counts if count]
