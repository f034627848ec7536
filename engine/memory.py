"""Measures free memory, plans decoding slots within it, and reports where it ran out."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.device_errors import is_device_fault, is_out_of_memory
from run.errors import UserError, gist

if TYPE_CHECKING:
    from engine.llama import Llama

CONTROL_GROUPS = Path("/sys/fs/cgroup")  # in a container, its own group is the root here
MEMBERSHIP = Path("/proc/self/cgroup")  # which group this process is in, such as one of Slurm's
# The files of a control group of versions 2 and 1: its limit, its use, and where memory.stat has
# the cached pages of files, which count as used, but which the kernel reclaims on demand.
VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
VERSION_1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
# The share of free memory that the cache may take. The rest is for the prompts' forward pass.
CACHE_SHARE = 0.8
# What to do if even the weights or the optimizer's state do not fit.
LARGER = "take a device with more memory"
LARGER_DEVICE = f"{LARGER}, or end what else is using this one"


@contextmanager
def reported(doing: str, cure: str) -> Iterator[None]:
    """Report running out of memory, or a failing device, in one line; also a decorator.

    Args:
        doing: what is being done, such as "loading the weights".
        cure: what to do if memory runs out.

    Raises:
        UserError: memory ran out or the device failed.
    """
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {gist(error)}"
        if is_out_of_memory(error):
            raise UserError(f"out of memory while {doing} ({why}): {cure}") from None
        if is_device_fault(error):
            raise UserError(
                f"the device failed while {doing} ({why}): type the same command again, which goes "
                "on from what was saved; if it fails again, look for the GPU's Xid in dmesg"
            ) from None
        raise


def total_bytes(device: torch.device) -> int | None:
    """The memory of a GPU; None for a CPU, which can swap."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def kind(device: torch.device) -> str:
    """The name that devices of the same kind share, such as ``NVIDIA H100 80GB HBM3``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_bytes(
    device: torch.device, control_groups: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP
) -> int:
    """Available memory of ``device``, within the system's, a container's and a job's limit.

    Processes that torchrun has started on one machine have an equal part each of its main memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [
        _room(group, files)
        for root, controller, files in (
            (control_groups, "", VERSION_2),
            (control_groups / "memory", "memory", VERSION_1),
        )
        for group in _groups(root, controller, membership)
    ]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):  # not Linux
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(limit for limit in limits if limit is not None) // processes


def _groups(root: Path, controller: str, membership: Path) -> list[Path]:
    """The control group of this process and all that contain it, up to ``root``.

    A limit of any of them holds. A container may not see all of them, but always its own, as the
    root (https://man7.org/linux/man-pages/man7/cgroups.7.html, "/proc/pid/cgroup").
    """
    own = Path()
    try:
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):  # in version 2, there are none
                own = Path(path.strip("/"))
    except (OSError, ValueError):  # not Linux
        pass
    return [root / group for group in (own, *own.parents)]


def _room(group: Path, files: tuple[str, str, tuple[str, ...]]) -> int | None:
    """The memory left in a control group; None if it sets no limit, or does not exist."""
    limit, used, cached = files
    try:
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        room = int((group / limit).read_text()) - int((group / used).read_text())
        return room + sum(int(lines[name]) for name in cached)
    except (OSError, KeyError, ValueError):  # the limit of version 2 may be "max"
        return None


def has_room(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes are free in one piece, which the next tensors will be parts of."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def release() -> None:
    """Free the memory that a failed pass left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class CachePlan:
    """How large a KV cache is.

    Attributes:
        slots: how many sequences are decoded at the same time.
        length: of the longest sequence, in tokens.
        regions: how many sequences of this length there is room for.
    """

    slots: int
    length: int
    regions: int


def plan_slots(
    model: "Llama", slots: int | None, length: int, prompts: int, free: int | None = None
) -> CachePlan:
    """How many slots to decode ``prompts`` prompts in, for sequences of up to ``length`` tokens.

    Args:
        slots: upper bound from the user, or None to choose. Capped by free memory rather than
            rejected: it cannot change a completion, and failing here could throw away hours of
            training.
        free: free memory in bytes; None: measured.

    Raises:
        UserError: not even one slot fits.
    """
    free = free_bytes(model.device) if free is None else free
    each = model.kernels.cache.slot_bytes(model, length)
    regions = int(CACHE_SHARE * free / each)
    most = min(prompts, model.kernels.most_slots if slots is None else slots)
    if not regions:
        raise UserError(
            f"decoding {length} tokens takes {each / 1e9:.2f} GB of cache, over {CACHE_SHARE:.0%} "
            f"of the {free / 1e9:.2f} GB of free memory: set a smaller max_new_tokens, or free "
            "some memory"
        )
    fit = model.kernels.sequences_in(model, regions)
    if slots is not None and fit < most:
        print(
            f"decode_slots {slots}: only {fit} fit into the {free / 1e9:.2f} GB of free memory; "
            f"using {fit}"
        )
    return CachePlan(min(most, fit), length, min(most, fit, regions))
