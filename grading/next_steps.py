"""What to run after an evaluation, as commands to paste."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grading.results import IDENTITY_FILE, PREDICTIONS_FILE, SAMPLES, SCORES_FILE
from run.errors import one_line
from run.shell import evaluation_command, path_word, script_command

NUM_SAMPLES = 8  # of each problem
RUNS_OWN = "eval"  # the folder of a run's evaluations


def next_steps(
    checkpoint: str, output: Path, flags: Mapping[str, Any], is_sampled: bool
) -> list[str]:
    """Lines with the commands, and what each is for.

    Args:
        output: the folder of the evaluation.
        flags: those of the evaluation but ``--ckpt``, by name without the dashes; None: not given.
        is_sampled: whether it has samples already.
    """
    lines = []
    if not is_sampled:
        given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        command = evaluation_command(Path(checkpoint), *given, f"--samples={NUM_SAMPLES}")
        lines += ["next, sample each problem several times (maj@k, pass@k):", f"  {command}"]
    elif flags["split"] == "train":
        command = _augmentation(output, flags)
        lines += ["next, add what is right and new to the rows:", f"  {command}"]
    if other := _newest_other(output):
        files = [path_word(folder / PREDICTIONS_FILE) for folder in (other, output)]
        lines.append(f"next, test the difference from {one_line(other)}:")
        lines.append(f"  {script_command('evaluate.py', '--compare', *files)}")
    return lines


def _augmentation(output: Path, flags: Mapping[str, Any]) -> str:
    """The command that makes a data set of the samples of train rows in ``output``."""
    folder, where = output / SAMPLES, output.absolute()
    run = where.parent.parent if where.parent.name == RUNS_OWN else where
    name = f"rft-{run.name}-{_recorded(folder, 'num_samples')}"  # more samples make another one
    config = [f"--config={flags['config']}"] if flags["config"] else []
    paths = ["--samples", path_word(folder / PREDICTIONS_FILE), "--output", f"./data/{name}"]
    return script_command("augment.py", *config, *paths)


def _newest_other(output: Path) -> Path | None:
    """The newest complete evaluation of the same rows by another run beside this one's run."""
    if output.parent.name != RUNS_OWN:
        return None
    run, rows = output.parent.parent, _recorded(output, "data_sha256")
    others = [
        folder
        for folder in run.parent.glob(f"*/{output.parent.name}/{output.name}")
        if folder != output
        and (folder / SCORES_FILE).is_file()
        and _recorded(folder, "data_sha256") == rows
    ]
    return max(others, key=lambda folder: (folder / SCORES_FILE).stat().st_mtime, default=None)


def _recorded(folder: Path, key: str) -> Any:
    """What is recorded of the evaluation in ``folder``; None if no file there says it."""
    try:
        return json.loads((folder / IDENTITY_FILE).read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
