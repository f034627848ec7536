"""Files and folders on any file system: locks, syncs, renames, and what is done where a mount lacks one of them."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from errors import UserError

LOCK_FILE = ".lock"  # made only where a folder itself can't be locked
# What mounts of the kinds CIFS, WSL, FUSE, 9p and NFS answer to what they have not. A full or broken disk (ENOSPC,
# EDQUOT, EIO, EROFS) is none of these: it stays an error.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_NO_LOCK = _NOT_SUPPORTED | {errno.ENOLCK, errno.EBADF, errno.EISDIR, errno.EACCES}
_NO_SYNC = _NOT_SUPPORTED | {errno.EBADF, errno.EACCES, errno.EISDIR}
_NO_RENAME = _NOT_SUPPORTED | {errno.EXDEV}  # overlayfs: a folder of a lower layer

_said: dict[str, str] = {}


def _say_once(what: str, line: str) -> None:
    """Print ``line`` if none of the kind ``what`` was printed in this process."""
    if _said.setdefault(what, line) is line:
        print(line)


# ---------------------------------------------------------------- locks


@contextmanager
def locked(folder: Path, refusal: str, patience: float = 0.0) -> Iterator[bool]:
    """Make ``folder`` where it is not there, and keep other processes out of it.

    Gone with the process, however it ends. A folder that was made here and is empty at the end is removed.

    Args:
        refusal: what to say where another process holds it.
        patience: for how many seconds to try, in case that one has it for a moment only.

    Yields:
        Whether it is held; not where the file system has no locks at all, which is said.

    Raises:
        UserError: another process holds it.
        OSError: it can't be made or opened.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    until = time.monotonic() + patience
    while True:
        try:
            descriptor, is_locked = _take(folder)
            break
        except BlockingIOError:
            if time.monotonic() >= until:
                raise UserError(refusal) from None
        time.sleep(0.02)
    try:
        if is_locked:
            _remove_staged_files(folder)
        yield is_locked
    finally:
        _remove_empty(made)
        os.close(descriptor)


@contextmanager
def locked_if_free(folder: Path) -> Iterator[bool]:
    """`locked` where nobody else holds ``folder``, and nothing where somebody does. Yields whether it is held here."""
    with ExitStack() as stack:
        try:
            is_held = stack.enter_context(locked(folder, "held"))
        except (UserError, OSError):
            is_held = False
        yield is_held


def _take(folder: Path, tries: int = 3) -> tuple[int, bool]:
    """A descriptor of ``folder``'s lock, and whether it is one. Raises BlockingIOError where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    # NFS locks, across machines, what is open for writing; a folder never is.
    for path, flags in ((folder, os.O_RDONLY), (folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)):
        try:
            descriptor = _lock(path, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _NO_LOCK:
                raise
            reasons.append(error.strerror)
            continue
        # Other where the process that held it until now has removed an empty folder; or always, where a mount makes up
        # its inode numbers.
        if tries > 1 and not (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):
            os.close(descriptor)
            return _take(folder, tries - 1)
        return descriptor, True
    descriptor = os.open(folder, os.O_RDONLY)  # who may not even do this is told so
    _say_once("lock", f"{folder}: this file system has no locks ({reasons[0]}): nothing keeps a second process out")
    return descriptor, False


def _lock(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags, 0o666)
    try:
        with naming(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if path.name == LOCK_FILE and error.errno == errno.EACCES:  # so some systems call a file that is locked
            raise BlockingIOError(errno.EAGAIN, error.strerror) from None
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
            folder.rmdir()


# ---------------------------------------------------------------- syncs


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
    _say_once(
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


def _remove_staged_files(folder: Path) -> None:
    """Remove what a kill in `replace_file` left, in a folder in which nobody else is writing."""
    for file in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.staged", file.name) and file.is_file():
            file.unlink(missing_ok=True)


# ---------------------------------------------------------------- renames of folders


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
    _say_once("rename", f"{source.parent}: folders can't be renamed here ({reason}): they are copied into place")
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
