"""What a user sees: progress, epochs, what to run next, and the look before a run."""

import importlib.util
import io
import itertools
import math
import re
import shlex
import shutil
import statistics
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jobs
import pytest
from conftest import flags, held_by_another_process, make_config, run_folder, tree
from rich.cells import cell_len
from safetensors.torch import load_file, save_file
from test_train import STEPS, measuring, metrics

import evaluate
import plan
import preflight
import train
from engine import device, packing, trial
from engine.device import cpu_kernels
from engine.loading import load_tokenizer
from engine.optimizer import Schedule
from engine.packing import IGNORE
from engine.ranks import ALONE
from grading.next_steps import next_steps
from run import progress_bar, streams, terminal
from run.checkpoint import newest_intact
from run.config import CONFIG_FILE, load_config
from run.files import gigabytes
from run.folder import find_opening
from run.manifest import BEST, FINISHED_FILE, LAST, MANIFEST_FILE, PREVIOUS
from run.opening import newest_as_it_is
from run.progress import Progress
from run.retention import disk_space
from run.shell import evaluation_command
from run.time_left import TimeLeft, count_saves
from run.train_arguments import Look

TRAIN_STEP = train.train_step
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
    left = TimeLeft(steps=10, steps_per_epoch=2, checkpoint_steps=5, clock=clock)
    for step in range(1, 7):
        with left.timed(step):
            pass
        assert left.after(step)[1] == (step == 6)  # when the save after step 5 is over


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
    is_best = shown.startswith("the best")
    assert progress.improve(*now) == is_best
    assert (progress.best_loss, progress.best_exact_match) == (now if is_best else before)


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
    assert end[3].startswith("report: ")
    assert end[4] == f"next: {evaluation_command(best)}" and len(end) == 5


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
    other = output / "other" / "eval" / "validation"
    other.mkdir(parents=True)
    (other / "scores.json").write_text("{}")
    (other / "evaluation.json").write_text('{"data_sha256": "of other rows"}')
    outcome = call(evaluate, "--ckpt", best, "--split", "validation", *typed)
    assert [words[4] for words in commands(outcome.out)] == ["--split=validation"]


def commands(printed: str) -> list[list[str]]:
    """The words of each command below a line that begins with "next, "."""
    lines = printed.splitlines()
    return [
        shlex.split(after)
        for before, after in itertools.pairwise(lines)
        if before.startswith("next, ")
    ]


# ---------------------------------------------------------------- a look before the run


OPENING = find_opening, load_tokenizer, plan.plan_run, plan.schedule_of
TOOLS = preflight.Tools(*OPENING, train.build, train.train_step)


@pytest.fixture
def look(call, settings: dict[str, str]) -> Callable[..., Any]:
    """Calls ``train.py --preflight`` with ``settings`` and these changes."""
    return lambda *argv, **changes: call(train, *flags(settings | changes), "--preflight", *argv)


def wide_lines(text: str) -> list[str]:
    return [line for line in ESCAPES.sub("", text).splitlines() if cell_len(line) > 80]


def test_a_look_without_a_terminal_is_plain_and_writes_nothing(
    look, settings: dict[str, str], tmp_path: Path, problems: list[Any]
) -> None:
    """Guards against colour codes in a log, lines that wrap, and a run folder that is in use."""
    before = tree(tmp_path)
    outcome = look(epochs="3")
    assert outcome.code == 0, outcome.err
    assert tree(tmp_path) == before and not run_folder(settings).exists()
    run = preflight.prospect(make_config(settings | {"epochs": "3"}), ALONE, TOOLS)
    lengths = [len(each.input_ids) for each in run.rows]
    tokens, labels = (
        sum(len(each.labels) - drop * each.labels.count(IGNORE) for each in run.rows)
        for drop in (0, 1)
    )
    assert "\x1b" not in outcome.out and wide_lines(outcome.out) == []
    for shown in (
        "21: 3 epochs of 7",
        "4, 2 in the last of an epoch",
        "begins 43 of 43 rows, not supervised",
        "ends 43 of 43 rows, supervised",
        "only there      43 of 43 rows",
        "0 with more than 256 tokens",
        "micro_batch_tokens 256",
        "learning_rate 0.003, dtype float32, gradient_checkpointing false, max_new_tokens 8",
        "tokens a second",
        f"train 26, with {tokens:,} tokens, of which {labels:,} ({labels / tokens:.1%}) are super",
        "validation 17 left out 0 with",
        f"{statistics.mean(lengths):.0f} tokens on average, median {statistics.median(lengths):g}, "
        f"longest {max(lengths):,}",
        f"Line {run.rows[0].line} of train",
        f"{run.schedule.learning_rate(20):.3g} at the end",
    ):
        assert shown in " ".join(outcome.out.split()) or shown in outcome.out, shown
    counts = re.findall(r"^ +[\d,]+ to +[\d,]+ tokens +([\d,]+)", outcome.out, re.MULTILINE)
    assert sum(int(count) for count in counts) == 26


