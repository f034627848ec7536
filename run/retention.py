"""Which checkpoints are kept, and the disk space that they need."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from run.checkpoint import remove_remains, take_away, wait_for_removals
from run.errors import UserError, one_line
from run.files import replace_file, sync
from run.manifest import BEST, FINISHED_FILE, LAST, PREVIOUS, fault_of


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
                take_away(folder)
        sync(run_folder)
    except OSError as error:
        raise UserError(
            f"{run_folder}: {LAST} and {PREVIOUS} can't be removed ({one_line(error)[:160]})"
        ) from error
    remove_remains(run_folder / LAST)
    print(f"removed: {state[1]} and {state[0]}, since {best} is whole (keep_state false)")


def cure_without_best(run_folder: Path) -> str:
    """What can be done with a finished run whose ``best`` is not whole."""
    other = (
        f"evaluate.py --ckpt {run_folder / LAST}"
        if (run_folder / LAST).exists()
        else "train under a new --run_name"
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
