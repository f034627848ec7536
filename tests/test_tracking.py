"""metrics.jsonl is the source of truth; W&B neither delays a run nor ends it."""

import atexit
import errno
import json
import logging
import math
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Killed, flags, flip_a_byte, kill, processes, step_that

import evaluate
import train
from engine.measure import Measurement
from run import evaluation, locks, metrics_log, progress, tracker, wandb_run
from run.config import CONFIG_FILE, load_config
from run.errors import NotFiniteError
from run.locks import is_free, locked
from run.manifest import FITTING_FILE
from run.metrics_file import read_metrics
from run.progress import Progress, Speed
from run.run_log import RunLog, open_log
from run.shell import evaluation_command

AGENTS = {
    "WANDB_SWEEP_ID": "s1",
    "WANDB_RUN_ID": "agent",
    "WANDB_PROJECT": "sweeps",
    "WANDB_ENTITY": "team",
}


class FakeRun:
    """Remembers what a run is told; ``fail`` makes every call raise."""

    offline = False
    url = "https://wandb.example/run"

    def __init__(
        self, fail: bool = False, run_id: str = "fake", project: str = "p", entity: str = ""
    ):
        self.fail, self.lines, self.defined, self.finished = fail, [], [], False
        self.id, self.project, self.entity = run_id, project, entity
        self.tables: list[tuple[int, str, list[str], list[list[Any]]]] = []
        self.artifacts: list[tuple[Any, list[str]]] = []
        self.waits: list[float] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.resumed, self.name = False, ""

    def define_metric(
        self, name: str, step_metric: str | None = None, summary: str | None = None
    ) -> None:
        self.defined.append((name, step_metric, summary))

    def log(self, line: dict[str, Any]) -> None:
        if self.fail:
            raise ConnectionError("gone")
        if tables := {name: table for name, table in line.items() if hasattr(table, "columns")}:
            assert line.keys() - tables.keys() == {"step"}
            for name, table in tables.items():
                self.tables.append((line["step"], name, table.columns, table.data))
            return
        self.lines.append(line)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> SimpleNamespace:
        if self.fail:
            raise ConnectionError("gone")
        self.artifacts.append((artifact, aliases))
        return SimpleNamespace(wait=self.wait)

    def wait(self, seconds: float) -> None:
        """W&B uploads in another process, which alone knows whether that succeeds."""
        self.waits.append(seconds)

    def finish(self, exit_code: int | None = None) -> None:
        if self.fail:
            raise ConnectionError("gone")
        self.finished, self.exit_code = True, exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    """Takes wandb.init's place; holds the arguments and the run of each call.

    Like wandb 0.31 it takes id, project and entity from the environment alone if a sweep's agent
    has started us.
    """
    import wandb

    calls: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**arguments: Any) -> FakeRun:
        given = {} if os.environ.get("WANDB_SWEEP_ID") else arguments
        run_id = given.get("id") or os.environ["WANDB_RUN_ID"]
        project = given.get("project") or os.environ.get("WANDB_PROJECT", "uncategorized")
        entity = given.get("entity") or os.environ.get("WANDB_ENTITY", "me")
        run = FakeRun(run_id=run_id, project=project, entity=entity)
        before = [known for _, known in calls if known.id == run_id]
        run.resumed = bool(before) and arguments["resume"] == "allow"
        run.name = arguments["name"] or (before[-1].name if before else "fearless-1")
        calls.append((arguments, run))
        return run

    for name in AGENTS:
        monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb.Table, "bind_to_run", lambda *_: None)
    monkeypatch.setattr(
        wandb, "login", lambda **arguments: arguments == {"prompt": False, "verify": False}
    )
    return calls


def folder_of(settings: dict[str, str]) -> Path:
    return Path(settings["output_dir"]) / settings["run_name"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_logged_offline(folder: Path) -> None:
    """W&B's own process writes its file, and may be a moment later than ours."""
    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    for _ in range(300):
        if b"train/grad_norm" in file.read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError(f"{file} holds no metrics")


def test_wandb_gets_the_settings_and_every_line_of_metrics(
    call, settings: dict[str, str], fake
) -> None:
    """Guards against a name or a step that differs between the dashboard and the file."""
    settings["wandb_mode"] = "online"
    assert call(train, *flags(settings)).code == 0
    [(arguments, run)] = fake
    assert arguments["config"]["learning_rate"] == 3e-3 and arguments["config"]["batch_size"] == 4
    assert (run.name, arguments["mode"], arguments["project"]) == (
        "test",
        "online",
        "llama-2-gsm8k",
    )
    lowest = {"val/loss", "val/perplexity"}
    lowest |= {f"val/perplexity_{part}" for part in ("reasoning", "equations", "final_answer")}
    assert run.defined[:2] == [("step", None, None), ("*", "step", None)]
    assert sorted(run.defined[2:]) == [(name, "step", "min") for name in sorted(lowest)]
    assert run.lines == lines_of(folder_of(settings))
    assert [line["step"] for line in run.lines if "val/perplexity" in line] == [7, 14]
    assert run.finished


def test_exact_match_goes_into_the_run_that_trained(call, settings: dict[str, str], fake) -> None:
    settings["wandb_mode"] = "online"
    assert call(train, *flags(settings)).code == 0
    assert call(evaluate, "--ckpt", str(folder_of(settings) / "best")).code == 0
    (trained, _), (evaluated, run) = fake
    assert evaluated["id"] == trained["id"] and evaluated["resume"] == "allow"
    assert [(line["step"], line["eval/exact_match"]) for line in run.lines] == [(14, 0.0)]
    assert run.finished


def test_a_resumed_run_continues_the_same_wandb_run(call, settings: dict[str, str], fake) -> None:
    settings["wandb_mode"] = "online"
    with pytest.raises(Killed):
        call(train, *flags(settings), step=step_that(kill, at=10))
    assert call(train, *flags(settings)).code == 0
    (first, broken), (second, run) = fake
    assert first["id"] == second["id"] and broken.finished
    assert [line["step"] for line in run.lines if "train/loss" in line] == list(range(8, 15))
    lines = lines_of(folder_of(settings))
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 15))


