"""A tiny real Llama and its tokenizer, small data sets, and a way to call the scripts."""

import gc
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests need no network, and must not reach for it
os.environ["WANDB_MODE"] = "disabled"
# Models this small are slower with a second thread, and two processes test side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A GPU, or a driver that is too old for this PyTorch, changes no test.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import engine  # noqa: F401  (before Transformers, which it keeps quiet)

# isort: split

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import standin
import train
from engine.loading import load_model, load_tokenizer
from engine.tokenizer import Tokenizer
from grading.dataset import Problem
from page import write
from run import config, manifest, training_json
from run.manifest import LAST, PREVIOUS
from run.script import run_script
from run.signals import STOP_SIGNALS

# No test cuts the power, and small runs would often wait for the disk. What is synced, when and in
# which order is checked where tests replace this again.
os.fsync = os.fstat

ROOT = Path(train.__file__).parent
PROMPT = "Question: {question}\nAnswer:"

# Processes that a test starts or kills: forked, each in the state of a new one, from a process that
# has only done the slow imports (`forking`). Use its Process, or start_method="forkserver" with
# torch.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.forking"])

# What GSM8K holds beside plain ASCII, and what has broken other projects.
PECULIAR = [
    Problem("It’s 3 – 2 × €5 − 1?", "It’s <<3-2=1>>1.\n#### 1"),
    Problem("A tab\there, a\u00a0hard space, a\u200bzero width.", "½ of 2 is <<1/2*2=1>>1\n#### 1"),
    Problem("Line\u2028separator in one question?", "Yes.\u2028No.\n#### -10"),
    Problem("How much is a million?", "It is 1,450,000.\n#### 1,450,000"),
    Problem("Leading  double  spaces?", "  Two spaces first.\n#### 7"),
    Problem("A newline\nin the question?", "A\n\nB\n#### 0.5"),
    Problem("Is </s> an end, or <s> a beginning?", "No: </s> is text here.\n#### 3"),
    Problem("七 + 八 = ?", "十五\n#### 15"),
    Problem("#hashes# and 12%?", "#1 is <<12*1=12>>12%\n#### 12"),
]


@pytest.fixture(autouse=True)
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no script in this process write a report, which takes longer than a tiny run.

    The tests of the reports replace this fixture.
    """
    monkeypatch.setattr(write, "write_report", lambda *_: "left out in tests")


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return [Problem(**row) for row in standin.make_problems(120, seed=1)] + PECULIAR


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, problems: list[Problem]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    standin.make_tokenizer(
        [f"Question: {p.question}\nAnswer: {p.answer}" for p in problems], folder, vocab_size=420
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a Llama of two layers with random weights, in Transformers' own attention."""

    def make(
        vocab_size: int, *, seed: int = 0, std: float = 0.1, **settings: Any
    ) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        shape |= {
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": std,
        }
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, **(shape | settings))
        ).eval()

    return make


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Tokenizer,
    make_llama: Callable[..., LlamaForCausalLM],
) -> Path:
    """A base model as a user has it: weights and tokenizer in Hugging Face format."""
    return write_model(tmp_path_factory.mktemp("model"), tokenizer, make_llama(len(tokenizer)))


@pytest.fixture(scope="session")
def wide_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Tokenizer,
    make_llama: Callable[..., LlamaForCausalLM],
) -> Path:
    """One with weights large enough for 8-bit moments, and rows of whole blocks of 4 bits."""
    made = make_llama(len(tokenizer), hidden_size=64, intermediate_size=128)
    return write_model(tmp_path_factory.mktemp("wide"), tokenizer, made)


def write_model(folder: Path, tokenizer: Tokenizer, model: LlamaForCausalLM) -> Path:
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def model(model_folder: Path) -> LlamaForCausalLM:
    """The base model with packed attention, in float32."""
    return load_model(model_folder, torch.float32, torch.device("cpu"))


