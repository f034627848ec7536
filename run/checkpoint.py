"""Checkpoints: whole or absent, checked by their hashes, and each says what it is.

A checkpoint is a Hugging Face folder with a ``training.json``; ``last`` holds the state of the
optimizer and of the random number generators beside that. It is written into a hidden sibling
folder and synced to disk, its ``manifest.json`` with the size and hash of every file at the end,
and then renamed into place. A run keeps ``best``, ``last`` and, as ``previous``, the last before it;
once it is finished, the last two can be removed.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from run.errors import UserError, one_line, storage_cure
from run.files import is_no_rename, move, remove, replace_file, sync
from run.manifest import (
    BEST,
    DESCRIPTION_FILE,
    FINISHED_FILE,
    HASH,
    LAST,
    MANIFEST_FILE,
    PREVIOUS,
    STATE_FILES,
    fault_of,
    hash_file,
    read_manifest,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from engine.tokenizer import Tokenizer


# Tensors are written in files of at most this size: no more of them is copied from a GPU at a time, and each is synced
# and hashed while the next is written.
PART_BYTES = 10**9


def save_checkpoint(
    folder: Path,
    model: "LlamaForCausalLM",
    tokenizer: "Tokenizer",
    description: Mapping[str, Any],
    state: "Mapping[str, torch.Tensor] | None" = None,
) -> None:
    """Write model, tokenizer, ``training.json`` and, where given, ``state`` into ``folder``, in place of what is there.

    What ``last`` was before becomes ``previous``.

    Args:
        description: the content of ``training.json``.

    Raises:
        UserError: the disk is full or not writable; the earlier checkpoints are intact.
    """
    from safetensors.torch import save_file

    staged = _hidden(folder, "staged")
    wait_for_removals()
    try:
        remove_remains(folder)  # of a save that failed
        staged.mkdir(parents=True)
    except OSError as error:
        raise _not_written(folder, error) from error
    try:
        with _Seal(staged) as seal:
            model.save_pretrained(staged, max_shard_size=PART_BYTES)
            write_both_spellings(staged / "config.json")
            tokenizer.save(staged)
            seal.written()
            for number, part in enumerate(_parts(state or {}), start=1):
                save_file(part, staged / STATE_FILES.replace("*", f"{number:05}"))
                seal.written()
            content = json.dumps(dict(description), indent=2) + "\n"
            (staged / DESCRIPTION_FILE).write_text(content, encoding="utf-8")
            seal.written()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)  # it may be what fills the disk
        raise _not_written(folder, error) from error
    try:
        _put_in_place(staged, folder)
    except OSError as error:  # what is staged is whole: the next start puts it in place
        raise _not_written(folder, error) from error


def write_both_spellings(file: Path) -> None:
    """Write the rotary embedding's parameters in a ``config.json`` as Transformers 4 reads them, too.

    Transformers 5 has them in ``rope_parameters`` alone, which 4 (and with it vLLM and lm-eval on
    many machines) passes over without a word: it takes a theta of 10,000 and no scaling.
    """
    content = json.loads(file.read_bytes())
    rope = content.get("rope_parameters")
    if rope is not None:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        content["rope_theta"] = rope["rope_theta"]
        content["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
        if rope.get("rope_type") == "longrope" and "original_max_position_embeddings" in rope:
            content["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _not_written(folder: Path, error: Exception) -> UserError:
    intact = (
        "; earlier ones are intact"
        if any((folder.parent / name).exists() for name in (BEST, LAST, PREVIOUS))
        else ""
    )
    return UserError(
        f"{folder}: the checkpoint can't be written ({one_line(error)[:160]}){intact}: {storage_cure(error)}, "
        "then type the same command again"
    )


def _hidden(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _parts(tensors: "Mapping[str, torch.Tensor]") -> "Iterator[dict[str, torch.Tensor]]":
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


class _Seal:
    """Syncs and hashes the files of a folder while the next ones are written; at the end the manifest says it all."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Future[dict[str, Any]]] = {}
        self._thread = ThreadPoolExecutor(1)

    def written(self) -> None:
        """All files that are in the folder by now are complete."""
        for file in sorted(self._folder.rglob("*")):
            name = file.relative_to(self._folder).as_posix()
            if file.is_file() and name not in self._files:
                self._files[name] = self._thread.submit(_sync_and_hash, file)

    def __enter__(self) -> "_Seal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            files = {name: future.result() for name, future in self._files.items()}
            for folder in [path for path in self._folder.rglob("*") if path.is_dir()]:
                sync(folder)
            replace_file(
                self._folder / MANIFEST_FILE, json.dumps({"files": files}, indent=2) + "\n"
            )


