"""Removes checkpoints that are no longer needed, and checks the disk space for the others."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from run.checkpoint import remove_remains, take_away
from run.errors import UserError, one_line
from run.files import gigabytes, replace_file, sync
from run.manifest import BEST, FINISHED_FILE, LAST, PREVIOUS, fault_of
from run.shell import evaluation_command
from run.training_json import read_description


def remove_state(run_folder: Path, description: Mapping[str, Any]) -> None:
    """Remove ``last`` and ``previous`` of a finished run.

    If this is interrupted, the next start completes it.

    Args:
        description: the final ``training.json``; ``finished.json`` keeps all of it but the state.

    Raises:
        UserError: ``best`` is not intact, so nothing was removed; or the removal failed.
    """
    best, state = run_folder / BEST, [run_folder / PREVIOUS, run_folder / LAST]
    if fault := fault_of(best):
        raise UserError(
            f"{best}: is damaged or gone ({fault}): {LAST} and {PREVIOUS} are not removed "
            f"(keep_state false): {cure_without_best(run_folder)}"
        )
    try:
        # Written first, since a run with neither this nor last looks as if it had never saved.
        content = {key: value for key, value in description.items() if key != "state"}
        replace_file(run_folder / FINISHED_FILE, json.dumps(content, indent=2) + "\n")
        for folder in state:
            if folder.exists():
                take_away(folder)
        sync(run_folder)
    except OSError as error:
        raise UserError(
            f"{run_folder}: {LAST} and {PREVIOUS} can't be removed ({one_line(error)[:160]})"
        ) from error
    remove_remains(run_folder / LAST)
    print(f"removed: {state[1]} and {state[0]}, since {best} is intact (keep_state false)")


def late_ends(checkpoint: Path, steps: int, settings: Mapping[str, Any]) -> list[str]:
    """What training does with the run of ``checkpoint`` if its ``steps`` are done already.

    Raises:
        UserError: more than these are done, so there are fewer epochs than before.
    """
    if (done := read_description(checkpoint)["step"]) > steps:
        fault = f"{checkpoint}: is at step {done} already, over the {steps} of epochs"
        raise UserError(f"{fault} {settings['epochs']}: set as many epochs as before, or more")
    if done < steps:
        return []
    ends = {
        f"uploads its {BEST} (wandb_artifact true)": settings["wandb_artifact"],
        f"removes its {LAST} and {PREVIOUS} (keep_state false)": not settings["keep_state"],
    }
    return [end for end, is_wanted in ends.items() if is_wanted]


def cure_without_best(run_folder: Path) -> str:
    """What the user can do about a finished run whose ``best`` is not intact."""
    other = (
        evaluation_command(run_folder / LAST)
        if (run_folder / LAST).exists()
        else "train under a new --run_name"
    )
    return f"restore {BEST} from a copy, or {other}"


def disk_space(run_folder: Path, weights: int, state: int) -> tuple[int, int]:
    """How many bytes the checkpoints of a run need, and how many are available for them.

    Args:
        run_folder: need not exist yet.
        weights, state: their sizes in bytes. ``best`` has only the weights. ``last``, ``previous``
            and the one being written, which exists alongside them, have both.
    """
    needed = weights + 3 * (weights + state)
    present = sum(
        file.stat().st_size
        for name in (BEST, LAST, PREVIOUS)
        for file in (run_folder / name).rglob("*")
        if file.is_file()
    )
    disk = next(place for place in (run_folder, *run_folder.absolute().parents) if place.exists())
    return needed, shutil.disk_usage(disk).free + present


def check_disk_space(run_folder: Path, weights: int, state: int) -> None:
    """Raises UserError if the checkpoints of a run do not fit on the disk; see `disk_space`."""
    needed, available = disk_space(run_folder, weights, state)
    if needed > available:
        raise UserError(
            f"{run_folder}: its checkpoints need {gigabytes(needed)} (best, last, previous, and "
            f"one being written), and {gigabytes(available)} are available: "
            "make room, or start in another --output_dir"
        )
