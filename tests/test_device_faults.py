"""A device that runs out of memory or fails ends a script in one line, and what is saved stays."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import flags, run_folder, step_that, tree
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import evaluate
import perplexity
import train
from engine import device_errors, loading, measure, memory, optimizer, state
from engine.device import kernels_for
from engine.strategy import decode
from run.errors import UserError

CPU = torch.device("cpu")
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:{}, unhandled cuda error (run "
    "with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA "
    "function failed.\nLast error:\n{}"
)
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"),
    MemoryError(),
    torch.distributed.DistBackendError(NCCL.format(268, "Cuda failure 2 'out of memory'")),
    torch.distributed.DistBackendError(NCCL.format(317, "Failed to CUDA calloc async 608 bytes")),
]
DEVICE_FAULTS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel..."),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]
BUGS = [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("CUDA error:")]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


# ---------------------------------------------------------------- which error is which


@pytest.mark.parametrize("error", OUT_OF_MEMORY + DEVICE_FAULTS + BUGS, ids=str)
def test_out_of_memory_a_failing_device_and_a_bug_are_told_apart(error: Exception) -> None:
    """Guards against a step that is repeated on a broken device, and a bug that looks like one."""
    assert device_errors.is_out_of_memory(error) is (error in OUT_OF_MEMORY)
    assert device_errors.is_device_fault(error) is (error in DEVICE_FAULTS)
    expected = type(error) if error in BUGS else UserError
    with pytest.raises(expected) as raised, memory.reported("testing", "a cure"):
        raise error
    words = str(raised.value)
    if error in OUT_OF_MEMORY:
        assert words.startswith("out of memory while testing (") and words.endswith(": a cure")
        assert ("DistBackendError: " in words) == ("Cuda failure" in words or "calloc" in words)
    if error in DEVICE_FAULTS:
        assert words.startswith("the device failed while testing (") and "\n" not in words


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_weights_that_do_not_fit_are_not_damaged(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Guards against advice to copy a model again that memory has no room for."""
    kernels = replace(kernels_for(CPU), replace_linear_layers=raising(error))
    load = "out of memory while loading the weights .*: take a device with more memory"
    with pytest.raises(UserError, match=load):
        loading.load_model(model_folder, torch.float32, CPU, kernels)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", raising(error))
    with pytest.raises(UserError, match=load):
        loading.load_model(model_folder, torch.float32, CPU)


def test_a_state_that_does_not_fit_is_an_error_with_a_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], fused=True)
    monkeypatch.setattr(torch, "zeros_like", raising(OUT_OF_MEMORY[0]))
    with pytest.raises(UserError, match=r"while making the optimizer's state .* more memory"):
        optimizer.make_state(made)


# ---------------------------------------------------------------- in each script


def test_the_optimizers_state_is_there_before_the_first_step(
    call, settings: dict[str, str]
) -> None:
    """Guards against running out of memory in the middle of an update."""
    seen: list[int] = []

    def step(model: Any, optimizer: torch.optim.Optimizer, *rest: Any) -> train.StepResult:
        seen.append(len(optimizer.state))
        return train.train_step(model, optimizer, *rest)

    assert call(train, *flags(settings), step=step).code == 0
    assert seen[0] > 0 and len(set(seen)) == 1


@pytest.mark.parametrize("error", [OUT_OF_MEMORY[1], DEVICE_FAULTS[0]], ids=str)
@pytest.mark.parametrize("after_update", [False, True])
def test_a_failed_update_ends_the_run_and_what_is_saved_stays(
    call,
    settings: dict[str, str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    after_update: bool,
) -> None:
    """Guards against a run that goes on with weights of which some were updated twice or never."""
    saved: list[dict[str, bytes]] = []
    update = torch.optim.AdamW.step

    def half_a_step(optimizer: torch.optim.Optimizer) -> None:
        if after_update:
            update(optimizer)
        raise error

    def fail() -> None:
        saved.append(tree(run_folder(settings) / "last"))
        monkeypatch.setattr(torch.optim.AdamW, "step", half_a_step)

    settings["checkpoint_steps"] = "4"
    outcome = call(train, *flags(settings), step=step_that(fail, at=6))
    is_out_of_memory = error in OUT_OF_MEMORY
    cure = "set a smaller micro_batch_tokens" if is_out_of_memory else "look for the GPU's Xid"
    outcome.assert_user_error("while training (AcceleratorError: CUDA error", cure)
    assert tree(run_folder(settings) / "last") == saved[0]
    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    assert call(train, *flags(settings)).code == 0
    ours, theirs = (
        load_file(folder / "last" / "model.safetensors") for folder in (run_folder(settings), whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY[0], DEVICE_FAULTS[0], DEVICE_FAULTS[3]], ids=str)
@pytest.mark.parametrize("where", ["_load", "set_random_state"])
def test_a_device_that_fails_on_resuming_has_damaged_no_checkpoint(
    call,
    settings: dict[str, str],
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
) -> None:
    """Guards against advice to start again, and to give up hours of training."""
    before = tree(stopped / "last")
    monkeypatch.setattr(state, where, raising(error))
    outcome = call(train, *flags(settings))
    outcome.assert_user_error("while restoring the optimizer's state (")
    is_out_of_memory = error in OUT_OF_MEMORY
    cure = "take a device with more memory" if is_out_of_memory else "look for the GPU's Xid"
    assert cure in outcome.err and "damaged" not in outcome.err
    assert tree(stopped / "last") == before


@pytest.mark.parametrize("part", ["measure", "save"])
@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, DEVICE_FAULTS[0]], ids=str)
def test_a_fault_between_steps_ends_training_in_one_line(
    call, settings: dict[str, str], part: str, error: Exception
) -> None:
    settings["batch_size"] = "26"  # one step an epoch
    outcome = call(train, *flags(settings), **{part: raising(error)})
    outcome.assert_user_error("while training (")


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, DEVICE_FAULTS[0]], ids=str)
def test_an_evaluation_that_fails_keeps_its_completions(
    call, settings: dict[str, str], tmp_path: Path, error: Exception
) -> None:
    """Guards against a traceback from the prefill, and completions that are lost with it."""

    def some(*given: Any, **named: Any) -> Iterator[Any]:
        for number, completion in enumerate(decode(*given, **named)):
            if number == 5:
                raise error
            yield completion

    names = ("dataset", "dtype", "max_new_tokens")
    evaluation = ["--ckpt", settings["model"], *flags({name: settings[name] for name in names})]
    evaluation += ["--output", str(tmp_path / "eval")]
    outcome = call(evaluate, *evaluation, parts=evaluate.Parts(decode=some))
    outcome.assert_user_error("while evaluating (")
    assert (tmp_path / "eval" / "predictions.jsonl").read_bytes().count(b"\n") == 5
    outcome = call(evaluate, *evaluation)
    assert outcome.code == 0 and "resuming: 5 of 12" in outcome.out


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, DEVICE_FAULTS[0]], ids=str)
def test_a_measurement_that_fails_says_so_in_one_line(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(measure, "pack", raising(error))
    names = {name: settings[name] for name in ("dataset", "dtype", "max_length")}
    outcome = call(perplexity, "--ckpt", settings["model"], *flags(names))
    outcome.assert_user_error("while measuring (")
