"""Checkpoints: complete or absent, verified by hashes, and self-describing.

A checkpoint is a Hugging Face folder with a ``training.json``. ``last`` also contains the state of
the optimizer and the random number generators. A run keeps ``best``, ``last``, and the ``previous``
``last``. A save moves folders along this line (``best`` has no previous one):

    .last.staged  ->  last  ->  previous  ->  .previous.removed  ->  gone

    1. write .last.staged, sync and hash every file, and write its manifest.json at the end
    2. rename previous to .previous.removed
    3. rename last to previous
    4. rename .last.staged to last
    5. delete .previous.removed, while training continues

If the process is killed at any point, one of .last.staged, last and previous is complete, with a
manifest that proves it, and the next start (`newest_intact`) completes the interrupted save.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError

from run.errors import UserError, one_line, storage_cure
from run.files import is_rename_unsupported, move, remove, sync
from run.manifest import (
    BEST,
    DESCRIPTION_FILE,
    FINISHED_FILE,
    LAST,
    MANIFEST_FILE,
    PREVIOUS,
    STATE_FILES,
    Seal,
    fault_of,
    read_manifest,
)
from run.spellings import write_both_spellings

if TYPE_CHECKING:
    import torch

# The size of one file. This limits what is copied from a GPU at a time, and lets one file be synced
# and hashed while the next is written.
PART_BYTES = 10**9


class Model(Protocol):
    """The method of Transformers' models that a save needs."""

    def save_pretrained(self, folder: Path, *, max_shard_size: int) -> None: ...


class Savable(Protocol):
    """A tokenizer, or tensors that several processes save together."""

    def save(self, folder: Path) -> None: ...


class Removals:
    """Deletes replaced checkpoints in the background, since tens of gigabytes take seconds."""

    def __init__(self) -> None:
        self._thread: Thread | None = None

    def start(self, folder: Path) -> None:
        """Delete the checkpoints that saves of ``folder`` have replaced."""
        self.wait()
        self._thread = Thread(target=_remove_quietly, args=(folder,))
        self._thread.start()

    def wait(self) -> None:
        """Block until all pending deletions are done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "Removals":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


def _remove_quietly(folder: Path) -> None:
    with suppress(OSError):  # the next start tries again
        remove_remains(folder)


def save_checkpoint(
    folder: Path,
    model: Model,
    tokenizer: Savable,
    description: Mapping[str, Any],
    state: "Mapping[str, torch.Tensor] | Savable | None" = None,
    removals: Removals | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Save a checkpoint as ``folder``, replacing any that exists.

    Args:
        description: the content of ``training.json``.
        state: the additional tensors of ``last``, or what saves them.
        removals: deletes the replaced checkpoint; None: it is deleted before this returns.
        part_bytes: the size limit of each file of tensors.

    Raises:
        UserError: the disk is full or not writable. The earlier checkpoints are intact.
    """
    staged = staged_beside(folder)
    if removals is not None:
        removals.wait()
    try:
        remove_remains(folder)  # of an earlier save that failed
        staged.mkdir(parents=True)
    except OSError as error:
        raise _not_written(folder, error) from error
    try:
        with Seal(staged) as seal:
            model.save_pretrained(staged, max_shard_size=part_bytes)
            if (staged / "config.json").exists():  # not beside an adapter
                write_both_spellings(staged / "config.json")
            tokenizer.save(staged)
            seal.add_new_files()
            _save_state(state or {}, staged, part_bytes, seal)
            content = json.dumps(dict(description), indent=2) + "\n"
            (staged / DESCRIPTION_FILE).write_text(content, encoding="utf-8")
            seal.add_new_files()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)  # which may be what filled the disk
        raise _not_written(folder, error) from error
    try:
        put_in_place(staged, folder)
    except OSError as error:  # the staged folder is complete; the next start puts it in place
        raise _not_written(folder, error) from error
    if removals is None:
        _remove_quietly(folder)
    else:
        removals.start(folder)


def _not_written(folder: Path, error: Exception) -> UserError:
    exists = any((folder.parent / name).exists() for name in (BEST, LAST, PREVIOUS))
    intact = "; earlier ones are intact" if exists else ""
    return UserError(
        f"{folder}: the checkpoint can't be written ({one_line(error)[:160]}){intact}: "
        f"{storage_cure(error)}, then type the same command again"
    )


def staged_beside(folder: Path) -> Path:
    """The folder in which a checkpoint is written before it becomes ``folder``."""
    return folder.with_name(f".{folder.name}.staged")


