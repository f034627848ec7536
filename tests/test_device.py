"""What a machine with a GPU lacks is said in one line, before anything is loaded or downloaded."""

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import flags, run_folder
from torch._subclasses.fake_tensor import FakeTensorMode

import evaluate
import perplexity
import train
from engine import loading, memory, optimizer
from engine.cuda import checks
from engine.cuda.checks import Card, Machine
from engine.device import pick_device, prepare_process
from engine.optimizer import build_optimizer, checkpoint_bytes, runs_triton
from run.errors import UserError
from run.script import let_gpu_memory_grow

ROOT = Path(train.__file__).parent
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CUDA_12 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0))
T4 = Card("Tesla T4", (7, 5))
WORKING = Machine("2.13.0+cu130", "13.0", None, CUDA_13, driver="580.65.06", cards=(H100,))
UNUSABLE = replace(WORKING, cards=(), fault="the driver says no")
ROCM = Machine("2.13.0+rocm7.1", None, "7.1", ("gfx942",), cards=(Card("MI300X", (9, 4)),))
INDEX = "--index-url https://download.pytorch.org/whl/"


# ---------------------------------------------------------------- a GPU that can't be used


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (
            {"driver": "550.54.15"},
            [
                "driver 550.54.15: torch 2.13.0+cu130 (CUDA 13.0) needs driver 580 or newer: upda",
                f", or pip install torch==2.13.0+cu126 {INDEX}cu126, or set CUDA_VISIBLE_DEVICES=",
            ],
        ),
        ({"driver": "470.256.02"}, ["update the driver to 580 or newer, or set CUDA_VIS"]),
        ({"driver": "525.60.13", "torch": "2.13.0+cu126", "cuda": "12.6"}, ["the driver says no"]),
        ({"driver": "515.43.04", "torch": "2.13.0+cu126", "cuda": "12.6"}, ["needs driver 525"]),
        ({"driver": ""}, ["driver of unknown version", "the driver says no: see whether nvidia"]),
        ({}, ["driver 580.65.06", "can't use the NVIDIA device: the driver says no"]),
        (
            {"torch": "2.13.0+cpu", "cuda": None},
            ["2.13.0+cpu is not built for CUDA", f"torch==2.13.0+cu130 {INDEX}cu130, or set"],
        ),
        (
            {"torch": "2.13.0+cpu", "cuda": None, "driver": "535.104.05"},
            [f"pip install torch==2.13.0+cu126 {INDEX}cu126, or set"],
        ),
        ({"torch": "2.13.0+cpu", "cuda": None, "driver": ""}, [f"cu130 {INDEX}cu130, or set"]),
    ],
)
def test_a_gpu_that_pytorch_can_not_use_is_no_reason_for_the_cpu(
    changes: dict[str, str | None], fragments: list[str]
) -> None:
    """Guards against 7 billion parameters that are trained on the CPU, without a word."""
    with pytest.raises(UserError) as error:
        pick_device(replace(UNUSABLE, **changes))
    for fragment in fragments:
        assert fragment in str(error.value), str(error.value)


def test_where_there_is_no_gpu_or_none_is_wanted_the_cpu_computes() -> None:
    assert pick_device(WORKING).type == "cuda"
    assert pick_device(replace(UNUSABLE, driver=None)).type == "cpu"
    assert pick_device(replace(UNUSABLE, driver="550.54.15", hides_gpus=True)).type == "cpu"