def test_a_name_that_was_given_in_wandb_stays(call, settings: dict[str, str], fake) -> None:
    """Guards against a run that has its old name back once it is resumed or evaluated."""
    settings["wandb_mode"] = "online"
    stop_in_epoch_2(call, settings)
    assert fake[0][1].name == "test"
    fake[0][1].name = "for the paper"
    assert call(train, *flags(settings)).code == 0
    assert call(evaluate, "--ckpt", str(folder_of(settings) / "best")).code == 0
    assert [run.name for _, run in fake] == ["for the paper"] * 3
    assert call(train, *flags(settings | {"run_name": "other", "wandb_mode": "offline"})).code == 0
    assert fake[-1][0]["name"] == fake[-1][1].name == "other"


@pytest.mark.parametrize("end", ["done", "SIGTERM", "SIGINT", "nan", "killed"])
def test_wandb_is_told_how_a_run_ended(call, settings: dict[str, str], fake, end: str) -> None:
    """Guards against a run that was stopped or diverged, and that W&B shows as finished."""
    settings["wandb_mode"] = "online"
    step = train.train_step
    if end.startswith("SIG"):
        step = step_that(lambda: signal.raise_signal(signal.Signals[end]), at=10)
    if end == "nan":
        settings |= {"learning_rate": "1e30", "max_grad_norm": "null"}
    if end == "killed":
        step = step_that(kill, at=10)
        with pytest.raises(Killed):
            call(train, *flags(settings), step=step)
    else:
        code = call(train, *flags(settings), step=step).code
        assert code == {"done": 0, "SIGTERM": 143, "SIGINT": 130, "nan": 3}[end]
    expected = 1 if end == "killed" else code
    assert fake[-1][1].exit_code == expected
    if end != "nan":
        arguments = ["--ckpt", str(folder_of(settings) / "best"), "--verify-batching", "0"]
        assert call(evaluate, *arguments).code == 0 and len(fake) == 2
        assert bool(fake[-1][1].exit_code) == (end != "done")  # an evaluation completes no training


def test_training_logs_what_an_evaluation_adds_meanwhile(tmp_path: Path) -> None:
    """Guards against two processes in one W&B run, one of which overwrites the other's lines."""
    run = FakeRun()
    with metrics_log.MetricsLog(tmp_path, wandb_run.WandbTracker(run), resume_step=0) as training:
        for step in (1, 2):
            training.write(step, 0.5, {"train/loss": 1.0})
            with metrics_log.MetricsLog(tmp_path, wandb_run.NoTracker(), alone=False) as evaluation:
                evaluation.write(1, 0.5, {"eval/exact_match": step / 4})
    assert len(run.lines) == 4 and run.lines == lines_of(tmp_path)
    assert run.summary == {"eval/exact_match": {"max": 0.5}}


def test_an_evaluation_leaves_the_run_to_its_training(call, settings: dict[str, str], fake) -> None:
    """Guards against a score that W&B loses, and a run that it shows as finished too early."""
    settings |= {"wandb_mode": "online"}
    stop_in_epoch_2(call, settings)
    folder = folder_of(settings)
    arguments = ["--ckpt", str(folder / "best"), "--verify-batching", "0"]
    with locked(folder, "held"):
        outcome = call(evaluate, *arguments)
    assert outcome.code == 0 and "W&B: this run is being trained" in outcome.out
    assert len(fake) == 1 and "eval/exact_match" in lines_of(folder)[-1]
    assert call(evaluate, *arguments, "--split", "validation").code == 0
    assert len(fake) == 2