def test_a_look_counts_the_rows_that_begin_and_end_as_they_should(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against 100 % of rows whose EOS is not learnt, which would write without an end."""
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, piece=str)
    rows = [
        packing.Example([1, 5, 2], [IGNORE, 5, 2]),
        packing.Example([1, 5, 2], [1, 5, IGNORE]),
        packing.Example([5, 1, 2, 6], [IGNORE, 1, 2, 6]),
        packing.Example([1, 2, 5, 2], [IGNORE, 2, 5, 2]),
        packing.Example([1, 1, 5, 2], [IGNORE, 1, 5, 2]),
    ]
    preflight.show_borders(terminal.open_console(), rows, tokenizer)
    shown = " ".join(capsys.readouterr().out.split())
    assert "begins 3 of 5 rows" in shown and "ends 3 of 5 rows" in shown
    assert "only there 3 of 5 rows" in shown


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_look_on_a_terminal_has_colours_unless_they_are_unwanted(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, no_color: str
) -> None:
    """Guards against NO_COLOR that leaves bold letters, and cursor movements."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", streams.Tolerant(shown))
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    # A model that can't be loaded, which is soon done.
    monkeypatch.setattr(train, "build", fail)
    train.main(make_config(settings), wanted=Look.PREFLIGHT)
    text = shown.getvalue()
    assert bool(ESCAPES.search(text)) == (not no_color)
    assert "\x1b" not in ESCAPES.sub("", text) and wide_lines(text) == []
    assert ("^^^" in text) == bool(no_color)  # what is supervised without colours
    assert "not measured    no memory for it" in ESCAPES.sub("", text)


def fail(*_: Any) -> None:
    raise preflight.UserError("no memory for it")


