"""Every command that README, docstrings and demo show can be typed; what they say of settings is so."""

import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

import demo
import evaluate
import perplexity
import train
from run import config

ROOT = Path(config.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELIABILITY = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "perplexity.py": perplexity}


def commands() -> list[str]:
    """Each ``python SCRIPT.py ...`` in a code block or docstring line, once."""
    blocks = "\n".join(
        re.findall(r"^```\w*\n(.*?)^```", README + RELIABILITY, re.DOTALL | re.MULTILINE)
    )
    texts = [blocks, *(module.__doc__ for module in (*SCRIPTS.values(), demo))]
    texts += [
        path.read_text() for path in (ROOT / "RESULTS.md", *(ROOT / "benchmarks").glob("*.py"))
    ]
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
    if script in SCRIPTS:
        SCRIPTS[script].read_arguments(arguments)


def test_commands_were_found() -> None:
    found = commands()
    assert len(found) >= 12
    for start in (
        "make demo",
        "make test",
        "python train.py",
        "python evaluate.py --ckpt",
        "python perplexity.py",
    ):
        assert any(command.startswith(start) for command in found), start


def test_readme_table_has_every_setting_with_its_value() -> None:
    values, comments = config.read_settings(config.CONFIG_FILE)
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \| .* \|$", README, re.MULTILINE))
    assert list(rows) == [field.name for field in fields(config.Config)]
    for key, shown in rows.items():
        assert shown == values[key].replace("\n", "\\n"), key
    for key, comment in comments.items():
        assert f"| {comment} |" in README, key


def test_readme_tree_is_what_is_there() -> None:
    """Guards against a file tree that shows what is gone, or lacks what has come."""
    tree = re.search(r"^## The files\n.*?```\n(.*?)```", README, re.DOTALL | re.MULTILINE)[1]
    shown = {line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")}
    there = {
        path.name + "/" * path.is_dir()
        for path in ROOT.iterdir()
        if not path.name.startswith((".", "__"))
    }
    assert shown <= there
    assert (tracked() or there - {"demo/", "wandb/"}) <= shown


def tracked() -> set[str]:
    """What git tracks of the root, where a user's models, runs and logs lie too; nothing in a copy without git."""
    if shutil.which("git") is None:
        return set()
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    return {re.sub("/.*", "/", name) for name in listed.splitlines() if not name.startswith(".")}


def test_every_promise_names_tests_that_exist() -> None:
    """Guards against a promise whose test was renamed or never written."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", RELIABILITY, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 32))
    defined = {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    for number, _, tests in rows:
        named = re.findall(r"`(\w+)`", tests)
        assert named and set(named) <= defined, (number, set(named) - defined)


def test_links_lead_somewhere() -> None:
    for document in (README, RELIABILITY, (ROOT / "RESULTS.md").read_text()):
        for target in re.findall(r"\]\(([^)#]+)\)", document):
            assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_requirement_is_pinned() -> None:
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