@pytest.mark.parametrize("variable", ["WANDB_MODE=disabled", "WANDB_DISABLED=true"])
def test_a_score_that_wandb_is_not_to_have_is_promised_to_nobody(
    call, settings: dict[str, str], fake, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Guards against a line that says where to find what is not there."""
    settings |= {"wandb_mode": "null"}
    monkeypatch.setenv(*variable.split("="))
    stop_in_epoch_2(call, settings)
    folder = folder_of(settings)
    with locked(folder, "held"):
        outcome = call(evaluate, "--ckpt", str(folder / "best"), "--verify-batching", "0")
    assert outcome.code == 0 and "training logs" not in outcome.out and not fake
    assert "eval/exact_match" in lines_of(folder)[-1]


def test_evaluations_take_turns_in_wandb(
    call, settings: dict[str, str], fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against two processes in one W&B run, one of which overwrites the other's lines."""
    settings |= {"wandb_mode": "online"}
    stop_in_epoch_2(call, settings)
    folder = folder_of(settings)
    arguments = ["--ckpt", str(folder / "best"), "--verify-batching", "0"]
    in_turn: list[bool] = []
    for name in ("__init__", "finish"):
        original = getattr(FakeRun, name)

        def noted(*words: Any, original: Any = original, **named: Any) -> None:
            in_turn.append(not is_free(folder / "wandb"))
            original(*words, **named)

        monkeypatch.setattr(FakeRun, name, noted)
    assert call(evaluate, *arguments).code == 0
    assert in_turn == [True, True] and is_free(folder / "wandb")
    monkeypatch.setattr(evaluation, "TURN_SECONDS", 0.05)
    with locked(folder / "wandb", "held"):
        outcome = call(evaluate, *arguments, "--split", "validation")
    assert outcome.code == 0 and "W&B: another evaluation is still logging there" in outcome.out
    assert len(in_turn) == 2 and "eval/validation_exact_match" in lines_of(folder)[-1]


def test_without_locks_an_evaluation_is_logged_to_wandb(
    call, settings: dict[str, str], fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a file system that has none, taken for another evaluation in its turn."""
    settings |= {"wandb_mode": "online"}
    stop_in_epoch_2(call, settings)

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    arguments = ["--ckpt", str(folder_of(settings) / "best"), "--verify-batching", "0"]
    outcome = call(evaluate, *arguments)
    assert outcome.code == 0 and len(fake) == 2 and "eval/exact_match" in fake[1][1].lines[-1]


# ---------------------------------------------------------------- whose run it is


def path_in(checkpoint: Path) -> tuple[str, str, str]:
    description = json.loads((checkpoint / "training.json").read_text())
    return tuple(description[f"wandb_{name}"] for name in ("run_id", "project", "entity"))


def path_of(run: FakeRun) -> tuple[str, str, str]:
    return run.id, run.project, run.entity


def agent(monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    """The environment that a sweep's agent gives to a run."""
    for name, value in (AGENTS | changed).items():
        monkeypatch.setenv(name, value)


def stop_in_epoch_2(call, settings: dict[str, str]) -> None:
    with pytest.raises(Killed):
        call(train, *flags(settings), step=step_that(kill, at=10))


def test_a_sweeps_run_is_known_by_the_agents_path(
    call, settings: dict[str, str], fake, monkeypatch
) -> None:
    """Guards against a score that goes to a second run, under an id or in a project of our own."""
    settings |= {"wandb_mode": "online", "epochs": "1"}
    with monkeypatch.context() as patch:
        agent(patch)
        outcome = call(train, *flags(settings))
    assert outcome.code == 0 and "not as" not in outcome.out
    for name in ("best", "last"):
        assert path_in(folder_of(settings) / name) == ("agent", "sweeps", "team")
    for typed, project in (([], "sweeps"), (["--wandb_project", "mine"], "mine")):
        arguments = ["--ckpt", str(folder_of(settings) / "best"), "--verify-batching", "0", *typed]
        assert call(evaluate, *arguments, "--output", str(folder_of(settings) / project)).code == 0
        arguments, run = fake[-1]
        assert (arguments["id"], arguments["project"]) == ("agent", project)
        assert arguments["entity"] == ("team" if project == "sweeps" else None)
        assert [line["step"] for line in run.lines if "eval/exact_match" in line] == [7]


@pytest.mark.parametrize("sweep", [False, True])
def test_a_resumed_run_under_another_id(
    call, settings: dict[str, str], fake, monkeypatch, sweep: bool
) -> None:
    """The saved run continues; but an agent's id wins, and is the run's from then on."""
    settings |= {"wandb_mode": "online"}
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_RUN_ID", "first")
        stop_in_epoch_2(call, settings)
    assert path_in(folder_of(settings) / "last") == ("first", "llama-2-gsm8k", "me")
    with monkeypatch.context() as patch:
        agent(patch, WANDB_RUN_ID="second") if sweep else patch.setenv("WANDB_RUN_ID", "second")
        worse = Measurement(99.0, 1e43, 1)
        outcome = call(train, *flags(settings), measure=lambda *_: worse)
    assert outcome.code == 0, outcome.err
    kept, other = ("second", "first") if sweep else ("first", "second")
    assert f"W&B: logged as run {kept}, not as {other}\n" in outcome.out
    assert path_in(folder_of(settings) / "best")[0] == "first"
    assert path_in(folder_of(settings) / "last") == path_of(fake[-1][1])
    assert fake[-1][1].id == kept
    assert (
        call(evaluate, "--ckpt", str(folder_of(settings) / "best"), "--verify-batching", "0").code
        == 0
    )
    assert path_of(fake[-1][1]) == path_in(folder_of(settings) / "last") and fake[-1][1].lines


def start(folder: Path, run: wandb_run.RunPath) -> wandb_run.Tracker:
    return wandb_run.start_tracker("online", run=run, name="x", folder=folder, settings={})


def test_what_wandb_gave_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake, capsys
) -> None:
    """Guards against W&B's own reasons for another id, such as SageMaker's."""
    import wandb

    asked = wandb_run.RunPath("ours", "mine")
    assert (
        start(tmp_path, asked).run == wandb_run.RunPath("ours", "mine", "me")
        and "not as" not in capsys.readouterr()[0]
    )
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(run_id="theirs\x1b[0m", project="other"))
    assert start(tmp_path, asked).run == wandb_run.RunPath("theirs\x1b[0m", "other", None)
    assert r"W&B: logged as run theirs\x1b[0m, not as ours" in capsys.readouterr().out
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    assert start(tmp_path, asked).run is None