def _sync_and_hash(file: Path) -> dict[str, Any]:
    sync(file)
    return {"size": file.stat().st_size, HASH: hash_file(file)}


def _put_in_place(staged: Path, folder: Path) -> None:
    """Rename a complete checkpoint into place. Wherever that is cut, doing it again ends it (`_finish_saves`)."""
    previous = folder.with_name(PREVIOUS)
    if folder.name == LAST and folder.exists() and fault_of(folder, read=False) is None:
        if previous.exists():
            take_away(previous)
        move(folder, previous, MANIFEST_FILE)
    elif folder.exists():
        take_away(folder)
    move(staged, folder, MANIFEST_FILE)
    sync(folder.parent)
    _removals.append(_remover.submit(remove_remains, folder))


def take_away(folder: Path) -> None:
    """Rename what is not needed any more to what `remove_remains` removes; where that can't be, remove it."""
    try:
        folder.rename(_free_name(folder, f".{folder.name}.removed"))
    except OSError as error:
        if not is_no_rename(error):
            raise
        remove(folder, MANIFEST_FILE)


# What a save replaced is removed while training goes on: tens of gigabytes take seconds.
_remover = ThreadPoolExecutor(1)


_removals: list[Future[None]] = []


def wait_for_removals() -> None:
    """Come back when nothing that was replaced is left."""
    while _removals:
        _removals.pop().exception()


def _free_name(folder: Path, name: str) -> Path:
    """``name`` beside ``folder``, or where that is taken ``name-2``, ``name-3``, and so on."""
    number, target = 1, folder.with_name(name)
    while target.exists():
        number, target = number + 1, folder.with_name(f"{name}-{number + 1}")
    return target


def remove_remains(folder: Path) -> None:
    remains = re.compile(
        rf"\.({folder.name}\.staged|({folder.name}|{PREVIOUS})\.removed(-[0-9]+)?)"
    )
    for path in folder.parent.iterdir() if folder.parent.exists() else ():
        if remains.fullmatch(path.name):
            # Not all can be removed at once: some network file systems keep what another process has open.
            shutil.rmtree(path, ignore_errors=True)


def newest_intact(run_folder: Path) -> Path | None:
    """What training goes on from: ``last``, or where that is damaged ``previous``; None where there is neither.

    Raises:
        UserError: what there is, is damaged.
    """
    _finish_saves(run_folder)
    faults: list[str] = []
    for folder in (run_folder / LAST, run_folder / PREVIOUS):
        if not folder.exists():
            continue
        fault = fault_of(folder)
        if fault is None:
            if faults:
                print(f"{faults[0]}: going on from {folder}")
            return folder
        faults.append(f"{folder}: is damaged ({fault})")
    if faults:
        raise UserError(
            "; ".join(faults) + ": restore it from a copy, or start anew under another --run_name"
        )
    return None


def _finish_saves(run_folder: Path) -> None:
    """Put in place what was complete when a kill came, and remove what was not, or was being removed."""
    if (run_folder / FINISHED_FILE).exists() and fault_of(run_folder / LAST, read=False):
        for folder in (run_folder / PREVIOUS, run_folder / LAST):
            if folder.exists():
                take_away(folder)
    for folder in (run_folder / BEST, run_folder / LAST):
        staged = _hidden(folder, "staged")
        is_whole = staged.exists() and fault_of(staged, read=False) is None
        # Else it was put in place by copying it, and just not removed: once more would replace the predecessor too.
        if is_whole and not (
            fault_of(folder, read=False) is None and read_manifest(folder) == read_manifest(staged)
        ):
            _put_in_place(staged, folder)
            wait_for_removals()
        else:
            remove_remains(folder)


def set_damaged_aside(run_folder: Path, start: Path) -> None:
    """Keep what is damaged from being taken for whole, before a run that goes on from ``start`` saves anything.

    ``last``, where ``start`` is its predecessor, and ``best`` become ``last.damaged`` and ``best.damaged``.
    """
    for folder in (run_folder / LAST, run_folder / BEST):
        if folder.exists() and folder != start and (fault := fault_of(folder)):
            aside = _free_name(folder, f"{folder.name}.damaged")
            move(folder, aside, MANIFEST_FILE)
            print(f"{folder}: is damaged ({fault}), and set aside as {aside.name}")
