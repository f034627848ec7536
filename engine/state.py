"""The state of the optimizer and of the random number generators as named tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from engine import memory

# How an optimizer computes on its device. A run that goes on with another device takes that one's.
IMPLEMENTATION = ("triton", "foreach", "fused", "capturable")


def get_random_state() -> dict[str, torch.Tensor]:
    """A snapshot of every random number generator that training uses, by name."""
    state = {"random.cpu": torch.get_rng_state()}
    for number in range(torch.cuda.device_count()):
        state[f"random.cuda.{number}"] = torch.cuda.get_rng_state(number)
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["random.cpu"])
    for number in range(torch.cuda.device_count()):
        if f"random.cuda.{number}" in state:
            torch.cuda.set_rng_state(state[f"random.cuda.{number}"], number)


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


def unpack_state(
    read: Callable[[], Mapping[str, torch.Tensor]],
    saved: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Restore what `pack_state` returned: ``read`` gives its tensors, ``saved`` is its second part.

    Returns:
        The fields of the progress.

    Raises:
        MemoryError: the state does not fit into the memory of the device.
    """
    try:
        tensors = read()
        _load(tensors, saved, optimizer)
    except Exception as error:
        if memory.is_out_of_memory(error):
            raise MemoryError from None
        raise
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
