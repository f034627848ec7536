"""Whose a run's folder is, whether its training may go on, and what that needs beside the weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

import memory
from checkpoint import (
    BEST,
    FINISHED_FILE,
    LAST,
    PREVIOUS,
    STATE_FILES,
    check_no_links,
    cure_without_best,
    fault_of,
    is_of_an_older_version,
    newest_intact,
    read_description,
    saved_settings,
    wait_for_removals,
)
from config import KEYS, PLACES, Config, is_same_place, local_path
from errors import UserError, one_line
from storage import locked, replace_file

# What may differ between a run and its resumption, beside epochs where no learning rate depends on them: nothing
# here changes which gradient a step has.
FREE_SETTINGS = frozenset(
    {
        *("output_dir", "run_name", "micro_batch_tokens", "gradient_checkpointing", "compile", "log_every"),
        *("checkpoint_steps", "keep_state", "resume", "max_new_tokens", "decode_slots", "calculator"),
        *("wandb_project", "wandb_mode"),
    }
)

LOCK_SECONDS = 1.0  # for how long a run's folder is asked for

Progress = TypeVar("Progress")


@contextmanager
def claimed(folder: Path, resume: str) -> Iterator[Path | None]:
    """Make the run's folder, or find what to resume from, and keep other processes out of it meanwhile.

    Yields:
        The checkpoint to go on from, or None for a new run.

    Raises:
        UserError: the folder is in use and may not be, or can't be written.
    """
    held = f"{folder}: another process is training this run: wait for it, or choose another --run_name"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_no_links(folder)
            # An evaluation that logs its score holds it for a moment.
            stack.enter_context(locked(folder, held, patience=LOCK_SECONDS))
        except OSError as error:
            raise UserError(f"{folder}: can't be written ({error.strerror}): choose another --output_dir") from None
        stack.callback(wait_for_removals)
        yield _find_start(folder, resume)


def _find_start(folder: Path, resume: str) -> Path | None:
    if resume == "auto" and (start := newest_intact(folder)):
        (folder / FINISHED_FILE).unlink(missing_ok=True)  # of a removal that was cut: there is something to go on from
        return start
    if (folder / FINISHED_FILE).exists():
        if fault := fault_of(folder / BEST):
            raise UserError(
                f"{folder}: this run is finished, and its {BEST} is damaged or gone ({fault}): "
                f"{cure_without_best(folder)}"
            )
        raise UserError(
            f"{folder}: this run is finished, and its {LAST} and {PREVIOUS} were removed (keep_state false): evaluate "
            "it, or train another under a new --run_name"
        )
    in_use = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if in_use:
        raise UserError(
            f"{folder}: is in use ({', '.join(in_use[:4])}): "
            + ("--resume auto goes on from its last; or " if LAST in in_use else "")
            + "choose another --run_name"
        )
    try:
        replace_file(folder / ".write_test", "")
        (folder / ".write_test").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}): choose another --output_dir") from None
    return None


def get_random_state() -> dict[str, torch.Tensor]:
    """The states of all random number generators that training draws from, by name."""
    devices = range(torch.cuda.device_count())
    return {"random.cpu": torch.get_rng_state()} | {f"random.cuda.{n}": torch.cuda.get_rng_state(n) for n in devices}


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
        tensors |= {f"group.{index}.{name}": value for name, value in group.items() if isinstance(value, torch.Tensor)}
        plain = (bool, int, float, str, type(None))
        groups.append({name: value for name, value in group.items() if isinstance(value, plain)})
    return tensors, {"progress": dict(progress), "optimizer": scalars, "groups": groups}


def unpack_state(folder: Path, optimizer: torch.optim.Optimizer, make_progress: Callable[..., Progress]) -> Progress:
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
        state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in scalars.items()}
        groups = [
            group | saved
            for group, saved in zip(optimizer.state_dict()["param_groups"], description["state"]["groups"], strict=True)
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
            raise UserError(f"{folder}: its optimizer state does not fit into memory: take a larger device") from None
        raise UserError(
            f"{folder}: is damaged, or of another version of this program ({one_line(error)[:160]}): restore it from a "
            "copy, or start anew under another --run_name"
        ) from None


def check_same_run(folder: Path, config: Config, data_sha256: str) -> None:
    """Say which settings are others than those of the run saved in ``folder``.

    Raises:
        UserError: with one of them, or with other data, it would be another run.
    """
    description = read_description(folder)
    before, now = dict(description["settings"]), asdict(config)
    older = is_of_an_older_version(description)
    free = FREE_SETTINGS
    if config.lr_schedule == "constant" and config.warmup_ratio == 0:  # no rate depends on the number of steps
        free |= {"epochs"}
    free |= {"dataset"}  # its rows say which one it is
    before |= saved_settings(folder, description)
    if has_moved(str(before.get("model")), config.model):
        free |= {"model"}
    # A setting that is newer than the checkpoint was none when it was saved.
    known = [key for key in KEYS if key in before]
    known = [key for key in known if key not in PLACES or not is_same_folder(str(before[key]), now[key], older)]
    others = {key: f"{key} was {before[key]!r} and is {now[key]!r}" for key in known if before[key] != now[key]}
    changed = [what for key, what in others.items() if key not in free]
    if description["data"].get("train_sha256") != data_sha256:
        changed.append("the rows of the data set are not the same")
    if changed:
        raise UserError(
            f"{folder}: can't go on with other settings: {'; '.join(changed)}: put them back, or start anew under "
            "another --run_name"
        )
    if others:
        print(f"resuming: {'; '.join(others.values())}")


def is_same_folder(before: str, now: str, older: bool) -> bool:
    """Whether two paths lead to one folder; ``older``: the first may be relative to a folder that is not known."""
    if older and is_same_place(before, now):
        return True
    one, other = local_path(before), local_path(now)
    return one.is_absolute() and one.is_dir() and other.is_dir() and one.samefile(other)


def has_moved(before: str, now: str) -> bool:
    """Whether a folder is not where it was, and one of its name is where it is now.

    That is enough for the base model: a run that goes on reads nothing more of it.
    """
    old, new = local_path(before), local_path(now)
    return old.is_absolute() and not old.exists() and new.is_dir() and old.name == new.name
