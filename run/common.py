"""What the processes of a job have in common: settings, the folder of the run, and its progress."""

import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from run.checkpoint import set_damaged_aside
from run.config import Config
from run.errors import UserError
from run.manifest import BEST
from run.progress import Progress
from run.setting_types import PLACES


class Ranks(Protocol):
    """The processes of a job (`engine.ranks.Ranks`)."""

    rank: int
    size: int
    is_main: bool

    def broadcast(self, value: Any) -> Any: ...

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any: ...

    def wait(self) -> None: ...


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


def check_same_folder(folder: Path, ranks: Ranks) -> None:
    """Raises UserError on a rank whose ``folder`` is not rank 0's, of which it sees a new file."""
    if ranks.size == 1:
        return
    # Named as `run.files.replace_file` does it, so that what a kill leaves is removed.
    mark = folder / ranks.broadcast(f".seen.{secrets.token_hex(4)}.staged")
    try:
        if ranks.is_main:
            mark.touch()
        ranks.wait()
        if not mark.exists():
            raise UserError(
                f"{folder}: rank {ranks.rank} does not see what rank 0 writes there: choose an "
                "--output_dir on a file system that all machines share"
            )
        ranks.wait()
    finally:
        if ranks.is_main:
            mark.unlink(missing_ok=True)


def go_on_together(folder: Path, start: Path, progress: Progress, ranks: Ranks) -> Progress:
    """The ``progress`` of a run that goes on from ``start``, as rank 0 finds it in ``folder``.

    On a network file system, other machines see later what is new there, such as a limit that one
    of them has found out before all were started again. Damaged checkpoints are set aside.
    """
    ranks.once(set_damaged_aside, folder, start)
    progress.forget_missing_best(folder / BEST)
    return Progress(**ranks.broadcast(asdict(progress)))
