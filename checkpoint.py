"""Checkpoints: whole or absent, checked by their hashes, and each says what it is.

A checkpoint is a Hugging Face folder with a ``training.json``; ``last`` holds the state of the
optimizer and of the random number generators beside that. It is written into a hidden sibling
folder and synced to disk, its ``manifest.json`` with the size and hash of every file at the end,
and then renamed into place. A run keeps ``best``, ``last`` and, as ``previous``, the last before it;
once it is finished, the last two can be removed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError

from config import KEYS, PLACES, Config, load_config, local_path, make_config, read_settings, with_tilde
from errors import UserError, one_line, storage_cure
from storage import is_no_rename, move, remove, replace_file, sync

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from tokenizer import Tokenizer

BEST, LAST, PREVIOUS = "best", "last", "previous"  # all checkpoints that a run has
DESCRIPTION_FILE = "training.json"
MANIFEST_FILE = "manifest.json"
METRICS_FILE = "metrics.jsonl"
FINISHED_FILE = "finished.json"  # of a run whose state was removed at its end
STATE_FILES = "state-*.safetensors"
# Tensors are written in files of at most this size: no more of them is copied from a GPU at a time, and each is synced
# and hashed while the next is written.
PART_BYTES = 10**9
# It finds damage, not forgery: what can write into the folder can write a manifest too. A cryptographic hash would be
# slower than a fast disk.
HASH = "xxh3_128"


# ---------------------------------------------------------------- writing


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
        _remove_remains(folder)  # of a save that failed
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
        "; earlier ones are intact" if any((folder.parent / name).exists() for name in (BEST, LAST, PREVIOUS)) else ""
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
            replace_file(self._folder / MANIFEST_FILE, json.dumps({"files": files}, indent=2) + "\n")


def _sync_and_hash(file: Path) -> dict[str, Any]:
    sync(file)
    return {"size": file.stat().st_size, HASH: hash_file(file)}


def hash_file(file: Path) -> str:
    """XXH3 (128 bits) of a file's content."""
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def _put_in_place(staged: Path, folder: Path) -> None:
    """Rename a complete checkpoint into place. Wherever that is cut, doing it again ends it (`_finish_saves`)."""
    previous = folder.with_name(PREVIOUS)
    if folder.name == LAST and folder.exists() and fault_of(folder, read=False) is None:
        if previous.exists():
            _take_away(previous)
        move(folder, previous, MANIFEST_FILE)
    elif folder.exists():
        _take_away(folder)
    move(staged, folder, MANIFEST_FILE)
    sync(folder.parent)
    _removals.append(_remover.submit(_remove_remains, folder))


def _take_away(folder: Path) -> None:
    """Rename what is not needed any more to what `_remove_remains` removes; where that can't be, remove it."""
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


def _remove_remains(folder: Path) -> None:
    remains = re.compile(rf"\.({folder.name}\.staged|({folder.name}|{PREVIOUS})\.removed(-[0-9]+)?)")
    for path in folder.parent.iterdir() if folder.parent.exists() else ():
        if remains.fullmatch(path.name):
            # Not all can be removed at once: some network file systems keep what another process has open.
            shutil.rmtree(path, ignore_errors=True)


def remove_state(run_folder: Path, description: Mapping[str, Any]) -> None:
    """Remove ``last`` and ``previous`` of a run that is finished. Where that is cut, the next start knows what is what.

    Args:
        description: the ``training.json`` of its end; ``finished.json`` keeps what is not state.

    Raises:
        UserError: ``best`` is not whole, and nothing is removed; or they can't be.
    """
    best, state = run_folder / BEST, [run_folder / PREVIOUS, run_folder / LAST]
    wait_for_removals()
    if fault := fault_of(best):
        raise UserError(
            f"{best}: is damaged or gone ({fault}): {LAST} and {PREVIOUS} are not removed (keep_state false): "
            f"{cure_without_best(run_folder)}"
        )
    try:
        # First: without it, and without last, the next start would take the run for one that never saved.
        content = {key: value for key, value in description.items() if key != "state"}
        replace_file(run_folder / FINISHED_FILE, json.dumps(content, indent=2) + "\n")
        for folder in state:
            if folder.exists():
                _take_away(folder)
        sync(run_folder)
    except OSError as error:
        raise UserError(f"{run_folder}: {LAST} and {PREVIOUS} can't be removed ({one_line(error)[:160]})") from error
    _remove_remains(run_folder / LAST)
    print(f"removed: {state[1]} and {state[0]}, since {best} is whole (keep_state false)")


