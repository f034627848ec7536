"""Logs to Weights & Biases. A run never waits long for it, and never fails because of it.

Every number that is sent there is also in ``metrics.jsonl``.
"""

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from run.code_version import code_commit
from run.errors import one_line
from run.paths import hide_home
from run.tracker import NoTracker, RunPath, Tracker, WandbTracker

# How many seconds a run waits for W&B when it starts, unless W&B's own WANDB_INIT_TIMEOUT is set.
INIT_SECONDS = 15
FINISH_SECONDS = 60  # how long a run waits at its end for the last numbers to be uploaded
WANDB_FOLDER = "wandb"  # where W&B keeps its own files, in the folder of the run
YES, NO = ("true", "1", "yes", "on", "y", "t"), ("", "false", "0", "no", "off", "n", "f")


def new_run(project: str) -> RunPath:
    """The path of a new run: a sweep's choice if there is one, and WANDB_RUN_ID if that is set."""
    asked = os.environ.get("WANDB_RUN_ID", "")
    run_id = asked if _is_run_id(asked) else secrets.token_hex(4)
    if not os.environ.get("WANDB_SWEEP_ID"):
        return RunPath(run_id, project)
    return RunPath(
        run_id, os.environ.get("WANDB_PROJECT") or project, os.environ.get("WANDB_ENTITY") or None
    )


def _is_run_id(text: str) -> bool:
    """Whether W&B accepts ``text`` as a run id.

    If a rejected id got into a checkpoint, W&B would be off each time the run is resumed.
    """
    return (
        0 < len(text) <= 128
        and text.isprintable()
        and text == text.strip()
        and not set(text) & set(":;,#?/'")
    )


def saved_run(description: Mapping[str, Any], project: str, project_before: str | None) -> RunPath:
    """The path at which the run of a checkpoint continues.

    Args:
        description: the checkpoint's ``training.json``. Older versions saved only the id.
        project, project_before: the setting now, and when the checkpoint was saved. If they
            differ, the run continues in ``project``.
    """
    run_id = description["wandb_run_id"]
    if project != project_before:
        return RunPath(run_id, project)
    return RunPath(
        run_id, description.get("wandb_project") or project, description.get("wandb_entity")
    )


def start_tracker(
    mode: str | None,
    *,
    run: RunPath,
    name: str,
    folder: Path,
    settings: Mapping[str, Any],
) -> Tracker:
    """Open a W&B run, new or continued.

    Args:
        mode: ``online``, ``offline``, ``disabled``, or None: WANDB_MODE if it is set, else online
            if the user is logged in and offline if not.
        run: where to log, unless a sweep's agent or W&B chooses another run for this process.
        folder: where W&B keeps its own files.
    """
    if mode == "disabled" or _is_disabled():
        return NoTracker()
    _drop_refused_run_id()
    # Where its server does not answer, W&B's reports of its own errors hold up the end by 20 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
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
                f"W&B: not reached ({one_line(error)[:120]}): logging offline, "
                "'wandb sync' uploads it later"
            )
            wandb.teardown()  # otherwise the failed attempt would keep the id in use
            opened = _init(wandb, "offline", run, name, folder, settings)
        if not opened.offline:
            print(f"W&B: {opened.url}")
        tracker = WandbTracker(opened)
        expected = {run.run_id, os.environ.get("WANDB_RUN_ID") or run.run_id}
        if others := " or ".join(sorted(expected - {opened.id})):
            print(one_line(f"W&B: logged as run {opened.id}, not as {others}")[:240])
        _say_ignored("WANDB_PROJECT", "wandb_project", opened.project)
        _say_ignored("WANDB_NAME", "run_name", name)
        _say_ignored("WANDB_DIR", "output_dir", str(folder))
        return tracker
    except Exception as error:  # no error of W&B may end the run
        print(f"W&B: off ({one_line(error)[:120]}); metrics.jsonl has every number")
        return NoTracker()


