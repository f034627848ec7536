"""Checkpoints: whole or absent, and each says what it is.

A checkpoint is a Hugging Face folder with a ``training.json``; ``last`` holds the state of the
optimizer and of the random number generators beside that. It is written into a hidden sibling
folder, synced to disk, and renamed into place; the predecessor goes only then.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from config import KEYS, Config, load_config, local_path, make_config, read_settings
from errors import UserError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

DESCRIPTION_FILE = "training.json"
STATE_FILE = "state.safetensors"
METRICS_FILE = "metrics.jsonl"

# What may differ between a run and its resumption: nothing here changes which gradient a step has.
FREE_SETTINGS = frozenset(
    {
        *("output_dir", "run_name", "micro_batch_tokens", "gradient_checkpointing", "compile", "log_every"),
        *("checkpoint_steps", "resume", "max_new_tokens", "decode_slots", "calculator", "wandb_project", "wandb_mode"),
    }
)


Progress = TypeVar("Progress")


# ---------------------------------------------------------------- writing


def save_checkpoint(
    folder: Path,
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    description: Mapping[str, Any],
    state: "tuple[dict[str, torch.Tensor], dict[str, Any]] | None" = None,
) -> None:
    """Write model, tokenizer, ``training.json`` and, where given, what resuming needs.

    Args:
        state: the result of `pack_state`.

    Raises:
        UserError: the disk is full or not writable; an earlier checkpoint of this name is intact.
    """

    def write(staged: Path) -> None:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        content = dict(description)
        if state is not None:
            from safetensors.torch import save_file

            save_file(state[0], staged / STATE_FILE)
            content["state"] = state[1]
        (staged / DESCRIPTION_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    _replace_folder(folder, write)


def _replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    staged, previous = _staged(folder), _previous(folder)
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        write(staged)
        for file in staged.rglob("*"):
            _sync(file)
        _sync(staged)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        staged.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the checkpoint can't be written ({one_line(error)[:160]}); earlier ones are "
            "intact: make room or choose another --output_dir, then start again to resume"
        ) from error


def _staged(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.staged")


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, content: str | bytes) -> None:
    """Write a small file so that a reader, or a kill, sees the old one or the new one, never half of it."""
    staged = file.with_name(f".{file.name}.staged")
    staged.write_bytes(content if isinstance(content, bytes) else content.encode())
    _sync(staged)
    staged.replace(file)
    _sync(file.parent)


def find_last(run_folder: Path) -> Path | None:
    """The run's newest complete ``last``: also where a kill came between the two renames of a save."""
    last = run_folder / "last"
    return next((folder for folder in (last, _previous(last)) if (folder / DESCRIPTION_FILE).is_file()), None)


# ---------------------------------------------------------------- what resuming needs


def random_state() -> "dict[str, torch.Tensor]":
    """The states of all random number generators that training draws from, by name."""
    import torch

    devices = range(torch.cuda.device_count())
    return {"random.cpu": torch.get_rng_state()} | {f"random.cuda.{n}": torch.cuda.get_rng_state(n) for n in devices}


def set_random_state(state: "Mapping[str, torch.Tensor]") -> None:
    import torch

    torch.set_rng_state(state["random.cpu"])
    for number in range(torch.cuda.device_count()):
        if f"random.cuda.{number}" in state:
            torch.cuda.set_rng_state(state[f"random.cuda.{number}"], number)


def pack_state(
    optimizer: "torch.optim.Optimizer", progress: Mapping[str, Any]
) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """Optimizer and random states as named tensors, the rest as what JSON holds: nothing is pickled."""
    import torch

    tensors = random_state()
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


def unpack_state(folder: Path, optimizer: "torch.optim.Optimizer", make_progress: Callable[..., Progress]) -> Progress:
    """Restore what `pack_state` packed; returns the progress, made of its saved fields."""
    from safetensors.torch import load_file

    description = read_description(folder)
    try:
        tensors = load_file(folder / STATE_FILE)
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
    except Exception as error:  # safetensors and torch raise many types on a damaged file
        raise UserError(
            f"{folder}: is damaged ({one_line(error)[:160]}): delete it to start anew, or restore it from a copy"
        ) from None


def check_same_run(folder: Path, config: Config, data_sha256: str) -> None:
    """Raises UserError where resuming with these settings would not continue the run saved in ``folder``."""
    description = read_description(folder)
    before, now = description["settings"], asdict(config)
    changed = [
        f"{key} was {before.get(key)!r} and is {now[key]!r}"
        for key in KEYS
        if key not in FREE_SETTINGS and before.get(key) != now[key]
    ]
    if description["data"].get("train_sha256") != data_sha256:
        changed.append("the rows of the data set are not the same")
    if changed:
        raise UserError(
            f"{folder}: can't go on with other settings: {'; '.join(changed)}: put them back, or start anew under "
            "another --run_name"
        )


# ---------------------------------------------------------------- reading


def read_description(folder: Path) -> dict[str, Any]:
    """The ``training.json`` of a checkpoint of ours."""
    file = folder / DESCRIPTION_FILE
    try:
        description = json.loads(file.read_bytes())
        for key, kind in (("settings", dict), ("data", dict), ("step", int), ("epoch", float), ("wandb_run_id", str)):
            if not isinstance(description[key], kind):
                raise ValueError(f"{key} is {description[key]!r}")
        return description
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: is damaged or no training.json of this program ({one_line(error)[:160]})") from None


@dataclass(frozen=True)
class Source:
    """What a script reads a model from.

    Attributes:
        path: a folder or hub id.
        config: the settings that belong to it.
        description: its ``training.json``; None for a model that is no checkpoint of ours.
        run_folder: the run that it belongs to; None also where the checkpoint was copied out of it.
    """

    path: str
    config: Config
    description: dict[str, Any] | None
    run_folder: Path | None


def resolve_source(ckpt: str | None, config_file: Path, typed: Mapping[str, str]) -> Source:
    """Find the checkpoint, and the settings that go with it.

    A checkpoint of ours knows its own settings (prompt, data set, seed of the split, dtype);
    any other model takes those of ``config_file``. A flag overrides both.

    Args:
        ckpt: None for the best checkpoint of ``config_file``'s run.
    """
    if ckpt is None:
        config = load_config(config_file, typed)
        folder = local_path(config.output_dir) / config.run_name / "best"
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such checkpoint: train first, or name one with --ckpt DIR")
        ckpt = str(folder)
    folder = local_path(ckpt)
    if not (folder / DESCRIPTION_FILE).is_file():
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise UserError(f"{folder}: is no checkpoint and no Hugging Face model folder: it has no config.json")
        return Source(ckpt, load_config(config_file, typed), None, None)
    description = read_description(folder)
    # A setting that is newer than the checkpoint has its value from the file.
    known = {key: value for key, value in description["settings"].items() if key in KEYS}
    values = read_settings(config_file)[0] | known | dict(typed)
    config = make_config(values, f"{folder / DESCRIPTION_FILE} and command line")
    print(f"settings: those of {folder / DESCRIPTION_FILE}" + (f", but {', '.join(typed)} as typed" if typed else ""))
    parent = folder.resolve().parent
    return Source(str(folder), config, description, parent if (parent / METRICS_FILE).is_file() else None)
