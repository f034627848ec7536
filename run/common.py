"""What the processes of a job must have in common."""

from dataclasses import asdict
from typing import Any

from run.config import Config
from run.setting_types import PLACES


def common_settings(config: Config) -> dict[str, Any]:
    """The settings that all processes of a training must have been given.

    Paths may differ between machines, and only one process logs to W&B.
    """
    own = {*PLACES, "output_dir"}
    return {
        key: value
        for key, value in asdict(config).items()
        if key not in own and not key.startswith("wandb_")
    }
