"""The disk that the step save of cuda.py writes to: its room, and its rate for a plain file."""

import os
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuda_work import Work

PIECE_BYTES = 2**26
SYNCED_BYTES = 2**30  # a checkpoint's files are this large, and synced one by one
MOST_SECONDS = 8.0  # a slow disk shows its rate in a part of the file, too
PROBES = 16


@dataclass
class Rates:
    """Bytes a second of a plain file; None where they could not be measured."""

    write: float | None = None
    read: float | None = None


def times_plain(size: int, seconds: float, rate: float | None) -> float | None:
    """How many times as long as a plain file of ``size`` bytes ``seconds`` are."""
    return seconds * rate / size if rate else None


def check_room(work: "Work", needed: int) -> None:
    """Raises RuntimeError if ``needed`` bytes do not fit into the scratch folder."""
    free = shutil.disk_usage(work.scratch).free
    kind = file_system(work.scratch)
    work.results.write(
        "scratch",
        folder=work.scratch,
        file_system=kind,
        free_GB=free / 1e9,
        needed_GB=needed / 1e9,
    )
    if free < needed:
        raise RuntimeError(
            f"{work.scratch}: has {free / 1e9:.1f} GB free, and the step save needs "
            f"{needed / 1e9:.1f} GB: set TMPDIR to a folder that has them"
        )


def scratch_parent(is_dry: bool) -> str:
    """The folder for checkpoints: the one with more room of $TMPDIR or /tmp and the current one.

    One in main memory is the last choice.
    """
    folders = [tempfile.gettempdir(), *[os.getcwd()] * (not is_dry)]
    return max(folders, key=room_in)


def room_in(folder: str) -> tuple[bool, int]:
    """Whether ``folder`` is on a disk, and how many GiB are free there."""
    is_on_disk = file_system(Path(folder)) not in ("tmpfs", "ramfs")
    return is_on_disk, shutil.disk_usage(folder).free // 2**30


def file_system(folder: Path) -> str:
    """The type of the file system that ``folder`` is in, such as ext4; tmpfs is main memory."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    within = [(len(at), kind) for _, at, kind, *_ in mounts if folder.resolve().is_relative_to(at)]
    return max(within, default=(0, ""))[1]


def measure_disk(work: "Work", size: int, rates: Rates) -> None:
    """Write a plain file of ``size`` bytes to the disk, and read it back; fills ``rates``."""
    file = work.scratch / "plain"
    try:
        written, write_seconds = write_plain(file, size)
        rates.write = written / write_seconds
        forget(file)
        cached = cached_share(file)
        read, read_seconds = read_plain(file)
        rates.read = read / read_seconds
    finally:
        file.unlink(missing_ok=True)  # its room is for the checkpoints
    work.results.write(
        "disk",
        written=written,
        write_s=write_seconds,
        write_GB_per_s=rates.write / 1e9,
        read=read,
        read_s=read_seconds,
        read_GB_per_s=rates.read / 1e9,
        share_read_from_cache=cached,
    )


def write_plain(file: Path, size: int) -> tuple[int, float]:
    """The bytes written and synced, and the seconds.

    As in a save, a part is synced while the next one is written.
    """
    piece, written = memoryview(os.urandom(PIECE_BYTES)), 0
    syncs: list[Future[None]] = []
    started = time.perf_counter()
    with file.open("wb", buffering=0) as opened, ThreadPoolExecutor(1) as thread:
        while written < size and time.perf_counter() - started < MOST_SECONDS:
            end = min(size, written + SYNCED_BYTES)
            while written < end:
                written += opened.write(piece[: end - written])
            for sync in syncs[-1:]:
                sync.result()
            syncs.append(thread.submit(os.fsync, opened.fileno()))
    syncs[-1].result()
    return written, time.perf_counter() - started


def read_plain(file: Path) -> tuple[int, float]:
    """The bytes read, and the seconds."""
    buffer, read = bytearray(PIECE_BYTES), 0
    started = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while time.perf_counter() - started < MOST_SECONDS and (count := opened.readinto(buffer)):
            read += count
    return read, time.perf_counter() - started


def forget(file: Path) -> None:
    """Ask the kernel to drop the pages of ``file`` from its cache, for which they must be synced.

    Unlike /proc/sys/vm/drop_caches, this needs no rights and leaves other files alone.
    """
    with file.open("rb") as opened, suppress(OSError):  # which not all file systems can
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(file: Path) -> float | None:
    """The share of ``file`` that is in the kernel's cache, by a few probes; None: it can't say."""
    cached, size = 0, file.stat().st_size
    with file.open("rb", buffering=0) as opened:
        for number in range(PROBES):
            try:
                at = size * number // PROBES
                cached += os.preadv(opened.fileno(), [bytearray(1)], at, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError:  # not on this file system
                return None
    return cached / PROBES
