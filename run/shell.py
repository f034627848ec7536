"""Command lines that can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def command_line(*words: str) -> str:
    """Python with ``words``, as it can be pasted into the shell (bash, zsh) that this was started from."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return " ".join(_quoted(word, encoding) for word in (_this_python(), *words))


def _this_python() -> str:
    """``python`` where the shell finds this one under that name, else where it is: the other has not its packages."""
    found, this = shutil.which("python"), sys.executable
    # Not where links lead to: the interpreters of two environments are often links to one file.
    if not this or (
        found
        and _folder(found) == _folder(this)
        and os.path.realpath(found) == os.path.realpath(this)
    ):
        return "python"
    short = os.path.relpath(this)
    return this if short.startswith("..") or os.sep not in short else short


def _folder(file: str) -> str:
    return os.path.realpath(os.path.dirname(file))


def _quoted(word: str, encoding: str) -> str:
    """``word`` for a shell; byte by byte where the stream would show other letters."""
    try:
        word.encode(encoding)
        if word.isprintable():
            return shlex.quote(word)
    except UnicodeError:
        pass
    return "$'" + "".join(_escaped(byte) for byte in os.fsencode(word)) + "'"


def _escaped(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}"


def evaluation_command(checkpoint: Path) -> str:
    """What evaluates ``checkpoint``, as it can be pasted into the shell that this was started from."""
    script = Path(__file__).resolve().parents[1] / "evaluate.py"
    shown, folder = script.name if script.parent == Path.cwd() else str(script), str(checkpoint)
    return command_line(
        shown, *([f"--ckpt={folder}"] if folder.startswith("-") else ["--ckpt", folder])
    )
