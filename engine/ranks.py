"""The processes of a job that torchrun starts: who they are, and how they agree.

A script joins its job once, and hands the object on:

    with ranks.job(pick_device()) as here:
        folder = here.once(claim, path)           # rank 0 calls it; all get what it returned
        answers = here.gather(ask(here.share(questions)))

A process that was started alone gets `ALONE`, which has the same methods, communicates with nobody,
and needs no process group. So no caller has to ask how many there are. What ranks tell each other
is JSON, never a pickle.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import distributed

from engine.device_errors import is_out_of_memory
from engine.joining import part_of_this_start
from run.errors import NotFiniteError, Stopped, UserError, gist, one_line

# How long a process waits for another one that neither answers nor closes its connections, as when
# its machine loses power. It must exceed what one process does while the others wait for it: rank 0
# hashes a checkpoint. A process that was killed is noticed at once.
TIMEOUT = timedelta(minutes=30)
# How long to wait at the start, until all have connected.
START_TIMEOUT = timedelta(minutes=10)
# In the job's store: how many processes have ended with an error, and whether rank 0 has left.
REPORTED, LEFT = "reported", "left"
# How gloo and NCCL say that another process is gone or does not answer.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket closed",
    "Connection was likely closed",
    "NCCL communicator was aborted",
    "NCCL error",
)

NO_SIGNALS = torch.zeros(0)

Item = TypeVar("Item")


class Stop(Protocol):
    """What `run.signals.StopSignal` has."""

    signal_number: int | None


@dataclass(eq=False)
class Ranks:
    """This process among the ``size`` processes of its job.

    Every rank must call the same methods in the same order; each call but ``share`` waits for all.

    Attributes:
        rank: its number in the job; rank 0 prints, logs, and writes the files that all share.
        size: how many processes there are.
        store: what all can read and write without waiting for each other; None for one process.
        total: the sum of numbers that all ranks give, as an int.
    """

    rank: int = 0
    size: int = 1
    store: distributed.Store | None = field(default=None, repr=False)
    total: Callable[[Iterable[int]], int] = sum
    stop: Stop | None = field(default=None, repr=False)
    _signals: torch.Tensor = field(default=NO_SIGNALS, repr=False)

    def __post_init__(self) -> None:
        if self.size > 1:
            self.total = self._total

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function(*arguments)`` on rank 0 only, while the others wait.

        Returns:
            On every rank what it returned, which must be a JSON value.

        Raises:
            Exception: what it raised, on rank 0. `job` ends the others.
        """
        return self.broadcast(function(*arguments) if self.is_main else None)

    def broadcast(self, value: Any) -> Any:
        """The JSON value that rank 0 gives; what the others give is ignored."""
        return value if self.size == 1 else self.gather(value if self.is_main else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(content)]))
        longest = int(max(lengths))
        contents = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.cat([content, torch.zeros(longest - len(content), dtype=torch.uint8)])
        distributed.all_gather(contents, padded)
        return [
            json.loads(bytes(bytearray(each[: int(length)].tolist())))
            for each, length in zip(contents, lengths, strict=True)
        ]

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of ``numbers``, of the same shape and on the same kind of device.

        With them travels which signal each process has received (`agreed`).
        """
        if self.size == 1:
            return numbers
        # Made on the device: a copy from here would wait until it has computed the numbers.
        signals = numbers.new_zeros(self.size)
        signals[self.rank].fill_((self.stop and self.stop.signal_number) or 0)
        message = torch.cat([numbers.flatten(), signals])
        distributed.all_reduce(message)
        self._signals = message[numbers.numel() :]
        return message[: numbers.numel()].view_as(numbers)

    def _total(self, counts: Iterable[int]) -> int:
        return int(self.sum(torch.tensor(sum(counts), dtype=torch.float64)))

    @contextmanager
    def agreed(self, stop: Stop) -> Iterator[Stop]:
        """Listen to ``stop``, and give a signal to all ranks at the same step, by their next `sum`.

        Yields:
            ``stop`` itself in a process alone; otherwise what has the signal they agree on.
        """
        with stop:
            self.stop = stop if self.size > 1 else None
            yield self if self.size > 1 else stop

    @property
    def signal_number(self) -> int | None:
        """The first rank's signal that the last `sum` has brought to all; None without any."""
        return next((int(number) for number in self._signals.tolist() if number), None)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raises UserError on all ranks if their ``values`` differ, such as files or settings."""
        first, *others = self.gather(values)
        for rank, theirs in enumerate(others, start=1):
            for name in first:
                if theirs[name] != first[name]:
                    raise UserError(
                        f"torchrun: {name} is {first[name]!r} for process 0 and {theirs[name]!r} "
                        f"for process {rank}: give all of them the same command and the same files"
                    )

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of ``items``: every ``size``-th, from ``rank`` on."""
        return items[self.rank :: self.size]


