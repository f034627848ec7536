"""Nothing that is read is executed, nothing leaves its folder, no secret gets into a file."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROMPT, flags, make_config, seal

import evaluate
import perplexity
import train
from grading.dataset import Problem
from run import config, paths

ROOT = Path(config.__file__).parents[1]
ROOMS = ("engine", "grading", "run")
PRODUCT = sorted([*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))])

# ---------------------------------------------------------------- the code itself

FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
    "code",
}


def offences(source: str) -> list[str]:
    """What of the forbidden stands in Python ``source``, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [
                f"{line}: import {name}"
                for name in names
                if name.split(".")[0] in FORBIDDEN_MODULES
            ]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in FORBIDDEN_CALLS or (name == "compile" and len(node.args) == 3):
                found.append(f"{line}: {name}")
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append(f"{line}: torch.load without weights_only=True")
            if (
                "trust_remote_code" in keywords
                or keywords.get("weights_only") == "False"
                or keywords.get("shell") == "True"
            ):
                found.append(f"{line}: {name}({keywords})")
            if keywords.get("use_safetensors") == "False" or keywords.get("allow_pickle") == "True":
                found.append(f"{line}: {name}({keywords})")
        if isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "weights_only"):
            found.append(f"{line}: {node.value!r}")  # as a key of keywords
    return found


@pytest.mark.parametrize("file", PRODUCT, ids=[file.name for file in PRODUCT])
def test_nothing_that_could_execute_what_is_read(file: Path) -> None:
    assert offences(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "x = exec(text)",
        "import pickle",
        "from pickle import loads",
        "import torch, dill as d",
        "def f():\n    import marshal",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "AutoModel.from_pretrained(name, **{'trust_remote_code': True})",
        "yaml.load(text, Loader=yaml.Loader)",
        "numpy.load(file, allow_pickle=True)",
        "from_pretrained(folder, use_safetensors=False)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "compile(text, 'x', 'exec')",
    ],
)
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert offences(source)


def test_dependencies_are_above_the_floor() -> None:
    """CVE-2025-32434 and CVE-2026-24747 (torch), CVE-2026-1839 (transformers)."""
    pinned = dict(
        line.split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line
    )
    for name, floor in (("torch", (2, 11)), ("transformers", (5,))):
        assert tuple(map(int, pinned[name].split(".")))[: len(floor)] >= floor


# ---------------------------------------------------------------- what is read


