"""metrics.jsonl: every logged number, the source of truth."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from run.errors import UserError, storage_cure
from run.files import replace_file, sync_open
from run.manifest import METRICS_FILE
from run.wandb_run import Tracker

LINE_SECONDS = 0.5  # how long another process may take for a line of metrics.jsonl


class MetricsLog:
    """``metrics.jsonl`` and the tracker together."""

    def __init__(
        self, folder: Path, tracker: Tracker, resume_step: float = math.inf, alone: bool = True
    ):
        """Open the log of a run; a resumed one stands at optimizer step ``resume_step``.

        Lines of later steps, from before a kill, are dropped: the resumed run writes them again. Those of
        evaluations stay, since it does not.

        Args:
            alone: whether no other process writes into it. Else nothing is dropped: a line that is only half
                there may be one that training is just writing, and in a new file it would miss the next.
        """
        self._tracker = tracker
        file = self._path = folder / METRICS_FILE
        try:
            lines = file.read_bytes().splitlines(keepends=True) if alone and file.exists() else []
            kept = [line for line in lines if _is_kept(line, resume_step)]
            if len(kept) < len(lines):
                replace_file(file, b"".join(kept))
            self._file = file.open(
                "a+b", buffering=0
            )  # each line in one piece, whoever else appends
            if not alone:
                self._end_line()
        except OSError as error:
            raise self._not_written(error) from None

    def _end_line(self) -> None:
        """Put what a kill cut in the middle on a line of its own; what is just being written ends by itself."""
        until = time.monotonic() + LINE_SECONDS
        while (size := self._file.seek(0, os.SEEK_END)) and os.pread(
            self._file.fileno(), 1, size - 1
        ) != b"\n":
            if time.monotonic() >= until:
                self._file.write(b"\n")
            time.sleep(0.01)

    def write(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        """Log ``numbers`` at ``step``; ``epoch`` counts passes over the training rows, with fractions."""
        line = {"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **numbers}
        content = json.dumps(line).encode() + b"\n"
        try:
            while content:  # a disk that fills up takes a part of it
                content = content[self._file.write(content) :]
            # A checkpoint that is on the disk has all lines before it there too.
            sync_open(self._file.fileno(), self._path)
        except OSError as error:
            raise self._not_written(error) from None
        self._tracker.log(line)

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path}: can't be written ({error.strerror}): {storage_cure(error)}, then type the same command "
            "again to go on from the last save"
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what did not fit on the disk has been said
            self._file.close()
        self._tracker.finish()


def is_logged(folder: Path, step: int, numbers: Mapping[str, float]) -> bool:
    """Whether a line of the run's ``metrics.jsonl`` has all of ``numbers`` at ``step``."""
    try:
        lines = (folder / METRICS_FILE).read_bytes().splitlines()
    except OSError:  # that it can't be written either is said where it is opened
        return False
    expected = numbers | {"step": step}
    return any(expected.items() <= line.items() for line in map(_parsed, lines))


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of ``metrics.jsonl``; empty where a kill cut it."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_kept(line: bytes, resume_step: float) -> bool:
    """Not one that a kill cut in the middle, nor one that is written again."""
    try:
        content = json.loads(line)
        return line.endswith(b"\n") and (
            content["step"] <= resume_step or any(key.startswith("eval/") for key in content)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
