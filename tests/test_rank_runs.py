"""train.py in several processes: resumed by any number, stopped, killed, and out of memory."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from conftest import flags, make_config, run_folder, step_that, with_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import train
from engine import device, memory
from engine.sharding import slice_of
from engine.slices import FOLDER, read_slices
from engine.together import complete_together
from run import folder as run_folders
from run import run_log
from run.config import Config
from run.manifest import BEST, FITTING_FILE, LAST, PREVIOUS, fault_of
from run.progress import Progress, fitting_budget
from run.script import run_script
from run.tracker import NoTracker
from run.training_json import read_description

CPU = torch.device("cpu")
STEPS = 7


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def train_in_float64(settings: dict[str, str], parts: Callable[[], dict[str, Any]] = dict) -> None:
    """train.py as its last line runs it; no setting has float64."""
    config = make_config(settings)
    object.__setattr__(config, "dtype", "float64")
    run_as_a_script(config, parts)


def train_as_set(settings: dict[str, str], parts: Callable[[], dict[str, Any]] = dict) -> None:
    run_as_a_script(make_config(settings), parts)


def run_as_a_script(config: Config, parts: Callable[[], dict[str, Any]]) -> None:
    run_script(partial(train.main, config, **{"report": no_report} | parts()))


def no_report(folder: Path) -> None:
    """In place of a run's report, which takes longer than these runs."""


def dying(at: int) -> dict[str, Any]:
    """Parts of a run whose rank 1, or only process, is killed in this step."""
    is_one = os.environ["WORLD_SIZE"] == "1"
    die = partial(os.kill, os.getpid(), signal.SIGKILL)
    return {"step": step_that(die, at)} if rank() == 1 or is_one else {}


def numbers(folder: Path) -> list[tuple[int, str, float]]:
    """What the log says that must not depend on the processes."""
    return [
        (line["step"], name, line[name])
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        for name in ("train/loss", "train/grad_norm", "train/learning_rate", "val/loss")
        if name in line
    ]