ALONE = Ranks()


@contextmanager
def job(device: torch.device, given: Mapping[str, Any] | None = None) -> Iterator[Ranks]:
    """Join the job of which torchrun has made this process a part, and leave it at the end.

    An error in any process ends all of them, and one line says why: the first process that fails
    reports its error, and the others, which then lose their connection to it, end without a word.

    Args:
        device: where this process computes; it decides how tensors travel (gloo, NCCL).
        given: what every process must have been given, such as settings.

    Raises:
        UserError: the processes can't connect, or were not given the same; or another one was
            killed or no longer answers.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    ranks, store = _join(device)
    try:
        ranks.check_same(given or {})
        yield ranks
        if ranks.is_main:
            store.set(LEFT, "")
        ranks.wait()
    except BaseException as error:
        if _is_of_all(error, ranks):
            with suppress(RuntimeError):  # one of them has ended nevertheless
                ranks.wait()
        ending = _lost(error) if _is_lost(error) else error
        _ignore_torchrun()
        if not _is_first(store):
            _leave(getattr(ending, "exit_code", 1))
        if ending is not error:
            raise ending from None
        if not hasattr(error, "exit_code") and not isinstance(error, OSError | SystemExit):
            traceback.print_exception(error)
            _leave(1)
        raise
    distributed.destroy_process_group()


def _join(device: torch.device) -> tuple[Ranks, distributed.Store]:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=START_TIMEOUT))
        store = part_of_this_start(store, rank, size, START_TIMEOUT)
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"torchrun: the processes of this job can't connect ({one_line(error)[:160]}): start "
            "each of them with torchrun, and set GLOO_SOCKET_IFNAME if a machine has several "
            "networks"
        ) from None
    return Ranks(rank, size, store), store


def _is_of_all(error: BaseException, ranks: Ranks) -> bool:
    """Whether all ranks raise ``error`` after the same step, and so can leave together.

    torchrun ends all of them once one has ended, also rank 0 while it closes the run's log.
    """
    is_agreed = isinstance(error, Stopped) and ranks.signal_number is not None
    return is_agreed or isinstance(error, NotFiniteError)


def _is_lost(error: BaseException) -> bool:
    """Whether ``error`` says that another process is gone or does not answer."""
    is_one = isinstance(error, distributed.DistError)
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
    return (is_one or said) and not is_out_of_memory(error)


def _lost(error: BaseException) -> UserError:
    # NCCL's other errors may be its own, or follow from a process that is gone.
    is_sure = "NCCL error" not in str(error) or "ncclRemoteError" in str(error)
    return UserError(
        f"{'' if is_sure else 'NCCL failed, or '}another process of this job was killed or no "
        f"longer answers ({gist(error)}): type the same command again, which goes on from what was "
        f"saved{'' if is_sure else '; if it fails again, NCCL_DEBUG=INFO shows more'}"
    )


def _ignore_torchrun() -> None:
    """Go on to the end of this process, which torchrun asks for once another one has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _is_first(store: distributed.Store) -> bool:
    """Whether no other process of the job has reported an error."""
    try:
        return store.add(REPORTED, 1) == 1
    except RuntimeError:  # it was in a process that is gone
        return True


def _leave(exit_code: int) -> None:
    """End this process at once: others may never answer what its threads still wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
