"""Which of the Triton kernels run on this GPU and are right; a line says where one is not used.

Each is imported, compiled and checked (`engine.cuda.kernel_checks`) when it is needed for the first
time. Where one does not run or makes mistakes, something slower takes its place.
"""

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import torch

from engine.cuda.kernel_checks import (
    wrong_attention,
    wrong_norm_gradients,
    wrong_rounding,
    wrong_small_kernels,
)
from engine.device_errors import cure_for_kernels, is_of_a_kernel
from engine.functions import NormGradients
from run.errors import cause_of, root_cause

DECODING = "decoding: its fused kernels", "using PyTorch's operations, which are slower"
TRAINING = "training: the norms' fused kernels", "torch.compile makes slower ones instead"
ROUNDING = "fp8: the kernels that round", "using PyTorch's operations, which are slower"


@cache
def small_kernels(kind: str) -> ModuleType | None:
    """`engine.cuda.small_kernels`; None where PyTorch's operators are to compute the same.

    Args:
        kind: of device; there are none but for "cuda".
    """
    if kind != "cuda":
        return None
    return _usable(_import_small_kernels, wrong_small_kernels, *DECODING)


def decode_attention(
    kind: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> ModuleType | None:
    """`engine.cuda.attention_kernel`; None where `attend_to_lengths` is to compute the same.

    That is so where there are no `small_kernels`, whose line says why.
    """
    return small_kernels(kind) and _decode_attention(dtype, heads, kv_heads, head_dim)


@cache
def _decode_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> ModuleType | None:
    check = partial(wrong_attention, dtype, heads, kv_heads, head_dim)
    return _usable(_import_attention_kernel, check, *DECODING)


@cache
def norm_gradients(kind: str, hidden_size: int, dtype: torch.dtype) -> NormGradients | None:
    """`engine.cuda.norm_kernel.norm_gradients`; None where a compiled one is to take its place."""
    if kind != "cuda":
        return None
    check = partial(wrong_norm_gradients, hidden_size, dtype)
    kernel = _usable(_import_norm_kernel, check, *TRAINING)
    return kernel and kernel.norm_gradients


@cache
def fp8_kernels(kind: str) -> ModuleType | None:
    """`engine.cuda.fp8_kernels`; None where PyTorch's operators are to round."""
    return _usable(_import_fp8_kernels, wrong_rounding, *ROUNDING) if kind == "cuda" else None


def _usable(
    load: Callable[[], ModuleType],
    wrong_results: Callable[[ModuleType, torch.device], list[str]],
    whose: str,
    instead: str,
) -> ModuleType | None:
    """The kernels that ``load`` imports; None, and a line, if they do not run or are wrong.

    Args:
        wrong_results: finds what they compute otherwise than PyTorch's operators, by name.
        whose, instead: for the line: the kernels, and what takes their place.
    """
    try:
        kernels = load()
        wrong = wrong_results(kernels, torch.device("cuda"))
    except Exception as error:  # Triton and its compilers raise many types
        if not is_of_a_kernel(error):
            raise
        fault, cure = f"do not run here ({cause_of(error)})", cure_for_kernels(root_cause(error))
    else:
        if not wrong:
            return kernels
        fault = f"compute another {', '.join(wrong)} than PyTorch"
        cure = f"install another torch than {torch.__version__}"
    print(f"{whose} {fault}; {instead}: {cure}")
    return None


# Triton, which they import, exists only beside PyTorch's builds for GPUs.


def _import_small_kernels() -> ModuleType:
    from engine.cuda import small_kernels as kernels

    return kernels


def _import_attention_kernel() -> ModuleType:
    from engine.cuda import attention_kernel as kernel

    return kernel


def _import_norm_kernel() -> ModuleType:
    from engine.cuda import norm_kernel as kernel

    return kernel


def _import_fp8_kernels() -> ModuleType:
    from engine.cuda import fp8_kernels as kernels

    return kernels