@pytest.fixture
def model64(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """The base model with packed attention, in float64 throughout.

    Transformers' RMSNorm always computes in float32, which would hide faults below 1e-8.
    """

    def forward(norm: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        return (
            norm.weight
            * hidden
            * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    return load_model(model_folder, torch.float64, torch.device("cpu"))


def write_rows(file: Path, problems: list[Problem]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"question": problem.question, "answer": problem.answer} for problem in problems)
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory, problems: list[Problem]) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", problems[-43:])
    write_rows(folder / "test.jsonl", problems[:12])
    return folder


@pytest.fixture(scope="session")
def many_rows(tmp_path_factory: pytest.TempPathFactory, problems: list[Problem]) -> Path:
    """The same test rows, and more of those to train on: 117."""
    folder = tmp_path_factory.mktemp("many")
    write_rows(folder / "train.jsonl", problems[12:])
    write_rows(folder / "test.jsonl", problems[:12])
    return folder


@pytest.fixture
def settings(model_folder: Path, data_folder: Path, tmp_path: Path) -> dict[str, str]:
    """Flags of a run that trains 43 - 17 = 26 rows: 7 steps an epoch, the last window partial."""
    return small_run(model_folder, data_folder, tmp_path)


def small_run(model_folder: Path, data_folder: Path, folder: Path) -> dict[str, str]:
    return {
        "model": str(model_folder),
        "dataset": str(data_folder),
        "output_dir": str(folder / "runs"),
        "run_name": "test",
        "max_length": "256",
        "validation_size": "17",
        "epochs": "2",
        "batch_size": "4",
        "micro_batch_tokens": "256",
        "learning_rate": "3e-3",
        "dtype": "float32",
        "gradient_checkpointing": "false",
        "max_new_tokens": "8",
        "wandb_mode": "disabled",
    }


def flags(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def make_config(settings: dict[str, str]) -> config.Config:
    return config.load_config(config.CONFIG_FILE, settings)


def seal(folder: Path) -> None:
    """Write the manifest again, so that whatever is in the checkpoint now counts as saved."""
    with manifest.Seal(folder) as seal:
        (folder / manifest.MANIFEST_FILE).unlink(missing_ok=True)
        seal.add_new_files()


class Outcome:
    """How a script ended: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def assert_user_error(self, *fragments: str) -> None:
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        for fragment in fragments:
            assert fragment in self.err, (fragment, self.err)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Runs a script in this process just as its last lines do."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def run(script: ModuleType, *argv: str, **parts: Any) -> Outcome:
        """``parts`` replace parts of the script's story; see its ``main``."""

        def story() -> None:
            parsed = script.read_arguments(list(argv))
            script.main(*(parsed if isinstance(parsed, tuple) else (parsed,)), **parts)

        capsys.readouterr()
        code = 0
        try:
            run_script(story)
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def as_a_process(script: str, out: str, *argv: str) -> None:
    """The target of one of `processes`: runs a script just as its last lines do.

    Args:
        script: the module's name.
        out: the file to which standard output and standard error are appended.
    """
    stream = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    module = importlib.import_module(script)

    def story() -> None:
        parsed = module.read_arguments(list(argv))
        module.main(*(parsed if isinstance(parsed, tuple) else (parsed,)))

    run_script(story)


def run_folder(settings: dict[str, str]) -> Path:
    return Path(settings["output_dir"]) / settings["run_name"]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def step_that(action: Callable[[], object], at: int) -> Callable[..., train.StepResult]:
    """`train.train_step`, with a call of ``action`` before its call number ``at`` (from 1)."""
    calls = itertools.count(1)

    def step(*arguments: Any) -> train.StepResult:
        if next(calls) == at:
            action()
        return train.train_step(*arguments)

    return step


def with_model(arrange: Callable[[Any], object]) -> Callable[..., train.StepResult]:
    """`train.train_step`, with a call of ``arrange`` with the model before the first step."""
    calls = itertools.count(1)

    def step(model: Any, *rest: Any) -> train.StepResult:
        if next(calls) == 1:
            arrange(model)
        return train.train_step(model, *rest)

    return step


def named(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The first module of ``model`` with this name, wherever it is."""
    return next(module for path, module in model.named_modules() if path.endswith(name))


class Killed(Exception):
    """Raised where a test lets training die, as by a kill: nothing catches it."""


def kill() -> None:
    raise Killed


def die_and_resume(settings: dict[str, str], at: int) -> int:
    """Let a run die in step ``at``, and finish it; returns the step of the save it goes on from."""
    with pytest.raises(Killed):
        train.main(make_config(settings), step=step_that(kill, at))
    step = training_json.read_description(run_folder(settings) / LAST)["step"]
    torch.manual_seed(12345)  # another process would not have this one's random state
    train.main(make_config(settings))
    return step


@pytest.fixture(scope="session")
def whole(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `stopped`'s run that nothing interrupted. No test changes it."""
    settings = small_run(model_folder, data_folder, tmp_path_factory.mktemp("whole"))
    train.main(make_config(settings | {"checkpoint_steps": "4"}), report=lambda *_: None)
    return run_folder(settings)


@pytest.fixture(scope="session")
def stopped_once(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of `stopped`'s run, which each test gets a copy of."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = small_run(model_folder, data_folder, folder) | {"checkpoint_steps": "4"}
    with pytest.raises(Killed):
        train.main(make_config(settings), step=step_that(kill, at=9))
    steps = [
        training_json.read_description(run_folder(settings) / name)["step"]
        for name in (LAST, PREVIOUS)
    ]
    assert steps == [8, 7]
    return folder / "runs"


@pytest.fixture
def stopped(stopped_once: Path, settings: dict[str, str]) -> Path:
    """The folder of a run that died in step 9 of 14, with last of step 8 and previous of step 7."""
    settings["checkpoint_steps"] = "4"
    shutil.copytree(stopped_once, settings["output_dir"])
    return run_folder(settings)


def gain(model: Any, optimizer: torch.optim.Optimizer, micro_batches: list, steps: int) -> float:
    """By how much the loss of one batch falls in so many steps on it, in nats per token."""
    model.train()
    losses = []
    for _ in range(steps):
        nats, num_labels, _ = train.accumulate_gradients(model, micro_batches, 1.0)
        losses.append(nats / num_labels)
        optimizer.step()
        optimizer.zero_grad()
    return losses[0] - losses[-1]


@contextmanager
def held_by_another_process(folder: Path, how: str = "locked(folder, 'held')") -> Iterator[None]:
    """In its context, a process holds ``folder``; at the end of it, that process is killed.

    Args:
        how: the context that it enters.
    """
    code = (
        "import pathlib, sys\n"
        "from run.folder import claimed\n"
        "from run.locks import locked\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        f"with {how}:\n"
        "    print('in', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "in\n"
    yield
    holder.kill()
    holder.communicate()


@pytest.fixture
def dead_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def real_folder(variable: str) -> Path:
    """The folder of real data that an environment variable names. Without it the test skips."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not say where the real one is")
    return Path(os.environ[variable])


def pytest_collection_finish() -> None:
    """Lets no later `gc.collect` look through all that was imported, which takes 0.3 s."""
    gc.collect()
    gc.freeze()
