"""A run's folder: claims it, finds the checkpoint to resume from, and rejects changed settings."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run.checkpoint import newest_intact
from run.common import Ranks, check_same_folder
from run.config import KEYS, Config, idle_settings
from run.errors import OutOfMemory, UserError, counted, first_few, one_line
from run.files import replace_file
from run.locks import check_free, locked
from run.manifest import (
    BEST,
    FINISHED_FILE,
    FITTING_FILE,
    LAST,
    PREVIOUS,
    STATE_FILES,
    check_no_links,
    fault_of,
)
from run.method import FULL
from run.opening import newest_as_it_is
from run.paths import is_same_folder, local_path
from run.places import anchored, has_moved
from run.progress import Progress, fitting_budget
from run.retention import cure_without_best, late_ends
from run.setting_types import PLACES, quoted
from run.training_json import is_of_an_older_version, read_description, saved_settings

if TYPE_CHECKING:
    import torch

# Settings that may change when a run is resumed, since none of them changes a step's gradient.
FREE_SETTINGS = frozenset(
    {
        "output_dir",
        "run_name",
        "micro_batch_tokens",
        "gradient_checkpointing",
        "compile",
        "shard_over",
        "reshard_after_forward",
        "reduce_gradients",
        "log_every",
        "checkpoint_steps",
        "keep_state",
        "resume",
        "max_new_tokens",
        "decode_slots",
        "calculator",
        *(key for key in KEYS if key.startswith("wandb_")),
    }
)

# What was so before there was a setting for it.
OLDER = {
    "method": FULL,
    "optimizer": "adamw",
    "mask_rate": 0.0,
    "fp8": False,
    "best_by": "val_loss",
}

HELD = "another process is training this run: wait for it, or choose another --run_name"
LOCK_SECONDS = 1.0  # how long to wait for the lock, since an evaluation holds it only briefly


@contextmanager
def claimed(folder: Path, resume: str) -> Iterator[Path | None]:
    """Make or open the run's folder, and keep other processes out of it inside this context.

    Yields:
        The checkpoint to resume from, or None for a new run.

    Raises:
        UserError: the folder is in use, or can't be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_no_links(folder)
            stack.enter_context(locked(folder, f"{folder}: {HELD}", patience=LOCK_SECONDS))
        except OSError as error:
            raise _not_writable(folder, error) from None
        if (start := start_in(folder, resume)) is None:
            _check_writable(folder)
        # An interrupted removal of the state left this file, but the run can still be resumed.
        (folder / FINISHED_FILE).unlink(missing_ok=True)
        yield start


@contextmanager
def claimed_by_all(
    folder: Path, resume: str, ranks: Ranks, micro_batch_tokens: int | None
) -> Iterator[Path | None]:
    """`claimed` by rank 0 for all processes of a job. A budget that did not fit is remembered.

    Args:
        micro_batch_tokens: the setting, for which the budget that fits is remembered.

    Raises:
        UserError: as `claimed`; or a rank does not see the folder.
    """
    with claimed(folder, resume) if ranks.is_main else nullcontext() as found:
        start = ranks.broadcast(found and str(found))
        check_same_folder(folder, ranks)
        try:
            yield start and Path(start)
        except OutOfMemory as error:
            content = {"micro_batch_tokens": micro_batch_tokens, "fitting": error.fitting}
            replace_file(folder / FITTING_FILE, json.dumps(content) + "\n")
            raise


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: can't be written ({error.strerror}): choose another --output_dir")


def start_in(
    folder: Path, resume: str, newest: Callable[[Path], Path | None] = newest_intact
) -> Path | None:
    """The checkpoint in a run's folder to resume from, by ``newest``; None for a new run.

    Raises:
        UserError: the folder is in use.
    """
    if resume == "auto" and (start := newest(folder)):
        return start
    if (folder / FINISHED_FILE).exists():
        if fault := fault_of(folder / BEST):
            raise UserError(
                f"{folder}: this run is finished, and its {BEST} is damaged or gone ({fault}): "
                f"{cure_without_best(folder)}"
            )
        raise UserError(
            f"{folder}: this run is finished, and its {LAST} and {PREVIOUS} were removed "
            "(keep_state false): evaluate it, or train another under a new --run_name"
        )
    in_use = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if in_use:
        cure = "--resume auto resumes from its last; or " if LAST in in_use else ""
        raise UserError(
            f"{folder}: is in use ({', '.join(in_use[:4])}): {cure}choose another --run_name"
        )
    return None


def _check_writable(folder: Path) -> None:
    try:
        replace_file(folder / ".write_test", "")
        (folder / ".write_test").unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from None


