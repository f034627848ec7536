"""What a setting may be, and how it is read.

The types and rules of all settings are the fields of `Config`, their values stand in
``config.yaml``, and nothing has a default anywhere else. Every value is read as text and
parsed by its field's annotation: YAML's own typing would read ``1e-5`` as a string and
``no`` as False, and would let the second of two equal keys win silently.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from run.errors import UserError
from run.paths import is_same_place, local_path, with_tilde

CONFIG_FILE = Path(__file__).parents[1] / "config.yaml"


def _check_prompt(prompt: str) -> str:
    if prompt.count("{question}") != 1:
        raise ValueError("must hold {question} exactly once")
    if "\\n" in prompt:
        raise ValueError(
            "holds a backslash and an n: type a real line break (in bash: $'Question: ...\\nAnswer:')"
        )
    return prompt


def _check_text(text: str) -> str:
    if not text.isprintable() and any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
        raise ValueError("must hold no control characters")
    return text


def _check_unicode(value: Any) -> Any:
    # Bytes that the locale can't decode come as halves of a letter, of which pydantic says less.
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("must be valid UTF-8, in a locale that reads it (such as LC_ALL=C.UTF-8)")
    return value


def _check_whole(value: Any) -> Any:
    # pydantic would also take "1.0" and "1_0".
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]+", value):
        raise ValueError("must be a whole number")
    return value


Text = Annotated[
    str, Field(min_length=1), AfterValidator(_check_text), BeforeValidator(_check_unicode)
]


Prompt = Annotated[Text, AfterValidator(_check_prompt)]


Whole = Annotated[int, BeforeValidator(_check_whole)]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]


Count = Annotated[Whole, Field(ge=1)]


Share = Annotated[float, Field(ge=0, le=1)]


ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


Positive = Annotated[float, Field(gt=0)]


NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Config:
    """All settings of a run. What each one means and in which unit: the comments of ``config.yaml``."""

    model: Text
    dataset: Text
    prompt: Prompt
    max_length: Annotated[Whole, Field(ge=2)]
    validation_size: Count
    seed: Annotated[Whole, Field(ge=0, lt=2**32)]
    output_dir: Text
    run_name: Name
    epochs: Count
    batch_size: Count
    micro_batch_tokens: Count
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
    gradient_checkpointing: bool
    compile: bool
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


KEYS = tuple(field.name for field in fields(Config))


_TYPES = get_type_hints(Config, include_extras=True)


_PATHS = ("model", "dataset", "output_dir")


PLACES = ("model", "dataset")  # each a folder, or else the hub's


def make_config(values: Mapping[str, Any], source: str) -> Config:
    """Parse and check all values (texts, or what JSON holds); ``null`` is the one empty value.

    Raises:
        UserError: names ``source`` and every unknown, missing, ill-typed and out-of-range key at once.
    """
    problems = [_unknown_key(key) for key in values if key not in KEYS]
    parsed: dict[str, Any] = {}
    for key in KEYS:
        if key not in values:
            problems.append(f"{key} is missing: add it (null is the one empty value)")
            continue
        value = None if values[key] == "null" else values[key]
        if key in _PATHS and isinstance(value, str):
            value = with_tilde(value)
        try:
            parsed[key] = TypeAdapter(
                _TYPES[key], config=ConfigDict(allow_inf_nan=False)
            ).validate_python(value)
        except ValidationError as error:
            problems.append(f"{key}: {_show(value)} {_rule(key, error)}")
    if {"max_length", "micro_batch_tokens"} <= parsed.keys() and parsed[
        "micro_batch_tokens"
    ] < parsed["max_length"]:
        problems.append(
            f"micro_batch_tokens: {parsed['micro_batch_tokens']} must be no less than max_length "
            f"({parsed['max_length']}), or a row of that length would fit no micro-batch"
        )
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))
    return Config(**parsed)


def _show(value: Any) -> str:
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 100 else f"{shown[:90]}... ({len(shown)} characters)"


def _rule(key: str, error: ValidationError) -> str:
    details = error.errors(include_url=False)
    if key in ("run_name", "wandb_project"):
        return "must be letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128"
    messages = dict.fromkeys(
        re.sub(r"^(Input|String) should", "must", detail["msg"].removeprefix("Value error, "))
        for detail in details
        if detail["type"] != "none_required"
    )
    nullable = any(detail["type"] == "none_required" for detail in details) or type(
        None
    ) in getattr(_TYPES[key], "__args__", ())
    return ", ".join(messages) + (" or null" if nullable else "")


def _unknown_key(key: str) -> str:
    close = difflib.get_close_matches(key, KEYS, n=1)
    return f"{key!r} is no setting" + (
        f": did you mean {close[0]!r}?" if close else "; config.yaml lists them all"
    )


def read_settings(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read a settings file without interpreting it.

    Returns:
        The value of each key as text, and the comment that follows it on its line.

    Raises:
        UserError: the file can't be read, is no flat YAML mapping, or holds a key twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(
            f"{file}: can't be read ({error.strerror}); name a settings file with --config FILE"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file}: is no UTF-8 text; name a settings file with --config FILE"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: is no YAML ({error}); write one 'key: value' a line") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file}: holds no settings; write one 'key: value' a line")
    lines = text.split("\n")
    values: dict[str, str] = {}
    comments: dict[str, str] = {}
    problems: list[str] = []
    for key_node, value_node in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not isinstance(value_node, yaml.ScalarNode):
            problems.append(f"line {line}: a setting is one value, not a list or a mapping")
        elif key in values:
            problems.append(f"{key} is set twice (again on line {line}): keep one")
        else:
            values[key] = value_node.value
            rest = lines[value_node.end_mark.line][value_node.end_mark.column :].strip()
            comments[key] = rest.removeprefix("#").strip()
    if problems:
        # Duplicates first, then whatever else is wrong: the user sees all of it at once.
        try:
            make_config(values, str(file))
        except UserError as error:
            problems.append(str(error).removeprefix(f"{file}: "))
        raise UserError(f"{file}: " + "; ".join(problems))
    return values, comments


def load_config(file: Path, typed: Mapping[str, str]) -> Config:
    """The settings of ``file``, with those typed as flags in their place."""
    values = read_settings(file)[0] | dict(typed)
    return make_config(values, f"{file} and command line" if typed else str(file))


def anchored(config: Config, saved: Mapping[str, Any] | None = None) -> Config:
    """``config`` with the folders of model and data set as absolute paths, free of symbolic links.

    What is a folder now is that folder wherever the run's next command is typed, and never a hub id
    of the same letters.

    Args:
        saved: the settings of the run that is gone on with. What was the hub's there stays the hub's;
            where no such folder is here, the one that it had is meant.
    """
    places: dict[str, str] = {}
    for key in PLACES:
        typed, before = getattr(config, key), None if saved is None else saved.get(key)
        if typed == before:
            continue
        if local_path(typed).is_dir():
            places[key] = _absolute(key, typed)
        elif before is not None and is_same_place(typed, before):
            places[key] = before
    return replace(config, **places)


def _absolute(key: str, typed: str) -> str:
    absolute = os.path.realpath(local_path(typed))
    try:
        return with_tilde(_check_text(absolute))
    except ValueError as error:
        print(f"{key} {typed!r} stays relative to this folder, whose own path {error}")
        return typed


def settings_text(config: Config) -> str:
    """The settings as resolved, as YAML that ``--config`` reads back unchanged."""
    values = {key: getattr(config, key) for key in KEYS}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
