"""training.json, in which a checkpoint describes itself."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from run.errors import UserError, one_line
from run.manifest import DESCRIPTION_FILE
from run.paths import local_path, with_tilde
from run.setting_types import PLACES
from run.tracker import RunPath

VERSIONED_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "torch-optimi")
OPTIMIZER_PACKAGES = {"adamw_8bit": ("torchao",)}
ADAPTER_PACKAGES = ("peft", "bitsandbytes")


def describe(
    settings: Mapping[str, Any],
    *,
    plan: Mapping[str, Any],
    step: int,
    epoch: float,
    base: Mapping[str, str] | None,
    data_hashes: Mapping[str, str],
    tokenizer: Mapping[str, Any],
    wandb: RunPath,
    validation_loss: float | None = None,
    validation_perplexity: float | None = None,
    validation_exact_match: float | None = None,
    validation_by_class: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The content of ``training.json``.

    Args:
        plan: what the run chose for itself.
        epoch: passes over the training rows, as a fraction.
        base: of adapters: the name of their base model, and a hash of its weights.
        tokenizer: the tokenizer's description of itself.
        validation_loss, validation_perplexity, validation_exact_match: None if they were not
            measured at this step.
        validation_by_class: the same, and the number of tokens, of each class of tokens.
    """
    packages = [*VERSIONED_PACKAGES, *OPTIMIZER_PACKAGES.get(settings.get("optimizer"), ())]
    if base is not None:
        packages += [name for name in ADAPTER_PACKAGES if name in sys.modules]
    return ({} if base is None else {"base": dict(base)}) | {
        "step": step,
        "epoch": epoch,
        "validation_loss": validation_loss,
        "validation_perplexity": validation_perplexity,
        "validation_exact_match": validation_exact_match,
        "validation_by_class": validation_by_class,
        "settings": dict(settings),
        "plan": dict(plan),
        "data": dict(data_hashes),
        "tokenizer": dict(tokenizer),
        "wandb_run_id": wandb.run_id,
        "wandb_project": wandb.project,
        "wandb_entity": wandb.entity,
        "versions": {"python": platform.python_version()}
        | {name: _package_version(name) for name in packages},
    }


@cache
def _package_version(name: str) -> str:
    """Read once: it is in a file that takes milliseconds to parse."""
    return importlib.metadata.version(name)


def read_description(folder: Path, name: str = DESCRIPTION_FILE) -> dict[str, Any]:
    """The ``training.json`` of a checkpoint of ours, or the ``finished.json`` of a run."""
    file = folder / name
    try:
        description = json.loads(file.read_bytes())
        for key, kind in (
            ("settings", dict),
            ("data", dict),
            ("step", int),
            ("epoch", float),
            ("wandb_run_id", str),
        ):
            if not isinstance(description[key], kind):
                raise ValueError(f"{key} is {description[key]!r}")
        return description
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: is damaged or not a training.json of this program ({one_line(error)[:160]})"
        ) from None


def saved_settings(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint of ours, with its folders as absolute paths.

    Older versions saved paths relative to the folder in which the run was started. If output_dir
    was relative, too, that folder can be inferred from the checkpoint's location. Otherwise it is
    unknown, and model and data set are omitted if they are relative.
    """
    settings = dict(description["settings"])
    if not is_of_an_older_version(description):
        return settings
    run = local_path(str(settings.get("output_dir"))) / str(settings.get("run_name"))
    parents = [Path(os.path.abspath(folder)).parent, folder.resolve().parent]
    starts = [
        Path(*parent.parts[: -len(run.parts)])
        for parent in parents
        if not run.is_absolute() and parent.parts[-len(run.parts) :] == run.parts
    ]
    for key in [key for key in PLACES if key in settings]:
        place = local_path(str(settings[key]))
        if place.is_absolute():
            continue
        found = [str(start / place) for start in starts if (start / place).is_dir()]
        if found:
            settings[key] = with_tilde(found[0])
        else:
            del settings[key]
    return settings


def is_of_an_older_version(description: Mapping[str, Any]) -> bool:
    """Whether the checkpoint was saved by a version that did not make folders absolute."""
    return "tokenizer" not in description


def tokenizer_record(folder: Path) -> Mapping[str, Any] | None:
    """A checkpoint's description of its tokenizer; None for a folder that is not a checkpoint.

    Empty for a checkpoint of an older version, which has no such description.
    """
    if not (folder / DESCRIPTION_FILE).is_file():
        return None
    return read_description(folder).get("tokenizer", {})
