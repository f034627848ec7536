"""Saves beside training: from copies, in order, waited for wherever something depends on them."""

import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from conftest import (
    Killed,
    flags,
    kill,
    make_config,
    named,
    run_folder,
    small_run,
    step_that,
    tree,
)
from safetensors import safe_open

import train
from engine import memory, state
from engine.ranks import ALONE
from engine.together import parts_of
from run import checkpoint, manifest, selftest, training_json
from run.checkpoint import save_checkpoint
from run.files import forget_what_was_said
from run.manifest import BEST, LAST, PREVIOUS
from run.saves import Saves, Snapshot

SECONDS = 60  # after which a test fails that would wait forever
Tensors = Mapping[str, torch.Tensor]


def copy(model: Any, tensors: Tensors, *others: Tensors) -> dict[str, torch.Tensor]:
    """As on a GPU with enough host memory."""
    return state.copied(tensors)


class Save:
    """`save_checkpoint`, which keeps the name, step and thread of each save.

    Attributes:
        before, after: called with name and step of each save beside training.
    """

    def __init__(
        self,
        before: Callable[[str, int], object] = lambda *_: None,
        after: Callable[[str, int], object] = lambda *_: None,
    ):
        self.before, self.after = before, after
        self.done: list[tuple[str, int]] = []
        self.beside: list[tuple[str, int]] = []

    def __call__(
        self,
        folder: Path,
        model: Any,
        tokenizer: Any,
        description: Any,
        *rest: Any,
        **removals: Any,
    ):
        which = folder.name, description["step"]
        is_beside = threading.current_thread() is not threading.main_thread()
        if is_beside:
            self.beside.append(which)
            self.before(*which)
        save_checkpoint(folder, model, tokenizer, description, *rest, **removals)
        self.done.append(which)
        if is_beside:
            self.after(*which)


def wait_for(event: threading.Event) -> None:
    assert event.wait(SECONDS), "what a save beside training waits for has not come"


def is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def step_of(folder: Path) -> int:
    return training_json.read_description(folder)["step"]


@pytest.fixture
def every_4(settings: dict[str, str]) -> dict[str, str]:
    """The settings of a run of 14 steps that saves after steps 4, 7, 8, 12 and 14."""
    settings["checkpoint_steps"] = "4"
    return settings


