"""Folders that one process at a time may write into."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from run.errors import UserError
from run.files import NOT_SUPPORTED, naming, remove_staged_files, say_once

LOCK_FILE = ".lock"  # made only where a folder itself can't be locked


_NO_LOCK = NOT_SUPPORTED | {errno.ENOLCK, errno.EBADF, errno.EISDIR, errno.EACCES}


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
            remove_staged_files(folder)
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
        # Other where the process that held it until now has removed an empty folder; or always, where a mount makes up
        # its inode numbers.
        if tries > 1 and not (
            path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        ):
            os.close(descriptor)
            return _take(folder, tries - 1)
        return descriptor, True
    descriptor = os.open(folder, os.O_RDONLY)  # who may not even do this is told so
    say_once(
        "lock",
        f"{folder}: this file system has no locks ({reasons[0]}): nothing keeps a second process out",
    )
    return descriptor, False


def _lock(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags, 0o666)
    try:
        with naming(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if (
            path.name == LOCK_FILE and error.errno == errno.EACCES
        ):  # so some systems call a file that is locked
            raise BlockingIOError(errno.EAGAIN, error.strerror) from None
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
            folder.rmdir()
