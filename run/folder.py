"""Whose a run's folder is, whether its training may go on, and what that needs beside the weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from run.checkpoint import newest_intact, wait_for_removals
from run.config import KEYS, PLACES, Config
from run.errors import UserError
from run.files import replace_file
from run.locks import locked
from run.manifest import BEST, FINISHED_FILE, LAST, PREVIOUS, check_no_links, fault_of
from run.paths import is_same_place, local_path
from run.retention import cure_without_best
from run.training_json import is_of_an_older_version, read_description, saved_settings

# What may differ between a run and its resumption, beside epochs where no learning rate depends on them: nothing
# here changes which gradient a step has.
FREE_SETTINGS = frozenset(
    {
        *(
            "output_dir",
            "run_name",
            "micro_batch_tokens",
            "gradient_checkpointing",
            "compile",
            "log_every",
        ),
        *(
            "checkpoint_steps",
            "keep_state",
            "resume",
            "max_new_tokens",
            "decode_slots",
            "calculator",
        ),
        *("wandb_project", "wandb_mode"),
    }
)


LOCK_SECONDS = 1.0  # for how long a run's folder is asked for


@contextmanager
def claimed(folder: Path, resume: str) -> Iterator[Path | None]:
    """Make the run's folder, or find what to resume from, and keep other processes out of it meanwhile.

    Yields:
        The checkpoint to go on from, or None for a new run.

    Raises:
        UserError: the folder is in use and may not be, or can't be written.
    """
    held = (
        f"{folder}: another process is training this run: wait for it, or choose another --run_name"
    )
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_no_links(folder)
            # An evaluation that logs its score holds it for a moment.
            stack.enter_context(locked(folder, held, patience=LOCK_SECONDS))
        except OSError as error:
            raise UserError(
                f"{folder}: can't be written ({error.strerror}): choose another --output_dir"
            ) from None
        stack.callback(wait_for_removals)
        yield _find_start(folder, resume)


def _find_start(folder: Path, resume: str) -> Path | None:
    if resume == "auto" and (start := newest_intact(folder)):
        (folder / FINISHED_FILE).unlink(
            missing_ok=True
        )  # of a removal that was cut: there is something to go on from
        return start
    if (folder / FINISHED_FILE).exists():
        if fault := fault_of(folder / BEST):
            raise UserError(
                f"{folder}: this run is finished, and its {BEST} is damaged or gone ({fault}): "
                f"{cure_without_best(folder)}"
            )
        raise UserError(
            f"{folder}: this run is finished, and its {LAST} and {PREVIOUS} were removed (keep_state false): evaluate "
            "it, or train another under a new --run_name"
        )
    in_use = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if in_use:
        raise UserError(
            f"{folder}: is in use ({', '.join(in_use[:4])}): "
            + ("--resume auto goes on from its last; or " if LAST in in_use else "")
            + "choose another --run_name"
        )
    try:
        replace_file(folder / ".write_test", "")
        (folder / ".write_test").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written ({error.strerror}): choose another --output_dir"
        ) from None
    return None


def check_same_run(folder: Path, config: Config, data_sha256: str) -> None:
    """Say which settings are others than those of the run saved in ``folder``.

    Raises:
        UserError: with one of them, or with other data, it would be another run.
    """
    description = read_description(folder)
    before, now = dict(description["settings"]), asdict(config)
    older = is_of_an_older_version(description)
    free = FREE_SETTINGS
    if (
        config.lr_schedule == "constant" and config.warmup_ratio == 0
    ):  # no rate depends on the number of steps
        free |= {"epochs"}
    free |= {"dataset"}  # its rows say which one it is
    before |= saved_settings(folder, description)
    if has_moved(str(before.get("model")), config.model):
        free |= {"model"}
    # A setting that is newer than the checkpoint was none when it was saved.
    known = [key for key in KEYS if key in before]
    known = [
        key
        for key in known
        if key not in PLACES or not is_same_folder(str(before[key]), now[key], older)
    ]
    others = {
        key: f"{key} was {before[key]!r} and is {now[key]!r}"
        for key in known
        if before[key] != now[key]
    }
    changed = [what for key, what in others.items() if key not in free]
    if description["data"].get("train_sha256") != data_sha256:
        changed.append("the rows of the data set are not the same")
    if changed:
        raise UserError(
            f"{folder}: can't go on with other settings: {'; '.join(changed)}: put them back, or start anew under "
            "another --run_name"
        )
    if others:
        print(f"resuming: {'; '.join(others.values())}")


def is_same_folder(before: str, now: str, older: bool) -> bool:
    """Whether two paths lead to one folder; ``older``: the first may be relative to a folder that is not known."""
    if older and is_same_place(before, now):
        return True
    one, other = local_path(before), local_path(now)
    return one.is_absolute() and one.is_dir() and other.is_dir() and one.samefile(other)


def has_moved(before: str, now: str) -> bool:
    """Whether a folder is not where it was, and one of its name is where it is now.

    That is enough for the base model: a run that goes on reads nothing more of it.
    """
    old, new = local_path(before), local_path(now)
    return old.is_absolute() and not old.exists() and new.is_dir() and old.name == new.name


def check_unfinished(step: int, total_steps: int, run_folder: Path) -> None:
    if step >= total_steps:
        if fault := fault_of(run_folder / BEST):
            raise UserError(
                f"{run_folder}: this run is finished ({total_steps} steps), and its {BEST} is damaged or gone "
                f"({fault}): {cure_without_best(run_folder)}"
            )
        raise UserError(
            f"{run_folder}: this run is finished ({total_steps} steps): evaluate it, or train another under a new "
            "--run_name"
        )
