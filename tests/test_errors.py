"""What a user may get wrong: one clear line, exit code 2, no traceback, nothing written over."""

import errno
import http.server
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Killed, as_a_process, flags, kill, processes, seal, step_that
from safetensors.torch import load_file, save_file

import evaluate
import perplexity
import train
from run import config
from run.errors import UserError, counted
from run.paths import is_hub_id, local_path

ROOT = Path(config.__file__).parents[1]


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def online() -> dict[str, str]:
    """The environment of a process that may ask a hub."""
    return {key: value for key, value in os.environ.items() if not key.startswith("HF_")}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A script as the user starts it."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=online(),
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---------------------------------------------------------------- as a process


def test_exit_code_and_one_line_in_a_real_process(settings: dict[str, str]) -> None:
    """Guards against a traceback from what is imported before or after the arguments are read."""
    for command in (
        ["train.py", "--epochs", "0"],
        ["evaluate.py", "--split", "dev"],
        ["perplexity.py", "--ckpt", "nowhere"],
        ["train.py", *flags(settings | {"model": "nowhere"})],
    ):
        result = run(*command)
        assert result.returncode == 2, result
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    "script", ["train.py", "evaluate.py", "perplexity.py", "merge.py", "augment.py", "demo.py"]
)
def test_help_shows_every_key_and_loads_nothing_heavy(script: str) -> None:
    """Guards against --help that takes as long as importing torch."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "assert not {'torch', 'transformers', 'wandb', 'datasets', 'scipy'} & set(sys.modules)\n"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    if script != "demo.py":
        values, comments = config.read_settings(config.CONFIG_FILE)
        shown = " ".join(result.stdout.split())
        for key, value in values.items():
            assert f"--{key} VALUE" in shown
            assert " ".join(f"{comments[key]} (now {value!r})".split()) in shown


def test_judging_files_loads_nothing_that_a_model_needs(tmp_path: Path) -> None:
    """Guards against seconds for the imports of an evaluation, and half a GiB."""
    file = tmp_path / "predictions.jsonl"
    file.write_text('{"id": 0, "gold": "1", "completion": "#### 1"}\n')
    for words in (["--rescore", str(file)], ["--compare", str(file), str(file)]):
        code = (
            "import runpy, sys\n"
            f"sys.argv = {['evaluate.py', *words]!r}\n"
            "try:\n"
            "    runpy.run_path('evaluate.py', run_name='__main__')\n"
            "except SystemExit as end:\n"
            "    assert not end.code, end.code\n"
            "assert not {'torch', 'transformers', 'data'} & set(sys.modules)\n"
        )
        result = run("-c", code)
        assert result.returncode == 0, result.stderr
        assert "100.00%   1 of 1" in result.stdout
    assert (tmp_path / "scores.json").is_file()


# ---------------------------------------------------------------- the hub


class RefusingHub(http.server.BaseHTTPRequestHandler):
    """A hub on this machine that answers as a model's name says: owner/STATUS-CODE, or -no."""

    def do_GET(self) -> None:
        status, code = re.search(r"owner/(\d+)-(\w*)", self.path).groups()
        self.send_response(int(status))
        if code != "no":
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


