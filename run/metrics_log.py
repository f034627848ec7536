"""metrics.jsonl, the authoritative record of every logged number."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from run.errors import UserError, exit_code_of, storage_cure
from run.files import replace_file, sync_open
from run.manifest import METRICS_FILE
from run.metrics_file import parsed_line, read_metrics
from run.tracker import Tracker

LINE_SECONDS = 0.5  # how long another process may take to finish a line of metrics.jsonl


class MetricsLog:
    """``metrics.jsonl`` and the tracker together."""

    def __init__(
        self,
        folder: Path,
        tracker: Tracker,
        resume_step: float = math.inf,
        alone: bool = True,
        exit_code: int | None = None,
    ):
        """Open the log of a run.

        Args:
            resume_step: the optimizer step at which a run resumes. Lines of later steps, written
                before a kill, are dropped, since the run will write them again. Lines of
                evaluations are kept, since it won't.
            alone: whether this process is the only writer. If not, nothing is dropped. An
                incomplete line may be one that training is writing at this moment, and if the file
                were replaced, the next line from training would be lost.
            exit_code: how the run has ended, for the tracker; None: it ends with this log, and as
                this log does.
        """
        self._tracker, self._exit_code = tracker, exit_code
        file = self._path = folder / METRICS_FILE
        try:
            lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
            kept = [line for line in lines if not alone or _is_kept(line, resume_step)]
            if len(kept) < len(lines):
                replace_file(file, b"".join(kept))
            tracker.go_on_from(map(parsed_line, kept))
            # Unbuffered, so that each line is appended in one piece even if others append too.
            self._file = file.open("a+b", buffering=0)
            if not alone:
                self._end_line()
            self._end = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._not_written(error) from None

    def _end_line(self) -> None:
        """End a line that a kill cut short, after waiting in case it is still being written."""
        until = time.monotonic() + LINE_SECONDS
        while (size := self._file.seek(0, os.SEEK_END)) and os.pread(
            self._file.fileno(), 1, size - 1
        ) != b"\n":
            if time.monotonic() >= until:
                self._file.write(b"\n")
            time.sleep(0.01)

    def write(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        """Log ``numbers`` at ``step``; ``epoch`` is the number of passes over the training rows."""
        line = {"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **numbers}
        content = json.dumps(line).encode() + b"\n"
        length = len(content)
        try:
            while content:  # a nearly full disk may accept only a part
                content = content[self._file.write(content) :]
            # By the time a checkpoint is on disk, all lines before it must be, too.
            sync_open(self._file.fileno(), self._path)
            end = os.lseek(self._file.fileno(), 0, os.SEEK_CUR)
            self._track_evaluations(end - length)
        except OSError as error:
            raise self._not_written(error) from None
        self._end = end
        self._tracker.log(line)

    def _track_evaluations(self, until: int) -> None:
        """Tell the tracker what evaluations have added since the last line, up to byte ``until``.

        They leave that to us (`run.evaluation.log_scores`).
        """
        added = os.pread(self._file.fileno(), max(0, until - self._end), self._end)
        for line in map(parsed_line, added.splitlines()):
            if _is_of_evaluation(line):
                self._tracker.log(line)

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path}: can't be written ({error.strerror}): {storage_cure(error)}, "
            "then type the same command again to resume from the last save"
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        with suppress(OSError):  # `write` has reported it
            self._track_evaluations(os.fstat(self._file.fileno()).st_size)
            self._file.close()
        ended = self._exit_code
        self._tracker.finish(exit_code_of(error) if ended is None else ended)


class NoMetrics:
    """The log of a process for which another one keeps it."""

    def write(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        pass

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def is_logged(folder: Path, step: int, numbers: Mapping[str, float]) -> bool:
    """Whether a line of the run's ``metrics.jsonl`` has all of ``numbers`` at ``step``.

    Not if it can't be read, which `MetricsLog` reports.
    """
    expected = numbers | {"step": step}
    return any(expected.items() <= line.items() for line in read_metrics(folder))


def _is_kept(line: bytes, resume_step: float) -> bool:
    """Whether a line is complete and won't be repeated by a run that resumes at ``resume_step``."""
    try:
        content = json.loads(line)
        return line.endswith(b"\n") and (
            content["step"] <= resume_step or _is_of_evaluation(content)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_of_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)
