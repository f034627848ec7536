"""Is a run that was killed resumed bit for bit, on this machine, with this model and these settings?

What ``python train.py --selftest`` does: four steps in a temporary folder of ``output_dir``, once
without and once with a kill. On the way it tries everything that a long run must not fail at.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.loading import load_tokenizer
from grading import dataset
from run.config import Config, load_config, settings_text
from run.errors import UserError, one_line
from run.manifest import BEST, LAST, MANIFEST_FILE, METRICS_FILE
from run.metrics_log import MetricsLog
from run.paths import local_path
from run.retention import check_disk_space
from run.script import run_script
from run.wandb_run import NoTracker, RunPath, start_tracker
from standin import write_jsonl

ROOT = Path(__file__).parent
EPOCHS, STEPS_PER_EPOCH = 2, 2  # or fewer steps, where the data set is that small
VALIDATION_ROWS = 8
WHOLE, KILLED = "whole", "killed"  # the two runs


def run_selftest(config: Config) -> None:
    """Print what was tried and how it went.

    Raises:
        UserError: something did not work.
    """
    output = local_path(config.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        # On the disk that the run's checkpoints will go to.
        folder = Path(tempfile.mkdtemp(prefix="selftest-", dir=output))
    except OSError as error:
        raise UserError(
            f"{output}: can't be written ({error.strerror}): choose another --output_dir"
        ) from None
    try:
        write_data(config, folder / "data")
        print(
            f"selftest: {EPOCHS} epochs of {STEPS_PER_EPOCH} steps in {folder}, which is removed at the end"
        )
        whole = run(config, folder, WHOLE)
        last_step, validation_loss = whole["losses"][-1]
        print(f"  trained:   {last_step} steps, validation loss {validation_loss:.6f}")
        print(f"  disk:      {try_disk(folder / WHOLE)}")
        print(f"  export:    {try_export(folder / WHOLE / BEST)}")
        shutil.rmtree(folder / WHOLE)  # room for the other
        run(config, folder, KILLED, kill_in=last_step)
        print(f"  killed:    SIGKILL in step {last_step}")
        resumed = run(config, folder, KILLED)
        for what in ("losses", "weights", "optimizer"):
            if resumed[what] != whole[what]:
                raise UserError(
                    f"selftest: the resumed run's {what} are not those of the run that was not killed "
                    f"({first_difference(whole[what], resumed[what])}): nothing is lost on resuming, but not every "
                    "kernel of this machine gives the same bits twice"
                )
        print("  resumed:   losses, weights and optimizer state are identical, bit for bit")
        print(f"  W&B:       {try_tracker(config, folder)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("selftest: passed")


def write_data(config: Config, folder: Path) -> None:
    """The first rows of the user's own data set, as many as the few steps take."""
    folder.mkdir()
    for split, count in (
        ("train", STEPS_PER_EPOCH * config.batch_size + VALIDATION_ROWS),
        ("test", VALIDATION_ROWS),
    ):
        # One row of each question: several must not fall on both sides of the validation split.
        problems = {
            problem.question: problem for problem in dataset.load_problems(config.dataset, split)
        }
        rows = [
            {"question": problem.question, "answer": problem.answer}
            for problem in problems.values()
        ]
        write_jsonl(rows[:count], folder / f"{split}.jsonl")


def run(config: Config, folder: Path, name: str, kill_in: int | None = None) -> dict[str, Any]:
    """Train in a process of its own; gives its losses, and the hashes of what it saved.

    Args:
        kill_in: the step in which it kills itself; then there is nothing to give.
    """
    settings = replace(
        config,
        dataset=str(folder / "data"),
        output_dir=str(folder),
        run_name=name,
        validation_size=VALIDATION_ROWS,
        epochs=EPOCHS,
        log_every=1,
        checkpoint_steps=None,
        keep_state=True,
        best_by="val_loss",
        resume="auto",
        max_new_tokens=min(config.max_new_tokens, 16),
        wandb_mode="disabled",
    )
    file = folder / f"{name}.yaml"
    file.write_text(settings_text(settings), encoding="utf-8")
    command = (
        ["train.py", "--config", str(file)]
        if kill_in is None
        else ["selftest.py", str(file), str(kill_in)]
    )
    result = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if result.returncode != (0 if kill_in is None else -signal.SIGKILL):
        said = [line for line in result.stderr.splitlines() if line.strip()] or [
            f"exit code {result.returncode}"
        ]
        raise UserError(f"selftest: training does not work here: {one_line(said[-1])}")
    if kill_in is not None:
        return {}
    lines = [json.loads(line) for line in (folder / name / METRICS_FILE).read_text().splitlines()]
    hashes = json.loads((folder / name / LAST / MANIFEST_FILE).read_text())["files"]
    return {
        "losses": [
            (line["step"], line[key])
            for line in lines
            for key in ("train/loss", "val/loss", "train/grad_norm")
            if key in line
        ],
        "weights": {file: entry for file, entry in hashes.items() if file.startswith("model")},
        "optimizer": {file: entry for file, entry in hashes.items() if file.startswith("state")},
    }


def first_difference(one: Any, other: Any) -> str:
    if isinstance(one, dict):
        return next((name for name in one if one[name] != other.get(name)), "another file")
    return next(
        (f"step {a[0]}: {a[1]} and {b[1]}" for a, b in zip(one, other, strict=False) if a != b),
        "another number of them",
    )


def try_disk(run_folder: Path) -> str:
    best, last = (
        sum(file.stat().st_size for file in (run_folder / name).iterdir()) for name in (BEST, LAST)
    )
    needed, room = check_disk_space(run_folder, best, last - best)
    return f"a run's checkpoints take {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB can be had"


def try_export(best: Path) -> str:
    """Load ``best`` as any other program would."""
    model = AutoModelForCausalLM.from_pretrained(best)
    ids = torch.tensor(load_tokenizer(best).encode(["How many?"]))
    with torch.inference_mode():
        if not model(ids).logits.isfinite().all():
            raise UserError(
                f"selftest: {best}, loaded by Transformers, gives logits that are not finite"
            )
    return "best loads in Transformers, and gives finite logits"


def try_tracker(config: Config, folder: Path) -> str:
    """Log one line the way the run will."""
    tracker = start_tracker(
        config.wandb_mode,
        run=RunPath(f"selftest-{os.getpid()}", config.wandb_project),
        name="selftest",
        folder=folder,
        settings={},
    )
    with MetricsLog(folder, tracker) as metrics:
        metrics.write(1, 1.0, {"selftest": 1.0})
    if isinstance(tracker, NoTracker):
        return "off"
    return (
        "one line logged online, as run selftest" if tracker.online else "offline: nothing was sent"
    )


def train_until_killed(file: Path, last_step: int) -> None:
    """The process that kills itself: in its last step, so that it has saved once and gone on from there."""
    import train

    original, steps = train.accumulate_in_memory, iter(range(1, last_step + 1))

    def killed(*arguments: Any) -> Any:
        if next(steps) == last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    train.accumulate_in_memory = killed
    train.main(load_config(file, {}))


if __name__ == "__main__":
    run_script(train_until_killed, Path(sys.argv[1]), int(sys.argv[2]))
