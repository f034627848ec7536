"""Files and folders on any file system: sync and rename, with fallbacks for mounts without them."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"  # how a file begins whose content git has not fetched


# The errors of CIFS, WSL, FUSE, 9p and NFS mounts for unsupported operations. Those of a full or
# broken disk (ENOSPC, EDQUOT, EIO, EROFS) are not included, and are always raised.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


_NO_SYNC = NOT_SUPPORTED | {errno.EBADF, errno.EACCES, errno.EISDIR}


_NO_RENAME = NOT_SUPPORTED | {errno.EXDEV}  # overlayfs: a folder of a lower layer


_said: set[str] = set()


def say_once(subject: str, line: str) -> None:
    """Print ``line``, unless this process has already printed one on the same ``subject``."""
    if subject not in _said:
        _said.add(subject)
        print(line)


def forget_what_was_said() -> None:
    """Let `say_once` print everything again, as in a new process."""
    _said.clear()


def gigabytes(size: float) -> str:
    """``size``, in bytes, for a message; in MB where little is left of a GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk, if the file system supports it."""
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
    """`sync` for an open file or folder."""
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        _say_no_sync(path, error)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add ``path`` to an OSError raised by an operation on a file descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _say_no_sync(path: Path, error: OSError) -> None:
    what, folder = ("folders", path) if path.is_dir() else ("files", path.parent)
    say_once(
        "sync",
        f"{folder}: this file system can't sync {what} ({error.strerror}): "
        "a power cut may lose what was just saved",
    )


def replace_file(file: Path, content: str | bytes, tries: int = 3) -> None:
    """Write a small file atomically: at any moment it has its old or its new content.

    If two processes write the same file, the later one wins. Each uses its own staged file, so
    neither fails. A process that locks the folder meanwhile takes the staged file for that of a
    killed process, and removes it (`remove_staged_files`), so it is written again.
    """
    staged = file.with_name(f".{file.name}.{secrets.token_hex(4)}.staged")
    try:
        with naming(file):
            staged.write_bytes(content if isinstance(content, bytes) else content.encode())
            sync(staged)
            staged.replace(file)
    except FileNotFoundError:
        if tries == 1 or not file.parent.exists():
            raise
        return replace_file(file, content, tries - 1)
    finally:
        with suppress(OSError):  # an error above is the one to report
            staged.unlink(missing_ok=True)
    sync(file.parent)


def has_only(file: Path, lines: Iterable[str]) -> bool:
    """Whether ``file`` consists of ``lines``, each with its end. It may be larger than memory."""
    with file.open("rb") as stream:
        return all(stream.readline() == line.encode() for line in lines) and not stream.read(1)


def remove_staged_files(folder: Path) -> None:
    """Remove the staged files of a killed `replace_file`, in a folder that this process locked."""
    for file in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.staged", file.name) and file.is_file():
            file.unlink(missing_ok=True)


def is_rename_unsupported(error: OSError) -> bool:
    """Whether ``error`` means that this file system can't rename folders, rather than a fault."""
    return error.errno in _NO_RENAME


def move(source: Path, target: Path, last: str) -> None:
    """Rename a folder to a free name; if the file system can't, copy it and remove the original.

    Args:
        last: the file whose presence means that the folder is complete. It is copied after all
            others have been synced, and removed first, so that at any moment either source or
            target is complete.
    """
    try:
        source.rename(target)
        return
    except OSError as error:
        if not is_rename_unsupported(error):
            raise
        reason = error.strerror
    say_once(
        "rename",
        f"{source.parent}: folders can't be renamed here ({reason}): they are copied into place",
    )
    try:
        _copy(source, target, last)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)  # which may be what filled the disk
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
        elif path.is_file() and path != source / last:  # not pipes or devices
            shutil.copyfile(path, copy)
            sync(copy)
    for folder in folders:
        sync(folder)
    if (source / last).is_file():
        replace_file(target / last, (source / last).read_bytes())
    sync(target.parent)


def remove(folder: Path, first: str) -> None:
    """Remove a folder, beginning with its file ``first``.

    If this is interrupted, the missing file shows that the folder is not complete.
    """
    with suppress(OSError):  # rmtree fails for the same reason and reports it
        (folder / first).unlink()
    shutil.rmtree(folder)
