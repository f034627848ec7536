"""The settings: their names, types and limits, and how they are read.

The fields of `Config` define the type and limits of every setting, and ``config.yaml`` its value.
There are no defaults anywhere else. A ``--config FILE`` overrides ``config.yaml``, and flags
override both. Every value is read as text and parsed according to its field's annotation. YAML's
own typing would read ``1e-5`` as a string and ``no`` as False, and would silently accept the second
of two equal keys.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from run.errors import UserError, one_line
from run.files import say_once
from run.paths import with_tilde
from run.setting_types import (
    Count,
    Length,
    Name,
    NotNegative,
    Positive,
    Prompt,
    Seed,
    Share,
    ShareBelowOne,
    Text,
    parse,
)
from run.settings_file import read_settings_file

CONFIG_FILE = Path(__file__).parents[1] / "config.yaml"


@dataclass(frozen=True)
class Config:
    """All settings of a run. The comments in ``config.yaml`` give the meaning and unit of each."""

    model: Text
    dataset: Text
    prompt: Prompt
    max_length: Length
    validation_size: Count
    seed: Seed
    method: Literal["full", "lora", "qlora"]
    lora_rank: Count
    lora_alpha: Count
    lora_dropout: ShareBelowOne
    lora_rslora: bool
    mask_rate: Share
    mask_warmup_ratio: Share
    mask_token: Text
    output_dir: Text
    run_name: Name
    optimizer: Literal["adamw", "adamw_8bit"]
    epochs: Count
    batch_size: Count
    micro_batch_tokens: Count | None
    learning_rate: Positive
    lr_schedule: Literal["cosine", "linear", "constant"]
    warmup_ratio: ShareBelowOne
    min_lr_ratio: Share
    weight_decay: NotNegative
    adam_beta1: ShareBelowOne
    adam_beta2: ShareBelowOne
    adam_epsilon: Positive
    max_grad_norm: Positive | None
    dtype: Literal["bfloat16", "float32"]
    fp8: bool
    gradient_checkpointing: bool | None
    compile: bool | None
    shard_over: Count | None
    reshard_after_forward: bool
    reduce_gradients: Literal["last", "each"] | None
    log_every: Count
    checkpoint_steps: Count | None
    keep_state: bool
    best_by: Literal["val_loss", "val_exact_match"]
    resume: Literal["auto", "never"]
    max_new_tokens: Count
    decode_slots: Count | None
    calculator: bool
    wandb_project: Name
    wandb_mode: Literal["online", "offline", "disabled"] | None
    wandb_artifact: bool

    @property
    def arithmetic(self) -> str:
        return f"{self.dtype} with products in FP8" if self.fp8 else self.dtype


KEYS = tuple(field.name for field in fields(Config))
_TYPES = get_type_hints(Config, include_extras=True)
_PATHS = ("model", "dataset", "output_dir")
COMMAND_LINE = "command line"  # the name of the layer on top of all files
ADAPTER_SETTINGS = tuple(key for key in KEYS if key.startswith("lora_"))
# What has no effect where another setting has this value, and how to give it one. Without a cure,
# it may be typed all the same: a sweep over schedules types one ratio for all of them.
_IDLE = {
    "method": ("full", ADAPTER_SETTINGS, "set method lora or qlora"),
    "mask_rate": (0, ("mask_warmup_ratio", "mask_token"), "set mask_rate too"),
    "lr_schedule": ("constant", ("min_lr_ratio",), None),
}


def make_config(values: Mapping[str, Any], source: str) -> Config:
    """`merge` for values that all come from one source."""
    return merge({source: values})


def merge(layers: Mapping[str, Mapping[str, Any]]) -> Config:
    """Parse and check all settings. If several layers set a key, the last one wins.

    Args:
        layers: the name of each source, and its values by key, as text or JSON values. ``null`` is
            the only empty value.

    Raises:
        UserError: lists every unknown, missing, ill-typed and out-of-range key at once, with the
            source of each.
    """
    parsed, problems = _parse(layers)
    _check_none(problems)
    return Config(**parsed)


def _parse(
    layers: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The settings that can be parsed, and the problems with the others, by source."""
    problems = {
        source: [_unknown(key) for key in values if key not in KEYS]
        for source, values in layers.items()
    }
    origin = {key: source for source, values in layers.items() for key in values}
    parsed: dict[str, Any] = {}
    for key in KEYS:
        if key not in origin:
            first = next(iter(problems.values()))
            first.append(f"{key} is missing: add it (null is the only empty value)")
            continue
        try:
            parsed[key] = _parse_value(key, layers[origin[key]][key])
        except ValueError as error:
            problems[origin[key]].append(f"{key}: {error}")
    longest, budget = parsed.get("max_length"), parsed.get("micro_batch_tokens")
    if longest and budget and budget < longest:
        problems[origin["micro_batch_tokens"]].append(
            f"micro_batch_tokens: {budget} must be at least max_length ({longest}), "
            "or a row of that length would fit no micro-batch"
        )
    if parsed.get("fp8"):
        for key, value in (("dtype", "float32"), ("method", "qlora")):
            if parsed.get(key) == value:
                problems[origin["fp8"]].append(
                    f"fp8: true is not for {key} {value}: set fp8 false, or another {key}"
                )
    idle = idle_settings(parsed)
    for key in layers.get(COMMAND_LINE, {}):
        if cure := idle.get(key):
            problems[COMMAND_LINE].append(f"{key}: has no effect {cure}")
    return parsed, problems