class Payload:
    """What pickle would execute on loading."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def payload(tmp_path: Path):
    mark = tmp_path / "executed"
    content = pickle.dumps(Payload(mark))
    pickle.loads(content)
    assert mark.exists()  # it is a real one
    mark.unlink()
    yield content
    assert not mark.exists()


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("script", ["train", "evaluate", "perplexity"])
def test_a_pickle_in_any_file_of_a_checkpoint_is_never_executed(
    call, settings: dict[str, str], payload: bytes, script: str, sealed: bool
) -> None:
    """In place of each file, and under the names that PyTorch and Transformers would load."""
    assert call(train, *flags(settings | {"epochs": "1"})).code == 0
    folder = Path(settings["output_dir"]) / "test"
    names = {path.name for path in (folder / "last").iterdir()}
    others = {
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "added_tokens.json",
    }
    for name in sorted(names | others):
        copy = folder.with_name(f"copy-{name}")
        shutil.copytree(folder, copy)
        for checkpoint in ("last", "best", "previous"):
            if (copy / checkpoint).is_dir():
                (copy / checkpoint / name).write_bytes(payload)
                if sealed and name != "manifest.json":
                    seal(copy / checkpoint)
        if script == "train":
            outcome = call(train, *flags(settings | {"epochs": "1", "run_name": copy.name}))
        else:
            scripts = {"evaluate": evaluate, "perplexity": perplexity}
            outcome = call(scripts[script], "--ckpt", str(copy / "last"), "--limit", "2")
        assert outcome.code in (0, 2), (name, outcome.err)
        assert outcome.err == "" or outcome.err.startswith(
            ("error: ", "\r", "decoding", "verif")
        ), (name, outcome.err)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ],
)
def test_a_pickle_in_any_file_of_a_base_model_is_never_executed(
    call, settings: dict[str, str], payload: bytes, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(settings["model"], folder)
    (folder / name).write_bytes(payload)
    call(train, *flags(settings | {"model": str(folder)})).assert_user_error("base")


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_a_pickle_as_data_is_never_executed(
    call, settings: dict[str, str], payload: bytes, tmp_path: Path, name: str
) -> None:
    shutil.copytree(settings["dataset"], tmp_path / "data")
    (tmp_path / "data" / name).write_bytes(payload)
    (tmp_path / "data" / "train.pkl").write_bytes(payload)
    call(train, *flags(settings | {"dataset": str(tmp_path / "data")})).assert_user_error(name)


def test_a_pickle_as_predictions_or_settings_is_never_executed(
    call, payload: bytes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(payload)
    call(evaluate, "--rescore", str(tmp_path / "file")).assert_user_error(
        "is not a valid prediction"
    )
    call(train, "--config", str(tmp_path / "file")).assert_user_error("file: is not")


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!!python/object/new:os.mkdir"],
)
def test_yaml_makes_no_objects(call, settings: dict[str, str], tmp_path: Path, tag: str) -> None:
    """Neither as a value, nor as a key, nor as a document."""
    mark = tmp_path / "executed"
    text = config.CONFIG_FILE.read_text()
    for content in (
        f"{tag} [{mark}]",
        text.replace("seed: 0 ", f"seed: {tag} [{mark}] "),
        f"{text}\n? {tag} [{mark}]\n: 1\n",
    ):
        (tmp_path / "settings.yaml").write_text(content)
        call(train, "--config", str(tmp_path / "settings.yaml")).assert_user_error(
            "settings.yaml: "
        )
        assert not mark.exists()
    tagged = text.replace("run_name: llama", f"run_name: {tag.split(':')[0]} llama")
    (tmp_path / "settings.yaml").write_text(tagged)
    parsed, *_ = train.read_arguments(["--config", str(tmp_path / "settings.yaml")])
    assert parsed.run_name == "llama-2-7b-gsm8k"  # the tag is nothing, the text is text


# ---------------------------------------------------------------- model text

ESCAPES = "\x1b[31m\x1b]0;title\x07\x9b2J\u202e<script>alert(1)</script>\r\x00\x08"


def test_model_text_steers_no_terminal(call, settings: dict[str, str]) -> None:
    """In the sample after each epoch, in what evaluation shows, and in its errors."""
    complete = [(ESCAPES, "length")]
    outcome = call(train, *flags(settings | {"epochs": "1"}), complete=lambda *_: complete)
    assert outcome.code == 0 and "<script>" in outcome.out
    shown = [outcome.out]
    best = Path(settings["output_dir"]) / "test" / "best"
    outcome = call(evaluate, "--ckpt", str(best), "--verify-batching", "0")
    assert outcome.code == 0
    file = best.parent / "eval" / "test" / "predictions.jsonl"
    rows = [
        json.loads(line) | {"completion": f"1 + 1 = 3{ESCAPES}\n#### 3"}
        for line in file.read_text().splitlines()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = call(evaluate, "--rescore", str(file))
    assert outcome.code == 0
    shown += [outcome.out, call(evaluate, "--compare", str(file), str(file)).out]
    rows[0]["gold"] = ESCAPES
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown.append(call(evaluate, "--rescore", str(file)).err)
    for text in shown:
        assert text and all(letter.isprintable() or letter == "\n" for letter in text), text


def test_errors_steer_no_terminal(call, settings: dict[str, str], tmp_path: Path) -> None:
    """Guards against names, values and lines of files that are printed as they are."""
    shutil.copytree(settings["dataset"], tmp_path / "data")
    lines = (tmp_path / "data" / "train.jsonl").read_text().split("\n")
    lines[2] = json.dumps({"question": "?", "answer": f"{ESCAPES}#### "})
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    named = ESCAPES.replace("/", "").replace("\0", "").replace("\r", "")
    for arguments in (
        ["--run_name", ESCAPES],
        ["--model", f"./{named}"],
        ["--dataset", f"/{named}"],
        ["--config", named],
        [f"--{ESCAPES}"],
        flags(settings | {"dataset": str(tmp_path / "data")}),
    ):
        outcome = call(train, *arguments)
        assert outcome.code == 2 and outcome.err.count("\n") == 1
        assert outcome.err[:-1].isprintable(), outcome.err


def test_files_hold_no_raw_control_characters(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """A `cat` of any report is as safe as the terminal output."""
    problem = Problem(f"What{ESCAPES}?", f"It{ESCAPES}is 1.\n#### 1")
    shutil.copytree(settings["dataset"], tmp_path / "data")
    with (tmp_path / "data" / "test.jsonl").open("a") as stream:
        stream.write(
            "\n" * 0 + json.dumps({"question": problem.question, "answer": problem.answer}) + "\n"
        )
    settings |= {"dataset": str(tmp_path / "data"), "epochs": "1"}
    assert call(train, *flags(settings)).code == 0
    folder = Path(settings["output_dir"]) / "test"
    assert call(evaluate, "--ckpt", str(folder / "best"), "--verify-batching", "0").code == 0
    for file in (*folder.rglob("*.json*"), folder / "config.yaml"):
        if file.name != "tokenizer.json":
            text = file.read_text()
            assert all(letter.isprintable() or letter == "\n" for letter in text), file


# ---------------------------------------------------------------- paths and secrets


@pytest.mark.parametrize(
    "name", ["..", "../other", "a/../../b", "/tmp/x", "a/b", ".hidden", "a\0b", "a\nb", "~", " "]
)
def test_a_run_stays_in_its_folder(
    call, settings: dict[str, str], tmp_path: Path, name: str
) -> None:
    outcome = call(train, *flags(settings | {"run_name": name}))
    outcome.assert_user_error("run_name: ", "must be letters, digits")
    assert not list(tmp_path.rglob("*"))


# Runs commands one after the other in one process, each as if typed.
RUN_EACH = """
import json, runpy, sys

