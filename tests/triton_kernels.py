"""Triton's kernels without a GPU: interpreted on a CPU, or compiled for a GPU that is not there."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load(file: Path, monkeypatch: pytest.MonkeyPatch, is_interpreted: bool) -> ModuleType:
    """The kernels, for the interpreter or for a compiler; skips the test if there is no Triton."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for GPUs")
    import triton.language as tl

    monkeypatch.setenv("TRITON_INTERPRET", str(int(is_interpreted)))
    if is_interpreted:  # this one is itself a kernel, which was made when Triton was imported
        combine = tl.standard._sum_combine
        monkeypatch.setattr(tl, "sum", lambda numbers: tl.reduce(numbers, 0, combine))
    spec = importlib.util.spec_from_file_location(f"{file.stem}_{is_interpreted}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_for_h100(
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    directory: Path,
    num_warps: int = 4,
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
    others = [name for name in names if name not in constants]
    source = ASTSource(
        function,
        {name: types.get(name, "*bf16") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in others},
    )
    options = {"enable_fp_fusion": False, "num_warps": num_warps}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    (directory / "kernel.ptx").write_text(code)
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    process = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    return code, process.stdout + process.stderr
