"""Main and device memory: what is kept, what is given back, and what an out-of-memory error looks like."""

import ctypes
import gc
import sys

import torch

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of giving it back to the kernel.

    Each tensor over 32 MB would otherwise be mapped anew, and the kernel would zero it page by
    page: a third of the processor time of training on a CPU. Nothing happens on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a tensor did not fit, on a device or in main memory."""
    # The CPU's allocator has no type of its own: "DefaultCPUAllocator: can't allocate memory".
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def release() -> None:
    """Give back what a failed pass left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
