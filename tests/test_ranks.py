"""Several processes of one job: how they agree, and how they end together."""

import os
import signal
import time
from pathlib import Path

import jobs
import pytest
import torch

from engine.ranks import ALONE, Ranks, job
from run.errors import Stopped, UserError
from run.script import run_script

CPU = torch.device("cpu")


def talk(sizes: list[int]) -> None:
    with job(CPU) as here:
        print("heard")
        assert here.size in sizes and here.is_main == (here.rank == 0)
        each = [{"rank": rank, "text": "é" * rank} for rank in range(here.size)]
        assert here.gather(each[here.rank]) == each
        assert here.broadcast(here.rank) == 0
        assert here.once(lambda: [1.5, None]) == [1.5, None]
        assert here.sum(torch.tensor([here.rank, 1.0])).tolist() == [sum(range(here.size)), 3]
        dealt = here.gather(list(here.share(range(7))))
        assert sorted(item for share in dealt for item in share) == list(range(7))
        here.wait()


def test_ranks_agree_and_only_the_first_one_prints(tmp_path: Path) -> None:
    ended = jobs.run(3, tmp_path, talk, [3])
    assert [each.out for each in ended] == ["heard\n"] * 3  # `run_script` silences them


def test_a_process_alone_needs_no_other() -> None:
    with job(CPU) as here:
        assert here is ALONE and here == Ranks(0, 1)
        assert here.once(lambda: 3) == here.broadcast(3) == 3 and here.gather(4) == [4]
        assert here.share([1, 2, 3]) == [1, 2, 3] and here.sum(torch.ones(2)).tolist() == [1, 1]
        here.wait()
    assert not torch.distributed.is_initialized()


def fail(how: str, at: int) -> None:
    run_script(failing, how, at)


def failing(how: str, at: int) -> None:
    with job(CPU) as here:
        print(f"rank {here.rank} is here")
        here.wait()
        if how == "stopped":  # by the same signal, on all
            raise Stopped(signal.SIGTERM, "as agreed")
        if here.rank == at:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {
                "mistake": UserError("x: is wrong: mend it"),
                "bug": ZeroDivisionError("a bug"),
                "full": OSError(28, "No space left on device", "/full"),
            }[how]
        here.wait()


@pytest.mark.parametrize(
    ("how", "at", "codes", "line"),
    [
        ("mistake", 0, {2}, "error: x: is wrong: mend it\n"),
        ("mistake", 2, {2}, "error: x: is wrong: mend it\n"),
        ("full", 1, {2}, "error: /full: No space left on device: make room there"),
        ("stopped", 0, {143}, "stopped: as agreed\n"),
        ("bug", 1, {1, 2}, "ZeroDivisionError: a bug\n"),
        ("killed", 0, {2, -9}, "error: another process of this job was killed or no longer answ"),
        ("killed", 2, {2, -9}, "error: another process of this job was killed or no longer answ"),
    ],
)
def test_a_failing_process_ends_all_with_one_line(
    tmp_path: Path, how: str, at: int, codes: set[int], line: str
) -> None:
    """Guards against processes that wait for a dead one, and one line from each of them."""
    started = time.monotonic()
    ended = jobs.Job(3, tmp_path, fail, how, at).end()
    assert time.monotonic() - started < 20
    assert {each.code for each in ended} == codes, ended
    written = "".join(each.err for each in ended)
    assert line in written, ended
    assert how == "bug" or written.count("\n") == 1, ended
    assert [each.out for each in ended] == ["rank 0 is here\n", "", ""]
