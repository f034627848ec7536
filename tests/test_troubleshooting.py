"""Each message that docs/troubleshooting.md quotes is one that the scripts print, word for word."""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx
import huggingface_hub
import pytest
import torch
import wandb
from conftest import make_config
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from test_plan import GPU, LLAMA_2_7B
from test_tracking import FakeRun

import evaluate
import plan
import train
from engine import compiling, faults, fused, optimizer
from engine.hub import fetch
from engine.packing import Example
from engine.plan import GIB
from engine.recipe import Recomputation
from grading.dataset import load_problems
from run import folder as folders
from run.config import CONFIG_FILE, load_config
from run.errors import NotFiniteError, UserError, one_line
from run.progress import Progress
from run.retention import check_disk_space
from run.run_log import open_log
from run.wandb_run import RunPath, start_tracker

ROOT = Path(plan.__file__).parent
GUIDE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [" ".join(block.split()) for block in re.findall(r"^```\n(.*?)^```", GUIDE, re.S | re.M)]
MODEL, RUN = "meta-llama/Llama-2-7b-hf", Path("checkpoints/llama-2-7b-gsm8k")
DEFAULTS = load_config(CONFIG_FILE, {})
SIZES = 13_476_831_232, 40_430_493_696  # of Llama-2-7B's weights and state in bfloat16

Printed = pytest.CaptureFixture[str]


def test_every_quoted_message_is_printed(
    settings: dict[str, str],
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Printed,
) -> None:
    """Guards against a message that was reworded, and a guide that was not."""
    monkeypatch.chdir(tmp_path)
    said = [
        *about_hub(monkeypatch),
        *about_memory(settings, monkeypatch),
        *about_disk(monkeypatch),
        *about_speed(model, monkeypatch, capsys),
        *of_a_log(tmp_path, monkeypatch, capsys),
        *about_wandb(monkeypatch, capsys),
        *about_the_same_command(monkeypatch),
    ]
    patterns = [re.escape(text).replace(re.escape("..."), ".+") for text in QUOTED]
    for line in said:
        assert sum(bool(re.fullmatch(pattern, line)) for pattern in patterns) == 1, line
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line) for line in said), pattern


def raises(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def line_of(function: Callable[..., Any], *arguments: Any) -> str:
    """How a script that calls this ends."""
    try:
        function(*arguments)
    except UserError as error:
        return f"error: {one_line(error)}"
    except NotFiniteError as error:
        return f"stopped: {one_line(error)}"
    pytest.fail("it is accepted")


def about_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    for name, error in (
        (MODEL, GatedRepoError("no", response=response)),
        (MODEL.removesuffix("-hf"), RepositoryNotFoundError("no", response=response)),
        (MODEL, OSError("not in the cache")),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", raises(error))
        yield line_of(fetch, name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield line_of(fetch, MODEL)
    monkeypatch.setattr(datasets, "load_dataset", raises(ConnectionError("unreachable")))
    yield line_of(load_problems, "openai/gsm8k", "train")


class Failing:
    @property
    def config(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def about_memory(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    device = int(23.5 * GIB)
    yield line_of(plan.refuse_too_large, DEFAULTS, MODEL, LLAMA_2_7B, GPU, device)
    yield f"error: {faults.does_not_fit([Example([0] * 577, [0] * 577)])}"
    monkeypatch.setattr(train, "train", raises(torch.OutOfMemoryError("CUDA out of memory.")))
    yield line_of(train.main, make_config(settings))
    yield line_of(evaluate.evaluate, SimpleNamespace(split="test"), Failing(), *"abc")


def about_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000_000))
        yield line_of(check_disk_space, RUN, *SIZES)


def about_speed(model: Any, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> Iterator[str]:
    assert not optimizer.runs_triton(torch.device("cpu"), raises(RuntimeError("no gcc")))
    yield last_line(capsys)
    fused.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", raises(RuntimeError("no compiler found")))
    model.kernels = replace(model.kernels, compiles_layers=True)
    compiling.prepare(model, Recomputation(0, False), None)
    fused.compiled.cache_clear()
    yield last_line(capsys)


def last_line(capsys: Printed) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def of_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> Iterator[str]:
    settings = asdict(DEFAULTS) | {"wandb_mode": "disabled"}
    saves = SimpleNamespace(folder=tmp_path, settings=settings, plan={}, data_hashes={})
    usage = SimpleNamespace(at=lambda _: {})
    batches = SimpleNamespace(per_epoch=56, mask_rate=lambda _: None)
    with open_log(saves, Progress(step=17), batches, 168, usage) as log:
        log.out_of_memory(4096)
        yield last_line(capsys)
        log.start(7168, 305, 128, "cpu", "bfloat16")
        yield last_line(capsys)
    monkeypatch.setattr(faults, "_is_finite", lambda _, row: row.line != 501)
    rows = [Example([], [], line) for line in range(400, 528)]
    caused = faults.rows_at_fault(SimpleNamespace(zero_grad=int), rows)
    nan = SimpleNamespace(loss=math.nan, grad_norm=math.nan)
    with open_log(saves, Progress(step=12), batches, 168, usage) as log:
        yield line_of(raises(log.not_finite(nan, caused, RUN / "last")))


def about_wandb(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> Iterator[str]:
    gone = OSError("timed out")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(FakeRun, "offline", True)
    for is_logged_in, errors in ((False, [None]), (True, [gone, None]), (True, [gone, gone])):
        monkeypatch.setattr(wandb, "login", lambda is_in=is_logged_in, **_: is_in)
        monkeypatch.setattr(wandb, "init", partial(start_or_fail, iter(errors)))
        start_tracker(None, run=RunPath("id", "p"), name="x", folder=Path(), settings={})
        yield last_line(capsys)


def start_or_fail(errors: Iterator[Exception | None], **_: Any) -> FakeRun:
    if error := next(errors):
        raise error
    return FakeRun(run_id="id", project="p")


def about_the_same_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(folders, "fault_of", lambda _: "")
    yield line_of(folders.check_unfinished, 168, 168, RUN)
    before = {"settings": asdict(DEFAULTS), "data": {"train_sha256": "same"}}
    monkeypatch.setattr(folders, "read_description", lambda _: before)
    now = asdict(replace(DEFAULTS, learning_rate=1e-5))
    yield line_of(folders.check_same_run, RUN / "last", now, "same")
