"""Main and device memory: what is free, asked for, kept and given back, and what an out-of-memory error looks like."""

import gc
import os
from pathlib import Path

import torch

CONTROL_GROUP = "/sys/fs/cgroup"  # where a container finds its own


def clear_gradients(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Zero the gradients: in their place on a CPU, where new ones among the activations would tear its heap."""
    optimizer.zero_grad(set_to_none=device.type == "cuda")


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
