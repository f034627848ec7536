"""Writes a folder of small files, whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from run.errors import UserError, storage_cure
from run.files import move, naming, sync


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of small files, by name: it appears with all of them, or not at all.

    It may exist if it is empty.

    Raises:
        UserError: no folder can be made there.
    """
    staged = folder.with_name(f".{folder.name[:32]}.{secrets.token_hex(4)}.staged")
    _make(folder, staged)
    try:
        for name, content in contents.items():
            with naming(staged / name):
                (staged / name).write_bytes(content)
                sync(staged / name)
        sync(staged)
        if folder.exists():
            folder.rmdir()
        move(staged, folder, list(contents)[-1])
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    sync(folder.parent)


def _make(folder: Path, staged: Path) -> None:
    """Make ``staged``, which is to become ``folder``, and all folders above it."""
    place = next(parent for parent in folder.parents if os.path.lexists(parent))
    if not place.is_dir():
        raise UserError(f"{folder}: {place} is not a folder: choose another --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
    except OSError as error:  # which may name ``staged``, that nobody typed
        raise UserError(
            f"{folder}: can't be made ({error.strerror}): {storage_cure(error)}, or choose another "
            "--output"
        ) from None
