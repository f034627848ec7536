"""A run survives its output, a closed terminal and stop signals, and shows its progress."""

import ast
import errno
import io
import itertools
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import flags, step_that
from test_train import STEPS, assert_same_bits, logged, run_folder

import evaluate
import perplexity
import train
from run import config, progress_bar, script, shell, signals, streams, training_json
from run.checkpoint import save_checkpoint

ROOT = Path(config.__file__).parents[1]
PLAIN = {
    key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))
}
TEXT = "It’s 七 half ½ of \ud800"  # the last: half of a letter, which no encoding has


def python(code: str, *before: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own, started by the shell words ``before``."""
    command = [*before, sys.executable, "-c", code]
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "env": PLAIN} | options
    return subprocess.run(command, cwd=ROOT, text=True, timeout=300, **options)


# ---------------------------------------------------------------- output that can't be written


LONG_STORY = """
import logging, pathlib, sys, warnings
from run import errors, script, signals
def story():
    for number in range(3000):
        print("a line of output", number)
    print("to be flushed at the end", end="")
    print("and this", file=sys.stderr)
    warnings.warn("as this")
    logging.error("and that")
    sys.stdout.writelines(["one", "two"])
    pathlib.Path(sys.argv[1]).write_text("finished")
script.run_script(story)
print("after it", end="")
"""


@pytest.mark.parametrize(
    "code", ["1>/dev/full", "1>/dev/full 2>&1", "1>&-", "1>&- 2>&-", "0>&- 1>&- 2>&-", "| true"]
)
def test_what_cannot_be_written_ends_nothing(tmp_path: Path, code: str) -> None:
    """Guards against a run that dies of a full disk under its log, or of a reader that left.

    Even while the interpreter ends.
    """
    file = tmp_path / "story.py"
    file.write_text(LONG_STORY)
    command = f"set -o pipefail; {sys.executable} {file} {tmp_path / 'result'} {code}"
    result = subprocess.run(
        ["bash", "-c", command],
        env=PLAIN | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result
    assert (tmp_path / "result").read_text() == "finished"
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr, result.stderr


def test_a_file_does_not_get_the_number_of_a_closed_output(tmp_path: Path) -> None:
    """Guards against a checkpoint into which the C++ below writes its warnings."""
    file = tmp_path / "checkpoint"
    code = (
        "import os\nfrom run import script\n"
        "def story():\n"
        f"    file = open({str(file)!r}, 'w')\n"
        "    assert os.system('cat && echo from a child && echo from a child >&2') == 0\n"
        "    os.write(1, b'from below'); os.write(2, b'from below')\n"
        "    file.write('mine')\n"
        "script.run_script(story)\n"
    )
    result = python(code, "bash", "-c", 'exec "$@" 0>&- 1>&- 2>&-', "sh")
    assert result.returncode == 0 and file.read_text() == "mine"


def test_what_is_left_at_the_end_goes_nowhere() -> None:
    """Guards against Python 3.13, which reports at its end what it could not write."""
    code = (
        "import atexit, os\nfrom run import script\n"
        # The first to be registered runs last.
        "atexit.register(lambda: os.write(1, b'nor this'))\n"
        "script.run_script(lambda: print('never written', end=''))\n"
    )
    with open("/dev/full", "w") as full:
        result = python(code, stdout=full)
    assert (result.returncode, result.stderr) == (0, "")


class Broken(io.TextIOBase):
    """A stream on which everything fails."""

    def __init__(self, number: int):
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        self.write("")

    def close(self) -> None:
        """When it is collected, which must not fail."""


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a minute pass between any two looks at the clock, so that each step writes a line."""
    minutes = itertools.count(1)
    monkeypatch.setattr(time, "monotonic", lambda: 60.0 * next(minutes))


def code_of(story: Callable[[], None]) -> int:
    try:
        script.run_script(story)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_a_run_without_output_finishes(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(sys, "stdout", Broken(number))
    monkeypatch.setattr(sys, "stderr", Broken(number))
    arguments = flags(settings | {"epochs": "1"})
    assert code_of(lambda: train.main(*train.read_arguments(arguments))) == 0
    best = run_folder(settings) / "best"
    assert training_json.read_description(best)["epoch"] == 1
    assert (
        code_of(
            lambda: evaluate.main(*evaluate.read_arguments(["--ckpt", str(best), "--limit", "2"]))
        )
        == 0
    )
    assert (run_folder(settings) / "eval" / "test" / "scores.json").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 2), (errno.EIO, 2), (errno.EPIPE, 141)]
)
def test_a_result_that_is_only_printed_is_missed_if_it_was_not(
    call,
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    """Guards against an exit code that says all is done where nobody got the result."""
    file = str(tmp_path / "predictions.jsonl")
    Path(file).write_text('{"id": 0, "gold": "1", "completion": "#### 1"}\n')
    arguments = ["--ckpt", settings["model"], "--limit", "2", *flags(settings)]
    for story in (
        lambda: perplexity.main(*perplexity.read_arguments(arguments)),
        lambda: evaluate.main(*evaluate.read_arguments(["--compare", file, file])),
        lambda: train.main(*train.read_arguments([*flags(settings), "--preflight"])),
        lambda: train.main(*train.read_arguments([*flags(settings), "--plan"])),
    ):
        monkeypatch.setattr(sys, "stdout", Broken(number))
        assert code_of(story) == code


@pytest.mark.parametrize("closed", ["1>&-", "0>&- 1>&-", "1</dev/null"])
def test_a_result_printed_to_a_closed_output_is_missed(tmp_path: Path, closed: str) -> None:
    """As in `perplexity.py >&-`; but a script that has written its result to a file is done."""
    for last, code in (("script.check_printed()", 2), ("pass", 0)):
        story = f"from run import script\ndef story():\n    print('result')\n    {last}\n"
        # Twice, as scripts do: the first is for the arguments.
        story += "script.run_script(lambda: None)\nscript.run_script(story)\n"
        result = python(story, "bash", "-c", f'exec "$@" {closed}', "sh")
        assert result.returncode == code, result
        assert result.stderr.startswith("error: standard output: can't be written (") == bool(
            code
        ), result.stderr
        assert result.stderr.count("\n") == bool(code)


def test_streams_are_made_tolerant_once(call, capsys: pytest.CaptureFixture[str]) -> None:
    script.run_script(lambda: print("one"))
    before = sys.stdout, sys.stderr
    script.run_script(lambda: print("two"))
    assert (sys.stdout, sys.stderr) == before and isinstance(sys.stdout, streams.Tolerant)
    assert capsys.readouterr() == ("one\ntwo\n", "")


# ---------------------------------------------------------------- letters


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "utf-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_letter_that_the_terminal_lacks_is_an_escape(environment: dict[str, str]) -> None:
    said = f"print({TEXT!a}), print({TEXT!a}, file=sys.stderr)"
    code = f"import sys\nfrom run import script\nscript.run_script(lambda: ({said}))\n"
    result = python(code, env=PLAIN | environment, encoding="latin-1")
    assert result.returncode == 0, result
    for shown in (result.stdout, result.stderr):
        assert shown.endswith("\\ud800\n")
        assert "\\u4e03" in shown or environment.get("PYTHONIOENCODING") == "utf-8"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_sample_in_any_letters_is_shown(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Guards against a run that ends at its first epoch's sample."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    arguments = train.read_arguments(flags(settings | {"epochs": "1"}))
    assert code_of(lambda: train.main(*arguments, complete=lambda *_: [(TEXT, "eos")])) == 0
    assert b"It\\u2019s \\u4e03" in shown.getvalue() and b"done: " in shown.getvalue()


# ---------------------------------------------------------------- signals


def test_nohup_is_respected(call, settings: dict[str, str]) -> None:
    """What the parent ignores stays ignored: SIGHUP under nohup, Ctrl-C in a background job."""
    ignored = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)

    def step(*arguments: Any) -> train.StepResult:
        for number in ignored:
            os.kill(os.getpid(), number)
        return train.train_step(*arguments)

    outcome = call(train, *flags(settings | {"epochs": "1"}), step=step)
    assert outcome.code == 0 and "done: " in outcome.out
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in ignored)