def cure_without_best(run_folder: Path) -> str:
    """What can be done with a finished run whose ``best`` is not whole."""
    other = (
        f"evaluate.py --ckpt {run_folder / LAST}" if (run_folder / LAST).exists() else "train under a new --run_name"
    )
    return f"restore {BEST} from a copy, or {other}"


def check_disk_space(run_folder: Path, weights: int, state: int) -> tuple[int, int]:
    """Make sure that the checkpoints of a run fit on the disk.

    Args:
        weights, state: in bytes; ``best`` has the first, ``last`` and ``previous`` both, and so has
            what is being written while all three stand there.

    Returns:
        The bytes that they take, and those that can be had.

    Raises:
        UserError: the first is more than the second.
    """
    needed = weights + 3 * (weights + state)
    there = sum(
        file.stat().st_size
        for name in (BEST, LAST, PREVIOUS)
        for file in (run_folder / name).rglob("*")
        if file.is_file()
    )
    room = shutil.disk_usage(run_folder).free + there
    if needed > room:
        raise UserError(
            f"{run_folder}: its checkpoints take {needed / 1e9:.1f} GB (best, last, the one before, and one being "
            f"written), and {room / 1e9:.1f} GB can be had: make room, or begin in another --output_dir"
        )
    return needed, room


# ---------------------------------------------------------------- finding and verifying


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
        raise UserError("; ".join(faults) + ": restore it from a copy, or start anew under another --run_name")
    return None


def _finish_saves(run_folder: Path) -> None:
    """Put in place what was complete when a kill came, and remove what was not, or was being removed."""
    if (run_folder / FINISHED_FILE).exists() and fault_of(run_folder / LAST, read=False):
        for folder in (run_folder / PREVIOUS, run_folder / LAST):
            if folder.exists():
                _take_away(folder)
    for folder in (run_folder / BEST, run_folder / LAST):
        staged = _hidden(folder, "staged")
        is_whole = staged.exists() and fault_of(staged, read=False) is None
        # Else it was put in place by copying it, and just not removed: once more would replace the predecessor too.
        if is_whole and not (fault_of(folder, read=False) is None and _read_manifest(folder) == _read_manifest(staged)):
            _put_in_place(staged, folder)
            wait_for_removals()
        else:
            _remove_remains(folder)


