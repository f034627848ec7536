"""Command lines that can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def command_line(*words: str) -> str:
    """A command that runs Python with ``words``, in the syntax of the user's shell (bash, zsh)."""
    return joined(_this_python(), *words)


def joined(*words: str) -> str:
    """``words`` as one line that the user's shell (bash, zsh) reads as these words."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return " ".join(_quoted(word, encoding) for word in words)


def _this_python() -> str:
    """``python`` if the shell would find this interpreter by that name, else its path.

    Another interpreter might lack the packages of this one.
    """
    in_shell, this = shutil.which("python"), sys.executable
    if not this:
        return "python"
    # The folders are compared too, since two environments' interpreters often link to one file.
    if (
        in_shell
        and _folder(in_shell) == _folder(this)
        and os.path.realpath(in_shell) == os.path.realpath(this)
    ):
        return "python"
    short = os.path.relpath(this)
    return this if short.startswith("..") or os.sep not in short else short


def _folder(file: str) -> str:
    return os.path.realpath(os.path.dirname(file))


def _quoted(word: str, encoding: str) -> str:
    """``word`` quoted for a shell, byte by byte if ``encoding`` can't represent it."""
    try:
        word.encode(encoding)
        if word.isprintable():
            return shlex.quote(word)
    except UnicodeError:
        pass
    return "$'" + "".join(_escaped(byte) for byte in os.fsencode(word)) + "'"


def _escaped(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}"


def path_word(path: Path) -> str:
    """``path`` as a word of its own, which no script takes for a flag."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def evaluation_command(checkpoint: Path, *flags: str) -> str:
    """The command that evaluates ``checkpoint``, ready to be pasted into a shell."""
    folder = str(checkpoint)
    flag = [f"--ckpt={folder}"] if folder.startswith("-") else ["--ckpt", folder]
    return script_command("evaluate.py", *flag, *flags)


def script_command(name: str, *words: str) -> str:
    """The command that runs one of these scripts, ready to be pasted into a shell."""
    script = Path(__file__).resolve().parents[1] / name
    shown = script.name if script.parent == Path.cwd() else str(script)
    return command_line(shown, *words)