def idle_settings(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """The settings that have no effect with the others; for each, with which, and the cure.

    None where it is no error to type one.
    """
    return {
        key: cure and f"with {other} {value}: leave it out, or {cure}"
        for other, (value, keys, cure) in _IDLE.items()
        if settings.get(other) == value
        for key in keys
    }


def _check_none(problems: Mapping[str, list[str]]) -> None:
    """Raises UserError if there are any ``problems``, and lists them by source."""
    lines = [f"{source}: {'; '.join(found)}" for source, found in problems.items() if found]
    if lines:
        raise UserError("; ".join(lines))


def _parse_value(key: str, value: Any) -> Any:
    """The value of one setting; raises ValueError as `setting_types.parse` does."""
    value = None if value == "null" else value
    if key in _PATHS and isinstance(value, str):
        value = with_tilde(value)
    return parse(_TYPES[key], value)


def _unknown(key: str) -> str:
    close = difflib.get_close_matches(key, KEYS, n=1)
    cure = f"did you mean {close[0]!r}?" if close else "config.yaml lists them all"
    return f"unknown setting {key!r}: {cure}"


@dataclass(frozen=True)
class SettingsFiles:
    """The contents of ``config.yaml`` and of a ``--config FILE`` that overrides it, as text.

    Attributes:
        layers: the path of each file, ``config.yaml`` first, and its values by key.
        meanings: the comment of each key in ``config.yaml``.
    """

    layers: Mapping[str, Mapping[str, str]]
    meanings: Mapping[str, str]

    @property
    def values(self) -> dict[str, str]:
        return {key: value for layer in self.layers.values() for key, value in layer.items()}

    def unlike(self, others: Mapping[str, Any]) -> dict[str, str]:
        """What a ``--config FILE`` sets otherwise than ``others`` do, as text."""
        _, *overlays = self.layers.values()
        return {
            key: value
            for overlay in overlays
            for key, value in overlay.items()
            if key in others and not _is_same(key, value, others)
        }

    def with_flags(self, typed: Mapping[str, str]) -> Config:
        """The settings of the files, with the values from the command line on top."""
        return merge({**self.layers, COMMAND_LINE: typed})

    def report_changes(self, typed: Mapping[str, str]) -> None:
        """Print, once per process, which settings a ``--config FILE`` changes.

        Args:
            typed: the settings from the command line, which override the file and are not listed.
        """
        if len(self.layers) == 1:
            return
        base, overlay = self.layers.values()
        *_, file = self.layers
        changed = [
            key
            for key in KEYS
            if key in overlay and key not in typed and not _is_same(key, overlay[key], base)
        ]
        listed = f": {', '.join(changed)}" if changed else ", which changes nothing"
        say_once("settings", f"settings: {len(changed)} from {one_line(file)}{listed}")


def _is_same(key: str, value: str, base: Mapping[str, str]) -> bool:
    try:
        return _parse_value(key, value) == _parse_value(key, base[key])
    except (KeyError, ValueError):  # `base` has no such value, or one that `value` repairs
        return False


def load_config(file: Path, typed: Mapping[str, str]) -> Config:
    """The settings of ``config.yaml``, overridden by ``file``, and both overridden by ``typed``."""
    return read_files(file).with_flags(typed)


def read_files(file: Path, base: Path = CONFIG_FILE) -> SettingsFiles:
    """Read ``base``, which is ``config.yaml``, and ``file``, which may leave settings out.

    Raises:
        UserError: as in `read_settings`, and then problems with the values are reported as well.
    """
    contents = {str(base): read_settings_file(base)}
    if not (os.path.exists(file) and os.path.samefile(file, base)):
        name = str(file) if str(file) != COMMAND_LINE else f"./{file}"
        contents[name] = read_settings_file(file)
    layers = {name: content.values for name, content in contents.items()}
    if any(content.problems for content in contents.values()):
        _, others = _parse(layers)
        _check_none({name: contents[name].problems + others[name] for name in contents})
    return SettingsFiles(layers, contents[str(base)].comments)


def read_settings(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read one settings file without interpreting it.

    Returns:
        The value of each key as text, and the comment that follows it on its line.

    Raises:
        UserError: the file can't be read, is not a flat YAML mapping, or sets a key twice.
    """
    content = read_settings_file(file)
    _check_none({str(file): content.problems})
    return content.values, content.comments


def settings_text(config: Config) -> str:
    """The settings as resolved, as YAML that ``--config`` reads back unchanged."""
    values = {key: getattr(config, key) for key in KEYS}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