def test_further_signals_do_not_cut_the_save(call, settings: dict[str, str]) -> None:
    """A closed terminal sends SIGHUP twice, `timeout` SIGTERM, a scheduler SIGUSR1 then SIGTERM."""
    heard: list[bool] = []

    def hang_up() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        heard.append(True)

    def save(*arguments: Any, **keywords: Any) -> None:
        for number in [
            signal.SIGHUP,
            signal.SIGUSR1,
            signal.SIGTERM,
            signal.SIGTERM,
            signal.SIGUSR2,
        ] * len(heard):
            os.kill(os.getpid(), number)
        save_checkpoint(*arguments, **keywords)

    outcome = call(train, *flags(settings), step=step_that(hang_up, at=3), save=save)
    assert outcome.code == 129 and outcome.err.startswith("stopped: SIGHUP after step 3, saved in ")
    assert training_json.read_description(run_folder(settings) / "last")["step"] == 3


REPEATED = """
import os, signal, time
from run import errors, script, signals
def story():
    with signals.StopSignal(same_request_seconds={apart}) as stop:
        for name in {names}:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.001)
    raise errors.Stopped(stop.signal_number, "saved")
script.run_script(story)
"""


@pytest.mark.parametrize(
    ("names", "apart", "at_once"),
    [
        (["SIGHUP", "SIGHUP", "SIGHUP"], 0, False),
        (["SIGUSR1", "SIGTERM"], 0, False),
        (["SIGUSR2", "SIGXCPU", "SIGXCPU"], 0, False),
        (["SIGXCPU", "SIGHUP", "SIGINT", "SIGUSR1"], 0, False),
        (["SIGTERM", "SIGTERM"], 30, False),
        (["SIGTERM", "SIGTERM"], 0, True),
        (["SIGINT", "SIGINT"], 0, True),
        (["SIGTERM", "SIGINT"], 0, True),
        (["SIGHUP", "SIGINT", "SIGTERM"], 0, True),
    ],
)
def test_only_insisting_ends_at_once(names: list[str], apart: float, at_once: bool) -> None:
    """A second Ctrl-C or SIGTERM does, unless both are one request that was sent twice."""
    result = python(REPEATED.format(names=names, apart=apart))
    assert result.returncode == (
        -signal.Signals[names[-1]] if at_once else 128 + signal.Signals[names[0]]
    ), result
    assert result.stderr == ("" if at_once else "stopped: saved\n")


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_signals_outside_of_training(number: int) -> None:
    """In a script, in its clean-up, and in the imports between its two halves."""
    name, kill = signal.Signals(number).name, f"os.kill(os.getpid(), {int(number)})"
    calm = "os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGUSR1)"
    story = f"def story():\n    try:\n        {kill}; time.sleep(9)\n"
    story += f"    finally:\n        {calm}\n        print('clean')\n"
    result = python(
        f"import os, signal, time\nfrom run import script\n{story}script.run_script(story)\n"
    )
    assert result.returncode == 128 + number and result.stdout == "clean\n", result
    said = f"stopped: {name}; what is saved is kept: type the same command again"
    assert result.stderr.startswith(said) and result.stderr.count("\n") == 1
    result = python(
        f"import os, time\nfrom run import script\nscript.run_script(int)\n{kill}\ntime.sleep(9)\n"
    )
    assert (result.returncode, result.stderr) == (128 + number, f"stopped: {name}\n")