# What train.py does with each model that it reads: exit code and standard error.
TRAIN_EACH = """
import contextlib, io, json, sys
import train
from run.script import run_script

for model in map(str.strip, sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            run_script(lambda: train.main(*train.read_arguments([*sys.argv[1:], "--model", model])))
            code = 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([model, code, err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def hub_refusals(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path
) -> dict[str, tuple[int, str]]:
    """Of each model: exit code and standard error, from one process that knows only this hub.

    The hub is gone before the last model, owner/model.
    """
    folder = tmp_path_factory.mktemp("hub")
    arguments = flags({"dataset": str(data_folder), "output_dir": str(folder / "runs")})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RefusingHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port}"
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN_EACH, *arguments],
        cwd=ROOT,
        env=online() | {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    found = {}
    for model in (*(f"owner/{status}-{code}" for status, code, _ in HUB_REFUSALS), "owner/model"):
        if model == "owner/model":
            server.shutdown()
            server.server_close()
        print(model, file=process.stdin, flush=True)
        answer = next((line for line in process.stdout if line.startswith("[")), "")
        assert answer, process.communicate()
        name, *found[model] = json.loads(answer)
        assert name == model
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err
    return found


HUB_REFUSALS = [
    (
        401,
        "GatedRepo",
        ["is gated", "accept its licence at huggingface.co/owner/401-GatedRepo", "HF_TOKEN"],
    ),
    (403, "GatedRepo", ["is gated", "HF_TOKEN"]),
    (401, "no", ["is gated", "HF_TOKEN"]),
    (500, "no", ["can't be loaded from the hub", "500"]),
    (404, "RepoNotFound", ["is not on the hub", "check the id"]),
]


@pytest.mark.parametrize(("status", "code", "fragments"), HUB_REFUSALS)
def test_hub_refusals_say_what_to_do(
    hub_refusals: dict[str, tuple[int, str]], status: int, code: str, fragments: list[str]
) -> None:
    exit_code, err = hub_refusals[f"owner/{status}-{code}"]
    assert exit_code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for fragment in fragments:
        assert fragment in err


def test_hub_out_of_reach(
    call, settings: dict[str, str], hub_refusals: dict[str, tuple[int, str]]
) -> None:
    exit_code, err = hub_refusals["owner/model"]
    assert exit_code == 2, err
    assert err.startswith(
        "error: model 'owner/model' can't be loaded from the hub (ConnectionRefusedError"
    )
    assert "check the network" in err and err.count("\n") == 1
    # Offline, since the data set's client takes half a minute of retries to believe in a dead port.
    # As all tests of this process are.
    call(train, *flags(settings | {"dataset": "owner/rows"})).assert_user_error(
        "error: dataset 'owner/rows': is not a folder here, and can't be loaded from the hub"
    )


# ---------------------------------------------------------------- models and checkpoints


def damaged(folder: Path, base: str, damage: Callable[[Path], object]) -> str:
    shutil.copytree(base, folder)
    damage(folder)
    return str(folder)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json|without a config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be read"),
        (
            lambda folder: edit_json(folder / "config.json", model_type="gpt2"),
            "only 'llama' is supported",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "has no weights in safetensors: copy its",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64),
            "its weights can't be read",
        ),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 20_000),
            "its weights can't be read",
        ),
        (drop_weight, "lack 1 weights, the first is model.layers.1.mlp.up_proj.weight"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            "its tokenizer can't be read",
        ),
        (
            lambda folder: edit_json(folder / "config.json", hidden_size=64),
            "its config.json asks for (",
        ),
        (
            lambda folder: edit_json(folder / "config.json", num_hidden_layers=1),
            "weights that its config.json has no place",
        ),
    ],
)
@pytest.mark.parametrize("script", [train, evaluate, perplexity])
def test_damaged_models(
    call, settings: dict[str, str], tmp_path: Path, script, damage, fragment: str
) -> None:
    """Guards against random weights in place of missing ones, and third-party tracebacks."""
    folder = damaged(tmp_path / "bad", settings["model"], damage)
    before = tree(tmp_path)
    if script is train:
        outcome = call(train, *flags(settings | {"model": folder}))
    else:
        outcome = call(script, "--ckpt", folder, *flags(settings))
    outcome.assert_user_error("bad")
    assert any(part in outcome.err for part in fragment.split("|")), outcome.err
    assert {path: content for path, content in tree(tmp_path).items() if path in before} == before


def test_models_that_are_none(call, settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for model, fragment in (
        (str(tmp_path / "nowhere"), "is neither a folder here nor a hub id"),
        ("no-slash", "is neither a folder here nor a hub id"),
        ("my models/llama", "is neither a folder here nor a hub id"),
        ("modèles/llama", "is neither a folder here nor a hub id"),
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "empty"), "config.json"),
    ):
        call(train, *flags(settings | {"model": model})).assert_user_error(repr(model), fragment)
        for script in (evaluate, perplexity):
            call(script, "--ckpt", model, *flags(settings)).assert_user_error(model, fragment)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("key", ["model", "dataset", "output_dir"])
@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "x" * 300])
def test_paths_that_no_file_can_have(call, settings: dict[str, str], key: str, path: str) -> None:
    call(train, *flags(settings | {key: path})).assert_user_error("is not a usable path")


def test_a_path_is_usable_if_a_file_may_have_it(tmp_path: Path) -> None:
    """Guards against a traceback for a null byte, and a fault of spelling where nothing is yet."""
    (tmp_path / "file").touch()
    for name in ("none", "file/none"):
        assert local_path(str(tmp_path / name)) == tmp_path / name
    with pytest.raises(UserError, match="is not a usable path"):
        local_path("a\0b")


def test_a_hub_id_has_two_names_and_begins_with_neither_dot_nor_slash() -> None:
    """Guards against a path that is looked for at the hub, for minutes if that can't be reached."""
    assert is_hub_id("openai/gsm8k") and is_hub_id("a.b/c-d_1")
    for path in ("gsm8k", "./gsm8k", "a/.b", "/a", "a/", "a/b/c", "~/a", "é/a"):
        assert not is_hub_id(path)