def _say_ignored(variable: str, setting: str, value: str) -> None:
    """Say that not W&B's own ``variable`` counts but our ``setting``, if they differ."""
    asked = os.environ.get(variable) or value
    if asked != value:
        place = f"the setting {setting} ({value}) takes its place"
        print(one_line(f"W&B: {variable}={asked[:80]} is ignored: {place}"))


def _drop_refused_run_id() -> None:
    """Remove a WANDB_RUN_ID that W&B rejects from the environment.

    W&B would read it from there even though we pass another id.
    """
    asked = os.environ.get("WANDB_RUN_ID")
    if asked is None or _is_run_id(asked):
        return
    del os.environ["WANDB_RUN_ID"]
    if asked:
        print(
            f"W&B: WANDB_RUN_ID={one_line(repr(asked))[:60]} is ignored, since W&B does not accept "
            "it as an id (at most 128 characters, no spaces around them, none of : ; , # ? / ')"
        )


def is_off(mode: str | None) -> bool:
    """Whether `start_tracker` would track nothing in this ``mode``, which it says itself."""
    return (mode or os.environ.get("WANDB_MODE")) == "disabled" or _older_switch().lower() in YES


def _older_switch() -> str:
    """WANDB_DISABLED, which is no longer W&B's own, but which other programs still obey."""
    return os.environ.get("WANDB_DISABLED", "").strip()


def _is_disabled() -> bool:
    """Whether WANDB_DISABLED says so; prints that, or that its value says neither."""
    value = _older_switch()
    if value.lower() in YES:
        print(f"W&B: off, because WANDB_DISABLED={value}; metrics.jsonl has every number")
        return True
    if value.lower() not in NO:
        print(
            f"W&B: WANDB_DISABLED={one_line(value)[:60]} is ignored, since it is neither true "
            "nor false"
        )
    return False


def _resolve_mode(wandb: Any, asked: str | None) -> str | None:
    """``asked``, but offline if nobody is logged in, since W&B would stop and ask for a key."""
    if asked in ("offline", "disabled"):
        return asked
    try:
        # With verify=True it would query the server, and wait for it.
        logged_in = wandb.login(prompt=False, verify=False)
    except Exception as error:  # such as a malformed key
        print(f"W&B: the login failed ({one_line(error)[:80]})")
        logged_in = False
    if logged_in:
        return asked
    print(
        "W&B: not logged in, so logging offline "
        "('wandb login' before the run, or 'wandb sync' after it)"
    )
    return "offline"


def _init(
    wandb: Any,
    mode: str | None,
    run: RunPath,
    name: str,
    folder: Path,
    settings: Mapping[str, Any],
) -> Any:
    logger = logging.getLogger("wandb")
    logger.addFilter(_hide_home)
    opened = wandb.init(
        project=run.project,
        entity=run.entity,
        # Given here, it would replace the one that a run was given in W&B in the meantime.
        name=name if mode == "offline" else "",
        id=run.run_id,
        dir=str(folder.absolute()),
        mode=mode,
        # Whatever opens a run later has no settings, and leaves it those of its training.
        config={**settings, "commit": code_commit()} if settings else None,
        resume="allow",  # offline, too, where it tells 'wandb sync' to resume the run
        settings=wandb.Settings(
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_SECONDS),
            finish_timeout=FINISH_SECONDS,
            silent=True,
            console="off",
            disable_git=True,
            x_disable_meta=True,  # the metadata would contain the command line and local paths
        ),
    )
    for handler in logger.handlers:
        # It would print a traceback if W&B's debug.log can't be written, as on a full disk.
        handler.handleError = lambda _: None
    if mode != "offline" and not opened.resumed:
        opened.name = name
    return opened


def _hide_home(record: logging.LogRecord) -> bool:
    """A filter for W&B's debug.log, which contains its own path."""
    record.msg, record.args = hide_home(record.getMessage()), None
    return True