IN_A_CALLBACK = """
import os, signal, time, weakref
from run import script
class Something:
    pass
def story():
    one = Something()
    kept = weakref.ref(one, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del one
    time.sleep(9)
{run}
"""


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("script.run_script(story)", "stopped: SIGTERM; what is saved is kept: type the same"),
        ("script.run_script(int)\nstory()", "stopped: SIGTERM\n"),
    ],
)
def test_a_signal_where_nothing_can_be_raised_ends_the_script(run: str, said: str) -> None:
    """Guards against a signal that Python drops with a traceback, since it arrived in the callback
    of a weak reference, of which imports and tensors have many."""
    result = python(IN_A_CALLBACK.format(run=run))
    assert result.returncode == 143 and result.stderr.startswith(said), result
    assert result.stderr.count("\n") == 1


IN_A_CLASS = """
import os, signal
from run.script import run_script
class Attribute:
    def __set_name__(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)
run_script(lambda: type("Owner", (), {"attribute": Attribute()}))
"""


def test_a_signal_while_a_class_is_defined_ends_the_script() -> None:
    """Guards against Python 3.11's "Error calling __set_name__", with a traceback and code 1."""
    result = python(IN_A_CLASS)
    assert result.returncode == 143, result
    assert result.stderr.startswith("stopped: SIGTERM; what is saved is kept: type the same ")
    assert result.stderr.count("\n") == 1


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.01)


