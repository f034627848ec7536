"""predictions.jsonl: what a model wrote for each problem, as it grows, and read again."""

import codecs
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grading import mistakes, rules
from grading.dataset import Problem
from run.errors import UserError, one_line
from run.files import naming, replace_file, sync_open

# A kill loses no line that was written; this is what the loss of power may take. Each sync costs milliseconds.
SECONDS_BETWEEN_SYNCS = 1.0


PREDICTIONS_FILE, SCORES_FILE, IDENTITY_FILE = "predictions.jsonl", "scores.json", "evaluation.json"


FIRST_BYTES = b'{"id": '  # of each line


KINDS = {"id": int, "gold": str, "completion": str, "stop": str, "correct": bool, "sample": int}


NEEDED = ("id", "gold", "completion")  # of these in each line


# Which completion a row is: of which problem, and which sample of it; greedy decoding writes one, number 0.
Key = tuple[int, int]


class PredictionsFile:
    """``predictions.jsonl`` as it grows, and what it holds from before.

    Attributes:
        rows: the predictions by `Key`.
        num_correct: how many of them are, by the headline rule.
        identity: all that a completion depends on, with ``num_problems``, and ``num_samples`` where
            there are samples.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        num_problems: int,
        num_samples: int | None = None,
    ):
        """Read what an interrupted evaluation with the same identity left in ``folder``; nothing is written yet.

        Args:
            num_samples: of each problem; None for the one completion of greedy decoding.

        Raises:
            UserError: what is there belongs to another evaluation, or holds more than asked for
                now, or can't be read.
        """
        self.folder, self.file = folder, folder / PREDICTIONS_FILE
        self._asked = {"num_problems": num_problems} | (
            {"num_samples": num_samples} if num_samples else {}
        )
        self.identity = identity | self._asked
        self.rows: dict[Key, dict[str, Any]] = {}
        self._dropped: list[str] = []
        self._synced = time.monotonic()
        try:
            if self.file.exists():
                self._read_finished()
            elif others := [
                name for name in (SCORES_FILE, IDENTITY_FILE) if (folder / name).exists()
            ]:
                raise UserError(
                    f"{folder}: holds {' and '.join(others)} of something else: choose another --output"
                )
        except OSError as error:
            raise UserError(
                f"{folder}: can't be read ({error.strerror}): choose another --output"
            ) from None
        self.num_correct = sum(is_correct(row) for row in self.rows.values())

    @property
    def size(self) -> int:
        """How many rows it will hold."""
        return self._asked["num_problems"] * self._asked.get("num_samples", 1)

    def missing(self) -> list[Key]:
        """Which completions it does not hold yet, problem after problem."""
        samples = range(self._asked.get("num_samples", 1))
        asked = (
            (index, sample) for index in range(self._asked["num_problems"]) for sample in samples
        )
        return [key for key in asked if key not in self.rows]

    def _read_finished(self) -> None:
        cure = f"choose another --output, or move {self.folder} away"
        content = self.file.read_bytes()
        if b"\n" not in content:  # stopped before its first completion: nothing to mix with
            if content[: len(FIRST_BYTES)] != FIRST_BYTES[: len(content)]:
                raise UserError(f"{self.file}: is no {PREDICTIONS_FILE} of this program: {cure}")
            return
        try:
            before = read_identity(self.folder / IDENTITY_FILE)
        except UserError as error:
            raise UserError(f"{str(error).partition(': move')[0]}: {cure}") from None
        if changed := differences(before, self.identity):
            raise UserError(
                f"{self.file}: belongs to another evaluation ({'; '.join(changed)}): {cure}"
            )
        self.rows, self._dropped = _mended(self.file)
        if not self.rows and content[: len(FIRST_BYTES)] != FIRST_BYTES:
            raise UserError(f"{self.file}: is no {PREDICTIONS_FILE} of this program: {cure}")
        if not self.rows:
            return
        held = {
            "problems": max(index for index, _ in self.rows) + 1,
            "samples": max(s for _, s in self.rows) + 1,
        }
        for what, count in held.items():
            if count > (asked := self._asked.get(f"num_{what}", 1)):
                raise UserError(
                    f"{self.file}: holds {count} {what}, with {asked} asked for now: {cure}"
                )

    def write(
        self, key: Key, problem: Problem, completion: str, stop: str, num_tokens: int
    ) -> None:
        """Add one prediction as one whole line."""
        label, false_equation = mistakes.mistake(completion, problem.gold, stop)
        row = {
            "id": key[0],
            **({"sample": key[1]} if "num_samples" in self._asked else {}),
            "question": problem.question,
            "gold": problem.gold,
            "completion": completion,
            "answer": rules.extract_openai(completion),
            "correct": rules.correct_openai(completion, problem.gold),
            "stop": stop,
            "num_tokens": num_tokens,
            "label": label,
            "false_equation": false_equation,
            "steps": mistakes.count_steps(problem.answer),
        }
        with naming(self.file):
            self._stream.write(_json_line(row))
            self._stream.flush()
        if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
            self._sync()
        self.rows[key] = row
        self.num_correct += row["correct"]

    def __enter__(self) -> "PredictionsFile":
        """Open the file for more rows.

        Raises:
            UserError: the folder can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = "".join(_json_line(row) for row in self.rows.values())
            if self.file.exists() and self.file.read_bytes() != whole.encode():
                replace_file(self.file, whole)  # without the line that a kill cut in the middle
            if self._dropped:
                print(
                    f"{self.file}: dropped {' and '.join(self._dropped)}, as two writers at a time leave them"
                )
            self._stream = self.file.open("a", encoding="utf-8")
            try:
                replace_file(
                    self.folder / IDENTITY_FILE, json.dumps(self.identity, indent=2) + "\n"
                )
            except OSError:
                self._stream.close()
                raise
        except OSError as error:
            raise UserError(
                f"{self.folder}: can't be written ({error.strerror}): choose another --output"
            ) from None
        return self

    def _sync(self) -> None:
        sync_open(self._stream.fileno(), self.file)
        self._synced = time.monotonic()

    def __exit__(self, *_: object) -> None:
        try:
            self._sync()
        finally:
            with naming(self.file):
                self._stream.close()