def test_where_a_run_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AGENTS:
        monkeypatch.delenv(name, raising=False)
    first, second = wandb_run.new_run("mine"), wandb_run.new_run("mine")
    assert first.run_id != second.run_id and (first.project, first.entity) == ("mine", None)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")  # without an agent the setting counts
    monkeypatch.setenv("WANDB_RUN_ID", "a b-1")
    assert wandb_run.new_run("mine") == wandb_run.RunPath("a b-1", "mine")
    agent(monkeypatch)  # known before W&B has answered: a kill may come before that is saved
    assert wandb_run.new_run("mine") == wandb_run.RunPath("agent", "sweeps", "team")
    old = {
        "wandb_run_id": "x",
        "settings": {"wandb_project": "mine"},
    }  # of a checkpoint that knows no more
    assert wandb_run.saved_run(old, "mine", "mine") == wandb_run.RunPath("x", "mine")
    new = old | {"wandb_project": "sweeps", "wandb_entity": "team"}
    assert wandb_run.saved_run(new, "mine", "mine") == wandb_run.RunPath("x", "sweeps", "team")
    assert wandb_run.saved_run(new, "another", "mine") == wandb_run.RunPath("x", "another")


@pytest.mark.parametrize(
    "run_id", ["", " ", "a/b", "a:b", "x ", "it's", "?", "a\nb", "x" * 129, "\udcff"]
)
def test_an_id_that_wandb_refuses_gets_into_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_id: str
) -> None:
    """Guards against a run whose every resumption would have W&B off."""
    import wandb

    monkeypatch.setenv("WANDB_RUN_ID", run_id)
    found = wandb_run.new_run("p").run_id
    assert len(found) == 8 and wandb.Settings(run_id=found).run_id == found


def test_a_variable_that_a_setting_overrides_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake, capsys
) -> None:
    """Guards against a run that is sought under the project and name that the user has set."""
    asked = {"WANDB_PROJECT": "theirs\x1b[0m", "WANDB_NAME": "nice", "WANDB_DIR": "/else"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    start(tmp_path, wandb_run.new_run("mine"))
    said = [line for line in capsys.readouterr().out.splitlines() if "is ignored" in line]
    assert len(said) == 3 and all(line.isprintable() for line in said)
    settings = ("wandb_project", "mine"), ("run_name", "x"), ("output_dir", str(tmp_path))
    for line, name, (setting, value) in zip(said, asked, settings, strict=True):
        assert line.startswith(f"W&B: {name}=") and f"{setting} ({value})" in line
    agent(monkeypatch)  # which sets the project itself
    monkeypatch.delenv("WANDB_NAME")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    start(tmp_path, wandb_run.new_run("mine"))
    assert "is ignored" not in capsys.readouterr().out


@pytest.mark.parametrize("run_id", ["", " ", "bad/id", "x" * 129, "a\x1b[0mb"])
def test_an_id_that_wandb_refuses_is_said_and_not_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake, capsys, run_id: str
) -> None:
    """Guards against W&B off for the whole run, and a line without variable and cure."""
    monkeypatch.setenv("WANDB_RUN_ID", run_id)
    start(tmp_path, wandb_run.new_run("p"))
    out = capsys.readouterr().out
    assert "WANDB_RUN_ID" not in os.environ and "not as" not in out
    assert (
        ("W&B: WANDB_RUN_ID=" in out)
        == ("is ignored, since W&B does not accept it as an id" in out)
        == bool(run_id)
    )
    assert all(letter.isprintable() or letter == "\n" for letter in out)


def test_real_wandb_logs_in_spite_of_an_id_that_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_RUN_ID", "bad/id")
    run = wandb_run.RunPath("mine", "p")  # as of a checkpoint: an evaluation, or a run that goes on
    tracker = wandb_run.start_tracker("offline", run=run, name="n", folder=tmp_path, settings={})
    tracker.finish()
    wandb.teardown()
    assert tracker.run is not None and tracker.run.run_id == "mine"
    assert "off (" not in capsys.readouterr().out and list(
        (tmp_path / "wandb").glob("offline-run-*-mine")
    )


