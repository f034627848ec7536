"""What a user sees: progress, epochs, and what to run next."""

import io
import itertools
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import flags, run_folder
from test_train import STEPS, measuring

import evaluate
import train
from run import progress_bar
from run.progress import Progress
from run.shell import evaluation_command
from run.time_left import TimeLeft, count_saves

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours, and nothing that moves the cursor


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


# ---------------------------------------------------------------- how long it takes


def test_the_time_left_counts_validations_and_saves() -> None:
    """Guards against an estimate from the steps alone, and one that repeats the slow first step."""
    clock = Clock()
    left = TimeLeft(steps=20, steps_per_epoch=10, checkpoint_steps=4, clock=clock)
    pauses = {4: 5.0, 8: 7.0, 10: 30.0}
    seen = {}
    for step in range(1, 13):
        with left.timed(step):
            clock.now += 50.0 if step == 1 else 2.0
        seen[step] = left.after(step)
        clock.now += pauses.get(step, 0.5)
    assert seen[1] == (19 * 50.0, False)
    assert seen[2] == (18 * 2.5, False)
    # At the end of step 9 its own pause is not over, and neither is that of any epoch.
    assert seen[9] == (11 * 2.5 + 2 * 6.0, False)
    # Saves after steps 12 and 16; the one after step 20 belongs to the end of the epoch.
    assert seen[12] == (8 * 2.5 + 2 * 6.0 + 30.0, True)


@pytest.mark.parametrize("every", [None, 1, 3, 4, 5, 10, 25])
def test_the_saves_to_come_are_those_of_a_run(every: int | None) -> None:
    """Guards against a save that is counted twice at the end of an epoch."""
    saved = {step for step in range(1, 21) if step % 10 == 0 or (every and step % every == 0)}
    assert count_saves(2, 10, every) == len(saved)
    left, clock = TimeLeft(20, 10, every, clock := Clock()), clock
    for step in range(1, 21):
        with left.timed(step):
            clock.now += 1.0
        clock.now += 100.0 if step in saved else 0.0
        assert step < 20 or left.after(20) == (100.0, True)


@pytest.mark.parametrize("is_all", [True, False])
def test_the_bar_shows_the_time_left(monkeypatch: pytest.MonkeyPatch, is_all: bool) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar.ProgressBar("training", 3, "step", clock=Clock()) as bar:
        bar.update(left=(3725.0, is_all), loss="0.5000", tok_s="14800")
        bar._bar.refresh()
    line = shown.getvalue().split("\r")[-2]
    assert f"<1:02:05{'' if is_all else '+'}, loss=0.5000, tok_s=14800]" in line
    assert "| 1/3 [" in line and len(line) <= 80


