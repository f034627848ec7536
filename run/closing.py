"""What training says at its end: where its results are, and what to run next."""

from collections.abc import Callable
from pathlib import Path

from run.errors import UserError, one_line
from run.manifest import BEST, FITTING_FILE, LAST, METRICS_FILE
from run.retention import remove_state
from run.shell import evaluation_command
from run.training_json import read_description


def finish(
    folder: Path, keep_state: bool, best_loss: float, report: Callable[[Path], None]
) -> None:
    """End a run: remove its state unless ``keep_state``, and print the next command.

    Args:
        report: writes the report of the run in ``folder``, and says where it is.
    """
    (folder / FITTING_FILE).unlink(missing_ok=True)
    if not keep_state:
        try:
            remove_state(folder, read_description(folder / LAST))
        except UserError as error:  # which does not make the run incomplete
            print(error)
    print(f"done: best validation loss {best_loss:.6f}")
    print(f"  best checkpoint: {one_line(folder / BEST)}")
    print(f"  every number:    {one_line(folder / METRICS_FILE)}")
    report(folder)
    print(f"next: {evaluation_command(folder / BEST)}")
