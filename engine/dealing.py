"""Completions of one job: rank 0 deals the prompts out, and the others send back what they wrote.

Completions travel through the job's store, in whose queues a process can put one down or look for
one without waiting for another process. So each reaches rank 0 as soon as it is finished, while all
of them go on decoding.

Prompts are dealt in advance, each to the next rank in turn. Ranks with equal devices finish at
about the same time, and in bfloat16, where a completion can depend on those beside it, the same job
writes the same completions again. If ranks took prompts from a shared queue, chance would decide
which prompts are decoded together.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

from engine.decoding import Completion
from engine.ranks import LEFT, REPORTED, TIMEOUT, Ranks
from run.errors import UserError

COMPLETIONS = "completions"  # the queue of those that are on their way to rank 0
SECONDS_BETWEEN_LOOKS = 0.05  # one takes about 0.1 ms
SECONDS_BETWEEN_SIGNS = 1.0

Ids = Sequence[tuple[int, int]]


def parts_of(count: int, size: int) -> list[list[int]]:
    """The positions of ``count`` prompts that each of ``size`` ranks gets.

    Each round begins with another rank, since in an evenly spread sample, such as the one that is
    verified, all could otherwise be of the same rank.
    """
    parts: list[list[int]] = [[] for _ in range(size)]
    for position in range(count):
        parts[(position + position // size) % size].append(position)
    return parts


class Deal:
    """On rank 0: a part of the prompts for each rank, and the completions that come back.

    Attributes:
        own: the part of rank 0, in their order.
        positions: of all prompts in the order of their parts, beginning with rank 0's. The index of
            a completion is its place in this list.
    """

    def __init__(self, here: Ranks, ids: Ids, how: Mapping[str, Any]):
        """
        Args:
            ids: what names the prompts; pairs of integers.
            how: a JSON object for the other ranks, which says how to complete them.
        """
        parts = parts_of(len(ids), here.size)
        self.positions = list(chain.from_iterable(parts))
        self.own = [ids[position] for position in parts[0]]
        starts = [0, *accumulate(map(len, parts))]
        for rank in range(1, here.size):
            part = [ids[position] for position in parts[rank]]
            _put(here, _queue_of(rank), {"ids": part, "start": starts[rank], "how": how})
        self._here, self._missing = here, len(ids) - len(self.own)
        self._heard, self._next_look = time.monotonic(), 0.0

    def arrived(self) -> list[Completion]:
        """Completions that have arrived since the last call. It takes no time, so call it often.

        Raises:
            UserError: another process has failed.
        """
        now = time.monotonic()
        if now < self._next_look:
            return []
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        found = list(_taken(self._here, COMPLETIONS))
        if found:
            self._heard = now
        completions = [Completion(**fields) for fields in found if fields]
        self._missing -= len(completions)
        return completions

    def rest(self) -> Iterator[Completion]:
        """Wait for what has not arrived yet.

        Raises:
            UserError: another process has failed, or none has given a sign of life for too long.
        """
        while self._missing:
            yield from self.arrived()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if time.monotonic() - self._heard > TIMEOUT.total_seconds():
                raise UserError(
                    f"torchrun: no other process of this job has given a sign of life for {TIMEOUT}"
                    ": see whether its machine works; the same command goes on from what was saved"
                )


class Worker:
    """On the other ranks: the parts that rank 0 deals to this one, and the way back to rank 0."""

    def __init__(self, here: Ranks):
        self._here, self._start, self._next_sign = here, 0, 0.0

    def parts(self) -> Iterator[tuple[Ids, dict[str, Any]]]:
        """``ids`` and ``how`` of one `Deal` after another, until rank 0 leaves the job.

        Raises:
            UserError: another process has failed.
        """
        while not self._here.store.check([LEFT]):
            for task in _taken(self._here, _queue_of(self._here.rank)):
                self._start = task["start"]
                yield task["ids"], task["how"]
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def send(self, completion: Completion) -> None:
        fields = {
            "index": self._start + completion.index,
            "prompt_length": completion.prompt_length,
            "token_ids": completion.token_ids,
            "stop": completion.stop,
        }
        _put(self._here, COMPLETIONS, fields)

    def give_sign(self) -> list[Completion]:
        """Let rank 0 know that this rank is at work. Few signs are sent, so call it often.

        Returns:
            An empty list: no completions arrive here.

        Raises:
            UserError: another process has failed.
        """
        if time.monotonic() >= self._next_sign:
            self._next_sign = time.monotonic() + SECONDS_BETWEEN_SIGNS
            _check_nobody_failed(self._here)
            _put(self._here, COMPLETIONS, {})
        return []


def _queue_of(rank: int) -> str:
    return f"parts of rank {rank}"


def _put(here: Ranks, queue: str, value: Mapping[str, Any]) -> None:
    here.store.queue_push(queue, json.dumps(value))


def _taken(here: Ranks, queue: str) -> Iterator[dict[str, Any]]:
    """What is in ``queue`` now. Raises UserError if another process has failed."""
    _check_nobody_failed(here)
    for _ in range(here.store.queue_len(queue)):
        yield json.loads(here.store.queue_pop(queue))


def _check_nobody_failed(here: Ranks) -> None:
    if here.store.check([REPORTED]):
        raise UserError("another process of this job has failed, and says why")
