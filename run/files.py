"""Files and folders on any file system: locks, syncs, renames, and what is done where a mount lacks one of them."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"  # how a file begins that git has not fetched


# What mounts of the kinds CIFS, WSL, FUSE, 9p and NFS answer to what they have not. A full or broken disk (ENOSPC,
# EDQUOT, EIO, EROFS) is none of these: it stays an error.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


_NO_SYNC = NOT_SUPPORTED | {errno.EBADF, errno.EACCES, errno.EISDIR}


_NO_RENAME = NOT_SUPPORTED | {errno.EXDEV}  # overlayfs: a folder of a lower layer


_said: dict[str, str] = {}


def say_once(what: str, line: str) -> None:
    """Print ``line`` if none of the kind ``what`` was printed in this process."""
    if _said.setdefault(what, line) is line:
        print(line)


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk, as far as its file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_SYNC:
            raise
        _say_no_sync(path, error)
        return
    try:
        sync_open(descriptor, path)
    finally:
        os.close(descriptor)


def sync_open(descriptor: int, path: Path) -> None:
    """`sync` of what is open."""
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        _say_no_sync(path, error)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of what is open say which file it is of: it knows the number alone."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _say_no_sync(path: Path, error: OSError) -> None:
    what, folder = ("folders", path) if path.is_dir() else ("files", path.parent)
    say_once(
        "sync",
        f"{folder}: this file system can't sync {what} ({error.strerror}): a power cut may lose what was just saved",
    )


def replace_file(file: Path, content: str | bytes) -> None:
    """Write a small file so that a reader, or a kill, sees the old one or the new one, never half of it."""
    # A name of its own: of two processes that write the same file the later one wins, and none trips over the other.
    staged = file.with_name(f".{file.name}.{secrets.token_hex(4)}.staged")
    try:
        with naming(file):
            staged.write_bytes(content if isinstance(content, bytes) else content.encode())
            sync(staged)
            staged.replace(file)
    finally:
        with suppress(OSError):  # what it failed of is said
            staged.unlink(missing_ok=True)
    sync(file.parent)


def remove_staged_files(folder: Path) -> None:
    """Remove what a kill in `replace_file` left, in a folder in which nobody else is writing."""
    for file in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.staged", file.name) and file.is_file():
            file.unlink(missing_ok=True)


def is_no_rename(error: OSError) -> bool:
    """Whether a file system that can't rename this folder says so, and not a fault."""
    return error.errno in _NO_RENAME


def move(source: Path, target: Path, last: str) -> None:
    """Rename a folder to a name that is free; where the file system can't, copy it there and remove it.

    Args:
        last: the file that says that the folder is whole. It is copied after all others are on the disk, and
            removed first, so that at any moment the source is whole, or the target.
    """
    try:
        source.rename(target)
        return
    except OSError as error:
        if not is_no_rename(error):
            raise
        reason = error.strerror
    say_once(
        "rename",
        f"{source.parent}: folders can't be renamed here ({reason}): they are copied into place",
    )
    try:
        _copy(source, target, last)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)  # it may be what fills the disk
        raise
    remove(source, last)


def _copy(source: Path, target: Path, last: str) -> None:
    folders = [target]
    target.mkdir()
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_symlink():
            copy.symlink_to(path.readlink())
        elif path.is_dir():
            copy.mkdir()
            folders.append(copy)
        elif path.is_file() and path != source / last:  # a pipe or a device holds nothing to copy
            shutil.copyfile(path, copy)
            sync(copy)
    for folder in folders:
        sync(folder)
    if (source / last).is_file():
        replace_file(target / last, (source / last).read_bytes())
    sync(target.parent)


def remove(folder: Path, first: str) -> None:
    """Remove a folder, its file ``first`` before all else: what a kill leaves is not taken for whole."""
    with suppress(OSError):  # then it hinders the rest, which says why
        (folder / first).unlink()
    shutil.rmtree(folder)
