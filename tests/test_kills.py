"""SIGKILL at points of the saves and at random moments, and train.py --selftest."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import pytest
from conftest import as_a_process, flags, make_config, processes

import train
from grading.dataset import Problem, load_problems
from run import selftest
from run.config import load_config
from run.errors import UserError

ROOT = Path(train.__file__).parent


def run_as_typed(out: Path, script: str, *arguments: str) -> None:
    """What ``python script arguments`` does, in a process that has done the imports already."""
    stream = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()


def typed(folder: Path, *words: str) -> tuple[str, int | None]:
    """What a command printed, and its exit code."""
    process = processes.Process(target=run_as_typed, args=[folder / "out", *words])
    process.start()
    process.join(400)
    ended = process.exitcode
    process.kill()
    return (folder / "out").read_text(), ended


def test_kills_lose_nothing(tmp_path: Path) -> None:
    """The short sweep; what it looks for stands in benchmarks/kill_sweep.py."""
    sweep = str(ROOT / "benchmarks" / "kill_sweep.py"), "--points", "12", "--random", "4"
    printed, ended = typed(tmp_path, *sweep)
    assert ended == 0 and "0 losses" in printed, printed
    assert int(re.search(r"^(\d+) kills", printed, re.MULTILINE)[1]) >= 10, printed
    assert "beside training" in printed


def test_what_holds_for_any_settings_holds_for_some(tmp_path: Path) -> None:
    """Two of those that benchmarks/any_settings.py draws, which says what that is.

    Each dies after a save. One trains all weights, the other adapters with dropout.
    """
    drawn = str(ROOT / "benchmarks" / "any_settings.py"), "--first", "579", "--seeds", "2"
    printed, ended = typed(tmp_path, *drawn)
    assert ended == 0 and "2 runs drawn, 0 failed" in printed, printed
    assert "method full" in printed and "lora_dropout 0.2" in printed


# ---------------------------------------------------------------- the self-test


def test_a_kill_waits_for_something_to_resume_from(tmp_path: Path) -> None:
    """Guards against a self-test that compares two runs from the beginning."""
    (tmp_path / "last").mkdir()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    content = {"settings": {}, "data": {}, "epoch": 0.0, "wandb_run_id": ""}
    for saved, expected in ((0, False), (2, True)):
        (tmp_path / "last" / "training.json").write_text(json.dumps(content | {"step": saved}))
        assert selftest.is_time_to_kill(tmp_path, 3) is expected
    assert not selftest.is_time_to_kill(tmp_path, 4)


class Forked:
    """A stand-in for `subprocess.Popen` of train.py that need not import everything again."""

    def __init__(self, command: Sequence[str], *, stdout: int, stderr: IO[bytes]):
        self.process = processes.Process(
            target=as_a_process, args=["train", stderr.name, *command[2:]]
        )
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        self.process.join()
        return self.returncode

    def kill(self) -> None:
        self.process.kill()


def test_the_self_test_passes(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of its own, one of which it kills; and nothing of it is left."""
    started = []

    def start(*arguments: Any, **keywords: Any) -> subprocess.Popen[bytes] | Forked:
        started.append(popen if not started else Forked)  # the first one as the user has it
        return started[-1](*arguments, **keywords)

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    outcome = call(train, "--selftest", *flags(settings))
    assert outcome.code == 0, outcome.out + outcome.err
    for fragment in (
        "trained:   4 steps, validation loss",
        "killed:    SIGKILL after step ",
        "resumed:   losses, weights and optimizer state are identical, bit for bit",
        "export:    best loads in Transformers",
        "GB are available",
        "W&B:       off",
        "selftest: passed",
    ):
        assert fragment in outcome.out, outcome.out
    assert re.search(r"a run's checkpoints need [1-9]\.\d MB, ", outcome.out), outcome.out
    assert list(Path(settings["output_dir"]).iterdir()) == []
    assert len(started) >= 3


EXPECTED = selftest.Results(
    losses=[(1, 2.0), (2, 1.0)],
    weights={"model.safetensors": 1},
    optimizer={"state-00001.safetensors": 1},
)


