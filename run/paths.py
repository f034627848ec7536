"""Paths that a user typed."""

import os
import re
from pathlib import Path

from run.errors import UserError, one_line


def local_path(text: str) -> Path:
    """The path that a user typed, ``~`` expanded.

    Raises:
        UserError: no file could have it (an unknown ``~user``, a name that is too long).
    """
    try:
        path = Path(text).expanduser()
        path.exists()
        return path
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{text[:80]!r}: is no usable path ({one_line(error)[:120]}): check its spelling"
        ) from None


def is_same_place(relative: str, absolute: str) -> bool:
    """Whether a relative path is the end of the absolute one that it was once turned into."""
    short, long = local_path(relative), local_path(absolute)
    return (
        not short.is_absolute()
        and long.is_absolute()
        and long.parts[-len(short.parts) :] == short.parts
    )


def with_tilde(path: str) -> str:
    """A path with ``~`` for the user's home, if it lies in there; `local_path` takes it back."""
    for home in _homes():
        if path == home or path.startswith(f"{home}/"):
            return f"~{path[len(home) :]}"
    return path


def _homes() -> set[str]:
    home = os.path.expanduser("~").rstrip("/")
    return {home, os.path.realpath(home)} - {"", "/", "~"}


def hide_home(text: str) -> str:
    """``text`` with ``~`` for the user's home, which is nobody's business."""
    for name in _homes():
        text = re.sub(rf"(?<![\w.~-]){re.escape(name)}(?![\w.-])", "~", text)
    return text


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a hub id, ``owner/name``, rather than that of a path."""
    owner, slash, rest = name.partition("/")
    return (
        bool(slash and owner and rest) and "/" not in rest and not name.startswith((".", "~", "/"))
    )
