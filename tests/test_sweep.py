"""sweep.yaml is what W&B accepts and train.py understands; each trial has a folder of its own."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Killed, flags, kill, run_folder, step_that

import evaluate
import train
from run.config import KEYS
from run.files import forget_what_was_said
from run.training_json import read_description

SWEEP = yaml.safe_load((Path(train.__file__).parent / "sweep.yaml").read_text())
BASE = "llama-2-7b-gsm8k"  # the run_name in config.yaml


def test_sweep_follows_the_schema_of_wandb() -> None:
    """By the package with which W&B's server checks a sweep."""
    jsonschema = pytest.importorskip("jsonschema")
    package = importlib.util.find_spec("sweeps")
    if package is None:
        pytest.skip("the package sweeps is not installed")
    schema = json.loads((Path(package.origin).parent / "config" / "schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(SWEEP)] == []
    parameters = SWEEP["parameters"]
    assert parameters["learning_rate"]["min"] < parameters["learning_rate"]["max"]
    wrong = SWEEP | {"method": "guess"}
    assert [error.message for error in validator.iter_errors(wrong)] != []


def trials() -> list[dict[str, Any]]:
    """One with the first value of each parameter, and one with the last."""
    return [
        {
            name: choice.get("values", [choice.get(end, choice.get("value"))])[place]
            for name, choice in SWEEP["parameters"].items()
        }
        for end, place in (("min", 0), ("max", -1))
    ]


@pytest.mark.parametrize("trial", trials())
def test_the_command_of_a_trial_is_understood(trial: dict[str, Any]) -> None:
    """The command is composed as W&B's agent does it (`wandb_agent.Agent._command_run`)."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    command = {"args": {name: {"value": value} for name, value in trial.items()}}
    values = create_sweep_command_args(command)
    values |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [SWEEP["program"]]}
    words: list[str] = []
    for word in create_sweep_command(list(SWEEP["command"])):
        words += values[word[2:-1]] if word.startswith("${") else [word]
    assert words[:3] == ["/usr/bin/env", "python", "train.py"]
    config, *_ = train.read_arguments(words[3:])
    assert {name: getattr(config, name) for name in trial} == trial and trial.keys() <= set(KEYS)


def test_each_trial_has_its_folder_and_goes_on_in_it(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guards against a second trial that is refused, or that goes on from the first one's weights.

    A run_name that was typed is not changed.
    """
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    typed = settings | {"epochs": "1", "checkpoint_steps": "2"}
    del typed["run_name"]

    def start(trial: str, learning_rate: str, **parts: Any) -> Any:
        forget_what_was_said()
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        return call(train, *flags(typed | {"learning_rate": learning_rate}), **parts)

    with pytest.raises(Killed):
        start("one", "1e-3", step=step_that(kill, at=4))
    outcome = start("two", "2e-3")
    assert outcome.code == 0 and f"sweep: this trial is the run {BASE}-two\n" in outcome.out
    again = start("one", "1e-3")
    assert again.code == 0 and "resuming: " in again.out
    runs = Path(settings["output_dir"])
    rates = {
        folder.name: read_description(folder / "best")["settings"]["learning_rate"]
        for folder in runs.iterdir()
    }
    assert rates == {f"{BASE}-one": 1e-3, f"{BASE}-two": 2e-3}
    outcome = call(evaluate, "--verify-batching", "0", *flags({"output_dir": str(runs)}))
    assert outcome.code == 0 and (runs / f"{BASE}-one" / "eval" / "test" / "scores.json").exists()
    config, *_ = train.read_arguments(flags(settings))
    assert config.run_name == run_folder(settings).name == "test"
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):  # the other alone makes no trial
        with monkeypatch.context() as alone:
            alone.delenv(name)
            assert train.read_arguments(flags(typed))[0].run_name == BASE
