"""The state of the optimizer and of the random number generators as named tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from engine import memory
from run.errors import UserError, one_line
from run.manifest import STATE_FILES
from run.training_json import read_description

Progress = TypeVar("Progress")


def get_random_state() -> dict[str, torch.Tensor]:
    """The states of all random number generators that training draws from, by name."""
    devices = range(torch.cuda.device_count())
    return {"random.cpu": torch.get_rng_state()} | {
        f"random.cuda.{n}": torch.cuda.get_rng_state(n) for n in devices
    }


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["random.cpu"])
    for number in range(torch.cuda.device_count()):
        if f"random.cuda.{number}" in state:
            torch.cuda.set_rng_state(state[f"random.cuda.{number}"], number)


def pack_state(
    optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer and random states as named tensors, the rest as what JSON holds: nothing is pickled."""
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
    for index, group in enumerate(content["param_groups"]):  # optimi counts its steps there
        tensors |= {
            f"group.{index}.{name}": value
            for name, value in group.items()
            if isinstance(value, torch.Tensor)
        }
        plain = (bool, int, float, str, type(None))
        groups.append({name: value for name, value in group.items() if isinstance(value, plain)})
    return tensors, {"progress": dict(progress), "optimizer": scalars, "groups": groups}


def unpack_state(
    folder: Path, optimizer: torch.optim.Optimizer, make_progress: Callable[..., Progress]
) -> Progress:
    """Restore what `pack_state` packed; returns the progress, made of its saved fields."""
    description = read_description(folder)
    on_cpu = optimizer.param_groups[0]["params"][0].device.type == "cpu"
    try:
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob(STATE_FILES)):
            tensors |= load_file(file)
        if on_cpu:  # else they would be those of the mapped file, which keeps its room on the disk when it is removed
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        scalars = description["state"]["optimizer"]
        state: dict[int, dict[str, Any]] = {
            int(index): dict(entries) for index, entries in scalars.items()
        }
        groups = [
            group | saved
            for group, saved in zip(
                optimizer.state_dict()["param_groups"], description["state"]["groups"], strict=True
            )
        ]
        for key, tensor in tensors.items():
            kind, index, name = key.split(".", 2) if key.count(".") > 1 else ("random", "", "")
            if kind == "optimizer":
                state.setdefault(int(index), {})[name] = tensor
            elif kind == "group":
                groups[int(index)][name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        set_random_state(tensors)
        return make_progress(**description["state"]["progress"])
    except Exception as error:  # safetensors and torch raise many types
        if memory.is_out_of_memory(error):
            raise UserError(
                f"{folder}: its optimizer state does not fit into memory: take a larger device"
            ) from None
        raise UserError(
            f"{folder}: is damaged, or of another version of this program ({one_line(error)[:160]}): restore it from a "
            "copy, or start anew under another --run_name"
        ) from None
