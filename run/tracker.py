"""What the scripts tell W&B, of which an object that does nothing is told the same."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from run.errors import one_line
from run.shell import command_line, path_word

# How many seconds a run waits at its end for the upload of its best checkpoint: 13 GB at 11 MB/s.
# Less than the half hour for which the other processes of a job wait.
UPLOAD_SECONDS = 20 * 60


@dataclass(frozen=True)
class RunPath:
    """Where a run is in W&B.

    Attributes:
        entity: the user or team that owns ``project``; None: W&B's default.
    """

    run_id: str
    project: str
    entity: str | None = None


class Tracker(Protocol):
    """The operations that the scripts need from W&B; `NoTracker` does nothing.

    Attributes:
        run: the run's actual path in W&B; None if there is none.
    """

    run: RunPath | None

    def go_on_from(self, lines: Iterable[Mapping[str, Any]]) -> None: ...

    def log(self, numbers: Mapping[str, float]) -> None: ...

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log ``rows``, which all have the same keys, as a table."""

    def upload(self, folder: Path) -> None:
        """Keep a copy of a checkpoint's ``folder`` as an artifact, unless W&B has it already."""

    def finish(self, exit_code: int = 0) -> None:
        """End the run, which W&B shows as failed if ``exit_code`` is not 0."""


class NoTracker:
    run: RunPath | None = None

    def go_on_from(self, lines: Iterable[Mapping[str, Any]]) -> None:
        pass

    def log(self, numbers: Mapping[str, float]) -> None:
        pass

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def upload(self, folder: Path) -> None:
        pass

    def finish(self, exit_code: int = 0) -> None:
        pass


def summary_of(name: str) -> str | None:
    """Which value of a number stands for a run in W&B: ``min``, ``max``, or None for the last."""
    room, _, kind = name.partition("/")
    if room == "val" and kind.startswith(("loss", "perplexity")):
        return "min"
    # With a higher share, both ends of its interval are higher, too.
    is_share = room == "eval" and "errors_" not in kind
    return "max" if is_share or name == "val/exact_match" else None


def artifact_name(folder: Path) -> str:
    return f"{folder.parent.name[:123]}-{folder.name}"  # W&B's have at most 128 characters


def upload_command(run: RunPath, folder: Path) -> str:
    """The command that uploads the artifact of `WandbTracker.upload`, in a run of its own."""
    place = "/".join(filter(None, (run.entity, run.project, artifact_name(folder))))
    # Otherwise W&B would copy the folder twice before it uploads it.
    how = "--policy", "immutable", "--skip_cache"
    # W&B notes the path as it is typed, in which no home is to be named.
    what = "--type", "model", "--alias", "best", "--name", place, path_word(relative(folder))
    return command_line("-m", "wandb", "artifact", "put", *how, *what)


def relative(path: Path) -> Path:
    """``path`` from the current folder."""
    return Path(os.path.relpath(path))


class WandbTracker:
    """A W&B run whose x axis is our ``step``.

    W&B's own step axis drops repeated steps, such as a resumed run's; a custom axis keeps them.
    """

    def __init__(self, run: Any):
        self._run = run
        self.online = not run.offline
        self.run: RunPath | None = RunPath(run.id, run.project, run.entity or None)
        self._defined: set[str] = set()
        self._extremes: dict[str, float] = {}
        self._said: set[str] = set()
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def go_on_from(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Begin with the summary of ``lines``, which earlier processes of the run have logged.

        W&B itself knows it only online.
        """
        summary: dict[str, Any] = {}
        for line in lines:
            summary |= line
            self._find_extremes(line)
        summary |= {name: {summary_of(name): value} for name, value in self._extremes.items()}
        try:
            self._run.summary.update(summary)
        except Exception as error:  # as in `log`
            self._say("the summary of what was logged before is missing", error)

    def log(self, numbers: Mapping[str, float]) -> None:
        try:
            found = self._find_extremes(numbers)
            for name in found.keys() - self._defined:
                # By its own name, since W&B lets one of several patterns win by chance.
                self._run.define_metric(name, step_metric="step", summary=summary_of(name))
                self._defined.add(name)
            self._run.log(dict(numbers))
            # W&B itself knows only what this process has logged, and takes a NaN for the lowest.
            summary = {name: {summary_of(name): value} for name, value in found.items()}
            if summary:
                self._run.summary.update(summary)
        except Exception as error:  # no error of W&B may end the run
            self._say("a line was not logged", error, "metrics.jsonl has it, and any later ones")

    def _find_extremes(self, numbers: Mapping[str, Any]) -> dict[str, float]:
        """The lowest or highest of each of ``numbers`` that is summed up so, in the whole run."""
        found: dict[str, float] = {}
        for name, value in numbers.items():
            choose = {"min": min, "max": max}.get(summary_of(name))
            if choose and isinstance(value, int | float):
                known = [v for v in (self._extremes.get(name, value), value) if not math.isnan(v)]
                found[name] = choose(known, default=value)
        self._extremes |= found
        return found

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            import wandb

            columns = list(rows[0])
            cells = [[row[column] for column in columns] for row in rows]
            table = wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
            # Bound by us, it is a file of the run. Otherwise W&B would make it an artifact as well:
            # it would ask its server, wait for the answer, and note a path in the user's home.
            table.bind_to_run(self._run, name, step)
            self._run.log({"step": step, name: table})
        except Exception as error:  # as in `log`
            self._say(f"the table {name} was not logged", error)

    def upload(self, folder: Path) -> None:
        name, later = artifact_name(folder), upload_command(self.run, folder)
        if not self.online:
            print(f"W&B: offline, so {one_line(folder)} stays here; to upload it later: {later}")
            return
        try:
            import wandb

            files = sorted(path for path in folder.rglob("*") if path.is_file())
            size = sum(file.stat().st_size for file in files) / 1e9
            print(f"W&B: uploading {one_line(folder)} ({size:.2f} GB) as artifact {name}")
            artifact = wandb.Artifact(name, type="model")
            for file in files:
                inside = str(file.relative_to(folder))
                # As in `upload_command`.
                artifact.add_file(str(relative(file)), inside, policy="immutable", skip_cache=True)
            logged = self._run.log_artifact(artifact, aliases=["best"])
            logged.wait(UPLOAD_SECONDS)  # otherwise an upload that fails later would say nothing
        except Exception as error:  # as in `log`
            self._say(f"{one_line(folder)} was not uploaded", error, f"to upload it later: {later}")

    def finish(self, exit_code: int = 0) -> None:
        try:
            self._run.finish(exit_code)
        except Exception as error:  # as in `log`
            self._say("did not finish cleanly", error, "metrics.jsonl has every number")
            with suppress(Exception):  # or W&B would fail once more at exit, with a traceback
                import wandb

                wandb.teardown()

    def _say(self, what: str, error: Exception, rest: str = "") -> None:
        """Print what failed, but once, since each line after it may fail for the same reason."""
        why = f"{type(error).__name__}: {one_line(error)[:120]}"  # some have no text
        line = "; ".join(filter(None, (f"W&B: {what} ({why})", rest)))
        if line not in self._said:
            self._said.add(line)
            print(line)