def read_state(folder: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a checkpoint other than its weights (see `engine.state.pack_state`)."""
    from safetensors.torch import load_file

    files = sorted(folder.glob(STATE_FILES))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_same_run(folder: Path, settings: Mapping[str, Any], data_sha256: str) -> None:
    """Check that settings and data still match the run in ``folder``; print permitted changes.

    Raises:
        UserError: a setting that must not change has changed, or the training rows have.
    """
    description = read_description(folder)
    before = OLDER | description["settings"] | saved_settings(folder, description)
    # The data set is identified by the hash of its rows.
    free = FREE_SETTINGS | {"dataset"} | idle_settings(settings).keys()
    warmups = settings["warmup_ratio"], settings["mask_rate"] * settings["mask_warmup_ratio"]
    if settings["lr_schedule"] == "constant" and not any(warmups):
        free |= {"epochs"}  # since no rate depends on the number of steps
    # The weights of an adapter's base were compared already (`run.model_source.find_start`).
    if "base" in description or has_moved(str(before.get("model")), settings["model"]):
        free |= {"model"}
    is_older = is_of_an_older_version(description)
    differences = {
        key: f"{key} was {quoted(before[key])} and is {quoted(settings[key])}"
        for key in KEYS
        if key in before
        and before[key] != settings[key]
        and not (key in PLACES and is_same_folder(str(before[key]), settings[key], is_older))
    }
    changed = [text for key, text in differences.items() if key not in free]
    if description["data"].get("train_sha256") != data_sha256:
        changed.append("the rows of the data set are not the same")
    if changed:
        raise UserError(
            f"{folder}: cannot resume with these changes: {'; '.join(changed)}: restore the old "
            "values, or start again under another --run_name"
        )
    if missing := [key for key in KEYS if key not in before and key not in free]:
        raise UserError(
            f"{folder}: cannot resume, since it was saved before there was {first_few(missing)}: "
            "add what was so then to OLDER in run/folder.py, or start again under another "
            "--run_name"
        )
    if differences:
        print(f"resuming: {'; '.join(differences.values())}")


def check_unfinished(step: int, total_steps: int, run_folder: Path) -> None:
    if step < total_steps:
        return
    finished = f"{run_folder}: this run is finished ({counted(total_steps, 'step')})"
    if fault := fault_of(run_folder / BEST):
        raise UserError(
            f"{finished}, and its {BEST} is damaged or gone ({fault}): "
            f"{cure_without_best(run_folder)}"
        )
    raise UserError(f"{finished}: evaluate it, or train another under a new --run_name")


def find_opening(config: Config, data_sha256: str, steps: int) -> Path | None:
    """The checkpoint that training would resume from; None for a new run. Changes nothing.

    Args:
        data_sha256: of the training rows.
        steps: of the whole run.

    Raises:
        UserError: training would be refused, for what is in the folder, settings or rows.
    """
    folder = local_path(config.output_dir) / config.run_name
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{folder}: {place} can't be written: choose another --output_dir")
    if place != folder:
        return None
    check_free(folder, f"{folder}: {HELD}", patience=LOCK_SECONDS)
    if (resume_from := start_in(folder, config.resume, newest_as_it_is)) is None:
        return None
    check_same_run(resume_from, asdict(anchored(config, resume_from)), data_sha256)
    if ends := late_ends(resume_from, steps, asdict(config)):
        raise UserError(
            f"{folder}: this run is finished ({counted(steps, 'step')}): the same without "
            f"--preflight only {' and '.join(ends)}"
        )
    check_unfinished(read_description(resume_from)["step"], steps, folder)
    return resume_from


def restore(
    folder: Path,
    unpack: Callable[..., Mapping[str, Any]],
    steps: int,
    setting: int | None,
    planned: int,
) -> Progress:
    """Restore the state in ``folder``, for a run of ``steps`` optimizer steps.

    Args:
        unpack: `engine.state.unpack_state` for the optimizer.
        setting, planned: see `run.progress.fitting_budget`.

    Raises:
        UserError: the state is damaged, or does not fit into memory, the device failed, or the
            run is finished.
    """
    saved = read_description(folder)
    try:
        progress = Progress(**unpack(partial(read_state, folder), saved["state"], folder=folder))
    except UserError:  # about the device, not about the folder
        raise
    except Exception as error:  # safetensors and torch raise many types
        raise UserError(
            f"{folder}: is damaged, or of another version of this program "
            f"({one_line(error)[:160]}): restore it from a copy, or start again under another "
            "--run_name"
        ) from None
    check_unfinished(progress.step, steps, folder.parent)
    progress.fitting = fitting_budget(folder.parent, setting, planned, progress.fitting)
    print(f"resuming: {folder} at step {progress.step} of {steps}")
    return progress
