"""What a run saves as named tensors: packed, copied to host memory, and unpacked."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from engine import device_errors, memory
from engine.optimizer import make_state
from engine.sharding import is_spread
from engine.slices import has_slices, read_slices
from run.files import say_once

if TYPE_CHECKING:
    from engine.llama import Llama

# The share of free host memory that a copy may take. The rest is for the pages of its files.
COPY_SHARE = 0.8
# What passes through page-locked memory at a time. To lock as many bytes as a checkpoint has would
# take seconds, and keep them from everything else.
PIECE_BYTES = 2**26
HUGE_PAGE_BYTES = 2**21

# How an optimizer computes on its device. A run that goes on with another device takes that one's.
IMPLEMENTATION = ("triton", "foreach", "fused", "capturable")


def get_random_state() -> dict[str, torch.Tensor]:
    """A snapshot of every random number generator that training uses, by name."""
    state = {"random.cpu": torch.get_rng_state()}
    for number, device in enumerate(_own_devices()):
        state[f"random.cuda.{number}"] = torch.cuda.get_rng_state(device)
    return state


def _own_devices() -> Sequence[int]:
    """The numbers of the GPUs of this process."""
    if torch.distributed.is_initialized() and torch.cuda.is_available():
        return [torch.cuda.current_device()]
    return range(torch.cuda.device_count())


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["random.cpu"])
    for number, device in enumerate(_own_devices()):
        if f"random.cuda.{number}" in state:
            torch.cuda.set_rng_state(state[f"random.cuda.{number}"], device)


def pack_state(
    optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state that resuming needs in addition to the weights, in forms that need no pickling.

    Returns:
        The tensors of the optimizer and the random number generators, by name, and everything
        else as JSON values.
    """
    tensors = get_random_state()
    content = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in content["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(content["param_groups"]):
        for name, value in group.items():
            if isinstance(value, torch.Tensor):  # optimi counts its steps in one
                tensors[f"group.{index}.{name}"] = value
        plain = (bool, int, float, str, type(None))
        groups.append({name: value for name, value in group.items() if isinstance(value, plain)})
    return tensors, {"progress": dict(progress), "optimizer": scalars, "groups": groups}


def copy_to_host(
    model: "Llama", tensors: Mapping[str, torch.Tensor], *others: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """Copy ``tensors`` of ``model`` to host memory, to be saved while training changes them.

    Args:
        others: are to be copied after these, which would be in vain without room for all.

    Returns:
        The copies; None if there is no room for them. On a CPU there never is: a copy would take
        memory from training, and a save beside it the processor.
    """
    if model.device.type == "cpu":
        return None
    together = [tensor for each in (tensors, *others) for tensor in each.values()]
    needed = sum({tensor.data_ptr(): tensor.nbytes for tensor in together}.values())
    free = memory.free_bytes(torch.device("cpu"))
    if needed > COPY_SHARE * free:
        say_once(
            "copy",
            f"host memory has {free / 1e9:.1f} GB free, too few to copy {needed / 1e9:.1f} GB: "
            "training waits until each checkpoint is written",
        )
        return None
    try:
        return copied(tensors)
    except Exception as error:
        if not device_errors.is_out_of_memory(error):
            raise
        return None


def copied(
    tensors: Mapping[str, torch.Tensor], piece_bytes: int = PIECE_BYTES
) -> dict[str, torch.Tensor]:
    """Copies in host memory. What is one tensor under two names, as tied weights are, remains one.

    Each tensor passes through a small page-locked buffer, to which a GPU copies at full speed, and
    from which all processor cores copy on.
    """
    buffer = _page_locked(piece_bytes)
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        identity = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if identity not in copies:
            copies[identity] = _copied_through(buffer, tensor)
        found[name] = copies[identity]
    return found


def _page_locked(piece_bytes: int) -> torch.Tensor:
    return torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _copied_through(buffer: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    copy = _empty_on_host(tensor)
    source, target = (each.reshape(-1).view(torch.uint8) for each in (tensor, copy))
    for start in range(0, len(source), len(buffer)):
        piece = source[start : start + len(buffer)]
        passing = buffer[: len(piece)].copy_(piece)
        target[start : start + len(piece)].copy_(passing)
    return copy


def _empty_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a copy of ``tensor``, in huge pages, which the kernel hands out faster."""
    if tensor.nbytes >= HUGE_PAGE_BYTES:
        try:
            pages = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
        except (OSError, AttributeError):  # a system without them
            pass
    return torch.empty(tensor.shape, dtype=tensor.dtype)


class ThroughPageLocked(TorchFunctionMode):
    """Within it, ``tensor.to("cpu")`` copies from a GPU as `copied` does.

    So safetensors copies what it writes, and with it Transformers: into ordinary memory, at 1.4
    GB/s on an H200, where this takes 7.
    """

    _buffer: torch.Tensor | None = None

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is not torch.Tensor.to or kwargs or args[1:] != ("cpu",):
            return function(*args, **(kwargs or {}))
        tensor = args[0].detach()
        if tensor.device.type != "cuda" or not tensor.is_contiguous() or is_spread(tensor):
            return function(*args)
        if self._buffer is None:
            self._buffer = _page_locked(PIECE_BYTES)
        return _copied_through(self._buffer, tensor)


def save_from_device(save: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
    """Call ``save``, and copy quickly what it writes of tensors on a GPU."""
    with ThroughPageLocked():
        save(*arguments, **keywords)


@memory.reported("restoring the optimizer's state", memory.LARGER_DEVICE)
def unpack_state(
    read: Callable[[], Mapping[str, torch.Tensor]],
    saved: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Restore what `pack_state` returned: ``read`` gives its tensors, ``saved`` is its second part.

    Args:
        folder: the checkpoint, which several processes read or have saved; each reads its slices.

    Returns:
        The fields of the progress.

    Raises:
        UserError: the state does not fit into memory, or the device failed.
    """
    if folder and (has_slices(folder) or is_spread(optimizer.param_groups[0]["params"][0])):
        make_state(optimizer)
        tensors, _ = pack_state(optimizer, {})
        tensors = read_slices(folder, tensors)
    else:
        tensors = read()
    _load(tensors, saved, optimizer)
    set_random_state(tensors)
    return saved["progress"]


def _load(
    tensors: Mapping[str, torch.Tensor], saved: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> None:
    if optimizer.param_groups[0]["params"][0].device.type == "cpu":
        # A tensor in a mapped file would keep the file's disk space in use after its removal.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in saved["optimizer"].items()
    }
    current_groups = optimizer.state_dict()["param_groups"]
    groups = [
        current | before | {name: current[name] for name in IMPLEMENTATION if name in current}
        for current, before in zip(current_groups, saved["groups"], strict=True)
    ]
    for key, tensor in tensors.items():
        kind, *rest = key.split(".", 2)
        if kind == "optimizer":
            index, name = rest
            state.setdefault(int(index), {})[name] = tensor
        elif kind == "group":
            index, name = rest
            groups[int(index)][name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    check_shapes(optimizer)


def check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if a state is that of a weight of another shape."""
    for weight, state in optimizer.state.items():
        for name in {"exp_avg", "exp_avg_sq", "kahan_comp"} & state.keys():
            if state[name].shape != weight.shape:
                found, expected = list(state[name].shape), list(weight.shape)
                raise ValueError(f"{name} of {found} is not that of a weight of {expected}")
