"""Checks that a killed run is resumed bit for bit, on this machine, with this model and settings.

``python train.py --selftest`` trains a few steps in a temporary folder in ``output_dir``, once
without interruption, and once killed and resumed. It also tests the disk, the export and W&B, so
that a long run does not fail because of them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from run.config import Config, settings_text
from run.errors import UserError, cause_of, one_line
from run.files import gigabytes
from run.manifest import BEST, LAST, MANIFEST_FILE, METRICS_FILE
from run.method import FULL
from run.metrics_log import MetricsLog
from run.paths import local_path
from run.retention import check_disk_space, disk_space
from run.streams import is_one_of_several
from run.training_json import read_description
from run.wandb_run import NoTracker, RunPath, start_tracker

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
EPOCHS, STEPS_PER_EPOCH = 2, 2  # fewer steps with a small data set
VALIDATION_ROWS = 8
UNINTERRUPTED, KILLED = "uninterrupted", "killed"  # the names of the two runs
LOSSES = ("train/loss", "val/loss", "train/grad_norm")
WEIGHT_FILES = ("model", "adapter_model")
LOOK_SECONDS = 0.001  # between two reads of the log, to find the step after which to kill


def run_selftest(config: Config, load_rows: Callable[[str], Sequence[Any]]) -> None:
    """Run all checks, and print the result of each.

    Args:
        load_rows: gives the rows of ``train`` or ``test``, as dataclasses.

    Raises:
        UserError: a check failed.
    """
    if is_one_of_several():
        raise UserError("--selftest: starts the processes that it needs: type it without torchrun")
    rows = {split: [*map(asdict, load_rows(split))] for split in ("train", "test")}
    with temporary_folder(local_path(config.output_dir)) as folder:
        write_data(rows, config.batch_size, folder / "data")
        print(f"selftest: {EPOCHS} epochs of {STEPS_PER_EPOCH} steps in {folder}, then removed")
        expected = train(config, folder, UNINTERRUPTED)
        last_step, validation_loss = expected.losses[-1]
        print(f"  trained:   {last_step} steps, validation loss {validation_loss:.6f}")
        print(f"  disk:      {try_disk(folder / UNINTERRUPTED)}")
        print(f"  export:    {try_export(folder / UNINTERRUPTED / BEST, config)}")
        shutil.rmtree(folder / UNINTERRUPTED)  # space for the other run
        killed_after = train_and_kill(config, folder, KILLED, last_step)
        print(f"  killed:    SIGKILL after step {killed_after}")
        check_identical(expected, train(config, folder, KILLED))
        print("  resumed:   losses, weights and optimizer state are identical, bit for bit")
        print(f"  W&B:       {try_tracker(config, folder)}")
    print("selftest: passed")


@contextmanager
def temporary_folder(output_dir: Path) -> Iterator[Path]:
    """A folder that exists inside this context, on the same disk as a run's checkpoints."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="selftest-", dir=output_dir))
    except OSError as error:
        raise UserError(
            f"{output_dir}: can't be written ({error.strerror}): choose another --output_dir"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_data(rows: Mapping[str, Sequence[dict[str, Any]]], batch_size: int, folder: Path) -> None:
    """Write the first rows of the user's own data set, as many as the few steps need."""
    folder.mkdir()
    counts = {"train": STEPS_PER_EPOCH * batch_size + VALIDATION_ROWS, "test": VALIDATION_ROWS}
    for split, count in counts.items():
        # One row per question, since rows of one question must be on the same side of the split.
        distinct = list({row["question"]: row for row in rows[split]}.values())
        lines = [
            json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n"
            for row in distinct[:count]
        ]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Results:
    """The results that must not depend on a kill.

    Attributes:
        losses: step and value of each logged loss and gradient norm.
        weights, optimizer: sizes and hashes of the files in ``last``.
    """

    losses: list[tuple[int, float]]
    weights: dict[str, Any]
    optimizer: dict[str, Any]


def train(config: Config, folder: Path, name: str) -> Results:
    """Train to the end, in a separate process."""
    process = start(config, folder, name)
    try:
        process.wait()
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise training_fails(folder, name, process.returncode)
    lines = read_log(folder / name)
    files = json.loads((folder / name / LAST / MANIFEST_FILE).read_text())["files"]
    return Results(
        losses=[(line["step"], line[key]) for line in lines for key in LOSSES if key in line],
        weights={file: entry for file, entry in files.items() if file.startswith(WEIGHT_FILES)},
        optimizer={file: entry for file, entry in files.items() if file.startswith("state")},
    )


def train_and_kill(config: Config, folder: Path, name: str, last_step: int) -> int:
    """Train, and kill the process before its last step is saved.

    If it saves the last step before the kill, try again with an earlier kill.

    Returns:
        The step after which it was killed.
    """
    for kill_after in range(last_step - 1, 0, -1):
        shutil.rmtree(folder / name, ignore_errors=True)
        process = start(config, folder, name)
        try:
            while process.poll() is None and not is_time_to_kill(folder / name, kill_after):
                time.sleep(LOOK_SECONDS)
        finally:
            process.kill()
            process.wait()
        if process.returncode not in (0, -signal.SIGKILL):
            raise training_fails(folder, name, process.returncode)
        # With saves that go on beside training, its log may have more steps, even all of them.
        if 0 < saved_step(folder / name) < last_step:
            return newest_step(folder / name)
    raise UserError(
        f"selftest: training ends within {last_step} steps before it can be killed: set a larger "
        "batch_size for this test"
    )


def is_time_to_kill(run_folder: Path, kill_after: int) -> bool:
    """Whether the run has made a step so late, and there is something to resume from."""
    return newest_step(run_folder) >= kill_after and saved_step(run_folder) > 0


def start(config: Config, folder: Path, name: str) -> subprocess.Popen[bytes]:
    rows = (folder / "data" / "train.jsonl").read_bytes().count(b"\n")
    settings = replace(
        config,
        dataset=str(folder / "data"),
        output_dir=str(folder),
        run_name=name,
        validation_size=min(VALIDATION_ROWS, rows - 1) or 1,
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
    with (folder / f"{name}.err").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), "--config", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def training_fails(folder: Path, name: str, exit_code: int) -> UserError:
    text = (folder / f"{name}.err").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    reason = one_line(lines[-1]) if lines else f"exit code {exit_code}"
    return UserError(f"selftest: training does not work here: {reason}")


def read_log(run_folder: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, which a run may be writing at the moment."""
    try:
        content = (run_folder / METRICS_FILE).read_bytes()
    except FileNotFoundError:
        return []
    complete = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def newest_step(run_folder: Path) -> int:
    """The newest optimizer step in the log; 0 before the first."""
    return max((line["step"] for line in read_log(run_folder)), default=0)


def saved_step(run_folder: Path) -> int:
    """The step of ``last``; 0 before the first save after a step."""
    try:
        return int(read_description(run_folder / LAST)["step"])
    except UserError:  # it is being put in place
        return 0


def check_identical(expected: Results, resumed: Results) -> None:
    """Raises UserError if the resumed run differs from the uninterrupted one."""
    for what in ("losses", "weights", "optimizer"):
        one, other = getattr(expected, what), getattr(resumed, what)
        if one != other:
            raise UserError(
                f"selftest: {what} of the resumed run differ from the uninterrupted run "
                f"({first_difference(one, other)}): resuming loses nothing, but not every kernel "
                "of this machine gives the same bits twice"
            )


def first_difference(one: Any, other: Any) -> str:
    if isinstance(one, dict):
        return next((name for name in one if one[name] != other.get(name)), "another file")
    for before, after in zip(one, other, strict=False):
        if before != after:
            return f"step {before[0]}: {before[1]} and {after[1]}"
    return f"{len(one)} and {len(other)} of them"


# ---------------------------------------------------------------- other checks


def try_disk(run_folder: Path) -> str:
    best, last = (
        sum(file.stat().st_size for file in (run_folder / name).iterdir()) for name in (BEST, LAST)
    )
    check_disk_space(run_folder, best, last - best)
    needed, available = map(gigabytes, disk_space(run_folder, best, last - best))
    return f"a run's checkpoints need {needed}, {available} are available"


def try_export(best: Path, config: Config) -> str:
    """Load ``best`` as any other program would."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    program, whole = "Transformers", best
    if config.method != FULL:
        from peft import PeftModel

        program, whole = "PEFT", local_path(config.model)
    warnings.simplefilter("ignore")  # from one of these packages, about another
    try:
        model = AutoModelForCausalLM.from_pretrained(whole if whole.is_dir() else config.model)
        if whole != best:
            model = PeftModel.from_pretrained(model, best)
        inputs = AutoTokenizer.from_pretrained(best)("How many?", return_tensors="pt")
        with torch.inference_mode():
            logits = model(inputs["input_ids"]).logits
    except Exception as error:  # Transformers raises many types
        raise UserError(f"selftest: {best} can't be used: {cause_of(error)}") from None
    if not logits.isfinite().all():
        raise UserError(f"selftest: {best}, loaded by {program}, gives logits that are not finite")
    return f"best loads in {program}, and gives finite logits"


def try_tracker(config: Config, folder: Path) -> str:
    """Log one line to W&B in the same way as a run."""
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
    return "one line logged online, as run selftest" if tracker.online else "offline: nothing sent"
