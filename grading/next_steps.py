"""What to run after an evaluation, as commands to paste."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grading.results import IDENTITY_FILE, PREDICTIONS_FILE, SCORES_FILE
from run.errors import one_line
from run.shell import evaluation_command, script_command

NUM_SAMPLES = 8  # of each problem


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
    if other := _newest_other(output):
        files = [str(folder / PREDICTIONS_FILE) for folder in (other, output)]
        lines.append(f"next, test the difference from {one_line(other)}:")
        lines.append(f"  {script_command('evaluate.py', '--compare', *files)}")
    return lines


def _newest_other(output: Path) -> Path | None:
    """The newest complete evaluation of the same rows by another run beside this one."""
    run, rows = output.parent.parent, _rows_of(output)
    others = [
        folder
        for folder in run.parent.glob(f"*/{output.parent.name}/{output.name}")
        if folder != output and (folder / SCORES_FILE).is_file() and _rows_of(folder) == rows
    ]
    return max(others, key=lambda folder: (folder / SCORES_FILE).stat().st_mtime, default=None)


def _rows_of(folder: Path) -> Any:
    """The hash of the rows that were evaluated; None if no file in ``folder`` says it."""
    try:
        return json.loads((folder / IDENTITY_FILE).read_bytes())["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