def _save_state(
    state: "Mapping[str, torch.Tensor] | Savable", folder: Path, part_bytes: int, seal: Seal
) -> None:
    from safetensors.torch import save_file

    if not isinstance(state, Mapping):
        return state.save(folder)
    for number, part in enumerate(_parts(state, part_bytes), start=1):
        save_file(part, folder / STATE_FILES.replace("*", f"{number:05}"))
        seal.add_new_files()


def _parts(
    tensors: "Mapping[str, torch.Tensor]", most_bytes: int
) -> "Iterator[dict[str, torch.Tensor]]":
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > most_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def put_in_place(staged: Path, folder: Path) -> None:
    """Rename a complete checkpoint into place: steps 2 to 4 of a save.

    Idempotent: if interrupted at any point, calling it again completes the move.
    """
    previous = folder.with_name(PREVIOUS)
    if folder.name == LAST and folder.exists() and fault_of(folder, read=False) is None:
        if previous.exists():
            take_away(previous)
        move(folder, previous, MANIFEST_FILE)
    elif folder.exists():
        take_away(folder)
    move(staged, folder, MANIFEST_FILE)
    sync(folder.parent)


def take_away(folder: Path) -> None:
    """Rename a checkpoint for `remove_remains` to delete; delete it here if it can't be renamed."""
    try:
        folder.rename(_free_name(folder, f".{folder.name}.removed"))
    except OSError as error:
        if not is_rename_unsupported(error):
            raise
        remove(folder, MANIFEST_FILE)


def _free_name(folder: Path, name: str) -> Path:
    """``name`` next to ``folder``, or the first of ``name-2``, ``name-3``, ... that is free."""
    number, target = 1, folder.with_name(name)
    while target.exists():
        number, target = number + 1, folder.with_name(f"{name}-{number + 1}")
    return target


def remove_remains(folder: Path) -> None:
    """Delete checkpoints that saves of ``folder`` replaced, and remains of interrupted saves."""
    name = re.escape(folder.name)  # which merge.py takes from the user
    remains = re.compile(rf"\.({name}\.staged|({name}|{PREVIOUS})\.removed(-[0-9]+)?)")
    for path in folder.parent.iterdir() if folder.parent.exists() else ():
        if remains.fullmatch(path.name):
            # Some network file systems can't delete a file that another process has open.
            shutil.rmtree(path, ignore_errors=True)


def newest_intact(run_folder: Path) -> Path | None:
    """The checkpoint to resume from: ``last``, or ``previous`` if ``last`` is damaged.

    None if neither exists.

    Raises:
        UserError: all that exist are damaged.
    """
    _finish_saves(run_folder)
    return first_intact(run_folder / LAST, run_folder / PREVIOUS)


def first_intact(*folders: Path) -> Path | None:
    """The first of these checkpoints that is intact; otherwise as `newest_intact`."""
    faults: list[str] = []
    for folder in folders:
        if not folder.exists():
            continue
        fault = fault_of(folder)
        if fault is None:
            if faults:
                print(f"{faults[0]}: resuming from {folder}")
            return folder
        faults.append(f"{folder}: is damaged ({fault})")
    if faults:
        raise UserError(
            f"{'; '.join(faults)}: restore it from a copy, or start again under another --run_name"
        )
    return None


def _finish_saves(run_folder: Path) -> None:
    """Complete interrupted saves: put complete checkpoints in place, and delete the rest."""
    if (run_folder / FINISHED_FILE).exists() and fault_of(run_folder / LAST, read=False):
        for folder in (run_folder / PREVIOUS, run_folder / LAST):
            if folder.exists():
                take_away(folder)
    for folder in (run_folder / BEST, run_folder / LAST):
        staged = staged_beside(folder)
        is_complete = staged.exists() and fault_of(staged, read=False) is None
        # Where folders are copied into place, a kill can leave the staged one behind. Putting it in
        # place again would replace previous with the same checkpoint as last.
        is_in_place = (
            is_complete
            and fault_of(folder, read=False) is None
            and read_manifest(folder) == read_manifest(staged)
        )
        if is_complete and not is_in_place:
            put_in_place(staged, folder)
        remove_remains(folder)


def set_damaged_aside(run_folder: Path, start: Path) -> None:
    """Rename damaged checkpoints, before a run that resumes from ``start`` saves anything.

    A damaged ``best`` becomes ``best.damaged``. A damaged ``last``, if ``start`` is ``previous``,
    becomes ``last.damaged``.
    """
    for folder in (run_folder / LAST, run_folder / BEST):
        if folder.exists() and folder != start and (fault := fault_of(folder)):
            aside = _free_name(folder, f"{folder.name}.damaged")
            move(folder, aside, MANIFEST_FILE)
            print(f"{folder}: is damaged ({fault}), and set aside as {aside.name}")
