"""A save of two processes: wherever one of them is killed, there are whole checkpoints."""

import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from conftest import tree

import train
from engine.device import kernels_for
from engine.loading import load_model, load_tokenizer
from engine.measure import Measurement
from engine.optimizer import build_optimizer, make_state
from engine.ranks import job
from engine.sharding import shard
from engine.state import pack_state, unpack_state
from engine.together import parts_of
from run import checkpoint
from run.folder import restore
from run.manifest import BEST, LAST, PREVIOUS, fault_of
from run.progress import Progress
from run.saves import Saves

CPU = torch.device("cpu")
# How long a process that can go on takes at most to its next event.
SECONDS_TO_AN_EVENT = 0.05

OnPoint = Callable[[str], None]


def optimizer_of(weights: Any) -> torch.optim.Optimizer:
    return build_optimizer(weights, 1e-2, (0.9, 0.999), 1e-8, 0.1)


def save_thrice(
    model_folder: Path, folder: Path, is_damaged: bool, on_point: Callable[[int], OnPoint]
) -> None:
    """In each process: save best and last of steps 1 to 3, each with other weights.

    Args:
        is_damaged: whether last is damaged before step 3 is saved.
        on_point: given the rank, what is called before each file operation of the last two saves.
    """
    sys.path.append(str(jobs.ROOT / "benchmarks"))
    from kill_sweep import watch

    with job(CPU) as here:
        model = load_model(model_folder, torch.float64, CPU, kernels_for(CPU), ranks=here)
        shard(model, None, True)
        optimizer = optimizer_of(model.parameters())
        make_state(optimizer)
        parts = train.Parts(**parts_of(here, checkpoint.save_checkpoint, train.complete))
        tokenizer = load_tokenizer(model_folder)
        saves = Saves(folder, {"checkpoint_steps": None}, {}, 7, None, {}, tokenizer, parts)
        for step in (1, 2, 3):
            with torch.no_grad():
                for tensor in (*model.parameters(), optimizer.state[model.trained[0]]["exp_avg"]):
                    tensor.add_(1)
            if step == 3:
                saves.removals.wait()
                here.once(damage, folder / LAST) if is_damaged else here.wait()
                watch(str(folder), on_point(here.rank))
            progress = Progress(step=step)
            if step != 2:
                saves.save_best(model, progress, Measurement(1.0, 2.7, 3))
            saves.save_last(model, progress, *pack_state(optimizer, asdict(progress)))
        saves.removals.wait()


def damage(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


# ---------------------------------------------------------------- at every event


def hold(ends: list[Connection], rank: int) -> OnPoint:
    """Announces each event of this rank, and waits until the test lets it happen."""
    ends[1 - rank].close()
    one_at_a_time = threading.Lock()  # files are hashed and removed in threads

    def on_point(point: str) -> None:
        with one_at_a_time:
            ends[rank].send(point)
            ends[rank].recv()

    return on_point


def events(of_ranks: list[Connection], ahead: int) -> Iterator[tuple[int, str]]:
    """The rank and the name of each event, just before it happens.

    Rank ``ahead`` goes on wherever it can. So the other one is held at each of its events until
    rank ``ahead`` can't go on without it, as if the other had been killed there.
    """
    running, held = dict(enumerate(of_ranks)), {}
    until = time.monotonic() + jobs.SECONDS
    while running:
        assert time.monotonic() < until, held
        moving = [running[rank] for rank in running.keys() - held.keys()]
        patience = 0 if ahead in held else SECONDS_TO_AN_EVENT if held else jobs.SECONDS
        arrived = wait(moving, patience) if moving else []
        for connection in arrived:
            rank = of_ranks.index(connection)
            try:
                held[rank] = connection.recv()
            except EOFError:  # it has ended
                del running[rank]
        if held and not arrived:
            rank = ahead if ahead in held else 1 - ahead
            yield rank, held.pop(rank)
            of_ranks[rank].send(None)


def after_a_kill(folder: Path, copy: Path) -> dict[str, dict[str, bytes]]:
    """The files of best, and of the checkpoint to resume from, if all is killed now."""
    shutil.copytree(folder, copy, copy_function=os.link)  # nothing is written into these files
    newest = checkpoint.newest_intact(copy)
    assert newest is not None and fault_of(copy / BEST) is None
    found = {LAST: tree(newest), BEST: tree(copy / BEST)}
    shutil.rmtree(copy)
    return found


@pytest.mark.parametrize(("ahead", "is_damaged"), [(0, False), (1, False), (0, True)])
def test_at_every_event_of_a_save_there_are_whole_checkpoints(
    tmp_path: Path, model_folder: Path, ahead: int, is_damaged: bool
) -> None:
    """Guards against a checkpoint in place before the slices of all ranks, or after the old one.

    What an event finds in the folder is what a kill there leaves: of all processes, or of this one
    where the other has gone ahead.
    """
    folder = tmp_path / "run"
    of_ranks, ends = map(list, zip(*(Pipe() for _ in range(2)), strict=True))
    saving = partial(save_thrice, model_folder, folder, is_damaged)
    started = jobs.Job(2, tmp_path / "job", saving, partial(hold, ends))
    for end in ends:
        end.close()
    seen, found, before, old = set(), [], {}, {}
    for rank, event in events(of_ranks, ahead):
        seen.add((rank, event.split()[0]))
        now = tree(folder)
        if not before:
            old = {name: tree(folder / name) for name in (LAST, BEST)}
            old[LAST] = tree(folder / PREVIOUS) if is_damaged else old[LAST]
        if now != before:
            before = now
            found.append(after_a_kill(folder, tmp_path / "copy"))
    assert [each.code for each in started.end()] == [0, 0]
    of_both = {(rank, kind) for rank in (0, 1) for kind in ("open", "os.fsync")}
    of_one = {(0, f"os.{kind}") for kind in ("mkdir", "rename", "remove", "rmdir")}
    assert of_both | of_one <= seen, seen
    for name, files in old.items():
        new = tree(folder / name)
        is_new = [each[name] == new for each in found]
        assert all(each[name] in (files, new) for each in found) and files != new
        assert is_new == sorted(is_new) and {*is_new} == {False, True}, is_new


# ---------------------------------------------------------------- kills


def die(victim: int, at: str, rank: int) -> OnPoint:
    def on_point(point: str) -> None:
        if rank == victim and re.fullmatch(at, point):
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the other threads may get the signal first

    return on_point


@pytest.mark.parametrize(
    ("victim", "at", "step"),
    [
        (1, "open /.last.staged/state/.*", 2),
        (1, "os.fsync ended", 2),
        (0, "os.rename /.last.staged/.*", 2),
        (0, "os.rename /previous", 3),
    ],
)
def test_a_kill_within_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, model_folder: Path, victim: int, at: str, step: int
) -> None:
    """Guards against a process that goes on alone, and a checkpoint that one process can't read."""
    folder = tmp_path / "run"
    saving = partial(save_thrice, model_folder, folder, False)
    ended = jobs.Job(2, tmp_path / "job", saving, partial(die, victim, at)).end()
    assert ended[victim].code == -signal.SIGKILL and ended[1 - victim].code == 1, ended
    newest = checkpoint.newest_intact(folder)
    model = load_model(newest, torch.float64, CPU)
    optimizer = optimizer_of(model.parameters())
    unpack = partial(unpack_state, optimizer=optimizer)
    assert restore(newest, unpack, 9, None, 512).step == step
    first = next(iter(optimizer.state.values()))["exp_avg"]
    assert (first == step).all()
