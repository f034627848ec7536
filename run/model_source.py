"""Resolves --ckpt: a checkpoint of ours with its own settings, or any other model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run.config import (
    ADAPTER_SETTINGS,
    COMMAND_LINE,
    KEYS,
    Config,
    SettingsFiles,
    merge,
)
from run.errors import UserError, one_line
from run.manifest import (
    BEST,
    DESCRIPTION_FILE,
    METRICS_FILE,
    intact,
    is_checkpoint,
    read_manifest,
    weights_identity,
)
from run.method import FULL, Adapter, adapter_of
from run.paths import is_hub_id, is_same_folder, local_path
from run.setting_types import PLACES, in_yaml
from run.sweep import with_trial
from run.training_json import read_description, saved_settings

# The settings that matter to a checkpoint after its training.
USED_LATER = (
    *("dataset", "prompt", "max_length", "validation_size", "seed", "dtype", "micro_batch_tokens"),
    *("max_new_tokens", "decode_slots", "calculator", "wandb_project", "wandb_mode"),
)


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
        adapter: the adapter that ``path`` contains; None if it contains a whole model.
    """

    path: str
    config: Config
    description: dict[str, Any] | None = None
    run_folder: Path | None = None
    manifest: bytes | None = None
    typed: frozenset[str] = frozenset()
    adapter: Adapter | None = None

    @property
    def model(self) -> str:
        """The folder or hub id with the weights: ``path``, or an adapter's base."""
        return self.adapter.base if self.adapter else self.path

    def tokenizer(self, folder: Path) -> Path:
        """The folder with the tokenizer, given that of `model`."""
        return self.adapter.folder if self.adapter else folder

    def weights_identity(self, folder: Path) -> str:
        """A hash over the weights, equal only for the same model.

        Args:
            folder: that of `model`.

        Raises:
            UserError: it is not the base that the adapter was trained on.
        """
        weights = weights_identity(folder)
        if not self.adapter:
            return weights
        check_base(self.adapter.folder, self.description, weights)
        return f"{weights_identity(self.adapter.folder)} on {weights}"

    def check_rows(self, split: str, sha256: Mapping[str, str]) -> None:
        """Check that the rows of ``split`` are those that the run used.

        This detects a hub id that is now the name of a folder, and a folder whose content has
        changed. If a flag asks for other rows, they are accepted, but not as rows to validate on
        if this run was trained on them, nor the other way round.

        Args:
            sha256: by the name of a split, the fingerprint of its rows, from `data.load_split`.

        Raises:
            UserError: they are not.
        """
        if self.description is None:
            return
        if split == "train":
            self._check_division("was validated on, not trained")
        known = self.description["data"]
        for name, now in sha256.items():
            if known.get(f"{name}_sha256", now) == now:
                continue
            if split == "validation" and self._has_own_data_set():
                self._check_division("may have been trained on")
            if not self.typed & {"dataset", "validation_size", "seed"}:
                raise UserError(
                    f"{self.path}: the {name} rows of dataset {self.config.dataset!r} are not the "
                    "ones that this run used: name the run's own data set with --dataset, or this "
                    "one to use these rows nevertheless"
                )

    def _has_own_data_set(self) -> bool:
        before = saved_settings(Path(self.path), self.description).get("dataset")
        now = self.config.dataset
        return now == before or (before is not None and is_same_folder(before, now, is_older=False))

    def _check_division(self, used: str) -> None:
        """Raises UserError if flags divide the train rows otherwise than this run did.

        Args:
            used: for what this run used the rows that would be taken.
        """
        for key in ("validation_size", "seed"):
            trained, now = self.description["settings"].get(key), getattr(self.config, key)
            if now != trained:
                raise UserError(
                    f"command line: --{key} {now}: would take rows that {self.path} {used} "
                    f"({key} was {trained}): leave it out; --limit takes fewer rows, and a larger "
                    "--samples of evaluate.py draws more samples"
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
        config = with_trial(files, typed)
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
    known.setdefault("method", FULL)
    known["fp8"] = False  # which is for training alone
    config = merge(
        {**files.layers, str(folder / DESCRIPTION_FILE): known, COMMAND_LINE: dict(typed)}
    )
    for key in ("method", *ADAPTER_SETTINGS):
        if key in typed and getattr(config, key) != known.get(key):
            raise UserError(
                f"command line: --{key} {typed[key]}: {folder} was trained with {key} "
                f"{in_yaml(known.get(key))}: leave it out"
            )
    if "model" in typed and "base" not in description and config.model != known.get("model"):
        raise UserError(
            f"command line: --model {typed['model']}: {folder} contains all weights of a model, "
            "and needs no other: leave it out, or name the model to use with --ckpt"
        )
    _say_whose(files, folder / DESCRIPTION_FILE, known, typed)
    parent = folder.resolve().parent
    run_folder = parent if (parent / METRICS_FILE).is_file() else None
    adapter = None
    if "base" in description:
        adapter = adapter_of(known | {"model": config.model}, folder)
        _check_base_is_there(adapter)
    found = description, run_folder, manifest, frozenset(typed), adapter
    return Source(str(folder), config, *found)


def _say_whose(
    files: SettingsFiles, record: Path, known: Mapping[str, Any], typed: Mapping[str, str]
) -> None:
    """Print where the settings come from, and what of a ``--config FILE`` has no effect.

    Args:
        known: the settings in the checkpoint's ``record``.
    """
    typed_too = f", but {', '.join(typed)} from the command line" if typed else ""
    print(f"settings: from {record}{typed_too}")
    ignored = [
        key
        for key, value in files.unlike(known).items()
        if key in USED_LATER
        and key not in typed
        and not (key in PLACES and _leads_to(value, str(known[key])))
    ]
    if ignored:
        *_, file = files.layers
        print(
            f"settings: not from {one_line(file)}, since the checkpoint has its own: "
            f"{', '.join(ignored)} (a flag overrides both)"
        )


def _leads_to(place: str, folder: str) -> bool:
    try:
        return is_same_folder(folder, place, is_older=False)
    except UserError:  # no usable path here, which is no error where it has no effect
        return False


def _check_base_is_there(adapter: Adapter) -> None:
    if not local_path(adapter.base).is_dir() and not is_hub_id(adapter.base):
        raise UserError(
            f"{adapter.folder}: its base model {adapter.base} is not there any more: say where it "
            "is now with --model DIR"
        )


@dataclass(frozen=True)
class Start:
    """What a run begins or goes on with.

    Attributes:
        weights: the folder of the model, which is the checkpoint to resume from or the base model.
        tokenizer: the checkpoint to resume from, or else the base model.
        adapter: what to add to the model; None if all weights are trained.
        base: of an adapter: its base's name and weights, as ``training.json`` records them.
    """

    weights: Path
    tokenizer: Path
    adapter: Adapter | None = None
    base: dict[str, str] | None = None


def find_start(
    settings: Mapping[str, Any], resume_from: Path | None, fetch: Callable[[str], Path]
) -> Start:
    """Find the folders that a run with these ``settings`` needs.

    Args:
        fetch: `engine.hub.fetch`.

    Raises:
        UserError: there is no such model, it is damaged, or it is not the one that the adapters of
            ``resume_from`` were trained on.
    """
    adapter = adapter_of(settings, resume_from)
    if adapter is None and resume_from is not None:
        return Start(resume_from, resume_from)
    if adapter and resume_from:
        _check_base_is_there(adapter)
    folder = intact(fetch(settings["model"]))
    if adapter is None:
        return Start(folder, folder)
    base = {"model": settings["model"], "weights": weights_identity(folder)}
    if resume_from is not None:
        check_base(resume_from, read_description(resume_from), base["weights"])
    return Start(folder, resume_from or folder, adapter, base)


def check_base(checkpoint: Path, description: Mapping[str, Any], weights: str) -> None:
    """Raises UserError if a model with these ``weights`` is not the base of an adapter.

    Args:
        description: the adapter's ``training.json``.
        weights: see `weights_identity`.
    """
    base = description.get("base")
    if base and base["weights"] != weights:
        raise UserError(
            f"{checkpoint}: was trained on other weights than those of model {base['model']} now: "
            "restore that model, or say where an unchanged copy of it is with --model DIR"
        )