def test_a_look_at_a_model_without_weights_shows_the_rest(
    look, settings: dict[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)
    (base / "model.safetensors").unlink()
    outcome = look(model=str(base))
    assert outcome.code == 0 and "Nothing was written" in outcome.out, outcome.err
    shown = "".join(outcome.out.split())  # a long path is broken
    assert f"notmeasuredmodel{base}:hasnoweightsinsafetensors" in shown
    assert wide_lines(outcome.out) == []


@pytest.mark.parametrize(
    ("argv", "changes", "fragment"),
    [
        ([], {"max_length": "2"}, "max_length 2: no train row is that short"),
        ([], {"dataset": "/nowhere"}, "dataset '/nowhere' is neither a folder here nor a hub id"),
        (["--plan"], {}, "--plan and --preflight exclude each other"),
        (["--selftest"], {}, "--preflight and --selftest exclude each other"),
        (["--devices", "2"], {}, "--devices belongs to --plan"),
    ],
)
def test_a_look_is_refused_as_training_is(
    look, argv: list[str], changes: dict[str, str], fragment: str
) -> None:
    outcome = look(*argv, **changes)
    outcome.assert_user_error(fragment)


@pytest.mark.parametrize("is_complete", [None, False, True], ids=["none", "cut", "complete"])
def test_a_look_says_what_is_there_already(look, stopped: Path, is_complete: bool | None) -> None:
    """Guards against a look that ends a save, or removes one that is being written."""
    step, staged = 8, stopped / f".{LAST}.staged"
    if is_complete is not None:
        shutil.copytree(stopped / PREVIOUS, stopped / f".{PREVIOUS}.removed")
        shutil.copytree(stopped / PREVIOUS, staged)
    if is_complete:
        step = 7
    elif is_complete is False:
        (staged / MANIFEST_FILE).unlink()
    before = tree(stopped)
    outcome = look()
    assert f"has a checkpoint of step {step}" in " ".join(outcome.out.split()), outcome.out
    assert tree(stopped) == before


@pytest.mark.parametrize(
    ("damaged", "is_finished", "found"),
    [
        ([LAST], False, PREVIOUS),
        ([], True, LAST),  # the removal of the state has not begun
        ([LAST], True, None),
        ([LAST, PREVIOUS], True, None),
    ],
)
def test_a_look_finds_what_training_would_go_on_from(
    stopped: Path, damaged: list[str], is_finished: bool, found: str | None
) -> None:
    """Guards against a removal of the state that was cut, and is taken for damage."""
    for name in damaged:
        (stopped / name / MANIFEST_FILE).unlink()
    if is_finished:
        (stopped / FINISHED_FILE).write_text("{}")
    before, expected = tree(stopped), found and stopped / found
    assert newest_as_it_is(stopped) == expected and tree(stopped) == before
    assert newest_intact(stopped) == expected


def test_a_look_at_a_run_in_training_is_refused(look, stopped: Path) -> None:
    """Guards against a look into a folder whose files another process moves and removes."""
    with held_by_another_process(stopped, "claimed(folder, 'auto')"):
        shutil.copytree(stopped / LAST, stopped / f".{LAST}.staged")
        before = tree(stopped)
        look().assert_user_error("another process is training this run", "--run_name")
        assert tree(stopped) == before
    assert look().code == 0


@pytest.mark.parametrize("columns", ["1", "18", "39"])
def test_a_look_on_the_narrowest_terminal_is_whole(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """Guards against a traceback, and facts cut short, where their labels leave no column."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", streams.Tolerant(shown))
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(train, "build", fail)
    train.main(make_config(settings), wanted=Look.PREFLIGHT)
    words = " ".join(ESCAPES.sub("", shown.getvalue()).split())
    assert "not measured no memory for it" in words and "without --preflight." in words


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"learning_rate": "1e-5"}, "learning_rate was "),
        ({"validation_size": "5"}, "cannot resume with these changes: validation_size was "),
        ({"resume": "never"}, "--resume auto resumes from its last; or choose another --run_name"),
    ],
)
def test_a_look_at_a_run_is_refused_as_training_is(
    call, look, settings: dict[str, str], stopped: Path, changes: dict[str, str], fragment: str
) -> None:
    """Guards against a day that is planned by a look, and ends in second five."""
    outcome = look(**changes)
    outcome.assert_user_error(fragment)
    assert call(train, *flags(settings | changes)).err == outcome.err


def test_a_look_at_a_finished_run_or_a_foreign_folder(
    call, look, settings: dict[str, str], tmp_path: Path
) -> None:
    assert call(train, *flags(settings | {"epochs": "1"})).code == 0
    outcome = look(epochs="1")
    outcome.assert_user_error("this run is finished (7 steps): evaluate it")
    for changes, end in (
        ({"keep_state": "false"}, "removes its last and previous (keep_state false)"),
        ({"wandb_artifact": "true"}, "uploads its best (wandb_artifact true)"),
    ):
        look(epochs="1", **changes).assert_user_error(f"the same without --preflight only {end}")
    (tmp_path / "mine" / "test").mkdir(parents=True)
    (tmp_path / "mine" / "test" / "thesis.txt").touch()
    look(output_dir=str(tmp_path / "mine")).assert_user_error("is in use (thesis.txt)")
    (tmp_path / "file").touch()
    look(output_dir=str(tmp_path / "file")).assert_user_error("choose another --output_dir")


def test_a_look_says_that_a_loss_is_not_finite(
    look, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against a speed and a total time of a run that stops in its first step."""
    shutil.copytree(settings["model"], folder := tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shown = " ".join(look(model=str(folder)).out.split())
    fault = "not measured step 1: loss nan, grad_norm nan must be finite, or training stops there"
    assert f"{fault}: copy the model again" in shown and "tokens a second" not in shown


def test_the_look_is_at_what_training_does(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against other rows, micro-batches, rates, saves or sizes than those of the run."""
    packed: list[list[int]] = []
    saved: list[tuple[str, int]] = []
    needed: list[tuple[int, int]] = []

    def pack(rows: Any, *rest: Any) -> Any:
        micro_batches = plainly(rows, *rest)
        packed.append([each.num_tokens for each in micro_batches])
        return micro_batches

    def save(folder: Path, *rest: Any, **keywords: Any) -> None:
        saved.append((folder.name, rest[2]["step"]))
        save_checkpoint(folder, *rest, **keywords)

    plainly, save_checkpoint = packing.pack, train.save_checkpoint
    unpadded = replace(cpu_kernels(with_onednn=False), row_multiple=1)
    monkeypatch.setattr(device, "cpu_kernels", lambda with_onednn: unpadded)
    monkeypatch.setattr(packing, "pack", pack)
    monkeypatch.setattr(train, "check_disk_space", lambda _, *sizes: needed.append(sizes))
    settings |= {"checkpoint_steps": "3", "seed": "5"}
    settings |= {"lr_schedule": "linear", "warmup_ratio": "0.3", "min_lr_ratio": "0.2"}
    assert call(train, *flags(settings), save=save).code == 0
    run = preflight.prospect(make_config(settings | {"run_name": "new"}), ALONE, TOOLS)
    with monkeypatch.context() as counting:  # 689 steps of augmented rows must not take long
        counting.setattr(packing, "collate", None)
        assert trial.filled(run.batches, 7, 256, ALONE) == packed[:7]
    assert max(map(max, packed[:7])) <= 256 and max(map(len, packed[:7])) > 1
    assert needed == [run.sizes]
    key = "train/learning_rate"
    rates = [line[key] for line in metrics(settings) if key in line]
    assert rates == [run.schedule.learning_rate(step) for step in range(14)]
    last = {step for name, step in saved if name == "last" and step}
    assert len(last) == count_saves(2, 7, 3)


@pytest.mark.parametrize(
    ("shape", "warmup", "masked"),
    [("cosine", 0.03, 0.0), ("linear", 0.0, 0.25), ("constant", 1, 0.0)],
)
def test_a_look_at_many_steps_computes_few_of_their_rates(
    settings: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shape: str,
    warmup: float,
    masked: float,
) -> None:
    """Guards against a look that seems to hang, where a run is given too many epochs."""
    run = preflight.prospect(make_config(settings | {"run_name": "new"}), ALONE, TOOLS)
    schedule = Schedule(5000, 0.1, shape, warmup, 0.2)
    rates = [*map(schedule.learning_rate, range(5000))]
    computed: list[int] = []
    original = Schedule.learning_rate

    def learning_rate(self: Schedule, step: int) -> float:
        computed.append(step)
        return original(self, step)

    monkeypatch.setattr(Schedule, "learning_rate", learning_rate)
    capsys.readouterr()
    run = replace(run, schedule=schedule, config=replace(run.config, mask_rate=masked))
    preflight.show_steps(terminal.open_console(), run)
    said = " ".join(capsys.readouterr().out.split())
    assert "steps 5,000: " in said and " 0.1 " in said and said.endswith("step 1 step 5,000")
    first = rates.index(max(rates)) + 1
    assert f"0.1 at most, first in step {first:,}; {shape}; {rates[-1]:.3g} at the end" in said
    assert len(computed) <= terminal.WIDTH
    assert ("masked 25% of the answers' tokens, at the end" in said) == bool(masked)
    assert ("masked" in said) == bool(masked)


def test_supervised_tokens_are_underlined(
    settings: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against marks that are shifted, or end at the end of a line."""
    run = preflight.prospect(make_config(settings | {"run_name": "new"}), ALONE, TOOLS)
    row = max(run.rows, key=lambda row: len(row.input_ids))
    capsys.readouterr()
    preflight.show_tokens(terminal.open_console(), row, run.tokenizer)
    words, marked = [], []
    lines = capsys.readouterr().out.splitlines()[2:]
    while lines:
        tokens = lines.pop(0)
        marks = lines.pop(0) if lines and not lines[0].strip("^ ") else ""
        for match in re.finditer(r"\S+", tokens):
            words.append(match[0])
            under = marks[match.start() : match.end()]
            assert under.strip() in ("", "^" * len(match[0]))
            marked.append("^" in under)
    assert words == [run.tokenizer.piece(index) for index in row.input_ids]
    assert marked == [label != IGNORE for label in row.labels]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_piece_steers_the_terminal_or_breaks_its_line(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="")
    monkeypatch.setattr(sys, "stdout", stream)
    console = terminal.open_console()
    pieces = ["\x1b[2J", "a\rb", "\u202e", "七" * 90, "x" * 200, "[bold]", "\ud800", "▁"] * 20
    terminal.draw_tokens(console, [(piece, True) for piece in pieces])
    terminal.draw_curve(console, [0.5, 1.0, 0.0].__getitem__, 3, 1.0, "step")
    terminal.draw_histogram(console, [1, 5, 5000], "tokens")
    terminal.facts(console, {"folder": "/a" * 200, "run": "七" * 300})
    terminal.lines(console, "七" * 300)
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert not set(text) & {"\x1b", "\r", "\u202e"} and "[bold]" in text
    assert wide_lines(text) == []


@pytest.mark.parametrize("numbers", [[7], [7, 7], [1, 2, 3], [*range(100)], [3, 900, 17, 899]])
def test_a_histogram_counts_each_number_once(numbers: list[int]) -> None:
    bars = terminal.histogram(numbers)
    assert bars[0][0] == min(numbers) and bars[-1][1] >= max(numbers) and len(bars) <= 10
    assert all(bar[1] + 1 == after[0] for bar, after in itertools.pairwise(bars))
    for low, high, count in bars:
        assert count == sum(low <= number <= high for number in numbers)


def test_the_time_is_composed_of_steps_validations_and_saves() -> None:
    """Guards against a total without one of them, and a rate of the slow first step."""
    rows, held_out = [row(1000)] * 10, [row(500)] * 4
    tried = trial.Trial((2.0, 1.5), (60.0, 2.0), (1000, 2000), 512, True, 4000.0)
    facts = trial.time_facts(tried, rows, held_out, 3, 5, (10**9, 3 * 10**9))
    assert facts["training"] == "0:00:30"  # 30,000 tokens at 1,000 a second
    assert facts["validation"].startswith("0:00:02 in 3 epochs")  # 6,000 at 4,000, to be rounded
    assert facts["saves"].startswith("0:00:24 for 24.0 GB, 5 times last and up to 3 times best")
    assert facts["in all"].startswith("about 0:00:56, ")
    small = trial.time_facts(tried, rows, held_out, 3, 5, (10**6, 3 * 10**6))
    assert small["saves"].startswith("0:00:00 for 24.0 MB, ")  # as the disk is said to be needed
    assert "after memory ran out, with micro_batch_tokens 512" in facts["the two steps"]
    one = trial.time_facts(tried, rows, held_out, 1, 1, (10**9, 3 * 10**9))
    assert " in 1 epoch, " in one["validation"]
    assert " 1 time last and up to 1 time best, " in one["saves"]


def row(length: int) -> Any:
    return SimpleNamespace(input_ids=range(length))


def test_a_disk_is_measured_before_the_folder_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run has there already counts, the slices of several processes too."""
    there, missing = tmp_path, tmp_path / "not" / "yet"
    assert disk_space(missing, 5, 7)[0] == 5 + 3 * 12
    # Others write to the disk meanwhile.
    assert disk_space(missing, 5, 7)[1] == pytest.approx(disk_space(there, 5, 7)[1], rel=0.01)
    assert not missing.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    for place in ("best", "last/state", "previous/state", "eval/test"):
        (there / place).mkdir(parents=True)
        (there / place / "file").write_bytes(bytes(100))
    assert disk_space(there, 5, 7)[1] == 10 + 3 * 100


def test_a_look_says_whether_the_disk_is_large_enough(
    settings: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = preflight.prospect(make_config(settings), ALONE, TOOLS)
    run = replace(run, sizes=(2 * 10**9, 3 * 10**9))
    (run.folder / BEST).mkdir(parents=True)
    (run.folder / BEST / "file").write_bytes(bytes(100))
    for missing, verdict in ((0, "enough"), (1, "NOT ENOUGH: training would be refused")):
        free = 17 * 10**9 - 100 - missing
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        capsys.readouterr()
        preflight.show_disk(terminal.open_console(), run)
        said = " ".join(capsys.readouterr().out.split())
        assert said.endswith(
            "needed 17.0 GB: best 2.0 GB; last, previous and one being written 5.0 GB each "
            f"available 17.0 GB, {verdict}"
        )


def test_a_look_times_the_run_itself(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a time of other rows, epochs or saves."""
    run = preflight.prospect(make_config(settings | {"checkpoint_steps": "3"}), ALONE, TOOLS)
    built: list[Any] = []
    taken: list[Any] = []
    monkeypatch.setattr(preflight, "try_steps", lambda *arguments: arguments)
    monkeypatch.setattr(preflight, "time_facts", lambda *arguments: taken.extend(arguments) or {})
    tools = replace(TOOLS, build=lambda *arguments: built.extend(arguments) or (None, None))
    preflight.show_time(terminal.open_console(), run, tools)
    assert built[2:] == [run.planned, run.rows + run.held_out, run.prompts, ALONE]
    assert len(run.prompts) == len(run.held_out) == 17 and taken[0][6] == run.held_out
    assert taken[1:] == [run.rows, run.held_out, 2, count_saves(2, 7, 3), run.sizes]


def test_a_look_counts_the_micro_batches_of_an_epoch(
    settings: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against an epoch without its last step, and `1 to 1` of them in each."""
    run = preflight.prospect(make_config(settings | {"run_name": "new"}), ALONE, TOOLS)
    for budget in (256, 4096):
        filled = trial.filled(run.batches, 7, budget, ALONE)
        counts = sorted({*map(len, filled)})
        assert len(counts) == (2 if budget == 256 else 1) and len(run.rows) == 26
        capsys.readouterr()
        planned = replace(run.planned, micro_batch_tokens=budget)
        preflight.show_batches(terminal.open_console(), replace(run, planned=planned))
        number = " to ".join(map(str, counts))
        shown = f"in a step {number}, {sum(map(len, filled))} in the first epoch"
        assert shown in " ".join(capsys.readouterr().out.split())


def test_a_look_at_the_settings_of_config_yaml_says_so(
    settings: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = preflight.prospect(make_config(settings | {"run_name": "new"}), ALONE, TOOLS)
    capsys.readouterr()
    run = replace(run, config=load_config(CONFIG_FILE, {}))
    preflight.show_run(terminal.open_console(), run)
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("llama-2-7b-gsm8k: new settings those of config.yaml")


def step_of_both(
    model: Any, optimizer: Any, batch: Any, rate: float, budget: int, norm: Any, packer: Any
) -> Any:
    """A step of which each of two processes has its part, and says how many micro-batches."""
    mine = packer.pack(batch, budget, model.kernels)
    print(f"packed {sum(not each.is_filler for each in mine)}")
    result = TRAIN_STEP(model, optimizer, batch, rate, budget, norm, packer)
    labels = sum(len(row.labels) - row.labels.count(IGNORE) for row in batch)
    assert model.ranks.size == 2 and result.num_labels == labels
    return result


def look_together(settings: dict[str, str]) -> None:
    train.train_step = step_of_both
    train.run_script(train.main, make_config(settings), False, Look.PREFLIGHT)


def test_of_several_processes_one_shows_what_all_measure(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against each measuring all rows, or one alone, and a count of what one would pack."""
    settings["batch_size"] = "13"  # two steps an epoch, which are those that are tried
    first, second = jobs.run(2, tmp_path / "printed", look_together, settings)
    counts = [int(count) for count in re.findall(r"packed (\d+)", first.out)]
    number = " to ".join(str(count) for count in sorted({*counts}))
    shown = f"in a step {number} on each of 2 devices, {sum(counts)} in the first epoch"
    assert len(counts) == 2 and shown in " ".join(first.out.split()), first.out
    sizes = preflight.prospect(make_config(settings), ALONE, TOOLS).sizes
    assert re.search(rf"best\s+{gigabytes(sizes[0])};", first.out), sizes  # of all slices together
    assert re.search(r"then\s+[\d,]+\s+tokens\s+a\s+second", first.out)
    assert second.out == first.err == second.err == ""


# ---------------------------------------------------------------- the picture of a terminal


@pytest.fixture(scope="module")
def picture_terminal() -> ModuleType:
    file = Path(preflight.__file__).parent / "benchmarks" / "picture_terminal.py"
    spec = importlib.util.spec_from_file_location("picture_terminal", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_picture_shows_what_is_left_on_the_terminal(picture_terminal: ModuleType) -> None:
    """Guards against each state of a bar below the other, and fonts from the network."""
    written = (
        "\x1b[1mbold\x1b[0m\r\nstep 1 of 10\rstep 2\x1b[K\n\rloss: 50%\x1b[A\rstep 3\n\r"
        "\x1b[K\x1b[A\rdone\x1b[K\r\nnext"
    )
    lines = picture_terminal.screen(written)
    assert [ESCAPES.sub("", line) for line in lines] == ["bold", "done", "next"]
    assert "\x1b[1m" in lines[0]
    svg = picture_terminal.picture([*lines, "<script>"], "python train.py")
    texts = {(element.text or "").replace("\xa0", " ") for element in ET.fromstring(svg).iter()}
    assert {"bold", "done", "next", "<script>", "python train.py"} <= texts
    assert "@font-face" not in svg and "<script>" not in svg and "url(http" not in svg


def test_the_commands_for_a_folder_that_looks_like_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Path("-runs") / run / "eval" / "test" for run in ("other", "mine")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text("{}")
        (folder / "evaluation.json").write_text('{"data_sha256": "0"}')
    given = {"split": None, "output": folders[1], "config": "-x.yaml"}
    found = next_steps("-runs/mine/best", folders[1], given, is_sampled=False)
    sampling, comparison = (shlex.split(line)[2:] for line in found[1::2])
    Path("-x.yaml").write_text("epochs: 1\n")
    arguments, _ = evaluate.read_arguments(sampling)
    assert (arguments.ckpt, arguments.output) == ("-runs/mine/best", folders[1])
    arguments, _ = evaluate.read_arguments(comparison)
    assert arguments.compare == [folder / "predictions.jsonl" for folder in folders]


def test_nothing_is_compared_with_evaluations_of_no_run(tmp_path: Path) -> None:
    """Guards against another evaluation that happens to lie somewhere near, or behind a link."""
    for name in ("mine/out/test", "other/out/test", "mine/eval/test", "other/eval/test"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "scores.json").write_text("{}")
        (tmp_path / name / "evaluation.json").write_text('{"data_sha256": "0"}')
    flags_given = {"split": None, "config": None}
    found = [
        next_steps("best", tmp_path / "mine" / room / "test", flags_given, True)
        for room in ("out", "eval")
    ]
    assert found[0] == []
    assert found[1][0] == f"next, test the difference from {tmp_path / 'other' / 'eval' / 'test'}:"
