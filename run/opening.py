"""The checkpoint that a run would go on from, found without changing anything in its folder."""

from pathlib import Path

from run.checkpoint import first_intact, staged_beside
from run.manifest import FINISHED_FILE, LAST, PREVIOUS, fault_of


def newest_as_it_is(run_folder: Path) -> Path | None:
    """What `run.checkpoint.newest_intact` finds once it has completed interrupted saves.

    Raises:
        UserError: all that exist are damaged.
    """
    last = run_folder / LAST
    if (run_folder / FINISHED_FILE).exists() and fault_of(last, read=False):
        return None
    staged = staged_beside(last)  # complete, if only its renaming was interrupted
    is_complete = staged.exists() and fault_of(staged, read=False) is None
    return first_intact(*[staged] * is_complete, last, run_folder / PREVIOUS)