def key_of(row: dict[str, Any]) -> Key:
    return row["id"], row.get("sample", 0)


def is_correct(row: dict[str, Any]) -> bool:
    """By the headline rule, whatever the row says of itself."""
    return rules.correct_openai(row["completion"], row["gold"])


def say_contradictions(rows: Iterable[dict[str, Any]], source: object) -> None:
    """Print one line where rows say of themselves what the headline rule does not."""
    found = [row["id"] for row in rows if "correct" in row and row["correct"] != is_correct(row)]
    if found:
        print(
            f"{source}: {len(found)} rows have a 'correct' that the headline rule contradicts (ids "
            f"{rules.some(found)}): the rule counts"
        )


def _json_line(row: dict[str, Any]) -> str:
    return (
        json.dumps(row) + "\n"
    )  # ASCII: U+2028 in a question must not look like a line's end to anyone


def _mended(file: Path) -> tuple[dict[Key, dict[str, Any]], list[str]]:
    """The first row of each completion in a ``predictions.jsonl``, and what had to be left out, in words."""
    damaged: list[int] = []
    read = read_predictions(file, drop_cut_line=True, damaged=damaged)
    possible = [row for row in read if min(key_of(row)) >= 0]
    rows: dict[Key, dict[str, Any]] = {}
    for row in possible:
        rows.setdefault(key_of(row), row)
    double, unread = len(possible) - len(rows), len(damaged) + len(read) - len(possible)
    counts = ((double, "that stood there before"), (unread, "that can't be read"))
    return rows, [f"{count} line{'s' * (count > 1)} {what}" for count, what in counts if count]


def read_predictions(
    file: Path, drop_cut_line: bool = False, damaged: list[int] | None = None
) -> list[dict[str, Any]]:
    """The rows of a ``predictions.jsonl``, each checked to have what scoring needs.

    Those of other programs may lack ``stop`` (or have null there) and ``correct``.

    Args:
        drop_cut_line: a last line without its end, from a kill, is no error.
        damaged: takes the numbers of lines that are no predictions; None: the first is an error.
    """
    try:
        lines = (
            file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        )  # which editors may add
    except OSError as error:
        raise UserError(
            f"{file}: can't be read ({error.strerror}): name a predictions.jsonl"
        ) from None
    if lines[-1] == b"" or drop_cut_line:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))  # of bytes json would guess the encoding
            if row.get("stop", "") is None:  # so some programs write that they don't know
                del row["stop"]
            for key, kind in KINDS.items():
                if (key in row or key in NEEDED) and type(row[key]) is not kind:
                    raise ValueError(f"{key!r} is {row[key]!r}, not of type {kind.__name__}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if damaged is not None:
                damaged.append(number)
                continue
            raise UserError(
                f"{file}, line {number}: is no prediction ({type(error).__name__}: {one_line(error)[:120]}): each line "
                f"is an object with {', '.join(NEEDED)}, as evaluate.py writes them; restore it or evaluate again"
            ) from None
        rows.append(row)
    return rows


def read_identity(file: Path) -> dict[str, Any]:
    """An ``evaluation.json``, or the ``scores.json`` that holds the same and more; empty where there is none."""
    try:
        identity = json.loads(file.read_bytes()) if file.exists() else {}
        counts = [identity.get(key, 1) for key in ("num_problems", "num_samples")]
        if not all(isinstance(count, int) for count in counts):
            raise ValueError("num_problems and num_samples must be whole numbers")
        return identity
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: is damaged ({one_line(error)[:120]}): move it away or evaluate again"
        ) from None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two evaluations differ, apart from how many problems they are of and how the checkpoint is spelt."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in (before | now)
        # weights says which model it is
        if key not in ("num_problems", "num_samples", "checkpoint")
        and before.get(key) != now.get(key)
        # An older version did not write it down; it read a lone tokenizer.model otherwise, and all else as now.
        and not (
            key == "tokenizer"
            and key not in before
            and not str(now[key]).startswith("tokenizer.model")
        )
    ]


def read_scores(file: Path) -> dict[str, Any]:
    """A ``scores.json``; nothing where it is damaged, since it is written anew from the predictions."""
    try:
        return read_identity(file)
    except UserError:
        return {}


def said_before(folder: Path) -> dict[str, Any]:
    """What an earlier ``scores.json`` in ``folder`` says of the decoding: its time, and whether it was verified."""
    before = read_scores(folder / SCORES_FILE)
    return {
        key: before[key]
        for key in ("seconds", "tokens_per_second", "verified_batching")
        if key in before
    }