def test_real_wandb_under_a_sweep(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a fake above that is none of wandb's."""
    import wandb

    settings |= {"wandb_mode": "offline", "epochs": "1"}
    wandb.teardown()  # it reads the environment once
    with monkeypatch.context() as patch:
        agent(patch)
        outcome = call(train, *flags(settings))
    wandb.teardown()
    assert outcome.code == 0 and "W&B" not in outcome.out, outcome
    assert path_in(folder_of(settings) / "best") == ("agent", "sweeps", "team")
    assert (
        call(evaluate, "--ckpt", str(folder_of(settings) / "best"), "--verify-batching", "0").code
        == 0
    )
    wandb.teardown()  # W&B's own process may write its file a moment later than ours ends
    files = list((folder_of(settings) / "wandb").glob("offline-run-*-agent*/run-agent.wandb"))
    assert len(files) == len({file.parent for file in files}) == 2
    for file in files:
        assert b"sweeps" in file.read_bytes() and b"team" in file.read_bytes()


@pytest.mark.parametrize(
    ("value", "off"),
    [
        *((value, True) for value in ("true", "1", "YES", "On", " True ")),
        *((value, False) for value in ("", "false", "0", "no", "maybe")),
    ],
)
def test_wandb_disabled_is_heeded(
    tmp_path: Path, monkeypatch, fake, capsys, value: str, off: bool
) -> None:
    monkeypatch.setenv("WANDB_DISABLED", value)
    tracker = start(tmp_path, wandb_run.RunPath("ours", "mine"))
    said = [line for line in capsys.readouterr().out.splitlines() if "WANDB_DISABLED" in line]
    assert isinstance(tracker, wandb_run.NoTracker) == off == (fake == [])
    assert len(said) == (off or value == "maybe")
    assert not off or said[0].startswith(f"W&B: off, because WANDB_DISABLED={value.strip()};")


@pytest.mark.parametrize("asked", [None, "true"])
def test_wandb_reports_its_own_errors_only_if_asked_to(
    tmp_path: Path, monkeypatch, fake, asked: str | None
) -> None:
    """Guards against the 20 seconds that these reports take where the server does not answer."""
    from wandb.env import error_reporting_enabled

    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    if asked:
        monkeypatch.setenv("WANDB_ERROR_REPORTING", asked)
    start(tmp_path, wandb_run.RunPath("ours", "mine"))
    assert error_reporting_enabled() == (asked == "true")


# ---------------------------------------------------------------- a W&B that fails


def test_a_wandb_that_fails_at_every_call_costs_nothing(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    settings["wandb_mode"] = "online"
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(fail=True))
    outcome = call(train, *flags(settings))
    assert outcome.code == 0
    assert "metrics.jsonl has" in outcome.out
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    outcome = call(train, *flags(settings | {"run_name": "second"}))
    assert outcome.code == 0 and "W&B: off" in outcome.out


@pytest.fixture
def bad_server() -> Iterator[Callable[[int | None], int]]:
    """Starts a server that answers everything with one status, or, with None, never."""
    sockets: list[socket.socket] = []

    def serve(listener: socket.socket, status: int | None) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            sockets.append(connection)
            if status is not None:
                connection.recv(65536)
                connection.sendall(
                    b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status
                )
                connection.close()

    def start(status: int | None) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)
        threading.Thread(target=serve, args=(listener, status), daemon=True).start()
        return listener.getsockname()[1]

    yield start
    for each in sockets:
        each.close()


def train_to_the_end(environment: dict[str, str], out: Path, *argv: str) -> None:
    """In a process of its own: what it does between the story and its end counts, too."""
    os.environ.pop("WANDB_ERROR_REPORTING", None)  # of another test
    os.environ |= environment
    from wandb.analytics.opentelemetry import opentelemetry_proxy

    with out.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # W&B's telemetry would wait for a server that does not answer, twice for 10 seconds.
    opentelemetry_proxy.OpenTelemetryProxy._server_supported = lambda _: os._exit(3)
    train.main(*train.read_arguments([*argv]), report=lambda folder: None)
    atexit._run_exitfuncs()  # W&B's, which a forked process would leave out


@pytest.mark.parametrize("fault", ["unreachable", "silent", 401, 403])
def test_a_wandb_that_does_not_answer_falls_back_to_offline_in_bounded_time(
    settings: dict[str, str], tmp_path: Path, dead_port: int, bad_server, fault: str | int
) -> None:
    """The real wandb, in a process of its own.

    The fallback is offline in the same process (wandb issue 9865).
    """
    port = dead_port if fault == "unreachable" else bad_server(None if fault == "silent" else fault)
    environment = {
        "WANDB_INIT_TIMEOUT": "2",
        "WANDB_HTTP_TIMEOUT": "1",  # of each of W&B's requests
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_MODE": "online",
    }
    out = tmp_path / "out"
    process = processes.Process(
        target=train_to_the_end,
        args=[environment, out, *flags(settings | {"wandb_mode": "online"})],
    )
    process.start()
    process.join(100)  # against waiting for ever, not a measurement
    ended = process.exitcode
    process.kill()
    assert ended == 0, out.read_text()
    assert out.read_text().count("W&B: not reached") == 1, out.read_text()
    assert_logged_offline(folder_of(settings))
    assert [line["step"] for line in lines_of(folder_of(settings)) if "train/loss" in line] == list(
        range(1, 15)
    )


def lose_the_service(out: Path, *argv: str) -> None:
    """`train_to_the_end`, but W&B's own process is killed before step 10."""
    from wandb.sdk.lib.service import service_process

    started: list[service_process.ServiceProcess] = []
    start = service_process.start
    service_process.start = lambda settings: (started.append(start(settings)), started[-1])[1]

    def lose() -> None:
        started[0]._process.kill()
        started[0].join()

    train.main = partial(train.main, step=step_that(lose, at=10))
    train_to_the_end({"WANDB_MODE": "offline"}, out, *argv)


