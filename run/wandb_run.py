"""Every logged number: into ``metrics.jsonl``, the source of truth, and to Weights & Biases.

W&B is a guest: a run never waits long for it and never dies of it.
"""

import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from run.errors import one_line
from run.paths import hide_home

INIT_SECONDS = 15  # how long a start may wait for W&B to answer


FINISH_SECONDS = 60  # how long an end may wait for the last numbers to be uploaded


@dataclass(frozen=True)
class RunPath:
    """Where W&B has a run.

    Attributes:
        entity: the user or team whose ``project`` it is in; None: whom W&B takes where nothing is said.
    """

    run_id: str
    project: str
    entity: str | None = None


def new_run(project: str) -> RunPath:
    """Where a new run goes: under WANDB_RUN_ID where that is set, and where a sweep's agent wants it."""
    asked = os.environ.get("WANDB_RUN_ID", "")
    run_id = asked if _is_run_id(asked) else secrets.token_hex(4)
    if not os.environ.get("WANDB_SWEEP_ID"):
        return RunPath(run_id, project)
    return RunPath(
        run_id, os.environ.get("WANDB_PROJECT") or project, os.environ.get("WANDB_ENTITY") or None
    )


def _is_run_id(text: str) -> bool:
    """Whether W&B takes it: an id that it refuses, once in a checkpoint, would keep W&B off for ever."""
    return (
        0 < len(text) <= 128
        and text.isprintable()
        and text == text.strip()
        and not set(text) & set(":;,#?/'")
    )


def saved_run(description: Mapping[str, Any], project: str, project_before: str | None) -> RunPath:
    """Where the run of a checkpoint is, or goes to from here on.

    Args:
        description: the checkpoint's ``training.json``; those of before W&B's own answer was kept have only the id.
        project, project_before: the setting now, and when the checkpoint was written; where they differ, the
            one that is asked for now counts.
    """
    run_id = description["wandb_run_id"]
    if project != project_before:
        return RunPath(run_id, project)
    return RunPath(
        run_id, description.get("wandb_project") or project, description.get("wandb_entity")
    )


class Tracker(Protocol):
    """What the scripts ask of W&B; `NoTracker` where there is none.

    Attributes:
        run: where W&B has put the run; None where it has not.
    """

    run: RunPath | None

    def log(self, numbers: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    run: RunPath | None = None

    def log(self, numbers: Mapping[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """A W&B run whose x axis is our ``step``, so that repeated steps of a resumed run are not dropped."""

    def __init__(self, run: Any):
        self._run = run
        self.online = not run.offline
        self.run: RunPath | None = RunPath(run.id, run.project, run.entity or None)
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
            print(
                f"W&B: did not finish cleanly ({one_line(error)[:120]}); metrics.jsonl has every number"
            )


def start_tracker(
    mode: str | None, *, run: RunPath, name: str, folder: Path, settings: Mapping[str, Any]
) -> Tracker:
    """Open a W&B run, new or continued: ``run``, unless a sweep's agent or W&B has another one for this process.

    Args:
        mode: ``online``, ``offline``, ``disabled``, or None: WANDB_MODE if it is set, else online
            where the user is logged in and offline where not.
        folder: where W&B keeps its own files.
    """
    if mode == "disabled" or _is_disabled():
        return NoTracker()
    _heed_run_id()
    try:
        import wandb

        resolved = _resolve_mode(wandb, mode or os.environ.get("WANDB_MODE"))
        if resolved == "disabled":
            return NoTracker()
        try:
            opened = _init(wandb, resolved, run, name, folder, settings)
        except Exception as error:  # refused, unreachable, too slow
            if resolved == "offline":
                raise
            print(
                f"W&B: not reached ({one_line(error)[:120]}): logging offline, 'wandb sync' uploads it later"
            )
            wandb.teardown()  # else the id would count as in use by the attempt that failed
            opened = _init(wandb, "offline", run, name, folder, settings)
        if not opened.offline:
            print(f"W&B: {opened.url}")
        tracker = WandbTracker(opened)
        if others := {run.run_id, os.environ.get("WANDB_RUN_ID") or run.run_id} - {opened.id}:
            print(
                one_line(f"W&B: logged as run {opened.id}, not as {' or '.join(sorted(others))}")[
                    :240
                ]
            )
        return tracker
    except Exception as error:  # as above
        print(f"W&B: off ({one_line(error)[:120]}); metrics.jsonl has every number")
        return NoTracker()


def _heed_run_id() -> None:
    """Take a WANDB_RUN_ID that W&B refuses out of the environment: W&B reads it there, whatever id it is given."""
    asked = os.environ.get("WANDB_RUN_ID")
    if asked is None or _is_run_id(asked):
        return
    del os.environ["WANDB_RUN_ID"]
    if asked:
        print(
            f"W&B: WANDB_RUN_ID={one_line(repr(asked))[:60]} is no id that W&B takes: not heeded (at most 128 letters "
            "without spaces around them, none of : ; , # ? / ')"
        )


def _is_disabled() -> bool:
    """Whether WANDB_DISABLED says so: an older switch of W&B's, which other programs still heed."""
    value = os.environ.get("WANDB_DISABLED", "").strip()
    if value.lower() in ("true", "1", "yes", "on", "y", "t"):
        print(f"W&B: off, as WANDB_DISABLED={value} says; metrics.jsonl has every number")
        return True
    if value.lower() not in ("", "false", "0", "no", "off", "n", "f"):
        print(f"W&B: WANDB_DISABLED={one_line(value)[:60]} is neither true nor false: not heeded")
    return False


def _resolve_mode(wandb: Any, asked: str | None) -> str | None:
    """``asked``, but offline where nobody is logged in: W&B would stop and ask for a key in the terminal."""
    if asked in ("offline", "disabled"):
        return asked
    try:
        logged_in = wandb.login(
            prompt=False, verify=False
        )  # verify would ask the server, and wait for it
    except Exception as error:  # such as a key of the wrong form
        print(f"W&B: the login is refused ({one_line(error)[:80]})")
        logged_in = False
    if logged_in:
        return asked
    print(
        "W&B: not logged in, so logging offline ('wandb login' before the run, or 'wandb sync' after it)"
    )
    return "offline"


def _init(
    wandb: Any, mode: str | None, run: RunPath, name: str, folder: Path, settings: Mapping[str, Any]
) -> Any:
    logging.getLogger("wandb").addFilter(_hide_home)
    return wandb.init(
        project=run.project,
        entity=run.entity,
        name=name,
        id=run.run_id,
        dir=str(folder.absolute()),
        mode=mode,
        config=dict(settings),
        resume=None
        if mode == "offline"
        else "allow",  # offline knows no resuming: 'wandb sync' joins by id
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
    record.msg, record.args = hide_home(record.getMessage()), None
    return True
