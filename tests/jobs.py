"""Starts jobs of several processes, as torchrun does, within milliseconds.

A server that has imported everything once forks each process, since the imports take seconds.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import processes
from torch import distributed

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # which no process of these tests needs, and which is less than it would wait


@dataclass(frozen=True)
class Ended:
    """How a process of a job ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def new_store() -> distributed.TCPStore:
    return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Job:
    """The processes that call ``function(*arguments)``, each as a rank of its own."""

    def __init__(
        self,
        size: int,
        folder: Path,
        function: Callable[..., Any],
        *arguments: Any,
        before: "Job | None" = None,
    ):
        """``before``: the job of which these processes are a restart, with the same store."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # As torchrun's agent does it, so that it outlives each of them.
        self._store = before._store if before else new_store()
        environment = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self.processes = [
            processes.Process(
                target=_be_rank,
                args=(rank, environment, folder / str(rank), function, arguments),
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def end(self, seconds: float = SECONDS) -> list[Ended]:
        """Wait until all have ended, in at most so many seconds."""
        until = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.join(max(0.0, until - time.monotonic()))
            late = [number for number, each in enumerate(self.processes) if each.exitcode is None]
            assert not late, (late, self.printed())
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, *printed)
            for process, printed in zip(self.processes, self.printed(), strict=True)
        ]

    def printed(self) -> list[tuple[str, str]]:
        return [
            tuple(_read(self._folder / f"{rank}.{name}") for name in ("out", "err"))
            for rank in range(len(self.processes))
        ]


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def run(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Ended]:
    """Run a job of which every process must succeed."""
    ended = Job(size, folder, function, *arguments).end()
    assert all(each.code == 0 for each in ended), "\n".join(map(str, ended)).replace("\\n", "\n")
    return ended


def _be_rank(
    rank: int,
    environment: dict[str, str],
    printed: Path,
    function: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{printed}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    warnings.simplefilter("error")
    function(*arguments)
    sys.stdout.flush()
