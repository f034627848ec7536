"""Every logged number: into ``metrics.jsonl``, the source of truth, and to Weights & Biases.

W&B is a guest: a run never waits long for it and never dies of it.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from checkpoint import METRICS_FILE, replace_file
from errors import one_line

INIT_SECONDS = 15  # how long a start may wait for W&B to answer
FINISH_SECONDS = 60  # how long an end may wait for the last numbers to be uploaded


class Tracker(Protocol):
    """What the scripts ask of W&B; `NoTracker` where there is none."""

    def log(self, numbers: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    def log(self, numbers: Mapping[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """A W&B run whose x axis is our ``step``, so that repeated steps of a resumed run are not dropped."""

    def __init__(self, run: Any):
        self._run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, numbers: Mapping[str, float]) -> None:
        try:
            self._run.log(dict(numbers))
        except Exception as error:  # whatever it is, it must not cost the run
            print(f"W&B: a line was not logged ({one_line(error)[:120]}); metrics.jsonl has it")

    def finish(self) -> None:
        try:
            self._run.finish()
        except Exception as error:  # as above
            print(f"W&B: did not finish cleanly ({one_line(error)[:120]}); metrics.jsonl has every number")


def start_tracker(
    mode: str | None, *, project: str, name: str, run_id: str, folder: Path, settings: Mapping[str, Any]
) -> Tracker:
    """Open the W&B run ``run_id``, new or continued.

    Args:
        mode: ``online``, ``offline``, ``disabled``, or None: WANDB_MODE if it is set, else online
            where the user is logged in and offline where not.
        folder: where W&B keeps its own files.
    """
    if mode == "disabled":
        return NoTracker()
    try:
        import wandb

        resolved = _resolve_mode(wandb, mode or os.environ.get("WANDB_MODE"))
        if resolved == "disabled":
            return NoTracker()
        try:
            run = _init(wandb, resolved, project, name, run_id, folder, settings)
        except Exception as error:  # refused, unreachable, too slow
            if resolved == "offline":
                raise
            print(f"W&B: not reached ({one_line(error)[:120]}): logging offline, 'wandb sync' uploads it later")
            wandb.teardown()  # else the id would count as in use by the attempt that failed
            run = _init(wandb, "offline", project, name, run_id, folder, settings)
        if not run.offline:
            print(f"W&B: {run.url}")
        return WandbTracker(run)
    except Exception as error:  # as above
        print(f"W&B: off ({one_line(error)[:120]}); metrics.jsonl has every number")
        return NoTracker()


def _resolve_mode(wandb: Any, asked: str | None) -> str | None:
    """``asked``, but offline where nobody is logged in: W&B would stop and ask for a key in the terminal."""
    if asked in ("offline", "disabled"):
        return asked
    try:
        logged_in = wandb.login(prompt=False, verify=False)  # verify would ask the server, and wait for it
    except Exception as error:  # such as a key of the wrong form
        print(f"W&B: the login is refused ({one_line(error)[:80]})")
        logged_in = False
    if logged_in:
        return asked
    print("W&B: not logged in, so logging offline ('wandb login' before the run, or 'wandb sync' after it)")
    return "offline"


def _init(
    wandb: Any, mode: str | None, project: str, name: str, run_id: str, folder: Path, settings: Mapping[str, Any]
) -> Any:
    logging.getLogger("wandb").addFilter(_hide_home)
    return wandb.init(
        project=project,
        name=name,
        id=run_id,
        dir=os.path.relpath(folder),  # it goes into W&B's logs, which need not say where on this machine that is
        mode=mode,
        config=dict(settings),
        resume=None if mode == "offline" else "allow",  # offline knows no resuming: 'wandb sync' joins by id
        settings=wandb.Settings(
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            silent=True,
            console="off",
            disable_git=True,
            x_disable_meta=True,  # the command line, and paths of this machine
        ),
    )


def _hide_home(record: logging.LogRecord) -> bool:
    """W&B's debug.log names its own place."""
    record.msg, record.args = record.getMessage().replace(os.path.expanduser("~"), "~"), None
    return True


class MetricsLog:
    """``metrics.jsonl`` and the tracker together."""

    def __init__(self, folder: Path, tracker: Tracker, resume_step: float = math.inf):
        """Open the log of a run; a resumed one stands at optimizer step ``resume_step``.

        Lines of later steps, from before a kill, are dropped: the resumed run writes them again.
        """
        self._tracker = tracker
        file = folder / METRICS_FILE
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if _step_of(line) <= resume_step]
        if len(kept) < len(lines):
            replace_file(file, b"".join(kept))
        self._file = file.open("a", encoding="utf-8")

    def write(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        """Log ``numbers`` at ``step``; ``epoch`` counts passes over the training rows, with fractions."""
        line = {"step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **numbers}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint that is on the disk has all lines before it there too
        self._tracker.log(line)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._tracker.finish()


def _step_of(line: bytes) -> float:
    """The step of a line; NaN, below nothing, where a kill cut it in the middle."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.nan
    except (ValueError, KeyError, TypeError):
        return math.nan
