"""Paths from the command line and the settings."""

import os
import re
from contextlib import suppress
from pathlib import Path

from run.errors import UserError, one_line


def local_path(text: str) -> Path:
    """The path that a user typed, with ``~`` expanded.

    Raises:
        UserError: no file can have this path (an unknown ``~user``, a name that is too long), or
            this user may not see what is there.
    """
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # not exists(), which ignores every error since Python 3.14
        return path
    except PermissionError as error:
        raise UserError(
            f"{text[:80]!r}: {error.strerror}: check your permissions there, or name another"
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{text[:80]!r}: is not a usable path ({one_line(error)[:120]}): check its spelling"
        ) from None


def is_same_place(relative: str, absolute: str) -> bool:
    """Whether ``absolute`` ends in ``relative``, as if it had been resolved from it."""
    short, long = local_path(relative), local_path(absolute)
    return (
        not short.is_absolute()
        and long.is_absolute()
        and long.parts[-len(short.parts) :] == short.parts
    )


def is_same_folder(before: str, now: str, is_older: bool) -> bool:
    """Whether two paths lead to the same folder.

    Args:
        is_older: whether ``before`` may be relative to an unknown folder.
    """
    if is_older and is_same_place(before, now):
        return True
    one, other = local_path(before), local_path(now)
    return one.is_absolute() and one.is_dir() and other.is_dir() and one.samefile(other)


def with_tilde(path: str) -> str:
    """``path``, beginning with ``~`` if it is in the user's home; `local_path` undoes this."""
    for home in _homes():
        if path == home or path.startswith(f"{home}/"):
            return f"~{path[len(home) :]}"
    return path


def _homes() -> set[str]:
    home = os.path.expanduser("~").rstrip("/")
    if home in ("", "~"):  # "/", as of a container's user without a name, or unknown
        return set()
    return {home, os.path.realpath(home)} - {"/"}


def hide_home(text: str) -> str:
    """``text`` with ``~`` for the user's home, whose name is private."""
    for name in _homes():
        text = re.sub(rf"(?<![\w.~-]){re.escape(name)}(?![\w.-])", "~", text)
    return text


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a hub id, ``owner/name``, rather than of a path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII))