HUNG_UP = """
import os, sys, time, pathlib
os.close(os.open(os.ttyname(0), os.O_RDWR))  # the terminal of this session from here on
folder = pathlib.Path(sys.argv.pop(1))
import train
from run.script import run_script
steps = iter(range(1, 100))
def step(*arguments):
    if next(steps) == 5:
        (folder / "in step 5").touch()
        while not (folder / "closed").exists():
            time.sleep(0.005)
    return train.train_step(*arguments)
run_script(lambda: train.main(*train.read_arguments(sys.argv[1:]), step=step))
"""


def test_a_closed_terminal_loses_nothing(call, settings: dict[str, str], tmp_path: Path) -> None:
    """A real terminal that goes away during training, as with a dropped connection.

    It sends SIGHUP, and answers each line with EIO.
    """
    whole = settings | {"run_name": "whole"}
    assert call(train, *flags(whole)).code == 0
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG_UP, str(tmp_path), *flags(settings)],
        cwd=ROOT,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    wait_for(tmp_path / "in step 5")
    os.close(terminal)
    (tmp_path / "closed").touch()
    assert process.wait(timeout=300) == 129
    assert training_json.read_description(run_folder(settings) / "last")["step"] == 5
    outcome = call(train, *flags(settings))
    assert outcome.code == 0 and f"last at step 5 of {STEPS}" in outcome.out
    assert_same_bits(run_folder(settings) / "last", run_folder(whole) / "last")
    assert logged(settings) == logged(whole)


# ---------------------------------------------------------------- the demo's scripts


DEMO = """
import demo, pathlib, sys
from run.script import run_script
demo.ROOT = pathlib.Path(sys.argv[1])
run_script(lambda: (demo.run("child.py"), print("not reached")))
"""
CHILD = f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from run import errors, script, signals
def story():
    with signals.StopSignal() as stop:
        pathlib.Path("ready").touch()
        while stop.signal_number is None:
            time.sleep(0.01)
        time.sleep(0.1)
    pathlib.Path("saved").touch()
    raise errors.Stopped(stop.signal_number, "saved")
