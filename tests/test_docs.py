"""What the documents show is so: commands can be typed; files, tests and settings exist."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import fields
from pathlib import Path

import pytest

import augment
import demo
import evaluate
import merge
import perplexity
import report
import train
from grading.dataset import Problem
from grading.predictions import graded_row
from page import curves
from run import config, folder

ROOT = Path(config.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELIABILITY = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
CONFIG = config.CONFIG_FILE.read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "checkpoints/README.md"])
SCRIPTS = {
    "train.py": train,
    "evaluate.py": evaluate,
    "perplexity.py": perplexity,
    "merge.py": merge,
    "augment.py": augment,
}
PLAIN_SCRIPTS = {"report.py": report}  # which take no settings
SETTINGS = {field.name for field in fields(config.Config)}
POINTER = re.compile(r"`([\w/]+\.py)`, `(\w+)`")  # a file and a function or class in there


def code_blocks(text: str) -> str:
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code_blocks(text))


def commands() -> list[str]:
    """Each ``python SCRIPT.py ...`` in a code block or docstring line, once."""
    texts = [code_blocks(document.read_text(encoding="utf-8")) for document in DOCUMENTS]
    texts += [module.__doc__ for module in (*SCRIPTS.values(), report, demo)]
    texts += [
        ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        for path in (ROOT / "benchmarks").glob("*.py")
    ]
    recipes = (ROOT / "recipes").glob("*.yaml")
    texts += [recipe.read_text(encoding="utf-8").replace("\n#", "\n") for recipe in recipes]
    lines = [
        line.strip().removeprefix("$ ")
        for text in texts
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return sorted(
        {line.split("  #")[0].strip() for line in lines if line.startswith(("python ", "make "))}
    )


@pytest.mark.parametrize("command", commands())
def test_shown_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a flag that was renamed, and a document that was not."""
    monkeypatch.chdir(ROOT)
    program, script, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{script}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert (ROOT / script).is_file()
    if module := (SCRIPTS | PLAIN_SCRIPTS).get(script):
        module.read_arguments(arguments)
    else:
        source = (ROOT / script).read_text()
        for flag in re.findall(r"(?<!\S)--[\w-]+", command):
            assert f'"{flag}"' in source, flag


def test_commands_were_found() -> None:
    found = commands()
    assert len(found) >= 12
    for start in (
        "make demo",
        "make test",
        "python train.py",
        "python evaluate.py --ckpt",
        "python perplexity.py",
        "python benchmarks/picture.py",
    ):
        assert any(command.startswith(start) for command in found), start


def test_names_in_documents_were_found() -> None:
    """The tests below look at each of them, and would all pass if none were found."""
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    assert min(len(code_spans(text)) for text in (README, RELIABILITY, REFERENCE)) > 50
    assert sum(len(POINTER.findall(text)) for text in texts) > 5


