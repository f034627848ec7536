"""Triton's kernels without a GPU: interpreted on a CPU, or compiled for a GPU that is not there."""

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def load(file: Path, monkeypatch: pytest.MonkeyPatch, is_interpreted: bool) -> ModuleType:
    """The kernels of ``file``, for the interpreter or for a compiler.

    Skips the test if there is no Triton.
    """
    triton = pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for GPUs")
    monkeypatch.setenv("TRITON_INTERPRET", str(int(is_interpreted)))
    if is_interpreted:
        language = triton.language
        # So must be those functions of Triton's own that were imported to be compiled.
        for name, function in list(vars(language).items()):
            if isinstance(function, triton.JITFunction):
                monkeypatch.setattr(language, name, triton.jit(function.fn))
        # When these call others, the interpreter leaves its own operations behind.
        for name, function in list(vars(language.core).items()):
            monkeypatch.setattr(language.core, name, function)
    spec = importlib.util.spec_from_file_location(f"{file.stem}_{is_interpreted}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_on_cpu(monkeypatch: pytest.MonkeyPatch, check: Callable[..., list[str]]) -> None:
    """Let ``check``, of `engine.cuda.kernel_checks`, be made on the CPU and not on a GPU."""

    def on_cpu(*given: Any) -> list[str]:
        return check(*given[:-1], torch.device("cpu"))

    monkeypatch.setattr(f"engine.cuda.kernels.{check.__name__}", on_cpu)


def compiled_for_h100(
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    directory: Path,
    **options: Any,
) -> tuple[str, str]:
    """PTX code for tensors at aligned addresses, and what ptxas says about it.

    Args:
        types: of the arguments that are not bfloat16 tensors.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    others = [name for name in names if types.get(name) not in ("constexpr", "fp32")]
    source = ASTSource(
        function,
        {name: types.get(name, "*bf16") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in others},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    (directory / "kernel.ptx").write_text(code)
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    process = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    return code, process.stdout + process.stderr