codes, (commands, file) = [], sys.argv[1:]
for sys.argv in json.loads(commands):
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    codes.append(code)
with open(file, "w") as stream:
    json.dump(codes, stream)
"""


def test_no_secret_and_no_home_gets_into_any_file(settings: dict[str, str], tmp_path: Path) -> None:
    """Canaries in the environment, in the home's name and on the command line.

    W&B's own folder is searched, too.
    """
    home = tmp_path / "home-of-CANARYHOME"
    shutil.copytree(settings["model"], home / "model")
    shutil.copytree(settings["dataset"], home / "data")
    variables = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HF_"))
    }
    variables |= {
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "USER": "CANARYUSER",
        "LOGNAME": "CANARYUSER",
    }
    variables |= {
        name: f"CANARY{number:034}"
        for number, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"))
    }
    given = settings | {
        "model": str(home / "model"),
        "dataset": "~/data",
        "output_dir": str(home / "runs"),
    }
    given |= {"wandb_mode": "offline", "epochs": "1"}
    best = home / "runs" / "test" / "best"
    commands = [
        ["train.py", *flags(given)],
        ["evaluate.py", "--ckpt", str(best), "--wandb_mode", "offline"],
        ["perplexity.py", "--ckpt", str(best)],
        ["evaluate.py", "--rescore", str(best.parent / "eval" / "test" / "predictions.jsonl")],
        ["train.py", *flags(given), "--hf_token", "hf_CANARYTYPED"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps(commands), str(tmp_path / "codes")],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = result.stdout + result.stderr
    assert (tmp_path / "codes").read_text() == "[0, 0, 0, 0, 2]", printed
    assert "CANARY0" not in printed
    folder = home / "runs"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in files if "wandb" in path.parts]) >= 4
    for path in files:
        found = [line for line in path.read_bytes().splitlines() if b"CANARY" in line]
        assert not found, (path, found)
    assert json.loads((best / "training.json").read_text())["settings"]["model"] == "~/model"


def test_a_home_that_was_hidden_is_found_again(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for typed, kept in (
        (home / "a" / "b", "~/a/b"),
        (home, "~"),
        (f"{home}x/y", f"{home}x/y"),
        ("a~b", "a~b"),
    ):
        made = make_config(settings | {"model": str(typed), "prompt": PROMPT})
        assert made.model == kept
        assert paths.local_path(made.model) == Path(typed)


def test_a_home_behind_a_link_is_hidden_and_a_home_of_all_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert paths.hide_home(f"{tmp_path}/real/x and {tmp_path}/link/y") == "~/x and ~/y"
    for other in (f"/mnt{tmp_path}/real/x", f"{tmp_path}/real-2/x", f"{tmp_path}/real.x"):
        assert paths.hide_home(other) == other
    monkeypatch.setenv("HOME", "/nowhere/me (x86+)")
    assert paths.hide_home("/nowhere/me (x86+)/x") == "~/x"
    here = tmp_path / "real" / "model"
    here.mkdir()
    monkeypatch.chdir(here.parent)  # which a container's user without a home had for one
    for home in ("/", "", "//"):
        monkeypatch.setenv("HOME", home)
        assert paths.hide_home("/a/b c/d") == "/a/b c/d"
        assert paths.with_tilde(str(here)) == paths.hide_home(str(here)) == str(here)