def test_the_cure_names_the_pinned_pytorch() -> None:
    """Guards against a cure that installs another version than requirements.txt."""
    assert f"torch=={checks.TORCH}\n" in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize(
    ("files", "driver"),
    [
        ({}, None),
        ({"dev/nvidiactl": ""}, None),
        ({"dev/nvidia0": ""}, ""),
        ({"dev/nvidia3": ""}, ""),
        ({"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""}, ""),
        ({"dev/dxg": ""}, None),  # of another maker
        ({"usr/lib/wsl/lib/libcuda.so.1": ""}, None),
        ({"dev/nvidia0": "", "proc/driver/nvidia/version": "NVRM version: unreadable\n"}, ""),
        (
            {
                "dev/nvidiactl": "",
                "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  "
                "580.65.06  Sun Jul 27 06:54:38 UTC 2025\n",
            },
            None,
        ),
        (
            {
                "dev/nvidia1": "",
                "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  "
                "470.256.02  Thu May  2 14:37:44 UTC 2024\nGCC version:  gcc version 11.4.0\n",
            },
            "470.256.02",
        ),
        (
            {
                "dev/nvidia0": "",
                "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for "
                "x86_64  580.65.06  Release Build  (dvs-builder@U22)  Sun Jul 27 06:54:38 UTC\n",
            },
            "580.65.06",
        ),
    ],
)
def test_the_driver_is_found(tmp_path: Path, files: dict[str, str], driver: str | None) -> None:
    """Guards against a refusal in a container without a GPU, on a machine that has some."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert checks.find_driver(tmp_path) == driver


def test_hidden_gpus_are_found() -> None:
    for shown, is_hidden in (
        ("", True),
        ("-1", True),
        ("-1,0", True),
        ("0", False),
        ("1,0", False),
    ):
        assert checks.hides_gpus({"CUDA_VISIBLE_DEVICES": shown}) is is_hidden
    assert not checks.hides_gpus({})


# ---------------------------------------------------------------- a GPU that lacks something


@pytest.mark.parametrize(
    ("machine", "card", "float32", "bfloat16"),
    [
        (WORKING, H100, None, None),
        (WORKING, Card("NVIDIA GeForce RTX 4090", (8, 9)), None, None),
        (WORKING, Card("NVIDIA GB10", (12, 1)), None, None),
        (WORKING, Card("of tomorrow", (13, 0)), None, None),  # compiles compute_120
        (WORKING, T4, None, "Tesla T4 has compute capability 7.5, and bfloat16 needs 8.0"),
        (
            WORKING,
            Card("Tesla V100", (7, 0)),
            "has kernels only for sm_75, sm_80",
            "only for sm_75",
        ),
        (replace(WORKING, architectures=CUDA_12), Card("Tesla V100", (7, 0)), None, "needs 8.0"),
        (replace(WORKING, architectures=CUDA_12), Card("B200", (10, 0)), "only for", "only for"),
        (ROCM, ROCM.cards[0], None, "PyTorch lacks for AMD (ROCm 7.1): set dtype float32"),
    ],
)
def test_a_card_that_can_not_compute_is_refused(
    machine: Machine, card: Card, float32: str | None, bfloat16: str | None
) -> None:
    """Guards against "no kernel image" after the load, and a FlashAttention that needs Ampere."""
    for dtype, fragment in ((torch.float32, float32), (torch.bfloat16, bfloat16)):
        check = (torch.device("cuda"), dtype, replace(machine, cards=(card,)))
        if fragment is None:
            prepare_process(*check)
            continue
        with pytest.raises(UserError) as error:
            prepare_process(*check)
        assert fragment in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("architectures", "runs"),
    [
        (("sm_90",), True),
        (("sm_90a",), True),
        (("sm_80",), False),
        (("sm_90", "sm_100"), True),
        (("sm_100",), False),
        (("compute_80",), True),
        (("compute_80a",), False),
        (("compute_100",), False),
        ((), True),
    ],
)
def test_kernels_for_a_card_are_recognised(architectures: tuple[str, ...], runs: bool) -> None:
    assert checks.has_kernels(architectures, H100.capability) is runs
    assert checks.has_kernels(("sm_80",), (8, 6)) and not checks.has_kernels(("sm_86",), (8, 0))


def test_unused_gpus_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against seven GPUs that idle without a word."""
    eight = replace(WORKING, cards=(H100,) * 8)
    pick_device(eight)
    prepare_process(torch.device("cuda"), torch.bfloat16, eight)
    out = capsys.readouterr().out
    assert out.startswith("8 GPUs are visible, and one is used: cuda:0, NVIDIA H100")
    assert "CUDA_VISIBLE_DEVICES=1" in out and out.count("\n") == 1
    for quiet in (WORKING, replace(eight, is_one_of_many=True)):
        prepare_process(torch.device("cuda"), torch.bfloat16, quiet)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("visible", "second"),
    [(None, "1"), ("2,3", "3"), ("5, 4,0", "4"), ("GPU-8a,GPU-8b", "GPU-8b"), ("0", "1")],
)
def test_the_next_gpu_is_named_as_the_environment_names_it(
    visible: str | None, second: str
) -> None:
    """Guards against advice to take GPU 1 of the machine, which may be another user's."""
    line = checks.unused_cards(replace(WORKING, cards=(H100,) * 2, visible=visible))
    assert line is not None and f" CUDA_VISIBLE_DEVICES={second} would choose the next" in line


def test_the_environments_choice_of_gpus_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_fault", lambda: "none here")
    for visible in ("2,3", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert checks.find_machine.__wrapped__().visible == visible
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert checks.find_machine.__wrapped__().visible is None


# ---------------------------------------------------------------- before anything is loaded


SCRIPTS = {"train": train, "evaluate": evaluate, "perplexity": perplexity}
HUB_ID = "meta-llama/Llama-2-7b-hf"


def arguments(script: str, settings: dict[str, str]) -> list[str]:
    if script == "train":
        return flags(settings | {"model": HUB_ID})
    return ["--ckpt", HUB_ID, *flags({name: settings[name] for name in ("dataset", "dtype")})]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("machine", "fragment"),
    [
        (replace(UNUSABLE, driver="550.54.15"), "needs driver 580"),
        (replace(WORKING, cards=(T4,)), "bfloat16 needs 8.0"),
    ],
)
def test_every_script_refuses_before_it_downloads_anything(
    call,
    settings: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    machine: Machine,
    fragment: str,
) -> None:
    monkeypatch.setattr(checks, "find_machine", lambda: machine)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    settings["dtype"] = "bfloat16"
    outcome = call(SCRIPTS[script], *arguments(script, settings))
    outcome.assert_user_error(fragment)
    assert not run_folder(settings).exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_exceeds_the_device_is_refused_before_its_weights_are_downloaded(
    call, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    """Guards against 13 GB of download and loading that end in a traceback."""
    folder = tmp_path / "hub"
    folder.mkdir()
    shutil.copy(Path(settings["model"]) / "config.json", folder)
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(memory, "total_bytes", lambda device: 10**5)
    outcome = call(SCRIPTS[script], *arguments(script, settings))
    if script == "train":
        parts = "(weights 0.0, gradients 0.0, optimizer states 0.0)"
        outcome.assert_user_error(f"model {HUB_ID}: training", parts, "over the 0.0 GiB")
    else:
        outcome.assert_user_error(f"model {HUB_ID}: the weights", "over the 0.0 GB")
        assert "set dtype bfloat16" in outcome.err
    assert asked == [["config.json"]]


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_model_is_counted_to_the_byte(
    make_llama, tmp_path: Path, dtype: torch.dtype, is_tied: bool
) -> None:
    """Guards against a tied head that counts twice; tests/test_plan.py has the rest of training."""
    made = make_llama(420, tie_word_embeddings=is_tied)
    made.save_pretrained(tmp_path)
    weights, _ = checkpoint_bytes(made.to(dtype).parameters())
    loading.check_fits(tmp_path, dtype, available=weights)
    with pytest.raises(UserError, match="over the"):
        loading.check_fits(tmp_path, dtype, available=weights - 1)


def test_the_memory_of_a_cpu_is_not_checked() -> None:
    assert memory.total_bytes(torch.device("cpu")) is None
    loading.check_fits("no/such-model", torch.float32)


# ---------------------------------------------------------------- the optimizer's kernel


@pytest.mark.parametrize(
    ("fault", "fragment", "cure"),
    [
        (RuntimeError("Failed to find C compiler. Specify CC"), "Failed to", "install a C comp"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "gcc", "install a C compiler"),
        (ImportError("Triton could not be imported on this system"), "not be", "pip install -r"),
        (PermissionError(13, "Permission denied"), "Permission denied", "set TRITON_CACHE_DIR"),
        (RuntimeError("Triton Error [CUDA]: kernel image is invalid"), "image", "update the GPU"),
    ],
)
def test_without_a_compiler_the_optimizer_takes_pytorchs_operations(
    capsys: pytest.CaptureFixture[str], fault: Exception, fragment: str, cure: str
) -> None:
    """Guards against a crash in the first step, after the load, a save and a backward pass."""

    def step(device: torch.device) -> None:
        raise fault

    assert not runs_triton(torch.device("cuda"), step)
    out = capsys.readouterr().out
    assert fragment in out and f": {cure}" in out and out.count("\n") == 1
    assert runs_triton(torch.device("cuda"), lambda device: None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
    ],
)
def test_a_failing_device_is_not_taken_for_a_missing_compiler(fault: Exception) -> None:
    def step(device: torch.device) -> None:
        raise fault

    with pytest.raises(type(fault)):
        runs_triton(torch.device("cuda"), step)


def test_only_a_gpu_is_asked_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an optimizer that chooses its kernel by itself, without the fallback."""
    asked: list[torch.device] = []

    def runs(device: torch.device) -> bool:
        asked.append(device)
        return False

    monkeypatch.setattr(optimizer, "runs_triton", runs)
    with FakeTensorMode():
        for device, dtype in (
            ("cpu", torch.bfloat16),
            ("cuda", torch.float32),
            ("cuda", torch.bfloat16),
        ):
            weight = torch.nn.Parameter(torch.empty(2, dtype=dtype, device=device))
            made = build_optimizer([weight], 1e-3, (0.9, 0.999), 1e-8, 0.0)
            assert not made.param_groups[0].get("triton")
    assert [device.type for device in asked] == ["cuda"]


def test_each_process_of_torchrun_has_a_gpu_of_its_own() -> None:
    """Guards against processes that all compute on the first GPU."""
    of_two = replace(WORKING, is_one_of_many=True, cards=(H100, T4))
    assert pick_device(replace(of_two, local_rank=1)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"Tesla T4 has compute capability 7.5, and bfloat16"):
        checks.check_card(replace(of_two, local_rank=1), torch.bfloat16)
    with pytest.raises(UserError, match=r"process 2 of this machine finds 2 GPUs: .* --nproc_per"):
        pick_device(replace(of_two, local_rank=2))


# ---------------------------------------------------------------- memory that grows


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_grows_in_place_unless_the_user_has_decided(name: str) -> None:
    environment: dict[str, str] = {}
    let_gpu_memory_grow(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment = {name: "backend:cudaMallocAsync"}
    let_gpu_memory_grow(environment)
    assert environment == {name: "backend:cudaMallocAsync"}


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "perplexity.py", "merge.py"])
def test_it_does_so_before_any_package_can_initialise_cuda(script: str) -> None:
    """Guards against a setting that comes too late: torchao's import asks the GPU what it is."""
    body = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    called = next(i for i, node in enumerate(body) if ast.unparse(node) == "check_platform()")
    imports = [node for node in body[:called] if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.split(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    assert names <= {"run", *sys.stdlib_module_names}
    assert "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ
