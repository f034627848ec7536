"""The trials of a W&B sweep, each a run in a folder of its own."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from run.files import say_once

if TYPE_CHECKING:
    from run.config import Config, SettingsFiles


def with_trial(files: "SettingsFiles", typed: Mapping[str, str]) -> "Config":
    """The settings of a run. In a trial of a sweep, its run_name ends in the trial's id.

    Otherwise all trials would share one folder, and the second be refused for its other settings. A
    trial that is started again has the same id, and is resumed. A run_name from the command line
    stays as it is.

    Args:
        typed: the settings from the command line.
    """
    trial = os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")
    if not trial or "run_name" in typed:
        return files.with_flags(typed)
    name = f"{files.with_flags(typed).run_name}-{trial}"
    config = files.with_flags({**typed, "run_name": name})
    say_once("sweep", f"sweep: this trial is the run {name}")
    return config