def test_every_setting_has_a_one_line_comment() -> None:
    """Guards against a setting without a meaning: config.yaml is the only list of them."""
    lines = [line for line in CONFIG.splitlines() if line and not line.startswith("#")]
    commented = [re.fullmatch(r"(\w+): .*\S +# +\S.*", line) for line in lines]
    assert all(commented), [line for line, match in zip(lines, commented, strict=True) if not match]
    assert [match[1] for match in commented] == [field.name for field in fields(config.Config)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_that_documents_name_exist(document: Path) -> None:
    """Guards against a renamed setting: `name: value`, and `snake_case` that is nowhere in code."""
    words = {word for path in python_files() for word in re.findall(r"\w+", path.read_text())}
    text = POINTER.sub("", document.read_text(encoding="utf-8"))
    for span in code_spans(text):
        if match := re.fullmatch(r"([a-z_]+): \S+", span):
            assert match[1] in SETTINGS, span
        elif re.fullmatch(r"[a-z]+(_[a-z]+)+", span):
            assert span in SETTINGS or span in words, span


def python_files() -> list[Path]:
    rooms = ("engine", "grading", "page", "run", "benchmarks", "tests")
    return [*ROOT.glob("*.py"), *(path for room in rooms for path in ROOT.glob(f"{room}/**/*.py"))]


def test_free_settings_are_those_of_the_reference() -> None:
    """Guards against a list of what may change on resuming that is not the program's."""
    listed = re.search(r"may change on resuming.*?:\n\n(.*?)\n\n", REFERENCE, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == folder.FREE_SETTINGS


def test_every_flag_is_in_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a flag that only the source knows."""
    for name, script in (SCRIPTS | PLAIN_SCRIPTS).items():
        with pytest.raises(SystemExit):
            script.read_arguments(["--help"])
        flags = set(re.findall(r"(?<!\S)--([a-z][\w-]*)", capsys.readouterr().out))
        assert flags >= SETTINGS or name in PLAIN_SCRIPTS
        for flag in flags - SETTINGS:
            assert f"`--{flag}" in REFERENCE, (name, flag)


def test_every_logged_number_is_in_the_reference() -> None:
    """Guards against a curve that nobody can look up. Where one is logged, test_report.py looks."""
    for name in " ".join(curves.TITLES).split():
        assert f"`{name}" in REFERENCE, name


def test_every_key_of_a_prediction_is_in_the_reference() -> None:
    row = graded_row(0, 0, Problem("1 + 1?", "1 + 1 = 2\n#### 2"), "3", "eos", 2)
    listed = re.search(r"^A line of `predictions.jsonl` has (.+?)\n\n", REFERENCE, re.M | re.S)[1]
    assert [key for key in re.findall(r"`(\w+)`", listed) if key in row] == list(row)


def test_every_benchmark_is_in_the_reference() -> None:
    """Guards against a command behind a number that only RESULTS.md knows."""
    commands = code_blocks(REFERENCE)
    for path in (ROOT / "benchmarks").glob("*.py"):
        if "__main__" in (source := path.read_text(encoding="utf-8")):
            assert f"python benchmarks/{path.name}" in commands, path.name
            assert "ArgumentParser(" in source, path.name  # so that --help is not a whole run


def test_readme_tree_is_what_is_there() -> None:
    """Guards against a file tree that shows what is gone, or lacks what has come."""
    tree = re.search(r"^## Read the code\n.*?```\n(.*?)```", README, re.DOTALL | re.MULTILINE)[1]
    shown = {line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")}
    there = {
        path.name + "/" * path.is_dir()
        for path in ROOT.iterdir()
        if not path.name.startswith((".", "__"))
    }
    assert shown <= there
    assert (tracked() or there - {"demo/", "wandb/"}) <= shown


def tracked() -> set[str]:
    """The names at the root that git tracks; nothing in a copy without git.

    A user's models, runs and logs lie at the root too.
    """
    if shutil.which("git") is None:
        return set()
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    return {re.sub("/.*", "/", name) for name in listed.splitlines() if not name.startswith(".")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document: Path) -> None:
    """Guards against a pointer to a file that has moved: `engine/optimizer.py`, `run/`."""
    rooms = "engine|grading|page|run|benchmarks|tests|docs|recipes"
    for span in code_spans(document.read_text(encoding="utf-8")):
        if re.fullmatch(rf"(?:{rooms})/(?:[\w/]+\.\w+|[\w/]*)|\w+\.py", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_that_documents_point_to_exist(document: Path) -> None:
    """Guards against a renamed function: `train.py`, `accumulate_gradients`."""
    for file, name in POINTER.findall(document.read_text(encoding="utf-8")):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), (file, name)


def test_every_promise_names_tests_that_exist() -> None:
    """Guards against a promise whose test was renamed or never written."""
    text, _, tests = RELIABILITY.partition("## The tests of each promise")
    promises = numbered(without_code_blocks(text))
    named = {number: re.findall(r"`([^`]+)`", words) for number, words in numbered(tests).items()}
    assert list(promises) == list(named) == list(range(1, 49))
    defined = {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    for number, names in named.items():
        missing = [name for name in names if name not in defined and not (ROOT / name).is_file()]
        assert any(name in defined for name in names) and not missing, (number, missing)


def numbered(text: str) -> dict[int, str]:
    """The items of a document's numbered lists."""
    items = re.findall(r"^(\d+)\. (.+?)(?=^\d+\. |^#|\Z)", text, re.DOTALL | re.MULTILINE)
    return {int(number): words for number, words in items}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Guards against a link to a file or a heading that is not there."""
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        file = document.parent / name if name else document
        assert file.is_file(), target
        assert not heading or heading in headings(file), target


def headings(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    titles = re.findall(
        r"^#+ (.+)$", without_code_blocks(document.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_at_most_100_columns(document: Path) -> None:
    lines = document.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 100] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_is_divided_at_the_end_of_a_line(document: Path) -> None:
    """Guards against "micro- batch": Markdown shows the end of a line as a space."""
    text = without_code_blocks(document.read_text(encoding="utf-8"))
    assert re.findall(r"\w+-\n", text) == []


def test_picture_shows_the_losses_and_the_score(tmp_path: Path) -> None:
    """Guards against a picture that is not well-formed or shows another epoch than the best."""
    metrics = [
        {"step": step, "train/loss": 2.0 / step, **({"val/loss": loss} if loss else {})}
        for step, loss in ((1, None), (2, 0.5), (3, None), (4, 0.25), (6, 0.75))
    ]
    best = {"step": 4, "epoch": 2.0, "validation_loss": 0.25}
    scores = {
        "split": "test", "exact_match": 0.5, "num_correct": 4, "num_problems": 8,
        "ci95": [0.2152, 0.7848],
    }  # fmt: skip
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "eval" / "test").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (run / "best" / "training.json").write_text(json.dumps(best))

    command = [sys.executable, "benchmarks/picture.py", "--run", run, "--output", tmp_path / "svg"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "scores.json: missing" in refused.stderr

    (run / "eval" / "test" / "scores.json").write_text(json.dumps(scores))
    subprocess.run(command, cwd=ROOT, check=True)
    elements = list(ET.parse(tmp_path / "svg").iter())
    words = [element.text for element in elements if element.text]
    for shown in (
        "best: epoch 2, 0.25",
        "50.0%",
        "4 of 8 correct",
        "95 % interval 21.5% to 78.5%",
    ):
        assert shown in words
    circles = [element.attrib for element in elements if element.tag.endswith("circle")]
    centres = {circle["r"]: [] for circle in circles}
    for circle in circles:
        centres[circle["r"]].append((circle["cx"], circle["cy"]))
    assert len(centres["3.5"]) == 3  # validation losses
    assert centres["7"] == [centres["3.5"][1]]  # the best of them


def test_every_requirement_is_pinned() -> None:
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