@pytest.fixture(scope="module")
def whole(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, whose training waited for its saves. No test changes it."""
    settings = small_run(model_folder, data_folder, tmp_path_factory.mktemp("whole-4"))
    settings["checkpoint_steps"] = "4"
    save = Save()
    train.main(make_config(settings), save=save, report=lambda *_: None)
    assert save.beside == []  # by default on a CPU
    return run_folder(settings)


def assert_same_run(folder: Path, whole: Path, *names: str) -> None:
    for name in names:
        assert manifest.fault_of(folder / name) is None
        one, other = tree(folder / name), tree(whole / name)
        assert one.keys() == other.keys()
        for file in one.keys() - {manifest.DESCRIPTION_FILE, manifest.MANIFEST_FILE}:
            assert one[file] == other[file], (name, file)
        assert described(folder / name) == described(whole / name)


def described(folder: Path) -> dict[str, Any]:
    """The description of a checkpoint, without what differs from run to run."""
    description = training_json.read_description(folder)
    for part in (description, description.get("state", {}).get("progress", {})):
        part.pop("settings", None)
        part.pop("wandb_run_id", None)
    return description


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("is_tied", [False, True])
def test_copies_are_written_as_the_same_files(
    make_llama, tokenizer, tmp_path: Path, is_tied: bool
) -> None:
    """Guards against a tied head that is written twice, and copies that training changes."""
    model = make_llama(420, tie_word_embeddings=is_tied).to(torch.bfloat16)
    tensors = {
        "step": torch.tensor(3.0),
        "moment": torch.randn(420, 32),
        "random": torch.get_rng_state(),
    }
    rest = tokenizer, {"step": 1}
    save_checkpoint(tmp_path / "at once", model, *rest, tensors, part_bytes=40_000)
    snapshot = Snapshot(model, 1, state.copied(model.state_dict(), piece_bytes=1000))
    copies = state.copied(tensors, piece_bytes=1000)
    for tensor in (*model.parameters(), *tensors.values()):
        tensor.data.zero_()
    for name in ("last", "again"):  # as best and last share their weights
        save_checkpoint(tmp_path / name, snapshot, *rest, copies, part_bytes=40_000)
        assert tree(tmp_path / name) == tree(tmp_path / "at once")
    files = sorted((tmp_path / "last").glob("model*.safetensors"))
    assert len(files) > 1
    names = {name for file in files for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert ("lm_head.weight" in names) != is_tied


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and can only be copied from it in small pieces."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    @classmethod
    def __torch_function__(cls, function: Any, *arguments: Any) -> Any:
        assert function is not torch.Tensor.to, "copied into ordinary memory as a whole"
        return super().__torch_function__(function, *arguments)


def test_what_is_written_from_a_gpu_passes_through_page_locked_memory(
    make_llama, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against saves that are slower than the disk, wherever there is no room for a copy.

    And against other bytes than those of the same tensors on a CPU.
    """
    model = make_llama(420).to(torch.bfloat16)
    tensors = {"step": torch.tensor(3.0), "moment": torch.randn(420, 32)}
    rest = tokenizer, {"step": 1}
    save_checkpoint(tmp_path / "cpu", model, *rest, tensors, part_bytes=40_000)
    of_gpu = {name: each.as_subclass(OnGpu) for name, each in tensors.items()}
    weights = {name: each.as_subclass(OnGpu) for name, each in model.state_dict().items()}
    arguments = tmp_path / "gpu", Snapshot(model, 1, weights), *rest, of_gpu
    monkeypatch.setattr(state, "PIECE_BYTES", 1000)
    save = parts_of(ALONE, save_checkpoint, train.complete)["save"]
    save(*arguments, part_bytes=40_000)
    assert tree(tmp_path / "gpu") == tree(tmp_path / "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_huge_pages", [True, False])
def test_large_copies_are_equal_and_apart(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_huge_pages: bool
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    if not has_huge_pages:
        monkeypatch.setattr(state.mmap, "mmap", refuse)
    weight = torch.randn(1100, 1001).to(dtype)  # not a whole number of pages
    tensors = {"weight": weight, "moment": weight + 1, "turned": weight.T, "row": weight[3]}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = state.copied(tensors)
    weight.zero_()
    tensors["moment"].zero_()
    assert copies.keys() == expected.keys()
    for name, copy in copies.items():
        assert torch.equal(copy, expected[name]) and copy.is_contiguous()


def test_there_is_a_copy_where_memory_allows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a save that makes the machine run out of memory, and against silence."""
    gpu = SimpleNamespace(device=torch.device("cuda"))
    weight = torch.randn(100, 25)  # 10 kB
    tensors = {"embedding": weight, "head": weight, "norm": torch.randn(25)}
    for free, expected in ((12_500, False), (12_700, True)):
        forget_what_was_said()
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        copies = [state.copy_to_host(gpu, tensors) for _ in range(2)]
        assert [each is not None for each in copies] == [expected] * 2
        said = capsys.readouterr().out
        assert said.count("training waits until each checkpoint is written") == 1 - expected
    assert all(torch.equal(copies[0][name], tensors[name]) for name in tensors)
    assert copies[0]["head"] is copies[0]["embedding"]
    optimizer = {"first": torch.zeros(5)}  # 20 bytes more
    for free, expected in ((12_640, False), (12_700, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        copies = state.copy_to_host(gpu, tensors, optimizer)
        assert (copies is not None) == expected and (not copies or copies.keys() == tensors.keys())
    assert state.copy_to_host(SimpleNamespace(device=torch.device("cpu")), tensors) is None


def test_memory_that_runs_out_all_the_same_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that ends because page-locked memory is short."""
    gpu = SimpleNamespace(device=torch.device("cuda"))

    def fail(error: Exception) -> Callable[..., None]:
        def copied(_: Tensors) -> None:
            raise error

        return copied

    monkeypatch.setattr(state, "copied", fail(torch.OutOfMemoryError("CUDA out of memory")))
    assert state.copy_to_host(gpu, {}) is None
    monkeypatch.setattr(state, "copied", fail(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        state.copy_to_host(gpu, {})


# ---------------------------------------------------------------- beside training


def test_training_goes_on_while_a_checkpoint_is_written(
    call, every_4: dict[str, str], whole: Path
) -> None:
    """Guards against a save of weights that a later step has changed."""
    made = {6: threading.Event(), 10: threading.Event(), 14: threading.Event()}
    # The save of step 4 is written when step 6 has been made, and still is when step 7 is saved.
    waits = {(LAST, 4): made[6], (LAST, 8): made[10], (LAST, 12): made[14]}

    def before(*which: Any) -> None:
        if which in waits:
            wait_for(waits[which])
            time.sleep(0.5)

    save = Save(before)
    steps: Iterator[int] = iter(range(14))

    def step(*arguments: Any) -> train.StepResult:
        result = train.train_step(*arguments)
        made.get(next(steps) + 1, threading.Event()).set()
        return result

    assert call(train, *flags(every_4), copy=copy, save=save, step=step).code == 0
    lasts = [(name, step) for name, step in save.beside if name == LAST]
    assert lasts == [(LAST, step) for step in (4, 7, 8, 12, 14)]
    assert_same_run(run_folder(every_4), whole, BEST, LAST, PREVIOUS)
    assert not list(run_folder(every_4).glob(".*"))


def test_there_is_one_copy_at_a_time(call, every_4: dict[str, str]) -> None:
    """And best and last of an epoch share their weights, instead of waiting for each other."""
    alive: list[Any] = []
    copied = {"weights": 0, "state": 0}
    last_asked = threading.Event()

    def counted(model: Any, tensors: Tensors, *others: Tensors) -> dict[str, torch.Tensor]:
        kind = "weights" if "model.norm.weight" in tensors else "state"
        if kind == "weights":
            # All that was asked for is written: these, and the one before the first step.
            assert [name for name, _ in save.done].count(LAST) == 1 + copied["state"]
            deadline = time.monotonic() + SECONDS  # the thread lets go a moment after its save
            while any(each() is not None for each in alive):
                assert time.monotonic() < deadline, "the copy before is still there"
                time.sleep(0.001)
            alive.clear()
        copied[kind] += 1
        copies = state.copied(tensors)
        alive.extend(map(ref, copies.values()))
        if kind == "state":
            last_asked.set()
        return copies

    def before(name: str, _: int) -> None:
        wait_for(last_asked) if name == BEST else time.sleep(0.5)

    def after(name: str, _: int) -> None:
        if name == LAST:
            last_asked.clear()

    save = Save(before, after)
    assert call(train, *flags(every_4), copy=counted, save=save).code == 0
    assert copied == {"weights": 5, "state": 5} and (BEST, 7) in save.beside
    assert save.done.index((BEST, 7)) + 1 == save.done.index((LAST, 7))


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets a word after each deletion of what was replaced, which takes a while."""
    done, remove = [], checkpoint._remove_quietly

    def remove_slowly(folder: Path) -> None:
        time.sleep(0.1)
        remove(folder)
        done.append("removed")

    monkeypatch.setattr(checkpoint, "_remove_quietly", remove_slowly)
    return done


def test_a_save_waits_until_what_was_replaced_is_gone(tmp_path: Path, removed: list[str]) -> None:
    """Guards against a thread that deletes what the next save has begun to write."""
    write = SimpleNamespace(save_pretrained=lambda folder, **_: removed.append("written"))
    tokenizer = SimpleNamespace(save=lambda folder: None)
    with checkpoint.Removals() as removals:
        for _ in range(2):
            save_checkpoint(tmp_path / LAST, write, tokenizer, {}, removals=removals)
    assert removed == ["written", "removed"] * 2


def test_at_the_end_of_saves_what_was_replaced_is_gone(tmp_path: Path, removed: list[str]) -> None:
    """Guards against a folder whose lock is released while a thread still deletes in it."""
    (tmp_path / ".previous.removed").mkdir()
    parts = SimpleNamespace(save=None, copy=None)
    with Saves(tmp_path, {}, {}, 7, None, {}, None, parts) as saves:
        saves.removals.start(tmp_path / LAST)
    assert removed and not [*tmp_path.iterdir()]


def test_where_there_is_no_copy_training_waits(call, every_4: dict[str, str], whole: Path) -> None:
    """Also where there is one of the weights alone; best is on the disk before last then, too.

    And the weights are not copied in vain, for a save whose state has no room beside them.
    """
    made: list[int] = []

    def of_weights(
        model: Any, tensors: Tensors, *others: Tensors
    ) -> dict[str, torch.Tensor] | None:
        if others or "model.norm.weight" not in tensors:
            return None
        made.append(len(tensors))
        return state.copied(tensors)

    save = Save(before=lambda *_: time.sleep(0.05))
    assert call(train, *flags(every_4), copy=of_weights, save=save).code == 0
    assert {name for name, _ in save.beside} == {BEST} and len(save.beside) == len(made)
    assert save.done.index((BEST, 7)) + 1 == save.done.index((LAST, 7))
    assert_same_run(run_folder(every_4), whole, BEST, LAST, PREVIOUS)


# ---------------------------------------------------------------- writes that fail


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, staged: str) -> None:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name == staged:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_write_that_fails_ends_training_at_the_next_steps(
    call, every_4: dict[str, str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an epoch of training after the last checkpoint that could be written."""
    folder, failed, steps = run_folder(every_4), threading.Event(), []

    def fail(name: str, _: int) -> None:
        fill_the_disk(patch, ".last.staged")
        failed.set()

    def step(*arguments: Any) -> train.StepResult:
        steps.append(1)
        if len(steps) == 5:
            before.update({name: tree(folder / name) for name in (BEST, LAST)})
            wait_for(failed)
            time.sleep(0.2)  # the error is known a moment later
        return train.train_step(*arguments)

    before: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        outcome = call(train, *flags(every_4), copy=copy, save=Save(before=fail), step=step)
    outcome.assert_user_error(
        f"{folder / LAST}: the checkpoint can't be written", "No space left", "ones are intact"
    )
    assert len(steps) <= 6  # the next save is that of step 7
    assert {name: tree(folder / name) for name in (BEST, LAST)} == before
    assert not list(folder.glob(".*"))
    assert call(train, *flags(every_4), copy=copy).code == 0
    assert_same_run(folder, whole, BEST, LAST, PREVIOUS)


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_last_is_not_written_where_best_could_not_be(
    call, every_4: dict[str, str], whole: Path, monkeypatch: pytest.MonkeyPatch, wait: float
) -> None:
    """Guards against a last that names a best epoch whose checkpoint is another one's."""
    folder = run_folder(every_4)
    with monkeypatch.context() as patch:
        save = Save(before=lambda name, _: (time.sleep(wait), fill_the_disk(patch, ".best.staged")))
        outcome = call(train, *flags(every_4), copy=copy, save=save)
    outcome.assert_user_error(f"{folder / BEST}: the checkpoint can't be written", "No space left")
    assert step_of(folder / LAST) == 4 and not (folder / BEST).exists()
    assert call(train, *flags(every_4), copy=copy).code == 0
    assert_same_run(folder, whole, BEST, LAST)


def test_a_stop_whose_save_fails_is_not_called_saved(
    call, every_4: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against "saved in last" and exit code 143 where nothing was saved."""
    arrives = step_that(lambda: os.kill(os.getpid(), signal.SIGTERM), at=2)
    with monkeypatch.context() as patch:
        save = Save(before=lambda *_: fill_the_disk(patch, ".last.staged"))
        outcome = call(train, *flags(every_4), copy=copy, save=save, step=arrives)
    outcome.assert_user_error("the checkpoint can't be written", "No space left on device")
    assert step_of(run_folder(every_4) / LAST) == 0


# ---------------------------------------------------------------- ends


def slowly(folder: Path, held: list[bool]) -> Save:
    """From step 8 on, saves take long, and the run's folder is locked until each is done."""
    return Save(
        before=lambda _, step: time.sleep(0.3 if step >= 8 else 0),
        after=lambda *_: held.append(is_locked(folder)),
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_waits_for_what_is_being_written(
    call, every_4: dict[str, str], whole: Path, name: str
) -> None:
    folder, held = run_folder(every_4), []
    arrives = step_that(lambda: os.kill(os.getpid(), getattr(signal, name)), at=9)
    save = slowly(folder, held)
    outcome = call(train, *flags(every_4), copy=copy, save=save, step=arrives)
    assert outcome.code == 128 + getattr(signal, name)
    assert outcome.err.startswith(f"stopped: {name} after step 9, saved in {folder / LAST}")
    assert (step_of(folder / LAST), step_of(folder / PREVIOUS)) == (9, 8)
    assert save.done[-1] == (LAST, 9) and set(held) == {True} and not is_locked(folder)
    assert call(train, *flags(every_4), copy=copy).code == 0
    assert_same_run(folder, whole, BEST, LAST)


def test_a_signal_does_not_cut_the_wait_at_the_end(call, every_4: dict[str, str]) -> None:
    """Guards against a run whose lock is gone while its last checkpoint is being written."""
    folder, held = run_folder(every_4), []

    def signal_at_the_end(name: str, step: int) -> None:
        if (name, step) == (LAST, 14):
            time.sleep(0.3)  # until training waits
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    save = Save(signal_at_the_end, after=lambda *_: held.append(is_locked(folder)))
    outcome = call(train, *flags(every_4), copy=copy, save=save)
    assert outcome.code == 0 and "done: best validation loss" in outcome.out
    assert save.done[-1] == (LAST, 14) and set(held) == {True}


def test_an_error_of_training_waits_and_is_the_one_that_is_raised(
    call, every_4: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Guards against a traceback of the save in the place of the one that ended the run."""
    folder, held = run_folder(every_4), []
    dies = {"copy": copy, "step": step_that(kill, at=9)}
    with pytest.raises(Killed):
        call(train, *flags(every_4), save=slowly(folder, held), **dies)
    assert step_of(folder / LAST) == 8 and set(held) == {True}
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        save = Save(before=lambda *_: fill_the_disk(patch, ".last.staged"))
        dies["step"] = step_that(lambda: (time.sleep(0.2), kill()), at=5)
        call(train, *flags(every_4), save=save, **dies)
    said = capsys.readouterr().out
    assert said.count(f"{folder / LAST}: the checkpoint can't be written") == 1
    assert step_of(folder / LAST) == 8


def test_a_loss_that_is_not_finite_refers_to_what_is_on_the_disk(
    call, every_4: dict[str, str]
) -> None:
    def step(model: Any, *rest: Any) -> train.StepResult:
        if len(save.beside) and save.beside[-1] == (LAST, 8):
            named(model, "embedding").register_forward_hook(lambda *given: given[2] * torch.nan)
        return train.train_step(model, *rest)

    save = Save(before=lambda _, step: time.sleep(0.3 if step == 8 else 0))
    outcome = call(train, *flags(every_4), copy=copy, save=save, step=step)
    assert outcome.code == 3 and f"the weights in {run_folder(every_4) / LAST}" in outcome.err
    assert save.done[-1] == (LAST, 8) and step_of(run_folder(every_4) / LAST) == 8


def test_a_state_is_removed_after_it_was_written(call, every_4: dict[str, str]) -> None:
    """Guards against a finished run that verifies and removes what is being written."""
    save = Save(before=lambda _, step: time.sleep(0.5 if step == 14 else 0))
    outcome = call(train, *flags(every_4 | {"keep_state": "false"}), copy=copy, save=save)
    assert outcome.code == 0 and "removed: " in outcome.out
    finished = json.loads((run_folder(every_4) / manifest.FINISHED_FILE).read_text())
    assert finished["step"] == 14  # that of the last which was removed
    assert save.done[-1] == (LAST, 14)
    assert {path.name for path in run_folder(every_4).iterdir()} == {
        BEST,
        "config.yaml",
        "metrics.jsonl",
        manifest.FINISHED_FILE,
    }
    assert manifest.fault_of(run_folder(every_4) / BEST) is None


def test_the_self_test_kills_before_the_last_step_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a self-test that fails wherever all its steps are faster than one save."""

    def start(config: Any, folder: Path, name: str) -> subprocess.Popen[bytes]:
        (folder / name / LAST).mkdir(parents=True)
        lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)]
        (folder / name / manifest.METRICS_FILE).write_text("".join(lines))
        content = {"settings": {}, "data": {}, "epoch": 0.0, "wandb_run_id": "", "step": 2}
        (folder / name / LAST / manifest.DESCRIPTION_FILE).write_text(json.dumps(content))
        return subprocess.Popen(["sleep", str(SECONDS)])

    monkeypatch.setattr(selftest, "start", start)
    assert selftest.train_and_kill(None, tmp_path, "killed", 4) == 4