def test_a_folder_that_may_not_be_entered(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against the advice to check how its path is spelt."""

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path == Path("locked/best"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os.stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    outcome = call(evaluate, "--ckpt", "locked/best", *flags(settings))
    outcome.assert_user_error("'locked/best': Permission denied: check your permissions there")


def test_code_that_comes_with_a_model_is_never_run(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against Transformers' question whether to run it, which `yes |` would answer."""
    for name in ("config.json", "tokenizer_config.json"):
        folder = tmp_path / name
        shutil.copytree(settings["model"], folder)
        edit_json(
            folder / name,
            auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]},
        )
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
        call(train, *flags(settings | {"model": str(folder)})).assert_user_error("auto_map")
    assert not (tmp_path / "executed").exists()


def test_pickled_weights_are_not_read(call, settings: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(settings["model"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    call(train, *flags(settings | {"model": str(folder)})).assert_user_error(
        "convert them to safetensors"
    )


def test_sequences_beyond_the_models_positions_are_refused(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against rotary positions that the model never saw, and an epoch lost to its sample."""
    folder = tmp_path / "short"
    shutil.copytree(settings["model"], folder)
    edit_json(folder / "config.json", max_position_embeddings=64)
    call(train, *flags(settings | {"model": str(folder)})).assert_user_error(
        "the model's 64 positions", "max_length"
    )
    arguments = flags(settings | {"model": str(folder)})
    call(perplexity, "--ckpt", str(folder), *arguments).assert_user_error(
        "the model's 64 positions", "max_length"
    )
    long = settings | {"max_new_tokens": "100000000000"}
    call(train, *flags(long)).assert_user_error("the model's 1024 positions", "max_new_tokens")


@pytest.mark.parametrize(
    ("dtype", "name", "value", "more"),
    [
        ("float32", "model.layers.1.mlp.up_proj.weight", "nan", ""),
        ("bfloat16", "lm_head.weight", "inf", ", or set dtype float32"),  # one logit, and no NaN
    ],
)
def test_a_model_whose_logits_are_not_finite_gets_no_score(
    call, settings: dict[str, str], tmp_path: Path, dtype: str, name: str, value: str, more: str
) -> None:
    """Guards against 0 % of a model that diverged, as if it had been asked."""
    shutil.copytree(settings["model"], folder := tmp_path / "diverged")
    weights = load_file(folder / "model.safetensors")
    weights[name][3, 3] = float(value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    arguments = flags(settings | {"dtype": dtype})
    outcome = call(evaluate, "--ckpt", str(folder), "--output", str(tmp_path / "out"), *arguments)
    outcome.assert_user_error("are not finite", "another checkpoint", f"copy it again{more}\n")
    assert not [*(tmp_path / "out").rglob("*.json*")]


def test_a_prompt_beyond_the_models_positions_is_named(
    call, settings: dict[str, str], data_folder: Path, tmp_path: Path
) -> None:
    """Guards against advice to set a max_new_tokens that would have to be negative."""
    shutil.copytree(data_folder, folder := tmp_path / "data")
    for split in ("train", "test"):
        with (folder / f"{split}.jsonl").open("a", encoding="utf-8") as file:
            for number in range(30):
                row = {"question": f"{split} {number}? " * 300, "answer": "So.\n#### 1"}
                file.write(json.dumps(row) + "\n")
    arguments = flags(settings | {"dataset": str(folder)})
    fault = "the model's 1024 positions: take rows with so long a question out of the data set"
    for script, more in ((train, []), (evaluate, ["--ckpt", settings["model"]])):
        call(script, *more, *arguments).assert_user_error("the longest prompt has", fault)


def test_longrope_is_refused_where_a_rows_loss_would_depend_on_others(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against losses that differ by micro_batch_tokens, in silence."""
    shutil.copytree(settings["model"], folder := tmp_path / "longrope")
    long = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0}
    long |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    long |= {"original_max_position_embeddings": 64}
    edit_json(folder / "config.json", rope_parameters=long)
    arguments = flags(settings | {"model": str(folder)})
    fault = "the model's 64 original positions (longrope)"
    call(train, *arguments).assert_user_error(fault, "max_length")
    call(perplexity, "--ckpt", str(folder), *arguments).assert_user_error(fault, "max_length")


def with_a_file_size_limit(*arguments: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60 * 1024, 60 * 1024))
    as_a_process(*arguments)


def test_a_file_size_limit_is_one_line(settings: dict[str, str], tmp_path: Path) -> None:
    """A real fault of the real writer, not an injected one: the weights do not fit."""
    out = tmp_path / "out"
    process = processes.Process(
        target=with_a_file_size_limit, args=["train", str(out), *flags(settings)]
    )
    process.start()
    process.join()
    assert process.exitcode == 2, out.read_text()
    *_, line = out.read_text().splitlines()
    assert line.startswith("error: ") and "the checkpoint can't be written" in line, out.read_text()


def test_sigterm_is_not_taken_for_an_error_of_what_it_interrupts() -> None:
    """Guards against a guard around the hub or W&B that swallows the signal and goes on."""
    code = (
        "import os, signal\nfrom run import errors, script\n"
        "def story():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except Exception:\n"
        "        pass\n"
        "script.run_script(story)\n"
    )
    assert run("-c", code).returncode == 143


def test_sigterm_outside_of_training_is_143(settings: dict[str, str]) -> None:
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    code = f"import os, signal\nfrom run import script\nscript.run_script(lambda: {kill})\n"
    result = run("-c", code)
    assert result.returncode == 143 and result.stderr.startswith("stopped: SIGTERM"), result


def test_no_checkpoint_yet(call, settings: dict[str, str]) -> None:
    for script in (evaluate, perplexity):
        call(script, *flags(settings)).assert_user_error(
            "there is no such checkpoint", "--ckpt DIR"
        )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"settings": {}}',
        b'{"settings": 1, "step": 1}',
        b'{"settings": {}, "step": 1, "epoch": 1.0}',
        b"\xff",
        b"null",
        b"[" * 100_000,
    ],
)
def test_damaged_descriptions(
    call, settings: dict[str, str], stopped: Path, content: bytes
) -> None:
    """Guards against a run that starts again over a checkpoint that it can't read.

    Its manifest finds no fault.
    """
    for name in ("best", "last"):
        (stopped / name / "training.json").write_bytes(content)
        seal(stopped / name)
    before = tree(stopped)
    call(train, *flags(settings)).assert_user_error("training.json: is damaged")
    for script in (evaluate, perplexity):
        call(script, "--ckpt", str(stopped / "best")).assert_user_error("training.json: is damaged")
    assert tree(stopped) == before


