"""The types of settings: how values are parsed and shown, their limits, and words for errors."""

import json
import re
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

PLACES = ("model", "dataset")  # settings that name either a folder or something on the hub
TRAIN_ROWS = ("dataset", "validation_size", "seed")  # on which the rows to train on depend


def _check_prompt(prompt: str) -> str:
    if prompt.count("{question}") != 1:
        raise ValueError("must contain {question} exactly once")
    if "\\n" in prompt:
        raise ValueError(
            "contains a backslash followed by an n: type a real line break "
            "(in bash: $'Question: ...\\nAnswer:')"
        )
    return prompt


def check_text(text: str) -> str:
    if not text.isprintable() and any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
        raise ValueError("must not contain control characters")
    return text


def _check_unicode(value: Any) -> Any:
    # Python turns bytes that the locale can't decode into unpaired surrogates.
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("must be valid UTF-8, in a locale that reads it (such as LC_ALL=C.UTF-8)")
    return value


def _check_digits(value: Any) -> Any:
    # pydantic would also accept "1.0" and "1_0".
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]+", value):
        raise ValueError
    return value


# The text at the end of each type completes the error message "must be ...".
Text = Annotated[
    str,
    Field(min_length=1),
    AfterValidator(check_text),
    BeforeValidator(_check_unicode),
    "a non-empty string",
]
Prompt = Annotated[Text, AfterValidator(_check_prompt)]
Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128),
    "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128",
]
Integer = Annotated[int, BeforeValidator(_check_digits)]
Count = Annotated[Integer, Field(ge=1), "a positive integer"]
Seed = Annotated[Integer, Field(ge=0, lt=2**32), f"an integer between 0 and {2**32 - 1}"]
Length = Annotated[Integer, Field(ge=2), "an integer of at least 2"]
Share = Annotated[float, Field(ge=0, le=1), "a number between 0 and 1"]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), "a number of at least 0 and below 1"]
Positive = Annotated[float, Field(gt=0), "a positive, finite number"]
NotNegative = Annotated[float, Field(ge=0), "a finite number of at least 0"]


def parse(kind: Any, value: Any) -> Any:
    """``value`` as a setting of type ``kind``.

    Args:
        value: text or a JSON value; None is ``null``.

    Raises:
        ValueError: with a message that shows the value and the rule.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        own = [str(detail.get("ctx", {}).get("error", "")) for detail in error.errors()]
        reason = next(filter(None, own), None) or _rule(kind)
        raise ValueError(f"{_show(value)} {reason}") from None


def in_yaml(value: Any) -> str:
    """A setting's value as in a settings file."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return re.sub(r"e([+-])0", r"e\1", repr(value))  # 2e-5 for 2e-05
    if isinstance(value, str) and not re.fullmatch(r"[\w./~<][\w./~<>-]*", value):
        shown = json.dumps(value, ensure_ascii=False)
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)
    return str(value)


def quoted(value: Any) -> str:
    """`in_yaml` with quotes around all text, for a sentence."""
    is_plain = isinstance(value, str) and value.isprintable()
    return repr(value) if is_plain else in_yaml(value)


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _show(value: Any) -> str:
    shown = quoted(value)
    return shown if len(shown) <= 100 else f"{shown[:90]}... ({len(shown)} characters)"


def _rule(kind: Any) -> str:
    """Describes what a type accepts, such as "must be a positive integer or null"."""
    accepted: list[str] = []
    for option in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        if option is NoneType:
            accepted.append("null")
        elif option is bool:
            accepted += ["true", "false"]
        elif get_origin(option) is Literal:
            accepted += map(repr, get_args(option))
        else:
            accepted.append(next(m for m in reversed(option.__metadata__) if isinstance(m, str)))
    *others, last = accepted
    return f"must be {', '.join(others)} or {last}" if others else f"must be {last}"