def check_numbers(folder: Path, expected: list[tuple[int, str, float]]) -> None:
    found = numbers(folder)
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    values = ([each[2] for each in some] for some in (found, expected))
    torch.testing.assert_close(*values, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, many_rows: Path
) -> dict[str, Any]:
    """The settings of a run of 7 steps, which ran alone, and died with 1 and with 2 processes."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "model": str(model_folder),
        "dataset": str(many_rows),
        "output_dir": str(folder),
        "max_length": "256",
        "validation_size": "17",
        "epochs": "1",
        "batch_size": "16",
        "micro_batch_tokens": "512",
        "learning_rate": "3e-3",
        "gradient_checkpointing": "false",
        "checkpoint_steps": "3",
        "max_new_tokens": "4",
        "wandb_mode": "disabled",
    }
    alone = settings | {"run_name": "alone"}
    jobs.run(1, folder / "printed", train_in_float64, alone)
    for size in (1, 2):
        died = settings | {"run_name": f"died-{size}"}
        ended = jobs.Job(
            size, folder / f"printed-{size}", train_in_float64, died, partial(dying, 5)
        ).end()
        assert [each.code for each in ended] == [2, -9][-size:], ended
        steps = [read_description(run_folder(died) / name)["step"] for name in (LAST, PREVIOUS)]
        assert steps == [3, 0]
        if size == 2:
            line = "error: another process of this job was killed or no longer answers ("
            assert ended[0].err.startswith(line) and ended[0].err.count("\n") == 1, ended
    return {"settings": settings, "expected": numbers(folder / "alone")}


@pytest.mark.parametrize(("died", "size"), [(2, 1), (2, 2), (2, 3), (2, 4), (1, 3)])
def test_any_number_of_processes_resumes_a_run(
    tmp_path: Path, runs: dict[str, Any], died: int, size: int
) -> None:
    """Guards against a checkpoint that only as many processes can read as have written it."""
    settings = runs["settings"] | {"run_name": f"on-{size}-after-{died}"}
    shutil.copytree(run_folder(settings).with_name(f"died-{died}"), run_folder(settings))
    ended = jobs.run(size, tmp_path, train_in_float64, settings)
    assert f"{LAST} at step 3 of {STEPS}" in ended[0].out
    is_new = ", gradients are summed after the last micro-batch, " in ended[0].out
    assert is_new == (size not in (died, 1))
    assert all(each.out == each.err == "" for each in ended[1:])
    check_numbers(run_folder(settings), runs["expected"])
    assert not any(fault_of(run_folder(settings) / name) for name in (BEST, LAST, PREVIOUS))
    if size > 1:
        check_files(run_folder(settings), run_folder(settings).with_name("alone"), size)


def tensors_of(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (file.name, name): tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_runs_in_bfloat16_are_resumed(tmp_path: Path, runs: dict[str, Any]) -> None:
    """Guards against an optimizer whose state differs by what it makes in its first step only."""
    ours = {"output_dir": str(tmp_path), "dtype": "bfloat16", "weight_decay": "0.1"}
    whole, died = (runs["settings"] | ours | {"run_name": name} for name in ("whole", "died"))
    jobs.run(2, tmp_path / "printed", train_as_set, whole)
    ended = jobs.Job(2, tmp_path / "printed", train_as_set, died, partial(dying, 5)).end()
    assert [each.code for each in ended] == [2, -9], ended
    expected = numbers(run_folder(whole))
    for size in (1, 2, 3):
        settings = died | {"run_name": f"on-{size}"}
        shutil.copytree(run_folder(died), run_folder(settings))
        ended = jobs.run(size, tmp_path / "printed", train_as_set, settings)
        assert f"{LAST} at step 3 of {STEPS}" in ended[0].out
        found = numbers(run_folder(settings))
        assert [each[:2] for each in found] == [each[:2] for each in expected]
        # By 4e-4 at most, on an AMD processor.
        losses, others = ([each[2] for each in one] for one in (found, expected))
        assert losses == pytest.approx(others, rel=2e-3)
        if size == 2:
            assert found == expected
            for name in (BEST, LAST):
                states = [tensors_of(run_folder(run) / name) for run in (settings, whole)]
                assert states[0].keys() == states[1].keys()
                assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("saved", [("0",), ("0", "1", "2"), ("1", "2"), ()])
def test_slices_of_another_optimizer_are_an_error(tmp_path: Path, saved: tuple[str, ...]) -> None:
    """Guards against moments that are left at zero, and against a first save that has none."""
    names = {f"optimizer.{number}.exp_avg" for number in saved} | {"random.cpu"}
    (tmp_path / FOLDER).mkdir()
    save_file({name: torch.ones(3) for name in names}, tmp_path / FOLDER / "1.safetensors")
    ours = ("optimizer.0.exp_avg", "optimizer.1.exp_avg", "random.cpu")
    tensors = {name: torch.zeros(3) for name in ours}
    if saved:
        with pytest.raises(ValueError, match=r"it lacks \[.*\], and has \["):
            read_slices(tmp_path, tensors)
    else:
        [(name, tensor)] = read_slices(tmp_path, tensors).items()
        assert name == "random.cpu" and tensor.eq(1).all()


def test_a_run_of_adapters_spreads_and_resumes(tmp_path: Path, runs: dict[str, Any]) -> None:
    """Guards against adapters that one rank has alone, or that only as many ranks can read."""
    adapters = runs["settings"] | {"output_dir": str(tmp_path), "method": "lora", "lora_rank": "4"}
    alone, died = (adapters | {"run_name": name} for name in ("alone", "died"))
    jobs.run(1, tmp_path / "1", train_in_float64, alone)
    ended = jobs.Job(2, tmp_path / "2", train_in_float64, died, partial(dying, 5)).end()
    assert [each.code for each in ended] == [2, -9], ended
    jobs.run(1, tmp_path / "3", train_in_float64, died)
    check_numbers(run_folder(died), numbers(run_folder(alone)))
    assert not any(fault_of(run_folder(died) / name) for name in (BEST, LAST, PREVIOUS))
    weights = [
        load_file(run_folder(run) / BEST / "adapter_model.safetensors") for run in (alone, died)
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-10)


def short_from_the_start() -> dict[str, Any]:
    """Parts of a run that dies in step 5, for which whole gradients do not fit."""
    memory.free_bytes = lambda device: 10**6
    parts = dying(5)
    step = parts.get("step", train.train_step)

    def check(model: Any, *rest: Any) -> train.StepResult:
        assert model.reduces_each
        return step(model, *rest)

    return parts | {"step": check}


def test_when_gradients_are_summed_is_chosen_and_kept(tmp_path: Path, runs: dict[str, Any]) -> None:
    """Guards against a choice that the model does not get, and one that a resumed run forgets."""
    settings = runs["settings"] | {"run_name": "summed"}
    records = [read_description(run_folder(settings).with_name("died-2") / LAST)]
    ended = jobs.Job(2, tmp_path, train_in_float64, settings, short_from_the_start).end()
    assert [each.code for each in ended] == [2, -9], ended
    records.append(read_description(run_folder(settings) / LAST))
    assert [each["plan"]["recipe"]["reduces_each"] for each in records] == [False, True]
    ended = jobs.run(2, tmp_path, train_in_float64, settings)
    assert "plan: " not in ended[0].out
    assert read_description(run_folder(settings) / LAST)["plan"] == records[1]["plan"]
    check_numbers(run_folder(settings), runs["expected"])


def check_files(folder: Path, alone: Path, size: int) -> None:
    """``best`` is a Hugging Face folder, each rank has written its slices, nothing is a pickle."""
    models = (
        AutoModelForCausalLM.from_pretrained(each / BEST, dtype=torch.float64)
        for each in (folder, alone)
    )
    torch.testing.assert_close(*(list(each.parameters()) for each in models), rtol=0, atol=1e-10)
    files = sorted((folder / LAST / "state").iterdir())
    assert len(files) == size
    states = []
    for number, file in enumerate(files):
        with safe_open(file, "pt") as opened:
            names = {*opened.keys()}
            own = "random.cpu" if number == 0 else f"rank.{number}.random.cpu"
            states.append(opened.get_tensor(own).numpy().tobytes())
        assert "optimizer.0.exp_avg" in names
    assert len({*states}) == size  # or each rank would drop out the same
    suffixes = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".model"}


def asked_to_stop() -> dict[str, Any]:
    """Parts of a run whose rank 1 alone gets SIGTERM, in step 3."""
    ask = partial(os.kill, os.getpid(), signal.SIGTERM)
    return {"step": step_that(ask, at=3)} if rank() == 1 else {}


def test_a_signal_to_one_process_saves_on_all(tmp_path: Path, runs: dict[str, Any]) -> None:
    """Guards against ranks that stop at different steps, and so wait for each other forever."""
    settings = runs["settings"] | {"run_name": "stopped"}
    ended = jobs.Job(3, tmp_path, train_in_float64, settings, asked_to_stop).end()
    assert [each.code for each in ended] == [143] * 3, ended
    written = "".join(each.err for each in ended)
    assert "stopped: SIGTERM after step 3, saved in" in written and written.count("\n") == 1, ended
    assert read_description(run_folder(settings) / LAST)["step"] == 3
    jobs.run(2, tmp_path, train_in_float64, settings)
    check_numbers(run_folder(settings), runs["expected"])


class SlowTracker(NoTracker):
    """One that needs a while to send its last lines, and writes a file when it has."""

    def __init__(self, file: Path):
        self._file = file

    def finish(self, exit_code: int = 0) -> None:
        time.sleep(1)
        self._file.touch()


def closing_slowly(file: Path, ending: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if rank() == 0:
        run_log.start_tracker = lambda *_, **__: SlowTracker(file)
    return ending()


def not_finite() -> dict[str, Any]:
    """Parts of a run whose first loss is NaN."""
    return {"step": with_model(lambda model: slice_of(model.norm.weight.detach()).fill_(torch.nan))}


@pytest.mark.parametrize(("ending", "code"), [(asked_to_stop, 143), (not_finite, 3)])
def test_processes_that_stop_together_leave_together(
    tmp_path: Path, runs: dict[str, Any], ending: Callable[[], dict[str, Any]], code: int
) -> None:
    """Guards against a log that is cut off in W&B: torchrun, in whose place the test acts, ends all
    processes once one has ended."""
    settings = runs["settings"] | {"run_name": f"closing-{code}"}
    parts = partial(closing_slowly, tmp_path / "closed", ending)
    started = jobs.Job(2, tmp_path, train_in_float64, settings, parts)
    wait([process.sentinel for process in started.processes], jobs.SECONDS)
    for process in started.processes:
        process.terminate()
    ended = started.end()
    assert code in [each.code for each in ended], ended
    assert (tmp_path / "closed").exists()


MOST_TOKENS = 320  # more do not fit into the memory of rank 1


def short_of_memory() -> dict[str, Any]:
    """Parts of a run whose rank 1 runs out of memory within a layer's backward pass, in step 5."""
    if rank() != 1:
        return {}
    count = 0

    def step(model: Any, *rest: Any) -> train.StepResult:
        nonlocal count
        count += 1
        if count == 1:
            model.blocks[0].register_forward_hook(watch)
        return train.train_step(model, *rest)

    def watch(block: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad and len(inputs[0]) > MOST_TOKENS and count >= 5:
            output.register_hook(run_out)

    return {"step": step}


def run_out(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_on_one_process_ends_the_step_on_all(
    tmp_path: Path, runs: dict[str, Any]
) -> None:
    """Guards against processes that wait for one which tries again on its own."""
    settings = runs["settings"] | {"run_name": "short"}
    ended = jobs.Job(2, tmp_path, train_in_float64, settings, short_of_memory).end()
    assert [each.code for each in ended] == [2, 2], ended
    written = "".join(each.err for each in ended)
    line = "error: rank 1 is out of memory with micro_batch_tokens 512: the run goes on from what "
    assert written.startswith(line) and "with 256" in written and written.count("\n") == 1, ended
    assert read_description(run_folder(settings) / LAST)["step"] == 3
    jobs.run(2, tmp_path, train_in_float64, settings, short_of_memory)
    check_numbers(run_folder(settings), runs["expected"])
    state = read_description(run_folder(settings) / LAST)["state"]
    assert state["progress"]["fitting"] == [512, 256]


def train_with_small_files(settings: dict[str, str]) -> None:
    """On rank 1, no file has room for its slices of the optimizer's state."""
    if rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    train_in_float64(settings)


def test_slices_that_one_process_can_not_write_are_a_checkpoint_that_can_not_be_written(
    tmp_path: Path, runs: dict[str, Any]
) -> None:
    """Guards against an error of that process alone, which names no place."""
    settings = runs["settings"] | {"run_name": "full"}
    ended = jobs.Job(2, tmp_path / "1", train_with_small_files, settings).end()
    assert [each.code for each in ended] == [2, 2], ended
    written = "".join(each.err for each in ended)
    assert written.startswith(f"error: {run_folder(settings) / LAST}: the checkpoint can't be writ")
    assert "File too large); earlier ones are intact: make room there" in written
    assert written.count("\n") == 1 and fault_of(run_folder(settings) / LAST) is None
    jobs.run(2, tmp_path / "2", train_in_float64, settings)
    check_numbers(run_folder(settings), runs["expected"])


class Full(TorchDispatchMode):
    """A device without room for a tensor of so many bytes."""

    def __init__(self, size: int):
        super().__init__()
        self._size = size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.nbytes >= self._size:
            run_out(found)
        return found


def short_in_samples() -> dict[str, Any]:
    """Parts of a run whose rank 1 has no room to gather the largest weight, nor all of them."""

    def complete(model: Any, *rest: Any) -> list[tuple[str, str]]:
        largest = max(weight.nbytes for weight in model.parameters())
        with Full(largest) if rank() == 1 else nullcontext():
            return complete_together(train.complete, model, *rest)

    return {"complete": complete}


def test_a_sample_without_room_on_one_process_is_left_out(
    tmp_path: Path, runs: dict[str, Any]
) -> None:
    """Guards against processes that wait for weights of one which goes on without a sample."""
    settings = runs["settings"] | {"run_name": "no-sample"}
    ended = jobs.run(2, tmp_path, train_in_float64, settings, short_in_samples)
    assert "  no sample: all weights take 0.0 GB on each process, which has " in ended[0].out
    check_numbers(run_folder(settings), runs["expected"])


def out_of_memory_in_decoding() -> dict[str, Any]:
    """Parts of a run whose rank 1 has no room to decode, once it has all weights."""

    def complete(*arguments: Any) -> list[tuple[str, str]]:
        return run_out(None) if rank() == 1 else train.complete(*arguments)

    return {"complete": partial(complete_together, complete)}


def test_decoding_that_fails_on_one_process_ends_all_with_a_cure(
    tmp_path: Path, runs: dict[str, Any]
) -> None:
    settings = runs["settings"] | {"run_name": "undecoded", "best_by": "val_exact_match"}
    ended = jobs.Job(2, tmp_path, train_in_float64, settings, out_of_memory_in_decoding).end()
    assert [each.code for each in ended] == [2, 2], ended
    written = "".join(each.err for each in ended)
    line = "error: best_by val_exact_match: decoding the validation rows failed (RuntimeError: ran"
    assert written.startswith(line) and written.count("\n") == 1, ended
    assert "type the same command with a smaller decode_slots" in written


def without_compiler(victims: list[int], function: str) -> dict[str, Any]:
    """Parts of a run that compiles its layers, but for ``function`` (or any) on these ranks."""
    kernels = device.cpu_kernels
    device.cpu_kernels = lambda *how: replace(kernels(*how), compiles_layers=True)

    def compile_here(compiled: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        fails = rank() in victims and compiled.__name__.startswith(function)
        return fail_to_compile if fails else compiled

    torch.compile = compile_here
    return {}


def fail_to_compile(*_: Any) -> None:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize("victims", [[1], [0, 1]])
def test_what_one_process_can_not_compile_none_compiles(
    tmp_path: Path, runs: dict[str, Any], victims: list[int]
) -> None:
    """Guards against ranks that wait within a layer for one that has left it, and against gathered
    weights of a layer that was left halfway, with which training would go on."""
    settings = runs["settings"] | {"run_name": f"uncompiled-{len(victims)}"}
    parts = partial(without_compiler, victims, "")
    ended = jobs.run(2, tmp_path, train_in_float64, settings, parts)
    line = f"torch.compile fails on rank {victims[0]} (RuntimeError: Failed to find C compiler)"
    assert line in ended[0].out and "the layers are not compiled" in ended[0].out
    check_numbers(run_folder(settings), runs["expected"])


def test_a_layer_that_fails_to_compile_on_one_process_ends_all(
    tmp_path: Path, runs: dict[str, Any]
) -> None:
    settings = runs["settings"] | {"run_name": "within"}
    parts = partial(without_compiler, [1], "add_rms_norm")
    ended = jobs.Job(2, tmp_path, train_in_float64, settings, parts).end()
    assert [each.code for each in ended] == [2, 2], ended
    written = "".join(each.err for each in ended)
    assert written.startswith("error: compile: torch.compile fails here (RuntimeError: Failed to ")
    assert "set compile false" in written and written.count("\n") == 1, ended


def seen_late() -> dict[str, Any]:
    """Parts of `short_of_memory`, whose rank 1 does not see yet what did not fit."""
    if rank() == 1:
        run_folders.fitting_budget = lambda folder, setting, planned, saved: saved
    return short_of_memory()


def test_all_processes_take_the_limit_that_the_first_one_finds(
    tmp_path: Path, runs: dict[str, Any]
) -> None:
    """Guards against ranks with other micro-batches, which wait for each other: on a network file
    system, a machine sees another's new files late."""
    settings = runs["settings"] | {"run_name": "late"}
    ended = jobs.Job(2, tmp_path / "1", train_in_float64, settings, short_of_memory).end()
    assert [each.code for each in ended] == [2, 2], ended
    jobs.run(2, tmp_path / "2", train_in_float64, settings, seen_late)
    check_numbers(run_folder(settings), runs["expected"])


def train_in(folders: list[Path], settings: dict[str, str]) -> None:
    os.chdir(folders[rank()])
    train_in_float64(settings)


def test_a_folder_that_is_another_on_each_machine_is_refused(
    tmp_path: Path, runs: dict[str, Any]
) -> None:
    """Guards against a checkpoint that counts as whole, but lacks the slices that another machine
    has written to its own disk, where there is a folder of this name, too."""
    settings = runs["settings"] | {"run_name": "local", "output_dir": "out"}
    machines = [tmp_path / "one", tmp_path / "other"]
    for machine in machines:
        (machine / "out" / "local").mkdir(parents=True)
    ended = jobs.Job(2, tmp_path, train_in, machines, settings).end()
    assert [each.code for each in ended] == [2, 2], ended
    written = "".join(each.err for each in ended)
    assert written.startswith("error: out/local: rank 1 does not see what rank 0 writes there: ")
    assert written.count("\n") == 1
    assert not any(path.is_file() for machine in machines for path in machine.rglob("*"))


def train_unequally(settings: dict[str, str], of_rank_1: dict[str, str]) -> None:
    train_in_float64(settings | (of_rank_1 if rank() == 1 else {}))


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (
            "learning_rate",
            "learning_rate is 0.003 for process 0 and 0.001 for process 1: give all ",
        ),
        ("dataset", "rows is "),
        ("model", "weights is "),
    ],
)
def test_processes_with_other_settings_rows_or_weights_are_refused(
    tmp_path: Path, runs: dict[str, Any], data_folder: Path, model_folder: Path, key: str, line: str
) -> None:
    """Guards against a mixture of two runs, and ranks that wait for micro-batches of others."""
    rows, model = (tmp_path / name for name in ("rows", "model"))
    shutil.copytree(data_folder, rows)
    *most, last = (rows / "train.jsonl").read_text().splitlines(keepends=True)
    (rows / "train.jsonl").write_text("".join([last, *most]))
    shutil.copytree(model_folder, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    others = {"learning_rate": "1e-3", "dataset": str(rows), "model": str(model)}
    settings = runs["settings"] | {"run_name": f"other-{key}"}
    unequally = partial(train_unequally, settings, {key: others[key]})
    ended = jobs.Job(2, tmp_path / "printed", unequally).end(40)
    assert [each.code for each in ended] == [2, 2], ended
    written = "".join(each.err for each in ended)
    assert written.startswith(f"error: torchrun: {line}") and written.count("\n") == 1, ended
    assert not list(run_folder(settings).glob("*"))


def rank_1_of(torchrun: int) -> int | None:
    """The process of rank 1 among the children of ``torchrun``; None before it has started."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    return None


def test_torchrun_starts_a_killed_run_again(tmp_path: Path, runs: dict[str, Any]) -> None:
    """Guards against a script that works in these tests' own jobs alone."""
    settings = runs["settings"] | {"run_name": "again", "epochs": "3", "dtype": "float32"}
    metrics = run_folder(settings) / "metrics.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "--max-restarts", "1", "train.py"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [*command, *flags(settings)], cwd=jobs.ROOT, stdout=out, stderr=err
        )
        try:
            until = time.monotonic() + jobs.SECONDS
            while process.poll() is None and time.monotonic() < until:
                if metrics.exists() and metrics.read_bytes().count(b"\n") >= 4:
                    break
                time.sleep(0.01)
            os.kill(rank_1_of(process.pid), signal.SIGKILL)
            assert process.wait(jobs.SECONDS) == 0, (tmp_path / "err").read_text()
        finally:
            process.kill()
            process.wait()
    printed = (tmp_path / "out").read_text()
    assert printed.count("resuming: ") == printed.count("done: ") == 1, printed
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert sorted({*steps}) == list(range(1, 3 * STEPS + 1)) and steps == sorted(steps)


def test_a_budget_that_did_not_fit_is_never_raised(tmp_path: Path) -> None:
    """Guards against a job's file that outranks a smaller plan, or what was found out since."""
    assert fitting_budget(tmp_path, None, 512, None) is None
    (tmp_path / FITTING_FILE).write_text('{"micro_batch_tokens": null, "fitting": 256}')
    assert fitting_budget(tmp_path, None, 512, None) == (512, 256)
    assert fitting_budget(tmp_path, None, 512, (512, 384)) == (512, 256)
    assert fitting_budget(tmp_path, None, 512, (512, 128)) == (512, 128)
    assert fitting_budget(tmp_path, None, 256, None) is None
    assert fitting_budget(tmp_path, 512, 512, None) is None
    for damaged in ("{", "[]", '{"fitting": 1}', '{"micro_batch_tokens": null, "fitting": "x"}'):
        (tmp_path / FITTING_FILE).write_text(damaged)
        assert fitting_budget(tmp_path, None, 512, (512, 384)) == (512, 384)
    fitting = Progress(fitting=(512, 256))  # not for what is chosen or set by now
    assert [fitting.budget(setting) for setting in (512, 1024, 128)] == [256, 1024, 128]