@pytest.mark.parametrize(
    "damage", [lambda f: f.unlink(), lambda f: f.write_bytes(b""), lambda f: os.truncate(f, 9_000)]
)
def test_damaged_state(call, settings: dict[str, str], damage) -> None:
    settings["checkpoint_steps"] = "3"
    with pytest.raises(Killed):
        call(train, *flags(settings), step=step_that(kill, at=5))
    folder = Path(settings["output_dir"]) / "test"
    damage(folder / "last" / "state-00001.safetensors")
    seal(folder / "last")
    before = tree(folder)
    call(train, *flags(settings)).assert_user_error("last: is damaged")
    assert tree(folder) == before


def test_folders_that_cannot_be_written(call, settings: dict[str, str], tmp_path: Path) -> None:
    """A file in the way stands for a folder without write permission.

    Root, as in containers, may write anywhere.
    """
    (tmp_path / "file").write_text("precious")
    call(train, *flags(settings | {"output_dir": str(tmp_path / "file")})).assert_user_error(
        "can't be written"
    )
    outcome = call(
        evaluate, "--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path / "file")
    )
    outcome.assert_user_error("can't be written")
    assert (tmp_path / "file").read_text() == "precious"


def test_no_data_of_a_split(call, settings: dict[str, str], tmp_path: Path) -> None:
    for dataset, fragment in (
        (tmp_path, "train.jsonl: can't be read"),
        (tmp_path / "no", "is neither a folder here nor a hub id"),
    ):
        call(train, *flags(settings | {"dataset": str(dataset)})).assert_user_error(fragment)
    outcome = call(train, *flags(settings | {"validation_size": "5000"}))
    outcome.assert_user_error("validation_size 5000 leaves nothing of the 43 train rows")


def test_one_of_a_kind_is_not_called_several() -> None:
    assert [counted(n, "row") for n in (0, 1, 1000)] == [
        "0 rows",
        "1 row",
        "1,000 rows",
    ]
