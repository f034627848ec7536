"""Main and device memory: what is free, asked for, kept and given back, and what an out-of-memory error looks like."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CONTROL_GROUP = "/sys/fs/cgroup"  # where a container finds its own
# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
# Of Linux' madvise(2), and the size of x86's large pages.
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 2 * 2**20


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


def empty_in_large_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty`` on the CPU, in pages of 2 MB where Linux has them, for memory that fills up bit by bit.

    The kernel hands out and zeroes each page when it is first written to, and a page of 4 KB takes it almost as long.
    """
    tensor = torch.empty(shape, dtype=dtype)
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform.startswith("linux") else None
    start, end = -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE, tensor.data_ptr() + tensor.nbytes
    if madvise is not None and end - start >= _LARGE_PAGE:
        # An advice: where it is refused, all goes on as without it.
        madvise(ctypes.c_void_p(start), ctypes.c_size_t((end - start) // _LARGE_PAGE * _LARGE_PAGE), _MADV_HUGEPAGE)
    return tensor


def clear_gradients(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Zero the gradients: in their place on a CPU, where new ones among the activations would tear its heap."""
    optimizer.zero_grad(set_to_none=device.type == "cuda")


@contextmanager
def remade(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> Iterator[None]:
    """What is computed in here keeps ``make`` for its backward pass instead of ``tensor``, and calls it there.

    For what is cheap to compute from tensors that are kept anyway (a form of selective activation
    recomputation, arXiv:2205.05198). The gradients are the same bit for bit where ``make`` gives
    ``tensor`` bit for bit.
    """
    target = [tensor]  # empty once we have left: the hooks live as long as the graph, and must not keep it
    again: list[torch.Tensor] = []

    def pack(saved: torch.Tensor) -> torch.Tensor | None:
        is_target = saved.data_ptr() == target[0].data_ptr() and saved.shape == target[0].shape
        return None if is_target else saved

    def unpack(packed: torch.Tensor | None) -> torch.Tensor:
        if packed is not None:
            return packed
        if not again:  # one for all that keep it; gone with the last of them
            with torch.no_grad():
                again.append(make())
        return again[0]

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        target.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a tensor did not fit, on a device or in main memory."""
    # The CPU's allocator has no type of its own: "DefaultCPUAllocator: can't allocate memory".
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that can still be had: from the system, and within a container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    rooms = [_container_room()]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        rooms.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):  # no Linux
        rooms.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return min(room for room in rooms if room is not None)


def _container_room() -> int | None:
    """What a control group (version 2) leaves of its memory; None where it sets no limit."""
    group = Path(CONTROL_GROUP)
    try:
        used = int((group / "memory.current").read_text())
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files that were read or written count as used, and are given back when they are wanted.
        cached = int(lines["inactive_file"]) + int(lines["active_file"])
        return int((group / "memory.max").read_text()) - used + cached
    except (OSError, KeyError, ValueError):  # "max"
        return None


def release() -> None:
    """Give back what a failed pass left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