def test_a_wandb_whose_own_process_dies_is_said_and_costs_nothing(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """As by a system that runs out of memory.

    Guards against a line for each step, one without a reason, and W&B's traceback at the end.
    """
    out = tmp_path / "out"
    arguments = [out, *flags(settings | {"wandb_mode": "offline"})]
    process = processes.Process(target=lose_the_service, args=arguments)
    process.start()
    process.join(100)  # against waiting for ever, not a measurement
    ended = process.exitcode
    process.kill()
    said = out.read_text()
    assert ended == 0 and "Traceback" not in said, said
    lost = re.findall(r"W&B: (a line was|the table val/samples was|did) not .*\((\w+): ", said)
    assert [what for what, _ in lost] == ["a line was", "the table val/samples was", "did"], said
    assert [line["step"] for line in lines_of(folder_of(settings))][-1] == 14


def test_a_log_of_wandb_that_can_not_be_written_shows_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Guards against Python's own report of a debug.log on a full disk, in the terminal."""
    import wandb

    wandb.teardown()  # it reads the environment once
    run = wandb_run.RunPath("full", "p")
    tracker = wandb_run.start_tracker("offline", run=run, name="n", folder=tmp_path, settings={})
    logger = logging.getLogger("wandb")
    # Its own, after those of runs that other tests did not finish.
    *_, handler = (one for one in logger.handlers if isinstance(one, logging.FileHandler))
    with monkeypatch.context() as patch:
        patch.setattr(handler, "format", lambda _: os.write(-1, b""))
        logger.info("said")
    tracker.finish()
    wandb.teardown()
    assert capsys.readouterr().err == ""


def test_null_means_offline_where_not_logged_in_said_in_one_line(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = call(train, *flags(settings | {"wandb_mode": "null"}))
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.out.splitlines() if "W&B" in line] == [
        "W&B: not logged in, so logging offline "
        "('wandb login' before the run, or 'wandb sync' after it)"
    ]
    assert_logged_offline(folder_of(settings))


@pytest.mark.parametrize("mode", ["online", "null"])
def test_online_without_a_login_asks_nothing_and_goes_offline(
    call, settings: dict[str, str], fake, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Guards against W&B's question for a key, at which a run in a terminal waits for ever."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    for login in (lambda **_: False, lambda **_: 1 / 0):
        monkeypatch.setattr(wandb, "login", login)
        outcome = call(
            train, *flags(settings | {"wandb_mode": mode, "run_name": f"{mode}-{len(fake)}"})
        )
        assert outcome.code == 0 and "not logged in, so logging offline" in outcome.out
        assert fake[-1][0]["mode"] == "offline"


def test_null_means_online_where_logged_in(
    call, settings: dict[str, str], fake, monkeypatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    assert call(train, *flags(settings | {"wandb_mode": "null"})).code == 0
    assert fake[0][0]["mode"] is None  # which is W&B's own default: online


def test_disabled_leaves_no_trace(call, settings: dict[str, str], fake) -> None:
    assert call(train, *flags(settings | {"wandb_mode": "disabled"})).code == 0
    assert (
        call(train, *flags(settings | {"wandb_mode": "null", "run_name": "by-environment"})).code
        == 0
    )
    assert fake == [] and not (folder_of(settings) / "wandb").exists()


def test_not_finite_numbers_are_logged_as_they_are(tmp_path: Path) -> None:
    """Guards against a filter between a loss and those who look at it."""
    run = FakeRun()
    with metrics_log.MetricsLog(tmp_path, wandb_run.WandbTracker(run)) as metrics:
        metrics.write(1, 0.5, {"val/loss": math.nan, "val/perplexity": math.inf})
    for line in (*lines_of(tmp_path), *run.lines):
        assert math.isnan(line["val/loss"]) and line["val/perplexity"] == math.inf


@pytest.mark.parametrize(
    ("step", "first"),
    [
        (3, "lower the learning_rate"),
        (1, "no step has changed the model yet, so copy it again"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "fp8", "cure"),
    [
        ("bfloat16", False, ", or set dtype float32"),
        ("bfloat16", True, ", or set fp8 false"),
        ("float32", False, ""),
    ],
)
def test_what_to_do_about_a_loss_that_is_not_finite(
    tmp_path: Path, step: int, first: str, dtype: str, fp8: bool, cure: str
) -> None:
    """Guards against advice to set what is set already, and against none about FP8.

    A learning rate that was never used is not to blame, but weights that are NaN in their files.
    """
    settings = asdict(load_config(CONFIG_FILE, {})) | {"wandb_mode": "disabled"}
    settings |= {"dtype": dtype, "fp8": fp8}
    saves = SimpleNamespace(folder=tmp_path, settings=settings, plan={}, data_hashes={})
    batches = SimpleNamespace(per_epoch=7, mask_rate=lambda _: None)
    usage = SimpleNamespace(at=lambda _: {})
    with open_log(saves, Progress(step=step), batches, 14, usage) as log:
        nan = SimpleNamespace(loss=math.nan, grad_norm=math.nan)
        error = log.not_finite(nan, "line 5", tmp_path / "last")
        nan.perplexity = math.nan
        with pytest.raises(NotFiniteError) as of_validation:
            log.check_validation(nan, tmp_path / "last")
    assert str(error).endswith(f"are from before this step: {first}{cure}")
    assert str(of_validation.value).endswith(f": lower the learning_rate{cure}")


def test_a_loss_that_is_not_a_number_is_not_the_lowest() -> None:
    """Guards against a NaN that W&B, too, would show as the best of the run."""
    run = FakeRun()
    tracker = wandb_run.WandbTracker(run)
    tracker.go_on_from([{"step": 1, "val/loss": 2.0, "eval/exact_match": 0.5}])
    for loss, score, expected in ((3.0, 0.25, (2.0, 0.5)), (math.nan, math.nan, (2.0, 0.5))):
        tracker.log({"step": 2, "val/loss": loss, "eval/exact_match": score})
        assert run.summary["val/loss"] == {"min": expected[0]}
        assert run.summary["eval/exact_match"] == {"max": expected[1]}
    tracker.log({"step": 3, "val/loss": 1.0, "eval/exact_match": 1.0, "eval/errors_format": 3})
    expected = {"step": 1, "val/loss": {"min": 1.0}, "eval/exact_match": {"max": 1.0}}
    assert run.summary == expected  # FakeRun does not sum up what it logs


def test_every_line_is_on_the_disk_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a checkpoint that survives a power cut, and metrics that do not."""
    synced = []
    original = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (original(number), synced.append(os.fstat(number).st_size))
    )
    with metrics_log.MetricsLog(tmp_path, wandb_run.NoTracker()) as metrics:
        for step in (1, 2):
            metrics.write(step, 0.5, {"train/loss": 1.0})
            assert synced[-1] == (tmp_path / "metrics.jsonl").stat().st_size > 0


def test_the_speed_is_that_of_the_steps_since_the_last_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a mean over the whole run, which hides that it has become slower."""
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    speed = Speed()
    for seconds, tokens, expected in ((2.0, 100, None), (3.0, 400, 100.0), (8.0, 400, 50.0)):
        with speed.timed(tokens):
            clock[0] += seconds
        clock[0] += 60.0  # a validation
        assert expected is None or speed.take_tokens_per_second() == expected


def test_metrics_of_a_killed_run_are_cut_at_the_resumed_step(tmp_path: Path) -> None:
    """Guards against a step that stands twice, and the half line of a kill."""
    file = tmp_path / "metrics.jsonl"
    evaluated = (
        '{"step": 4, "eval/exact_match": 0.5}\n'  # of a best that is saved again just as it was
    )
    deep = "[" * 100_000 + "\n"  # of a damaged disk
    file.write_text(
        f'{deep}{{"step": 1, "a": 1}}\n{{"step": 2, "a": 2}}\n{{"step": 3, "a": 3}}\n'
        f'{evaluated}{{"step": 4, "a"'
    )
    with metrics_log.MetricsLog(tmp_path, wandb_run.NoTracker(), resume_step=2) as metrics:
        metrics.write(3, 0.5, {"a": 30})
    lines = lines_of(tmp_path)
    assert [(line["step"], line.get("a")) for line in lines] == [(1, 1), (2, 2), (4, None), (3, 30)]


def test_lines_that_are_none_are_left_out(tmp_path: Path) -> None:
    """Guards against a score that can't be logged, or shown, for a line that a kill has cut."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n7\nnull\n[]\n{}\n' + "[" * 100_000 + '\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    file.unlink()
    assert read_metrics(tmp_path) == []
    file.mkdir()
    assert read_metrics(tmp_path) == []


def test_an_evaluation_drops_no_line_of_training(tmp_path: Path) -> None:
    """Guards against a file that is replaced while training appends to it."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')  # which is being written
    before = file.stat().st_ino
    with metrics_log.MetricsLog(tmp_path, wandb_run.NoTracker(), alone=False) as metrics:
        metrics.write(1, 0.5, {"eval/exact_match": 0.5})
    lines = file.read_text().splitlines()
    assert lines[:2] == ['{"step": 1, "a": 1}', '{"step": 2, "a"'] and len(lines) == 3
    assert file.stat().st_ino == before
    assert metrics_log.is_logged(tmp_path, 1, {"eval/exact_match": 0.5})
    for step, share in ((2, 0.5), (1, 0.25)):
        assert not metrics_log.is_logged(tmp_path, step, {"eval/exact_match": share})


def test_a_line_that_is_written_in_pieces_is_whole(tmp_path: Path) -> None:
    """Guards against half a line on a disk that is nearly full."""
    with metrics_log.MetricsLog(tmp_path, wandb_run.NoTracker()) as metrics:
        write = metrics._file.write
        in_pieces = SimpleNamespace(write=lambda content: write(content[:7]))
        in_pieces.fileno, in_pieces.close = metrics._file.fileno, metrics._file.close
        metrics._file = in_pieces
        metrics.write(1, 0.5, {"train/loss": 1.0})
    assert [line["train/loss"] for line in lines_of(tmp_path)] == [1.0]


# ---------------------------------------------------------------- the best checkpoint


@pytest.mark.parametrize("how", ["true", "false", "offline", "refused", "failed", "stopped"])
def test_best_is_an_artifact_if_asked_for(
    call, settings: dict[str, str], fake, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Guards against an upload that nobody wanted, that ends a run, or of a run that goes on."""
    settings |= {"wandb_mode": "online", "wandb_artifact": "false" if how == "false" else "true"}
    monkeypatch.setattr(FakeRun, "offline", how == "offline")
    if how == "refused":
        monkeypatch.setattr(FakeRun, "log_artifact", lambda *_, **__: 1 / 0)
    if how == "failed":
        monkeypatch.setattr(FakeRun, "wait", lambda *_: 1 / 0)
    if how == "stopped":
        stop_in_epoch_2(call, settings)
    else:
        outcome = call(train, *flags(settings))
        assert outcome.code == 0 and "done: " in outcome.out
        is_fault = how in ("refused", "failed")
        assert ("was not uploaded (ZeroDivisionError: division by zero)" in outcome.out) == is_fault
        assert ("W&B: offline, so " in outcome.out) == (how == "offline")
        commands = re.findall("to upload it later: (.*)", outcome.out)
        assert len(commands) == (is_fault or how == "offline")
        for command in commands:
            assert_uploads(command, folder_of(settings) / "best")
    [(arguments, run)] = fake
    assert arguments["settings"].finish_timeout == wandb_run.FINISH_SECONDS and run.finished
    assert len(run.artifacts) == (how in ("true", "failed"))
    assert run.waits == [tracker.UPLOAD_SECONDS] * (how == "true")
    for artifact, aliases in run.artifacts:
        assert (artifact.name, artifact.type, aliases) == ("test-best", "model", ["best"])
        best = folder_of(settings) / "best"
        entries = artifact.manifest.entries
        assert entries.keys() == {file.name for file in best.iterdir()}
        for name, entry in entries.items():
            # The checkpoint itself, not a copy, by a path that names no home.
            assert not Path(entry.local_path).is_absolute()
            assert Path(entry.local_path).resolve() == (best / name).resolve()


def assert_uploads(command: str, best: Path, place: str = "me/llama-2-gsm8k/test-best") -> None:
    """By W&B's own reader of the command line."""
    from wandb.cli.cli import artifact

    _, module, program, group, name, *words = shlex.split(command)
    assert (module, program, group) == ("-m", "wandb", "artifact")
    given = artifact.commands[name].make_context(name, words).params
    assert given["name"] == place
    # W&B shows the path as it is given, in which no home is to be named.
    assert not Path(given["path"]).is_absolute() and Path(given["path"]).samefile(best)
    assert (given["type"], given["alias"], given["run_id"]) == ("model", ("best",), None)
    assert (given["policy"], given["skip_cache"]) == ("immutable", True)


def test_an_upload_that_a_kill_came_before_is_made_by_the_same_command(
    call, settings: dict[str, str], fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an artifact that never comes, since there is nothing left to train."""
    settings |= {"wandb_mode": "online", "wandb_artifact": "true", "epochs": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "_upload_best", lambda *_: kill())
        with pytest.raises(Killed):
            call(train, *flags(settings))
    for keep_state, said in (("true", ""), ("false", "removed: ")):
        (folder_of(settings) / FITTING_FILE).touch()
        outcome = call(train, *flags(settings), "--keep_state", keep_state)
        assert outcome.code == 0 and said in outcome.out, outcome.err
        command = evaluation_command(folder_of(settings) / "best")
        assert f"this run is finished; next: {command}\n" in outcome.out
        assert "report: left out in tests" in outcome.out
        assert not (folder_of(settings) / FITTING_FILE).exists()
        (first, _), *_, (arguments, run) = fake
        assert [artifact.name for artifact, _ in run.artifacts] == ["test-best"] and run.finished
        assert arguments["id"] == first["id"] and arguments["config"] is None
    assert len(fake) == 3


def test_a_damaged_best_is_not_uploaded_later(call, settings: dict[str, str], fake) -> None:
    settings |= {"wandb_mode": "disabled", "wandb_artifact": "true", "epochs": "1"}
    assert call(train, *flags(settings)).code == 0
    flip_a_byte(folder_of(settings) / "best" / "model.safetensors")
    call(train, *flags(settings | {"wandb_mode": "online"})).assert_user_error(
        "best: is damaged or gone", "so it is not uploaded (wandb_artifact true)"
    )
    assert fake == []


def test_an_artifact_that_can_not_be_uploaded_is_said_at_the_start(
    call, settings: dict[str, str]
) -> None:
    """Guards against a setting that does nothing, also when the finished run is started again."""
    settings |= {"wandb_mode": "disabled", "wandb_artifact": "true", "epochs": "1"}
    out = call(train, *flags(settings)).out
    assert out.index("wandb_artifact: best will not be uploaded, since W&B is off") < out.index(
        "training: "
    )
    again = call(train, *flags(settings))
    assert again.code == 0
    assert "wandb_artifact: best is not uploaded, since W&B is off" in again.out
    [command] = re.findall("to upload it later: (.*)", again.out)
    assert_uploads(command, folder_of(settings) / "best", "llama-2-gsm8k/test-best")


def test_the_name_of_an_artifact_fits(call, settings: dict[str, str], fake) -> None:
    """W&B refuses more than 128 characters, and would do so after the last step."""
    changes = {
        "wandb_mode": "online",
        "wandb_artifact": "true",
        "epochs": "1",
        "run_name": "r" * 128,
    }
    assert call(train, *flags(settings | changes)).code == 0
    [(_, run)] = fake
    [(artifact, _)] = run.artifacts
    assert artifact.name == "r" * 123 + "-best"
