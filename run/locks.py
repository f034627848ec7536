"""Locks for folders that only one process at a time may write to."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from run.errors import UserError
from run.files import NOT_SUPPORTED, naming, remove_staged_files, say_once

LOCK_FILE = ".lock"  # created only where the folder itself cannot be locked


_NO_LOCK = NOT_SUPPORTED | {errno.ENOLCK, errno.EBADF, errno.EISDIR, errno.EACCES}


@contextmanager
def locked(folder: Path, refusal: str, patience: float = 0.0) -> Iterator[bool]:
    """Make ``folder`` if it does not exist, and keep other processes out of it.

    The lock is released when the process ends, in whatever way. A folder that was made here is
    removed if it is empty at the end.

    Args:
        refusal: the error message if another process holds the lock.
        patience: how many seconds to keep trying, in case the other one holds it only briefly.

    Yields:
        Whether the folder is locked. If the file system has no locks, it is not, and this is
        reported.

    Raises:
        UserError: another process holds the lock.
        OSError: the folder can't be made or opened.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    until = time.monotonic() + patience
    while True:
        try:
            descriptor, is_locked = _lock_folder(folder)
            break
        except BlockingIOError:
            if time.monotonic() >= until:
                raise UserError(refusal) from None
        time.sleep(0.02)
    try:
        if is_locked:
            remove_staged_files(folder)
        yield is_locked
    finally:
        _remove_empty(made)
        os.close(descriptor)


@contextmanager
def locked_if_free(folder: Path) -> Iterator[bool]:
    """`locked`, but without an error if another process holds the lock.

    Yields:
        Whether this process has locked the folder.
    """
    with ExitStack() as stack:
        try:
            is_locked = stack.enter_context(locked(folder, "held"))
        except (UserError, OSError):
            is_locked = False
        yield is_locked


def check_free(folder: Path, refusal: str, patience: float = 0.0) -> None:
    """Raises UserError where `locked` would. The folder stays as it is."""
    if not is_free(folder, patience):
        raise UserError(refusal)


def is_free(folder: Path, patience: float = 0.0) -> bool:
    """Whether no process holds the lock of ``folder``, at least once in ``patience`` seconds."""
    until = time.monotonic() + patience
    while not _is_free(folder):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _is_free(folder: Path) -> bool:
    for path, flags in ((folder, os.O_RDONLY), (folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)):
        try:
            os.close(_lock(path, flags))
            break
        except BlockingIOError:
            return False
        except OSError:  # it can't be locked, or nobody has made the file yet
            continue
    return True


def _lock_folder(folder: Path, tries: int = 3) -> tuple[int, bool]:
    """A descriptor that holds the lock of ``folder``, and whether the file system has locks at all.

    Raises BlockingIOError if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    # NFS can only lock what is open for writing, which a folder never is, so there we lock a file.
    for path, flags in (
        (folder, os.O_RDONLY),
        (folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW),
    ):
        try:
            descriptor = _lock(path, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _NO_LOCK:
                raise
            reasons.append(error.strerror)
            continue
        # The previous holder may have removed the folder just before we locked it. If so, try
        # again, but not forever, since some mounts invent a new inode number each time.
        if tries > 1 and not _is_open_file(descriptor, path):
            os.close(descriptor)
            return _lock_folder(folder, tries - 1)
        return descriptor, True
    descriptor = os.open(folder, os.O_RDONLY)
    say_once(
        "lock",
        f"{folder}: this file system has no locks ({reasons[0]}): "
        "a second process will not be kept out",
    )
    return descriptor, False


def _is_open_file(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _lock(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags, 0o666)
    try:
        with naming(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        # Some systems report a locked file as EACCES.
        if path.name == LOCK_FILE and error.errno == errno.EACCES:
            raise BlockingIOError(errno.EAGAIN, error.strerror) from None
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
            folder.rmdir()
