"""What --ckpt names: a checkpoint, with its settings, or any other model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run.config import KEYS, PLACES, Config, load_config, make_config, read_settings
from run.errors import UserError
from run.manifest import (
    BEST,
    DESCRIPTION_FILE,
    METRICS_FILE,
    check_whole,
    is_checkpoint,
    read_manifest,
)
from run.paths import local_path
from run.training_json import read_description, saved_settings


@dataclass(frozen=True)
class Source:
    """What a script reads a model from.

    Attributes:
        path: a folder or hub id.
        config: the settings that belong to it.
        description: its ``training.json``; None for a model that is no checkpoint of ours.
        run_folder: the run that it belongs to; None also where the checkpoint was copied out of it.
        manifest: the content of its ``manifest.json``.
        typed: the settings that were given as flags.
    """

    path: str
    config: Config
    description: dict[str, Any] | None = None
    run_folder: Path | None = None
    manifest: bytes | None = None
    typed: frozenset[str] = frozenset()

    def check_rows(self, split: str, sha256: str) -> None:
        """Raises UserError where the rows of ``split`` are others than the run's, and no flag asks for others.

        So a hub id that has become a folder's name, or a folder that holds something else by now, is noticed.
        """
        known = {} if self.description is None else self.description["data"]
        if known.get(f"{split}_sha256", sha256) != sha256 and not self.typed & {
            "dataset",
            "validation_size",
            "seed",
        }:
            raise UserError(
                f"{self.path}: the {split} rows of dataset {self.config.dataset!r} are not those that this run knew: "
                "name its own data set with --dataset, or this one, to take these rows nevertheless"
            )

    def check_unchanged(self) -> None:
        """Raises UserError where training has saved another checkpoint in its place since it was found."""
        if self.manifest is not None and self.manifest != read_manifest(Path(self.path)):
            raise UserError(
                f"{self.path}: training has just saved another one in its place: start again"
            )


def resolve_source(ckpt: str | None, config_file: Path, typed: Mapping[str, str]) -> Source:
    """Find the checkpoint, and the settings that go with it.

    A checkpoint of ours knows its own settings (prompt, data set, seed of the split, dtype);
    any other model takes those of ``config_file``. A flag overrides both.

    Args:
        ckpt: None for the best checkpoint of ``config_file``'s run.
    """
    if ckpt is None:
        config = load_config(config_file, typed)
        folder = local_path(config.output_dir) / config.run_name / BEST
        if not folder.is_dir():
            raise UserError(
                f"{folder}: there is no such checkpoint: train first, or name one with --ckpt DIR"
            )
        ckpt = str(folder)
    folder = local_path(ckpt)
    if not is_checkpoint(folder):
        return Source(ckpt, load_config(config_file, typed))
    manifest = read_manifest(folder)
    check_whole(folder)
    description = read_description(folder)
    # A setting that is newer than the checkpoint has its value from the file.
    known = {key: value for key, value in description["settings"].items() if key in KEYS}
    known |= {
        key: value for key, value in saved_settings(folder, description).items() if key in PLACES
    }
    values = read_settings(config_file)[0] | known | dict(typed)
    config = make_config(values, f"{folder / DESCRIPTION_FILE} and command line")
    print(
        f"settings: those of {folder / DESCRIPTION_FILE}"
        + (f", but {', '.join(typed)} as typed" if typed else "")
    )
    parent = folder.resolve().parent
    run_folder = parent if (parent / METRICS_FILE).is_file() else None
    return Source(str(folder), config, description, run_folder, manifest, frozenset(typed))
