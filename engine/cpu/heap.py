"""Faster memory for large tensors on Linux. On other systems these functions change nothing."""

import ctypes
import math
import sys
from typing import Any

import torch

# Parameter names of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
# A constant of Linux's madvise(2), and the size of x86's large pages.
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 2 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it to the kernel.

    Otherwise each tensor over 32 MB would be mapped again, and the kernel would zero it page by
    page, which takes a third of the processor time of training on a CPU.
    """
    mallopt = _from_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)


def empty_in_large_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty`` in pages of 2 MB, for memory that fills up gradually.

    The kernel provides and zeroes each page when it is first written to, and that takes almost as
    long for a page of 4 KB.
    """
    tensor = torch.empty(shape, dtype=dtype)
    start = math.ceil(tensor.data_ptr() / _LARGE_PAGE) * _LARGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes - start) // _LARGE_PAGE * _LARGE_PAGE
    madvise = _from_libc("madvise")
    if madvise is not None and size > 0:
        # Only a hint: if the kernel refuses it, nothing changes.
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return tensor


def _from_libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