def test_training_says_how_long_it_takes(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a clock that does not reach the steps and the pauses of a run."""
    minutes = itertools.count(1)
    monkeypatch.setattr(time, "monotonic", lambda: 60.0 * next(minutes))
    outcome = call(train, *flags(settings))
    lines = [line for line in outcome.out.splitlines() if line.startswith("training: step ")]
    assert len(lines) == STEPS
    # A step takes a minute here, and a pause two, since the bar looks at the clock as well.
    assert lines[3].endswith(f", more than {progress_bar.clock(60 * (STEPS - 4) * 3)} left")
    assert all(", about " in line for line in lines[7:]), lines


# ---------------------------------------------------------------- lines instead of a bar


def test_a_line_is_there_as_soon_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an hour of silence under nohup, as a pipe or a file is buffered in blocks."""
    clock, file = Clock(), tmp_path / "log"
    with file.open("w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        with progress_bar.ProgressBar("training", 9, "step", clock=clock) as bar:
            clock.now += 60
            bar.update(left=(480.0, True))
            assert file.read_text() == "training: step 1 of 9, about 0:08:00 left\n"
            bar.write("epoch 1 of 1")
            assert file.read_text().endswith("left\nepoch 1 of 1\n")


@pytest.mark.parametrize("variable", [("TERM", "dumb"), ("JPY_PARENT_PID", "1")])
def test_no_bar_where_it_cannot_be_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    """Guards against a bar below a bar in a notebook, whose commands have a terminal."""
    clock, shown = Clock(), Terminal()
    monkeypatch.setenv(*variable)
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar.ProgressBar("training", 9, "step", clock=clock) as bar:
        clock.now += 60
        bar.update()
    assert shown.getvalue() == ""
    assert capsys.readouterr().out == "training: step 1 of 9, about 0:08:00 left\n"


# ---------------------------------------------------------------- an epoch


@pytest.mark.parametrize(
    ("before", "now", "shown"),
    [
        ((None, None), (0.5, None), "the best so far"),
        ((0.5, None), (0.4877, None), "the best so far (loss -0.012)"),
        ((0.5, None), (0.5, None), "not the best (loss +0)"),
        ((0.5, None), (0.51, None), "not the best (loss +0.01)"),
        ((0.5, 0.4), (0.6, 0.425), "the best so far (exact match +2.50 points, loss +0.1)"),
        ((0.5, 0.4), (0.4, 0.375), "not the best (exact match -2.50 points, loss -0.1)"),
        ((0.5, 0.4), (0.4, 0.4), "the best so far (exact match +0.00 points, loss -0.1)"),
    ],
)
def test_an_epoch_is_compared_with_the_best_before(before: Any, now: Any, shown: str) -> None:
    """Guards against a line that calls an epoch the best which is not saved as such."""
    progress = Progress(best_loss=before[0], best_exact_match=before[1])
    assert progress.standing(*now) == shown
    assert progress.improve(*now) == shown.startswith("the best")


def test_each_epoch_has_a_line_and_the_end_says_what_is_next(
    call, settings: dict[str, str]
) -> None:
    """Guards against a change that is lost on the way, and files that are not where it says."""
    settings |= {"epochs": "3"}
    outcome = call(train, *flags(settings), measure=measuring(3.0, 2.0, 2.5))
    lines = [line for line in outcome.out.splitlines() if line.startswith("epoch ")]
    assert lines == [
        "epoch 1 of 3: validation loss 3.0000000, perplexity 20.085537, the best so far",
        "epoch 2 of 3: validation loss 2.0000000, perplexity 7.3890561, the best so far (loss -1)",
        "epoch 3 of 3: validation loss 2.5000000, perplexity 12.182494, not the best (loss +0.5)",
    ]
    end = outcome.out[outcome.out.index("done: ") :].splitlines()
    best = run_folder(settings) / "best"
    assert end[0] == "done: best validation loss 2.000000"
    assert [line.split(": ")[1].strip() for line in end[1:3]] == [
        str(best),
        str(run_folder(settings) / "metrics.jsonl"),
    ]
    assert all(Path(line.split(": ")[1].strip()).exists() for line in end[1:3])
    assert end[3] == f"next: {evaluation_command(best)}" and len(end) == 4


def test_the_commands_after_an_evaluation_run_as_they_stand(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against a command that another setting, a blank in a path or other rows refuse."""
    output = tmp_path / "it's $HOME; my runs"
    typed = ["--limit", "3", "--max_new_tokens", "5", "--output_dir", str(output)]
    settings |= {"output_dir": str(output), "epochs": "1"}
    assert call(train, *flags(settings)).code == 0
    best = str(run_folder(settings) / "best")
    alone = commands(call(evaluate, "--ckpt", best, *typed).out)
    assert len(alone) == 1 and alone[0][-1] == "--samples=8"
    model = settings["model"]
    others = ["--dataset", settings["dataset"], "--dtype", "float32"]
    outcome = call(evaluate, "--ckpt", model, *others, *typed)
    sampling, comparison = commands(outcome.out)
    for words in (alone[0], sampling):
        outcome = call(evaluate, *words[2:])
        assert outcome.code == 0 and "maj@8" in outcome.out, outcome.err
        assert "--samples" not in outcome.out.rpartition("results: ")[2]
    outcome = call(evaluate, *comparison[2:])
    assert outcome.code == 0 and "on the 3 problems in common" in outcome.out, outcome.err
    # Other rows can't be compared, so that is not proposed.
    elsewhere = ["--split", "validation", "--limit", "2", *typed[2:]]
    assert len(commands(call(evaluate, "--ckpt", best, *elsewhere).out)) == 1


def commands(printed: str) -> list[list[str]]:
    """The words of each command below a line that begins with "next, "."""
    lines = printed.splitlines()
    return [
        shlex.split(after)
        for before, after in itertools.pairwise(lines)
        if before.startswith("next, ")
    ]
