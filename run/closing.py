"""The end of training: what it says, removes and uploads, also if a kill came before."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from run.errors import UserError, one_line
from run.manifest import BEST, FITTING_FILE, LAST, METRICS_FILE, fault_of
from run.retention import cure_without_best, remove_state
from run.shell import evaluation_command
from run.tracker import upload_command
from run.training_json import read_description
from run.wandb_run import saved_run, start_tracker


def finish(folder: Path, keep_state: bool, best: str, report: Callable[[Path], None]) -> None:
    """End a run: remove its state unless ``keep_state``, and print the next command.

    Args:
        best: `run.progress.Progress.best`.
        report: writes the report of the run in ``folder``, and says where it is.
    """
    (folder / FITTING_FILE).unlink(missing_ok=True)
    if not keep_state:
        try:
            remove_state(folder, read_description(folder / LAST))
        except UserError as error:  # which does not make the run incomplete
            print(error)
    print(f"done: {best}")
    print(f"  best checkpoint: {one_line(folder / BEST)}")
    print(f"  every number:    {one_line(folder / METRICS_FILE)}")
    report(folder)
    print(f"next: {evaluation_command(folder / BEST)}")


def finish_late(
    folder: Path, checkpoint: Path, settings: Mapping[str, Any], report: Callable[[Path], None]
) -> None:
    """Complete the end of a run that may have been killed after its last save.

    This can be repeated: W&B does nothing if it has the artifact already.

    Args:
        checkpoint: the last one.
        report: as in `finish`.

    Raises:
        UserError: ``best`` is not intact, so nothing was uploaded or removed.
    """
    description = read_description(checkpoint)
    if settings["wandb_artifact"]:
        upload_late(folder, description, settings)
    (folder / FITTING_FILE).unlink(missing_ok=True)
    if not settings["keep_state"]:
        remove_state(folder, description)
    report(folder)
    print(f"{one_line(folder)}: this run is finished; next: {evaluation_command(folder / BEST)}")


def upload_late(folder: Path, description: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Upload ``best`` in the run's name, as training does at its end."""
    best = folder / BEST
    if fault := fault_of(best):
        raise UserError(
            f"{best}: is damaged or gone ({fault}), so it is not uploaded (wandb_artifact true): "
            f"{cure_without_best(folder)}"
        )
    project = settings["wandb_project"]
    run = saved_run(description, project, description["settings"].get("wandb_project"))
    name, mode = settings["run_name"], settings["wandb_mode"]
    tracker = start_tracker(mode, run=run, name=name, folder=folder, settings={})
    if tracker.run is None:
        print(
            "wandb_artifact: best is not uploaded, since W&B is off; to upload it later: "
            f"{upload_command(run, best)}"
        )
    tracker.upload(best)
    tracker.finish()
