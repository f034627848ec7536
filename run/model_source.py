"""Resolves --ckpt: a checkpoint of ours with its own settings, or any other model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run.config import COMMAND_LINE, KEYS, PLACES, Config, SettingsFiles, merge
from run.errors import UserError
from run.manifest import (
    BEST,
    DESCRIPTION_FILE,
    METRICS_FILE,
    intact,
    is_checkpoint,
    read_manifest,
)
from run.paths import local_path
from run.training_json import read_description, saved_settings


@dataclass(frozen=True)
class Source:
    """Where a script reads a model from, and with which settings.

    Attributes:
        path: a folder or hub id.
        config: the settings to use with it.
        description: its ``training.json``; None if the model is not a checkpoint of ours.
        run_folder: the run that it belongs to; None if there is none, or if it was copied out.
        manifest: the content of its ``manifest.json``.
        typed: the names of the settings from the command line.
    """

    path: str
    config: Config
    description: dict[str, Any] | None = None
    run_folder: Path | None = None
    manifest: bytes | None = None
    typed: frozenset[str] = frozenset()

    def check_rows(self, split: str, sha256: str) -> None:
        """Raises UserError if the rows of ``split`` differ from those that the run used.

        This detects a hub id that is now the name of a folder, and a folder whose content has
        changed. If a flag asks for other rows, they are accepted.
        """
        known = {} if self.description is None else self.description["data"]
        is_asked_for = bool(self.typed & {"dataset", "validation_size", "seed"})
        if known.get(f"{split}_sha256", sha256) != sha256 and not is_asked_for:
            raise UserError(
                f"{self.path}: the {split} rows of dataset {self.config.dataset!r} are not the "
                "ones that this run used: name the run's own data set with --dataset, or this one "
                "to use these rows nevertheless"
            )

    def check_unchanged(self) -> None:
        """Raises UserError if training has replaced the checkpoint since it was found."""
        if self.manifest is not None and self.manifest != read_manifest(Path(self.path)):
            raise UserError(
                f"{self.path}: training has just saved another one in its place: start again"
            )


def resolve_source(ckpt: str | None, files: SettingsFiles, typed: Mapping[str, str]) -> Source:
    """Find the checkpoint and the settings that go with it.

    A checkpoint of ours has its own settings (prompt, data set, seed of the split, dtype). Any
    other model uses those in the settings files. Flags override both.

    Args:
        ckpt: None for the best checkpoint of the run that the settings files name.
        typed: the settings from the command line.
    """
    if ckpt is None:
        config = files.with_flags(typed)
        folder = local_path(config.output_dir) / config.run_name / BEST
        if not folder.is_dir():
            raise UserError(
                f"{folder}: there is no such checkpoint: train first, or name one with --ckpt DIR"
            )
        ckpt = str(folder)
    folder = local_path(ckpt)
    if not is_checkpoint(folder):
        config = files.with_flags(typed)
        files.report_changes(typed)
        return Source(ckpt, config)
    manifest = read_manifest(folder)
    description = read_description(intact(folder))
    # The files supply settings that did not exist when the checkpoint was saved.
    known = {key: value for key, value in description["settings"].items() if key in KEYS}
    absolute = saved_settings(folder, description)
    known |= {key: absolute[key] for key in PLACES if key in absolute}
    config = merge(
        {**files.layers, str(folder / DESCRIPTION_FILE): known, COMMAND_LINE: dict(typed)}
    )
    print(
        f"settings: from {folder / DESCRIPTION_FILE}"
        + (f", but {', '.join(typed)} from the command line" if typed else "")
    )
    parent = folder.resolve().parent
    run_folder = parent if (parent / METRICS_FILE).is_file() else None
    return Source(str(folder), config, description, run_folder, manifest, frozenset(typed))
