"""training.json: what a checkpoint says of itself."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.loss import Measurement
from engine.tokenizer import Tokenizer
from run.config import PLACES, Config
from run.errors import UserError, one_line
from run.manifest import DESCRIPTION_FILE
from run.paths import local_path, with_tilde
from run.progress import Progress


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
            f"{file}: is damaged or no training.json of this program ({one_line(error)[:160]})"
        ) from None


def saved_settings(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint of ours, its folders as absolute paths.

    An older version saved them relative to the folder in which the run was started, which is known
    where its output_dir was relative, too. Where it is not known, model or data set are left out.
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
        if not place.is_absolute():
            found = [str(start / place) for start in starts if (start / place).is_dir()]
            settings |= {key: with_tilde(found[0])} if found else {}
            if not found:
                del settings[key]
    return settings


def is_of_an_older_version(description: Mapping[str, Any]) -> bool:
    """Whether it was saved before folders were made absolute, and ids compared with SentencePiece's."""
    return "tokenizer" not in description


def describe(
    config: Config,
    progress: Progress,
    steps_per_epoch: int,
    data_hashes: Mapping[str, str],
    tokenizer: Tokenizer,
    result: Measurement | None,
) -> dict[str, Any]:
    """The content of ``training.json``."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "torch-optimi")
    return {
        "step": progress.step,
        "epoch": progress.step / steps_per_epoch,
        "validation_loss": result.loss if result else None,
        "validation_perplexity": result.perplexity if result else None,
        "validation_exact_match": progress.best_exact_match if result else None,
        "settings": asdict(config),
        "data": dict(data_hashes),
        "tokenizer": tokenizer.describe(),
        "wandb_run_id": progress.wandb_run_id,
        "wandb_project": progress.wandb_project,
        "wandb_entity": progress.wandb_entity,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }
