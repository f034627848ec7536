"""The manifest of a checkpoint, which shows whether its files are intact."""

import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from run.errors import UserError, one_line
from run.files import replace_file, sync

BEST, LAST, PREVIOUS = "best", "last", "previous"  # the checkpoints of a run


DESCRIPTION_FILE = "training.json"


MANIFEST_FILE = "manifest.json"


METRICS_FILE = "metrics.jsonl"


FINISHED_FILE = "finished.json"  # in a finished run whose state was removed


# What one of several processes found out when it ran out of memory, and could not tell the others.
FITTING_FILE = ".fitting.json"


STATE_FILES = "state-*.safetensors"


# This detects damage, not forgery, since whoever can change a file can change the manifest too. A
# cryptographic hash would be slower than a fast disk.
HASH = "xxh3_128"


# How many files are read and hashed at a time. While one is hashed, others keep the disk busy.
READERS = 4


def hash_file(file: Path) -> str:
    """XXH3 (128 bits) of a file's content."""
    # The buffer is used again, since fresh memory for each piece would double the time.
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(file.stat().st_size, 2**24) + 1))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


class Seal:
    """Writes the manifest of a folder at the end of the context.

    Until then, files that are complete are synced and hashed while others are being written. Each
    has a thread, so that the disk is not idle while a file is hashed.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._syncs: dict[str, Future[None]] = {}
        self._hashes: dict[str, Future[str]] = {}
        self._disk, self._processor = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def add_new_files(self) -> None:
        """Add every new file in the folder. All files in it must be complete."""
        for file in sorted(self._folder.rglob("*")):
            name = file.relative_to(self._folder).as_posix()
            if file.is_file() and name not in self._syncs:
                self._syncs[name] = self._disk.submit(sync, file)
                self._hashes[name] = self._processor.submit(hash_file, file)

    def __enter__(self) -> "Seal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for thread in (self._disk, self._processor):
            thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            files = {name: self._entry(name) for name in self._syncs}
            for folder in [path for path in self._folder.rglob("*") if path.is_dir()]:
                sync(folder)
            replace_file(
                self._folder / MANIFEST_FILE, json.dumps({"files": files}, indent=2) + "\n"
            )

    def _entry(self, name: str) -> dict[str, Any]:
        self._syncs[name].result()
        return {
            "size": (self._folder / name).stat().st_size,
            HASH: self._hashes[name].result(),
        }


def _expected_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of each file in the manifest of ``folder``."""
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    return {str(name): (int(entry["size"]), str(entry[HASH])) for name, entry in files.items()}


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours, intact or damaged."""
    manifest = folder / MANIFEST_FILE  # other programs use this name too
    return (folder / DESCRIPTION_FILE).is_file() or (
        manifest.is_file() and DESCRIPTION_FILE.encode() in manifest.read_bytes()
    )


def checkpoint_around(place: Path) -> Path | None:
    """The checkpoint of a run that ``place`` is or lies in, even if it is yet to be saved.

    Only such a checkpoint is replaced by the next one, not a copy or a merged model elsewhere.
    """
    place, names = Path(os.path.realpath(place)), (BEST, LAST, PREVIOUS)
    for folder in (place, *place.parents):
        of_its_run = [folder.with_name(name) for name in names] if folder.name in names else []
        with suppress(OSError):  # whoever writes there will report it
            if any((one / MANIFEST_FILE).is_file() and is_checkpoint(one) for one in of_its_run):
                return folder
    return None


def intact(folder: Path) -> Path:
    """Gives ``folder`` back. Raises UserError if it is a damaged checkpoint of ours."""
    if is_checkpoint(folder) and (fault := fault_of(folder)):
        raise UserError(
            f"{folder}: is damaged ({fault}): copy or restore the complete folder, "
            "or name another one"
        )
    return folder


def fault_of(folder: Path, read: bool = True) -> str | None:
    """Describes the damage to a checkpoint; None if it is intact.

    Args:
        read: whether to read all files and compare their hashes, not only their sizes.
    """
    try:
        expected = _expected_files(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, which a save writes last"
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        return f"its {MANIFEST_FILE} can't be read: {one_line(error)[:120]}"
    if DESCRIPTION_FILE not in expected:
        return f"its {MANIFEST_FILE} does not name {DESCRIPTION_FILE}"
    for name, (size, _) in expected.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its {MANIFEST_FILE} names {name!r}, which is outside the folder"
        try:
            if file.exists() and not file.is_file():  # reading a pipe or device may never return
                return f"{name} is not a regular file"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, and {MANIFEST_FILE} says {size}"
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            return f"{name!r} can't be read: {one_line(error)}"
    return _fault_of_contents(folder, expected) if read else None


def _fault_of_contents(folder: Path, expected: dict[str, tuple[int, str]]) -> str | None:
    with ThreadPoolExecutor(READERS) as threads:
        hashes = {name: threads.submit(hash_file, folder / name) for name in expected}
        try:
            for name, (_, digest) in expected.items():
                if hashes[name].result() != digest:
                    return f"the content of {name} is not what was saved"
        except OSError as error:
            return f"{name!r} can't be read: {one_line(error)}"
        finally:
            threads.shutdown(cancel_futures=True)
    return None


def check_no_links(folder: Path) -> None:
    """Raises UserError if a symbolic link would redirect writes to outside ``folder``."""
    for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
        if path.is_symlink():
            raise UserError(
                f"{path}: is a symbolic link, and nothing is written through one: move it away"
            )


def read_manifest(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST_FILE).read_bytes()
    except OSError:
        return None


def weights_identity(folder: Path) -> str:
    """A hash over the names and contents of a model's files, equal only for the same model."""
    is_adapter = (folder / "adapter_config.json").is_file()
    config = folder / ("adapter_config.json" if is_adapter else "config.json")
    files = {config, *folder.glob("*.safetensors")} - {*folder.glob(STATE_FILES)}
    known = _verified_hashes(folder)
    hashes = [[file.name, known.get(file.name) or hash_file(file)] for file in sorted(files)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _verified_hashes(folder: Path) -> dict[str, str]:
    """The hashes in the manifest of a checkpoint of ours that `intact` has accepted.

    Using them avoids reading 13 GB a second time. Empty for any other model.
    """
    if not is_checkpoint(folder):
        return {}
    return {name: digest for name, (_, digest) in _expected_files(folder).items()}