script.run_script(story)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("whom", ["demo", "both"])
def test_the_demo_waits_for_what_it_stops(tmp_path: Path, number: int, whom: str) -> None:
    """Guards against a script of the demo that is killed while it saves.

    By Ctrl-C, or by a SIGTERM to the demo alone.
    """
    (tmp_path / "child.py").write_text(CHILD)
    process = subprocess.Popen(
        [sys.executable, "-c", DEMO, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "ready")
    (os.killpg if whom == "both" else os.kill)(process.pid, number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, (out, err)
    assert (tmp_path / "saved").exists() and "not reached" not in out
    assert err == "stopped: saved\n"


@pytest.mark.parametrize(
    ("end", "code", "err"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: child.py was killed by SIGKILL\n"),
        ("sys.exit(143)", 143, ""),
        ("sys.exit(2)", 2, ""),
    ],
)
def test_the_demo_ends_as_its_script_did(tmp_path: Path, end: str, code: int, err: str) -> None:
    (tmp_path / "child.py").write_text(f"import os, signal, sys\n{end}\n")
    result = subprocess.run(
        [sys.executable, "-c", DEMO, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stderr) == (code, err)


# ---------------------------------------------------------------- how far it is


class Clock:
    """Shows what it is set to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress_bar.ProgressBar("training", 168, "step", done=8, clock=clock) as bar:
        for step in range(9, 89):
            clock.now += 4
            bar.update(loss=f"{step / 100:.4f}", tok_s="512")
            if step == 70:
                bar.write("epoch 1: validation")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "training: step 11 of 168, loss 0.1100, tok_s 512, about 0:10:28 left"
    assert lines[1] == "training: step 19 of 168, loss 0.1900, tok_s 512, about 0:09:56 left"
    assert "epoch 1: validation" in lines and len(lines) == 11 and err == ""


def test_what_is_short_writes_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress_bar.ProgressBar("loss", 100, "batch", leave=False, clock=clock) as bar:
        for _ in range(100):
            clock.now += 0.09
            bar.update()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, terminal = Clock(), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", streams.Tolerant(terminal))
    with progress_bar.ProgressBar("training", 3, "step", clock=clock) as bar:
        for _ in range(3):
            clock.now += 100
            bar.update(loss="0.5")
        bar.write("a line")
    assert capsys.readouterr().out == "a line\n"
    assert (
        "training: 100%" in terminal.getvalue()
        and "3/3" in terminal.getvalue()
        and "loss=0.5" in terminal.getvalue()
    )


@pytest.mark.parametrize("script", [train, evaluate, perplexity])
def test_every_long_loop_says_how_far_it_is(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> None:
    hurry(monkeypatch)
    ckpt = [] if script is train else ["--ckpt", settings["model"], "--limit", "3"]
    outcome = call(script, *ckpt, *flags(settings | {"epochs": "1"}))
    assert outcome.code == 0, outcome.err
    expected = {
        train: [
            "training: step 1 of 7, loss ",
            "training: step 7 of 7, loss ",
            "loss: micro-batch 1 of ",
        ],
        evaluate: ["decoding: problem 1 of 3, exact_match ", ", tok_s "],
        perplexity: ["loss: micro-batch 1 of "],
    }
    for fragment in expected[script]:
        assert fragment in outcome.out, outcome.out


# ---------------------------------------------------------------- the command that comes next


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_next_command_can_be_pasted(
    call, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """With blanks, quotes and a dollar in the path; from the scripts' folder and elsewhere."""
    monkeypatch.chdir(tmp_path if elsewhere else ROOT)
    output = tmp_path / "it's $HOME; my runs"
    outcome = call(train, *flags(settings | {"output_dir": str(output), "epochs": "1"}))
    assert outcome.code == 0, outcome.err
    command = outcome.out.rpartition("next: ")[2]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == shlex.split(command)
    assert (
        os.path.samefile(shutil.which(words[0]), sys.executable)
        and (Path.cwd() / words[1]).resolve() == ROOT / "evaluate.py"
    )
    assert words[2:] == ["--ckpt", str(output / "test" / "best")]
    assert call(evaluate, *words[2:], "--limit", "1").code == 0


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ``python`` of an environment that this process seems to run in; PATH has no other."""
    file = tmp_path / "env" / "bin" / "python"
    file.parent.mkdir(parents=True)
    (file.parent / "base").symlink_to(sys.executable)
    for name in ("python", "python3"):
        (file.parent / name).symlink_to("base")
    monkeypatch.setattr(sys, "executable", str(file.with_name("python3")))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    return file


def test_the_next_command_names_an_interpreter_that_has_the_packages(
    interpreter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against the system's python, which lacks them.

    It may be the very file that the environment's links lead to.
    """

    def first() -> str:
        return shell.command_line("x").split()[0]

    other = tmp_path / "other" / "python"
    other.parent.mkdir()
    other.symlink_to(interpreter.with_name("base"))
    assert first() == "env/bin/python3"
    monkeypatch.setenv("PATH", str(other.parent))
    assert first() == "env/bin/python3"
    monkeypatch.setenv("PATH", f"{interpreter.parent}:{other.parent}")
    assert first() == "python"
    monkeypatch.setenv("PATH", str(other.parent))
    for place in (
        other.parent,
        interpreter.parent,
    ):  # there a name alone would be looked for elsewhere
        monkeypatch.chdir(place)
        assert first() == str(interpreter.with_name("python3"))


ODD = [
    "it's $HOME; `ls`",
    "-runs",
    "caf\u00e9",
    "\u4e03",
    "a\nb\tc",
    "back\\slash'",
    "\x1b[0m",
    "caf\udce9",
    "\u00e9f0",
    "",
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_command_for_the_shell_is_the_same_words_again(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Guards against escape sequences for letters that a stream lacks: they name another file."""
    raw = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    )
    print(shell.command_line(*ODD), end="", flush=True)
    shown = raw.getvalue()
    assert b"\n" not in shown and b"\x1b" not in shown
    command = shown.decode(encoding).encode()
    words = subprocess.run(
        ["bash", "-c", b"printf '%s\\0' " + command], capture_output=True, check=True
    ).stdout
    assert [os.fsdecode(word) for word in words.split(b"\0")[1:-1]] == ODD


def test_the_next_command_of_a_folder_that_looks_like_a_flag() -> None:
    words = shlex.split(shell.evaluation_command(Path("-runs/test/best")))
    assert evaluate.read_arguments(words[2:])[0].ckpt == "-runs/test/best"


# ---------------------------------------------------------------- where it runs


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "perplexity.py", "demo.py"])
@pytest.mark.parametrize("lacking", ["yaml", "pydantic", "scipy"])
def test_lacking_packages_are_one_line(script: str, lacking: str) -> None:
    """As with the system's python while the environment is not active.

    Of the first import, and of later ones.
    """
    code = (
        f"import runpy, sys\nsys.modules[{lacking!r}] = None\n"
        f"sys.argv = [{script!r}]\nsys.path.insert(0, '.')\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    result = python(code)
    assert result.returncode == 2 and result.stdout == "", result
    assert (
        result.stderr.startswith(f"error: {sys.executable} lacks {lacking}: ")
        and result.stderr.count("\n") == 1
    )


def test_the_packages_are_those_of_requirements_and_imported() -> None:
    """Guards against a check that forgets one, or asks for one that nothing needs."""
    rooms = ("engine", "grading", "page", "run")
    imported = set()
    for file in (*ROOT.glob("*.py"), *(f for room in rooms for f in (ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [n.name for n in getattr(node, "names", ())]
            )
            imported |= {
                name.partition(".")[0]
                for name in names
                if isinstance(node, ast.Import | ast.ImportFrom)
            }
    own = {file.stem for file in ROOT.glob("*.py")} | set(rooms)
    brought = {"numpy", "huggingface_hub", "tokenizers"}  # by transformers
    # Asked for where they are used.
    optional = {"wandb", "peft", "bitsandbytes", "torchao", "triton", "matplotlib", "jinja2"}
    brought |= {"markupsafe"}  # by jinja2
    assert imported - own - brought - set(sys.stdlib_module_names) - optional == set(
        script.PACKAGES
    )


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "perplexity.py", "demo.py"])
@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (
            "import shutil; sys.modules['fcntl'] = None; sys.platform = 'win32'",
            ["win32 has no file locks", "WSL2"],
        ),
        (
            "sys.version_info = (3, 10, 4, 'final', 0)",
            ["Python 3.10.4 is too old, 3.11 or newer is needed"],
        ),
        ("import os; os.environ['WORLD_SIZE'] = ''", ["WORLD_SIZE is ''", "unset it"]),
        ("import os; os.environ['LOCAL_RANK'] = '-1'", ["LOCAL_RANK is '-1'", "torchrun"]),
    ],
)
def test_an_unsupported_platform_is_one_line(
    script: str, change: str, fragments: list[str]
) -> None:
    """Before any package is imported: an old Python may have none of them."""
    code = (
        f"import runpy, sys\n{change}\n"
        "for name in ('yaml', 'pydantic', 'torch', 'transformers', 'run.config', 'engine'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = [{script!r}]\nsys.path.insert(0, '.')\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    result = python(code)
    assert result.returncode == 2 and result.stdout == "", result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(fragment in result.stderr for fragment in fragments)


@pytest.mark.parametrize(
    "file",
    [
        "train.py",
        "evaluate.py",
        "perplexity.py",
        "augment.py",
        "demo.py",
        "run/errors.py",
        "run/streams.py",
        "run/script.py",
        "run/signals.py",
    ],
)
def test_an_old_python_can_read_as_far_as_its_one_line(file: str) -> None:
    ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))


FAKE = """#!/bin/sh
case "$*" in *ensurepip*) exit {ensurepip};; *venv*) mkdir .venv; exit 1;; *) echo {version};; esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("target", ["demo", "test", "lint"])
@pytest.mark.parametrize(
    ("version", "ensurepip", "fragments"),
    [
        (
            "3.9.2",
            0,
            ["is Python 3.9.2", "3.11 or newer is needed", "make TARGET PYTHON=python3.11"],
        ),
        ("2.7.18", 0, ["is Python 2.7.18"]),
        ("3.1.5", 0, ["is Python 3.1.5"]),
        ("3.12.1", 1, ["has no venv", "python3-venv"]),
        (None, 0, ["can't be run", "make TARGET PYTHON=python3.11"]),
    ],
)
def test_make_says_which_python_it_needs(
    tmp_path: Path, target: str, version: str | None, ensurepip: int, fragments: list[str]
) -> None:
    """Before it makes anything, in the first line."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "python"
    if version:
        fake.write_text(FAKE.format(version=version, ensurepip=ensurepip))
        fake.chmod(0o755)
    alone = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }
    result = subprocess.run(
        ["make", target, f"PYTHON={fake}"],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2 and result.stdout == "", result
    line = result.stderr.splitlines()[0]
    assert line.startswith(f"error: {fake} "), result.stderr
    for fragment in fragments:
        assert fragment.replace("TARGET", target) in line
    assert not (tmp_path / ".venv").exists()