@pytest.mark.parametrize(
    ("what", "value", "fragment"),
    [
        (
            "losses",
            [(1, 2.0), (2, 1.5)],
            "losses of the resumed run differ from the uninterrupted run (step 2: 1.0 and 1.5)",
        ),
        (
            "losses",
            [(1, 2.0)],
            "losses of the resumed run differ from the uninterrupted run (2 and 1 of them)",
        ),
        ("weights", {"model.safetensors": 2}, "weights of .* differ .* (model.safetensors)"),
        (
            "optimizer",
            {"state-00001.safetensors": 2},
            "optimizer of .* differ .* (state-00001.safetensors)",
        ),
    ],
)
def test_the_self_test_sees_what_is_not_identical(
    tmp_path: Path, what: str, value: object, fragment: str
) -> None:
    pattern = ".*".join(map(re.escape, fragment.split(" .* ")))
    with pytest.raises(UserError, match=pattern), selftest.temporary_folder(tmp_path) as folder:
        (folder / "something").touch()
        selftest.check_identical(EXPECTED, replace(EXPECTED, **{what: value}))
    assert list(tmp_path.iterdir()) == []
    selftest.check_identical(EXPECTED, replace(EXPECTED))


def test_the_self_test_says_why_training_fails(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Forked)
    outcome = call(train, *flags(settings | {"model": "nowhere"}), "--selftest")
    outcome.assert_user_error("selftest: training does not work here: error: model 'nowhere'")
    file = Path(settings["output_dir"]) / "file"
    file.touch()
    call(train, *flags(settings | {"output_dir": str(file)}), "--selftest").assert_user_error(
        "file: can't be written"
    )
    file.unlink()
    call(train, *flags(settings | {"dataset": "nowhere"}), "--selftest").assert_user_error(
        "dataset 'nowhere'"
    )
    assert list(Path(settings["output_dir"]).iterdir()) == []


def test_the_self_test_takes_one_row_of_each_question(tmp_path: Path) -> None:
    """Augmented data has many; on both sides of the validation split they would be refused."""
    many = [Problem(f"{n // 10}?", f"{n}\n#### 1") for n in range(600)]
    rows = {"train": [asdict(row) for row in many], "test": [asdict(Problem("test?", "#### 1"))]}
    selftest.write_data(rows, 16, tmp_path / "data")
    rows = load_problems(str(tmp_path / "data"), "train")
    assert len(rows) == len({row.question for row in rows}) == 2 * 16 + selftest.VALIDATION_ROWS


@pytest.mark.parametrize(("count", "size"), [(2, 1), (5, 4), (9, 8), (100, 8)])
def test_the_self_test_leaves_rows_to_train_on(
    settings: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    count: int,
    size: int,
) -> None:
    """Guards against "training does not work here" for a data set of fewer than 9 rows."""
    rows = [{"question": f"{n}?", "answer": "#### 1"} for n in range(count)]
    selftest.write_data({"train": rows, "test": rows[:1]}, 100, tmp_path / "data")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
    selftest.start(make_config(settings), tmp_path, "run")
    assert load_config(tmp_path / "run.yaml", {}).validation_size == size


def test_a_kill_that_comes_too_late_is_tried_again_earlier(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a fast machine, whose finished run would be refused instead of resumed."""
    settings["epochs"] = "2"
    output = Path(settings["output_dir"])
    rows = {
        split: [asdict(row) for row in load_problems(settings["dataset"], split)]
        for split in ("train", "test")
    }
    config, starts = make_config(settings), []

    class Late(Forked):
        """A process of which nothing is seen until it has ended; the first time."""

        def poll(self) -> int | None:
            return self.wait() if len(starts) == 1 else super().poll()

    def start(*arguments: Any, **keywords: Any) -> Forked:
        starts.append(arguments)
        return Late(*arguments, **keywords)

    monkeypatch.setattr(subprocess, "Popen", Forked)
    with selftest.temporary_folder(output) as folder:
        selftest.write_data(rows, config.batch_size, folder / "data")
        expected = selftest.train(config, folder, "expected")
        monkeypatch.setattr(subprocess, "Popen", start)
        killed_after = selftest.train_and_kill(config, folder, "killed", 4)
        assert len(starts) >= 2 and 1 <= killed_after < 4
        selftest.check_identical(expected, selftest.train(config, folder, "killed"))