def _expected_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of each file that the manifest of ``folder`` names."""
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    return {str(name): (int(entry["size"]), str(entry[HASH])) for name, entry in files.items()}


def verified_hashes(folder: Path) -> dict[str, str]:
    """The hash of each file of a folder that `check_whole` has read; nothing of what is no checkpoint of ours."""
    return {name: digest for name, (_, digest) in _expected_files(folder).items()} if _is_ours(folder) else {}


def set_damaged_aside(run_folder: Path, start: Path) -> None:
    """Keep what is damaged from being taken for whole, before a run that goes on from ``start`` saves anything.

    ``last``, where ``start`` is its predecessor, and ``best`` become ``last.damaged`` and ``best.damaged``.
    """
    for folder in (run_folder / LAST, run_folder / BEST):
        if folder.exists() and folder != start and (fault := fault_of(folder)):
            aside = _free_name(folder, f"{folder.name}.damaged")
            move(folder, aside, MANIFEST_FILE)
            print(f"{folder}: is damaged ({fault}), and set aside as {aside.name}")


def check_whole(folder: Path) -> Path:
    """``folder`` as it is. Raises UserError where it is a checkpoint of ours, and damaged."""
    if _is_ours(folder) and (fault := fault_of(folder)):
        raise UserError(f"{folder}: is damaged ({fault}): copy or restore the whole folder, or name another one")
    return folder


def _is_ours(folder: Path) -> bool:
    manifest = folder / MANIFEST_FILE  # other programs have files of this name
    return (folder / DESCRIPTION_FILE).is_file() or (
        manifest.is_file() and DESCRIPTION_FILE.encode() in manifest.read_bytes()
    )


def check_no_links(folder: Path) -> None:
    """Raises UserError where a symbolic link would lead what is written into ``folder`` out of it."""
    for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link, and nothing is written through one: move it away")


def fault_of(folder: Path, read: bool = True) -> str | None:
    """What is wrong with a checkpoint; None where it is whole.

    Args:
        read: whether to read all files and compare their hashes, and not their sizes alone.
    """
    try:
        expected = _expected_files(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, which a save writes last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
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


# ---------------------------------------------------------------- reading


def read_description(folder: Path, name: str = DESCRIPTION_FILE) -> dict[str, Any]:
    """The ``training.json`` of a checkpoint of ours, or the ``finished.json`` of a run."""
    file = folder / name
    try:
        description = json.loads(file.read_bytes())
        for key, kind in (("settings", dict), ("data", dict), ("step", int), ("epoch", float), ("wandb_run_id", str)):
            if not isinstance(description[key], kind):
                raise ValueError(f"{key} is {description[key]!r}")
        return description
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: is damaged or no training.json of this program ({one_line(error)[:160]})") from None


@dataclass(frozen=True)
class Source:
    """What a script reads a model from.

    Attributes:
        path: a folder or hub id.
        config: the settings that belong to it.
        description: its ``training.json``; None for a model that is no checkpoint of ours.
        run_folder: the run that it belongs to; None also where the checkpoint was copied out of it.
        manifest: the content of its ``manifest.json``.
        typed: the settings that were given as flags.
    """

    path: str
    config: Config
    description: dict[str, Any] | None = None
    run_folder: Path | None = None
    manifest: bytes | None = None
    typed: frozenset[str] = frozenset()

    def check_rows(self, split: str, sha256: str) -> None:
        """Raises UserError where the rows of ``split`` are others than the run's, and no flag asks for others.

        So a hub id that has become a folder's name, or a folder that holds something else by now, is noticed.
        """
        known = {} if self.description is None else self.description["data"]
        if known.get(f"{split}_sha256", sha256) != sha256 and not self.typed & {"dataset", "validation_size", "seed"}:
            raise UserError(
                f"{self.path}: the {split} rows of dataset {self.config.dataset!r} are not those that this run knew: "
                "name its own data set with --dataset, or this one, to take these rows nevertheless"
            )

    def check_unchanged(self) -> None:
        """Raises UserError where training has saved another checkpoint in its place since it was found."""
        if self.manifest is not None and self.manifest != _read_manifest(Path(self.path)):
            raise UserError(f"{self.path}: training has just saved another one in its place: start again")


def saved_settings(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint of ours, its folders as absolute paths.

    An older version saved them relative to the folder in which the run was started, which is known
    where its output_dir was relative, too. Where it is not known, model or data set are left out.
    """
    settings = dict(description["settings"])
    if not is_of_an_older_version(description):
        return settings
    run = local_path(str(settings.get("output_dir"))) / str(settings.get("run_name"))
    parents = [Path(os.path.abspath(folder)).parent, folder.resolve().parent]
    starts = [
        Path(*parent.parts[: -len(run.parts)])
        for parent in parents
        if not run.is_absolute() and parent.parts[-len(run.parts) :] == run.parts
    ]
    for key in [key for key in PLACES if key in settings]:
        place = local_path(str(settings[key]))
        if not place.is_absolute():
            found = [str(start / place) for start in starts if (start / place).is_dir()]
            settings |= {key: with_tilde(found[0])} if found else {}
            if not found:
                del settings[key]
    return settings


def is_of_an_older_version(description: Mapping[str, Any]) -> bool:
    """Whether it was saved before folders were made absolute, and ids compared with SentencePiece's."""
    return "tokenizer" not in description


def _read_manifest(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST_FILE).read_bytes()
    except OSError:
        return None


def resolve_source(ckpt: str | None, config_file: Path, typed: Mapping[str, str]) -> Source:
    """Find the checkpoint, and the settings that go with it.

    A checkpoint of ours knows its own settings (prompt, data set, seed of the split, dtype);
    any other model takes those of ``config_file``. A flag overrides both.

    Args:
        ckpt: None for the best checkpoint of ``config_file``'s run.
    """
    if ckpt is None:
        config = load_config(config_file, typed)
        folder = local_path(config.output_dir) / config.run_name / BEST
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such checkpoint: train first, or name one with --ckpt DIR")
        ckpt = str(folder)
    folder = local_path(ckpt)
    if not _is_ours(folder):
        return Source(ckpt, load_config(config_file, typed))
    manifest = _read_manifest(folder)
    check_whole(folder)
    description = read_description(folder)
    # A setting that is newer than the checkpoint has its value from the file.
    known = {key: value for key, value in description["settings"].items() if key in KEYS}
    known |= {key: value for key, value in saved_settings(folder, description).items() if key in PLACES}
    values = read_settings(config_file)[0] | known | dict(typed)
    config = make_config(values, f"{folder / DESCRIPTION_FILE} and command line")
    print(f"settings: those of {folder / DESCRIPTION_FILE}" + (f", but {', '.join(typed)} as typed" if typed else ""))
    parent = folder.resolve().parent
    run_folder = parent if (parent / METRICS_FILE).is_file() else None
    return Source(str(folder), config, description, run_folder, manifest, frozenset(typed))
