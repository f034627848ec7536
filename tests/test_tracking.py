"""metrics.jsonl is the source of truth; W&B neither delays a run nor ends it."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import flags

import evaluate
import tracking
import train


class FakeRun:
    """Remembers what a run is told; ``fail`` makes every call raise."""

    offline = False
    url = "https://wandb.example/run"

    def __init__(self, fail: bool = False):
        self.fail, self.lines, self.defined, self.finished = fail, [], [], False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, line: dict[str, Any]) -> None:
        if self.fail:
            raise ConnectionError("gone")
        self.lines.append(line)

    def finish(self) -> None:
        if self.fail:
            raise ConnectionError("gone")
        self.finished = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    """Takes wandb.init's place; holds the arguments and the run of each call."""
    import wandb

    calls: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**arguments: Any) -> FakeRun:
        calls.append((arguments, FakeRun()))
        return calls[-1][1]

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda **arguments: arguments == {"prompt": False, "verify": False})
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


def test_wandb_gets_the_settings_and_every_line_of_metrics(call, settings: dict[str, str], fake) -> None:
    """Guards against a name or a step that differs between the dashboard and the file."""
    settings["wandb_mode"] = "online"
    assert call(train, *flags(settings)).code == 0
    [(arguments, run)] = fake
    assert arguments["config"]["learning_rate"] == 3e-3 and arguments["config"]["batch_size"] == 16
    assert (arguments["name"], arguments["mode"], arguments["project"]) == ("test", "online", "llama-2-gsm8k")
    assert run.defined == [("step", None), ("*", "step")]
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


def test_a_resumed_run_continues_the_same_wandb_run(
    call, settings: dict[str, str], fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["wandb_mode"] = "online"
    original = train.accumulate
    steps = iter(range(100))
    monkeypatch.setattr(train, "accumulate", lambda *a: original(*a) if next(steps) < 9 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(train, *flags(settings))
    monkeypatch.setattr(train, "accumulate", original)
    assert call(train, *flags(settings)).code == 0
    (first, broken), (second, run) = fake
    assert first["id"] == second["id"] and broken.finished
    assert [line["step"] for line in run.lines if "train/loss" in line] == list(range(8, 15))
    lines = lines_of(folder_of(settings))
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 15))


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
    """Starts a server that answers everything with one status, or with None takes a connection and says nothing."""
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
                connection.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
                connection.close()

    def start(status: int | None) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)
        threading.Thread(target=serve, args=(listener, status), daemon=True).start()
        return listener.getsockname()[1]

    yield start
    for each in sockets:
        each.close()


@pytest.mark.parametrize("fault", ["unreachable", "silent", 401, 403])
def test_a_wandb_that_does_not_answer_falls_back_to_offline_in_bounded_time(
    settings: dict[str, str], dead_port: int, bad_server, fault: str | int
) -> None:
    """The real wandb, in a process of its own. The fallback is offline in the same process (wandb issue 9865)."""
    port = dead_port if fault == "unreachable" else bad_server(None if fault == "silent" else fault)
    arguments = flags(settings | {"wandb_mode": "online"})
    code = f"import train, tracking; tracking.INIT_SECONDS = 2; train.main(*train.read_arguments({arguments!r}))"
    environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(train.__file__).parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,  # against waiting for ever, not a measurement
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("W&B: not reached") == 1, result.stdout
    assert_logged_offline(folder_of(settings))
    assert [line["step"] for line in lines_of(folder_of(settings)) if "train/loss" in line] == list(range(1, 15))


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
        "W&B: not logged in, so logging offline ('wandb login' before the run, or 'wandb sync' after it)"
    ]
    assert_logged_offline(folder_of(settings))


@pytest.mark.parametrize("mode", ["online", "null"])
def test_online_without_a_login_asks_nothing_and_goes_offline(
    call, settings: dict[str, str], fake, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Guards against W&B's own question for a key, at which a run in a terminal would wait for ever."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    for login in (lambda **_: False, lambda **_: 1 / 0):
        monkeypatch.setattr(wandb, "login", login)
        outcome = call(train, *flags(settings | {"wandb_mode": mode, "run_name": f"{mode}-{len(fake)}"}))
        assert outcome.code == 0 and "not logged in, so logging offline" in outcome.out
        assert fake[-1][0]["mode"] == "offline"


def test_null_means_online_where_logged_in(call, settings: dict[str, str], fake, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    assert call(train, *flags(settings | {"wandb_mode": "null"})).code == 0
    assert fake[0][0]["mode"] is None  # which is W&B's own default: online


def test_disabled_leaves_no_trace(call, settings: dict[str, str], fake) -> None:
    assert call(train, *flags(settings | {"wandb_mode": "disabled"})).code == 0
    assert call(train, *flags(settings | {"wandb_mode": "null", "run_name": "by-environment"})).code == 0
    assert fake == [] and not (folder_of(settings) / "wandb").exists()


def test_not_finite_numbers_are_logged_as_they_are(tmp_path: Path) -> None:
    """Guards against a filter between a loss and those who look at it."""
    run = FakeRun()
    with tracking.MetricsLog(tmp_path, tracking.WandbTracker(run)) as metrics:
        metrics.write(1, 0.5, {"val/loss": math.nan, "val/perplexity": math.inf})
    for line in (*lines_of(tmp_path), *run.lines):
        assert math.isnan(line["val/loss"]) and line["val/perplexity"] == math.inf


def test_every_line_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a checkpoint that survives a loss of power, and metrics before it that do not."""
    synced = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (original(number), synced.append(os.fstat(number).st_size)))
    with tracking.MetricsLog(tmp_path, tracking.NoTracker()) as metrics:
        for step in (1, 2):
            metrics.write(step, 0.5, {"train/loss": 1.0})
            assert synced[-1] == (tmp_path / "metrics.jsonl").stat().st_size > 0


def test_metrics_of_a_killed_run_are_cut_at_the_resumed_step(tmp_path: Path) -> None:
    """Guards against a step that stands twice, and the half line of a kill."""
    file = tmp_path / "metrics.jsonl"
    evaluated = '{"step": 4, "eval/exact_match": 0.5}\n'  # of a best that is saved again just as it was
    deep = "[" * 100_000 + "\n"  # of a damaged disk
    file.write_text(
        f'{deep}{{"step": 1, "a": 1}}\n{{"step": 2, "a": 2}}\n{{"step": 3, "a": 3}}\n{evaluated}{{"step": 4, "a"'
    )
    with tracking.MetricsLog(tmp_path, tracking.NoTracker(), resume_step=2) as metrics:
        metrics.write(3, 0.5, {"a": 30})
    lines = lines_of(tmp_path)
    assert [(line["step"], line.get("a")) for line in lines] == [(1, 1), (2, 2), (4, None), (3, 30)]
