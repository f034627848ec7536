"""The recipes: what they change, and that their commands lead from one to the next."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from run import config

ROOT = Path(config.__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def head(recipe: Path) -> str:
    """The comment at the beginning, without its marks."""
    comment = recipe.read_text(encoding="utf-8").partition("\n\n")[0]
    return re.sub(r"^# ?", "", comment, flags=re.MULTILINE)


def commands(recipe: Path) -> list[list[str]]:
    lines = head(recipe).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.strip().startswith("python ")]
    return [line[1:] for line in words if "--plan" not in line]


def argument(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def settings(recipe: str | Path) -> config.Config:
    return config.load_config(ROOT / recipe, {})


def test_there_is_one_for_each_method() -> None:
    assert [recipe.stem for recipe in RECIPES] == ["mft", "mft_rft", "plain", "rft"]


@each_recipe
def test_a_recipe_holds_exactly_what_differs_each_with_a_comment(recipe: Path) -> None:
    """Guards against a setting that no longer exists, or is that of config.yaml by now."""
    values, comments = config.read_settings(recipe)
    ours, default = settings(recipe), config.load_config(config.CONFIG_FILE, {})
    keys = [field.name for field in fields(config.Config)]
    assert list(values) == [key for key in keys if getattr(ours, key) != getattr(default, key)]
    assert all(comments.values())
    assert ours.run_name == recipe.stem
    assert max(map(len, recipe.read_text(encoding="utf-8").splitlines())) <= 100


@each_recipe
def test_a_recipe_says_what_to_expect(recipe: Path) -> None:
    """And the README's table shows the same score."""
    for word in ("Published: ", "Time: ", "Disk: "):
        assert re.search(rf"^{word}", head(recipe), re.MULTILINE), word
    score = re.search(r"^Published: ([0-9.]+) % exact match.*?\(arXiv:", head(recipe), re.M | re.S)
    assert f"| {score[1]} | [{recipe.name}](recipes/{recipe.name}) |" in README
    assert ("mask" in "".join(config.read_settings(recipe)[0])) == ("mft" in recipe.stem)


@each_recipe
def test_the_commands_of_a_recipe_lead_from_one_to_the_next(recipe: Path) -> None:
    """Guards against a checkpoint, samples or a data set that no command before has made."""
    there = {"openai/gsm8k"}
    for command in commands(recipe):
        if command[0] == "train.py":
            trained = settings(argument(command, "--config"))
            assert str(Path(trained.dataset)) in there
            there.add(f"checkpoints/{trained.run_name}/best")
        elif command[0] == "evaluate.py":
            assert argument(command, "--ckpt") in there
            if "train" in command:
                there.add(f"checkpoints/{trained.run_name}/eval/train/samples/predictions.jsonl")
        else:
            assert command[0] == "augment.py" and argument(command, "--samples") in there
            there.add(argument(command, "--output"))
    last, evaluated = commands(recipe)[-2:]
    assert last == ["train.py", "--config", f"recipes/{recipe.name}"]
    assert evaluated == ["evaluate.py", "--ckpt", f"checkpoints/{recipe.stem}/best"]
