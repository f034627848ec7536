"""Whether a checkpoint is intact: the names, sizes and hashes of its files."""

import hashlib
import json
from pathlib import Path

import xxhash

from run.errors import UserError, one_line

BEST, LAST, PREVIOUS = "best", "last", "previous"  # all checkpoints that a run has


DESCRIPTION_FILE = "training.json"


MANIFEST_FILE = "manifest.json"


METRICS_FILE = "metrics.jsonl"


FINISHED_FILE = "finished.json"  # of a run whose state was removed at its end


STATE_FILES = "state-*.safetensors"


# It finds damage, not forgery: what can write into the folder can write a manifest too. A cryptographic hash would be
# slower than a fast disk.
HASH = "xxh3_128"


def hash_file(file: Path) -> str:
    """XXH3 (128 bits) of a file's content."""
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def _expected_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of each file that the manifest of ``folder`` names."""
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    return {str(name): (int(entry["size"]), str(entry[HASH])) for name, entry in files.items()}


def verified_hashes(folder: Path) -> dict[str, str]:
    """The hash of each file of a folder that `check_whole` has read; nothing of what is no checkpoint of ours."""
    return (
        {name: digest for name, (_, digest) in _expected_files(folder).items()}
        if is_checkpoint(folder)
        else {}
    )


def check_whole(folder: Path) -> Path:
    """``folder`` as it is. Raises UserError where it is a checkpoint of ours, and damaged."""
    if is_checkpoint(folder) and (fault := fault_of(folder)):
        raise UserError(
            f"{folder}: is damaged ({fault}): copy or restore the whole folder, or name another one"
        )
    return folder


def is_checkpoint(folder: Path) -> bool:
    manifest = folder / MANIFEST_FILE  # other programs have files of this name
    return (folder / DESCRIPTION_FILE).is_file() or (
        manifest.is_file() and DESCRIPTION_FILE.encode() in manifest.read_bytes()
    )


def check_no_links(folder: Path) -> None:
    """Raises UserError where a symbolic link would lead what is written into ``folder`` out of it."""
    for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
        if path.is_symlink():
            raise UserError(
                f"{path}: is a symbolic link, and nothing is written through one: move it away"
            )


def fault_of(folder: Path, read: bool = True) -> str | None:
    """What is wrong with a checkpoint; None where it is whole.

    Args:
        read: whether to read all files and compare their hashes, and not their sizes alone.
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
    for name, (size, digest) in expected.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its {MANIFEST_FILE} names {name!r}, which is not in it"
        try:
            if file.exists() and not file.is_file():  # a pipe or a device could be read for ever
                return f"{name} is no file"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, and {MANIFEST_FILE} says {size}"
            if read and hash_file(file) != digest:
                return f"the content of {name} is not what was saved"
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            return f"{name!r} can't be read: {one_line(error)}"
    return None


def read_manifest(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST_FILE).read_bytes()
    except OSError:
        return None


def weights_identity(folder: Path) -> str:
    """What tells the models in two folders apart: a hash over the names and contents of their files."""
    files = {folder / "config.json", *folder.glob("*.safetensors")} - {*folder.glob(STATE_FILES)}
    known = verified_hashes(folder)  # of a checkpoint of ours: 13 GB need not be read again
    hashes = [[file.name, known.get(file.name) or hash_file(file)] for file in sorted(files)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
