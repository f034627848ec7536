"""A table of bad input: each gives one line and exit code 2, and changes no file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Killed, flags, kill, seal, step_that

import evaluate
import perplexity
import train

SCRIPTS = {"train": train, "evaluate": evaluate, "perplexity": perplexity}


class World:
    """Copies of all that a user may have, to be damaged: settings, data, model, a stopped run."""

    def __init__(self, root: Path, settings: dict[str, str]):
        self.root, self.settings = root, settings
        self.data = Path(settings["dataset"])
        self.run = Path(settings["output_dir"]) / settings["run_name"]
        self.best, self.last, self.previous = (
            self.run / name for name in ("best", "last", "previous")
        )
        self.predictions = self.run / "eval" / "test" / "predictions.jsonl"

    def config(self, content: str | bytes) -> list[str]:
        """Arguments that name a settings file of this content."""
        file = self.root / "settings.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--config", str(file)]

    def changed_config(self, old: str, new: str) -> list[str]:
        text = Path(train.__file__).with_name("config.yaml").read_text()
        assert text.count(old) == 1
        return self.config(text.replace(old, new))

    def train(self, **changed: str) -> list[str]:
        """Arguments of a new run."""
        return flags(self.settings | {"run_name": "new"} | changed)

    def resume(self, **changed: str) -> list[str]:
        return flags(self.settings | changed)

    def with_line(self, line: str | bytes, number: int = 3) -> list[str]:
        """A new run on data whose line ``number`` is this."""
        lines = (self.data / "train.jsonl").read_bytes().split(b"\n")
        lines[number - 1] = line if isinstance(line, bytes) else line.encode()
        (self.data / "train.jsonl").write_bytes(b"\n".join(lines))
        return self.train()

    def with_data(self, content: bytes) -> list[str]:
        (self.data / "train.jsonl").write_bytes(content)
        return self.train()

    def instead_of_data(self, put: Callable[[Path], object]) -> list[str]:
        file = self.data / "train.jsonl"
        file.unlink()
        put(file)
        return self.train()

    def rescore(self, content: str | bytes) -> list[str]:
        self.predictions.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--rescore", str(self.predictions)]

    def row(self, **changed: object) -> str:
        row = json.loads(self.predictions.read_text().splitlines()[0])
        return (
            json.dumps({key: value for key, value in (row | changed).items() if value != "ABSENT"})
            + "\n"
        )

    def rows(self, **changed: object) -> str:
        """All predictions, the first one changed."""
        return self.row(**changed) + "".join(
            self.predictions.read_text().splitlines(keepends=True)[1:]
        )

    def evaluate(self, folder: Path | None = None) -> list[str]:
        return ["--ckpt", str(folder or self.best)]


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def loop(file: Path) -> None:
    file.symlink_to(file)


def unreadable(file: Path) -> None:
    file.symlink_to(
        "/proc/self/mem"
    )  # reading it is an error even for root, whom no permissions stop


def done(arguments: list[str], *_: object) -> list[str]:
    """``arguments``, after what was done for them."""
    return arguments


LONG = "x" * 5_000_000

# What it is, the script, its arguments after the damage, and what the one line says.
TABLE: list[tuple[str, str, Callable[[World], list[str]], str]] = [
    # settings files
    ("settings: empty", "train", lambda w: w.config(""), "settings.yaml: contains no settings"),
    (
        "settings: a list",
        "train",
        lambda w: w.config("- model\n- dataset\n"),
        "settings.yaml: contains no settings",
    ),
    (
        "settings: one word",
        "train",
        lambda w: w.config("settings"),
        "settings.yaml: contains no settings",
    ),
    (
        "settings: no YAML",
        "train",
        lambda w: w.config("model: {"),
        "settings.yaml: is not valid YAML",
    ),
    ("settings: Latin-1", "train", lambda w: w.config(b"model: caf\xe9\n"), "is not UTF-8 text"),
    (
        "settings: UTF-16",
        "train",
        lambda w: w.config("model: x\n".encode("utf-16")),
        "is not UTF-8 text",
    ),
    (
        "settings: a null byte",
        "train",
        lambda w: w.config("model: a\0b\n"),
        "settings.yaml: is not valid YAML",
    ),
    (
        "settings: no file",
        "evaluate",
        lambda w: ["--config", str(w.root / "no.yaml")],
        "no.yaml: can't be read",
    ),
    (
        "settings: a folder",
        "perplexity",
        lambda w: ["--config", str(w.root)],
        "can't be read (Is a directory)",
    ),
    (
        "settings: endless link",
        "train",
        lambda w: done(["--config", str(w.root / "l")], loop(w.root / "l")),
        "can't be",
    ),
    (
        "settings: code",
        "train",
        lambda w: w.changed_config("seed: 0 ", "seed: !!python/object/apply:os.abort []"),
        "one value",
    ),
    (
        "settings: nested",
        "train",
        lambda w: w.changed_config("seed: 0 ", "seed: {a: 1} "),
        "not a list or a mapping",
    ),
    (
        "settings: twice",
        "train",
        lambda w: w.changed_config("seed: 0 ", "epochs: 3\nseed: 0 "),
        "epochs is set twice",
    ),
    (
        "settings: unknown",
        "train",
        lambda w: w.changed_config("epochs: 3 ", "epoch: 3 "),
        "did you mean 'epochs'?",
    ),
    (
        "settings: left out, and another unknown",
        "train",
        lambda w: w.config("epoch: 3\nseed: x\n"),
        "seed: 'x' must be an integer between 0 and",
    ),
    (
        "settings: huge",
        "train",
        lambda w: w.changed_config("epochs: 3 ", f"epochs: {LONG} "),
        "must be a positive integer",
    ),
    (
        "settings: deep",
        "train",
        lambda w: w.config("a: " + "[" * 50_000),
        "settings.yaml: is not valid YAML",
    ),
    # flags
    (
        "--epochs 0",
        "train",
        lambda w: w.train(epochs="0"),
        "epochs: '0' must be a positive integer",
    ),
    (
        "--epochs 1.5",
        "train",
        lambda w: w.train(epochs="1.5"),
        "epochs: '1.5' must be a positive integer",
    ),
    (
        "--epochs word",
        "evaluate",
        lambda w: w.resume(epochs="three"),
        "epochs: 'three' must be a positive integer",
    ),
    (
        "--epochs ٣",
        "train",
        lambda w: w.train(epochs="٣"),
        "epochs: '٣' must be a positive integer",
    ),
    (
        "--learning_rate nan",
        "train",
        lambda w: w.train(learning_rate="nan"),
        "learning_rate: 'nan' must be a positive, finite number",
    ),
    (
        "--learning_rate inf",
        "train",
        lambda w: w.train(learning_rate="1e999"),
        "learning_rate: '1e999' must be a positive, fin",
    ),
    (
        "--learning_rate -1",
        "train",
        lambda w: w.train(learning_rate="-1"),
        "learning_rate: '-1' must be a positive, finite number",
    ),
    (
        "--dtype",
        "train",
        lambda w: w.train(dtype="float16"),
        "dtype: 'float16' must be 'bfloat16' or 'float32'",
    ),
    (
        "--compile",
        "train",
        lambda w: w.train(compile="maybe"),
        "compile: 'maybe' must be true, false or null",
    ),
    ("--seed 2^32", "train", lambda w: w.train(seed=str(2**32)), "between 0 and 4294967295"),
    (
        "--run_name ..",
        "train",
        lambda w: w.train(run_name=".."),
        "run_name: '..' must be letters, digits",
    ),
    (
        "--run_name ../x",
        "train",
        lambda w: w.train(run_name="../x"),
        "run_name: '../x' must be letters, digits",
    ),
    (
        "--run_name /x",
        "train",
        lambda w: w.train(run_name="/x"),
        "run_name: '/x' must be letters, digits",
    ),
    (
        "--run_name nothing",
        "train",
        lambda w: w.train(run_name=""),
        "run_name: '' must be letters, digits",
    ),
    ("--run_name long", "train", lambda w: w.train(run_name=LONG[:200]), "at most 128"),
    (
        "--prompt without",
        "train",
        lambda w: w.train(prompt="Q: {q}"),
        "prompt: 'Q: {q}' must contain {question} exactly",
    ),
    (
        "--model nothing",
        "train",
        lambda w: w.train(model=""),
        "model: '' must be a non-empty string",
    ),
    (
        "--micro_batch_tokens",
        "train",
        lambda w: w.train(micro_batch_tokens="8"),
        "must be at least max_length (256)",
    ),
    (
        "--validation_size",
        "train",
        lambda w: w.train(validation_size="5000"),
        "leaves nothing of the 43 train rows",
    ),
    ("an unknown flag", "train", lambda w: ["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    ("a flag twice", "train", lambda w: ["--epochs", "3", "--epochs=4"], "--epochs is given twice"),
    (
        "a flag without value",
        "perplexity",
        lambda w: ["--epochs"],
        "argument --epochs: expected one argument",
    ),
    (
        "--limit 0",
        "evaluate",
        lambda w: [*w.evaluate(), "--limit", "0"],
        "'0' must be a positive integer",
    ),
    (
        "--split dev",
        "evaluate",
        lambda w: ["--split", "dev"],
        "argument --split: invalid choice: 'dev'",
    ),
    (
        "--temperature 0",
        "evaluate",
        lambda w: ["--temperature", "0"],
        "'0' must be a positive, finite number",
    ),
    (
        "--rescore --ckpt",
        "evaluate",
        lambda w: ["--rescore", "x", *w.evaluate()],
        "--ckpt can't be used with --rescore",
    ),
    # data
    (
        "data: nowhere",
        "train",
        lambda w: w.train(dataset="nowhere"),
        "is neither a folder here nor a hub id",
    ),
    (
        "data: a file",
        "train",
        lambda w: w.train(dataset=str(w.data / "train.jsonl")),
        "is a file: name the folder",
    ),
    (
        "data: no train.jsonl",
        "train",
        lambda w: w.instead_of_data(lambda f: None),
        "train.jsonl: can't be read (No such",
    ),
    (
        "data: a folder",
        "train",
        lambda w: w.instead_of_data(Path.mkdir),
        "train.jsonl: can't be read (Is a directory)",
    ),
    (
        "data: endless link",
        "train",
        lambda w: w.instead_of_data(loop),
        "can't be read (Too many levels of symbolic",
    ),
    (
        "data: unreadable",
        "train",
        lambda w: w.instead_of_data(unreadable),
        "can't be read (Input/output error)",
    ),
    ("data: empty", "train", lambda w: w.with_data(b""), "train.jsonl: is empty"),
    (
        "data: UTF-16",
        "train",
        lambda w: w.with_data('{"question": "a", "answer": "#### 1"}\n'.encode("utf-16")),
        "line 1: is not valid JSON",
    ),
    (
        "data: a byte order mark alone",
        "train",
        lambda w: w.with_line(b"\xef\xbb\xbf"),
        "line 3: is not valid JSON",
    ),
    (
        "data: Latin-1",
        "train",
        lambda w: w.with_line(b'{"question": "caf\xe9?", "answer": "#### 1"}'),
        "line 3: is not valid JSON",
    ),
    (
        "data: no JSON",
        "train",
        lambda w: w.with_line("question, answer"),
        "train.jsonl, line 3: is not valid JSON",
    ),
    (
        "data: a huge line",
        "train",
        lambda w: w.with_line(LONG),
        "train.jsonl, line 3: is not valid JSON",
    ),
    (
        "data: a deep line",
        "train",
        lambda w: w.with_line("[" * 100_000),
        "train.jsonl, line 3: is not valid JSON",
    ),
    (
        "data: an empty line",
        "train",
        lambda w: w.with_line(""),
        "train.jsonl, line 3: is not valid JSON",
    ),
    (
        "data: a cut line",
        "train",
        lambda w: w.with_line('{"question": "How ma'),
        "train.jsonl, line 3: is not valid JSON",
    ),
    (
        "data: a list",
        "train",
        lambda w: w.with_line('["How many?", "#### 1"]'),
        "line 3: is not a JSON object",
    ),
    (
        "data: no answer",
        "train",
        lambda w: w.with_line('{"question": "?"}'),
        "line 3: 'answer' is missing",
    ),
    (
        "data: a number",
        "train",
        lambda w: w.with_line('{"question": "?", "answer": 4}'),
        "line 3: 'answer' is 4",
    ),
    (
        "data: white space",
        "train",
        lambda w: w.with_line('{"question": " ", "answer": "#### 1"}'),
        "'question' is \" \"",
    ),
    (
        "data: no ####",
        "train",
        lambda w: w.with_line('{"question": "?", "answer": "4"}'),
        "line 3: the answer '4'",
    ),
    (
        "data: no number",
        "train",
        lambda w: w.with_line('{"question": "?", "answer": "#### four"}'),
        "line 3: the answer",
    ),
    (
        "data: half a character",
        "train",
        lambda w: w.with_line('{"question": "\\ud800", "answer": "#### 1"}'),
        "an unpaired surrogate",
    ),
    (
        "data: a test question",
        "train",
        lambda w: w.with_line((w.data / "test.jsonl").read_bytes().split(b"\n")[0]),
        "train and test share 1 question, such as",
    ),
    (
        "data: split of evaluation",
        "evaluate",
        lambda w: done(w.evaluate(), (w.data / "test.jsonl").unlink()),
        "test.jsonl: can't",
    ),
    # models and checkpoints
    (
        "model: nowhere",
        "train",
        lambda w: w.train(model="./nowhere"),
        "model './nowhere' is neither a folder here nor a hub id",
    ),
    ("ckpt: nowhere", "evaluate", lambda w: w.evaluate(w.root / "nowhere"), "nowhere"),
    ("ckpt: a file", "perplexity", lambda w: w.evaluate(w.best / "config.json"), "is a file"),
    ("ckpt: a folder of none", "evaluate", lambda w: w.evaluate(w.root), "has no config.json"),
    (
        "ckpt: cut weights",
        "evaluate",
        lambda w: done(w.evaluate(), os.truncate(w.best / "model.safetensors", 9)),
        "has 9 bytes",
    ),
    (
        "ckpt: a flipped bit",
        "perplexity",
        lambda w: done(w.evaluate(), flipped(w.best / "model.safetensors")),
        "is not what was",
    ),
    (
        "ckpt: flipped settings",
        "evaluate",
        lambda w: done(w.evaluate(), flipped(w.best / "training.json")),
        "is not what was",
    ),
    (
        "ckpt: no manifest",
        "evaluate",
        lambda w: done(w.evaluate(), (w.best / "manifest.json").unlink()),
        "has no manifest",
    ),
    (
        "ckpt: a folder in it",
        "evaluate",
        lambda w: done(w.evaluate(), directory(w.best / "training.json")),
        "training.json",
    ),
    (
        "ckpt: no tokenizer",
        "evaluate",
        lambda w: done(w.evaluate(), (w.best / "tokenizer.json").unlink()),
        "tokenizer.json",
    ),
    (
        "ckpt: weights of zeros, sealed",
        "perplexity",
        lambda w: done(
            w.evaluate(), (w.best / "model.safetensors").write_bytes(b"\0" * 99), seal(w.best)
        ),
        "its weights can't be read",
    ),
    (
        "ckpt: settings of another kind, sealed",
        "evaluate",
        lambda w: done(
            w.evaluate(), (w.best / "training.json").write_text('{"settings": []}'), seal(w.best)
        ),
        "training.json: is damaged",
    ),
    (
        "resume: both damaged",
        "train",
        lambda w: done(
            w.resume(), flipped(w.last / "model.safetensors"), flipped(w.previous / "training.json")
        ),
        "previous: is damaged",
    ),
    ("resume: another seed", "train", lambda w: w.resume(seed="7"), "seed was 0 and is 7"),
    ("resume: never", "train", lambda w: w.resume(resume="never"), "is in use"),
    (
        "run: a file in its place",
        "train",
        lambda w: done(w.train(), (w.run.parent / "new").touch()),
        "new: can't be written",
    ),
    (
        "run: a link",
        "train",
        lambda w: done(w.train(), (w.run.parent / "new").symlink_to(w.data)),
        "is a symbolic link",
    ),
    (
        "run: an output that is a file",
        "train",
        lambda w: w.train(output_dir=str(w.data / "test.jsonl")),
        "can't be written",
    ),
    # predictions
    (
        "rescore: no file",
        "evaluate",
        lambda w: ["--rescore", str(w.root / "no")],
        "no: can't be read (No such file",
    ),
    (
        "rescore: a folder",
        "evaluate",
        lambda w: ["--rescore", str(w.root)],
        "can't be read (Is a directory)",
    ),
    ("rescore: empty", "evaluate", lambda w: w.rescore(""), "predictions.jsonl"),
    (
        "rescore: no JSON",
        "evaluate",
        lambda w: w.rescore(w.row() + "nonsense\n"),
        "predictions.jsonl, line 2: is not a valid prediction",
    ),
    (
        "rescore: UTF-16",
        "evaluate",
        lambda w: w.rescore(w.row().encode("utf-16")),
        "line 1: is not a valid prediction",
    ),
    (
        "rescore: a cut line",
        "evaluate",
        lambda w: w.rescore(w.row() + w.row(id=1)[:50]),
        "line 2: is not a valid prediction",
    ),
    (
        "rescore: a huge line",
        "evaluate",
        lambda w: w.rescore(LONG + "\n"),
        "line 1: is not a valid prediction",
    ),
    (
        "rescore: a deep line",
        "evaluate",
        lambda w: w.rescore("[" * 100_000 + "\n"),
        "line 1: is not a valid prediction",
    ),
    (
        "rescore: no gold",
        "evaluate",
        lambda w: w.rescore(w.row(gold="ABSENT")),
        "line 1: is not a valid prediction (KeyError: 'gold')",
    ),
    (
        "rescore: a gold of no number",
        "evaluate",
        lambda w: w.rescore(w.rows(gold="four")),
        "the gold answer 'four' is not a number",
    ),
    (
        "rescore: an id as text",
        "evaluate",
        lambda w: w.rescore(w.row(id="0")),
        "'id' is '0', not of type int",
    ),
    (
        "rescore: an id as truth",
        "evaluate",
        lambda w: w.rescore(w.row(id=True)),
        "'id' is True, not of type int",
    ),
    (
        "rescore: a double id",
        "evaluate",
        lambda w: w.rescore(w.row() + w.rows()),
        "contains 13 predictions for 12 problems: duplicate ids",
    ),
    (
        "rescore: too few",
        "evaluate",
        lambda w: w.rescore(w.row()),
        "contains 1 predictions for 12 problems: missing ids",
    ),
    ("rescore: a foreign id", "evaluate", lambda w: w.rescore(w.rows(id=99)), "unknown ids 99"),
    (
        "compare: nothing in common",
        "evaluate",
        lambda w: compare(w, w.row(question="?", id=50)),
        "no",
    ),
    (
        "compare: one damaged",
        "evaluate",
        lambda w: compare(w, "{"),
        "line 1: is not a valid prediction",
    ),
    (
        "evaluation: of other weights",
        "evaluate",
        lambda w: [*w.evaluate(w.last), "--output", str(w.predictions.parent)],
        "weights",
    ),
    (
        "evaluation: an output that is a file",
        "evaluate",
        lambda w: [*w.evaluate(), "--output", str(w.data / "test.jsonl")],
        "can't",
    ),
]


def compare(world: World, other: str) -> list[str]:
    file = world.root / "other.jsonl"
    file.write_text(other)
    return ["--compare", str(world.predictions), str(file)]


@pytest.fixture(scope="session")
def template(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_folder: Path
) -> Path:
    """A run of one epoch that is not finished, evaluated; model and data beside it."""
    return tmp_path_factory.mktemp("template")


@pytest.fixture
def world(
    call, template: Path, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    if not (template / "runs").exists():
        shutil.copytree(settings["dataset"], template / "data")
        made = settings | {"dataset": str(template / "data"), "output_dir": str(template / "runs")}
        with pytest.raises(Killed):
            call(train, *flags(made | {"checkpoint_steps": "4"}), step=step_that(kill, at=9))
        outcome = call(
            evaluate, "--ckpt", str(template / "runs" / "test" / "best"), "--verify-batching", "0"
        )
        assert outcome.code == 0, outcome.err
    shutil.copytree(template, tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    changed = {
        "dataset": str(tmp_path / "world" / "data"),
        "output_dir": str(tmp_path / "world" / "runs"),
    }
    for file in (tmp_path / "world" / "runs" / "test").glob(
        "*/training.json"
    ):  # the copy knows its own data
        file.write_text(file.read_text().replace(str(template), str(tmp_path / "world")))
        seal(file.parent)
    return World(tmp_path / "world", settings | changed)


def everything(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("script", "arrange", "fragment"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_bad_input(
    call, world: World, script: str, arrange: Callable[[World], list[str]], fragment: str
) -> None:
    """Guards against a traceback, a message of pages, and a file overwritten before an error."""
    arguments = arrange(world)
    before = everything(world.root)
    outcome = call(SCRIPTS[script], *arguments)
    outcome.assert_user_error(fragment)
    assert len(outcome.err) < 1200, len(outcome.err)
    assert everything(world.root) == before


def test_the_table_is_long_enough_and_covers_every_script() -> None:
    assert len({row[0] for row in TABLE}) == len(TABLE) >= 60
    assert {row[1] for row in TABLE} == SCRIPTS.keys()


def test_the_world_is_in_order(call, world: World) -> None:
    """Guards against a table that passes because nothing works at all."""
    assert call(evaluate, *world.evaluate(), "--output", str(world.root / "new")).code == 0
    assert call(perplexity, *world.evaluate()).code == 0
    assert call(evaluate, "--rescore", str(world.predictions)).code == 0
    assert call(train, *world.resume()).code == 0
    assert call(train, *world.train()).code == 0
