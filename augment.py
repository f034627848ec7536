"""Add a model's own right solutions to its training data (RFT, arXiv:2308.01825).

python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best --split train --samples 8
python augment.py --samples checkpoints/llama-2-7b-gsm8k/eval/train/samples/predictions.jsonl \\
    --output data/rft-8
python train.py --dataset data/rft-8 --run_name rft-8

Samples of the train rows, from one or several runs, are kept if their answer is right, all of their
equations are true, and their list of equations is new for the problem. The output is a data set
with the same rows as before, in train.jsonl followed by the kept samples, the same test.jsonl and,
with the same validation_size and seed, the same validation rows. augment.json says where they are
from. Data set, validation_size and seed are those of the samples, unless flags name others.
"""

import argparse
import os
from pathlib import Path

from run.script import check_platform, read_command_line, run_script

check_platform()  # before the imports that would fail

from run.arguments import ArgumentParser, parse_arguments


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--samples",
        nargs="+",
        type=Path,
        metavar="FILE",
        required=True,
        help="each predictions.jsonl of samples of the train rows",
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="the data set's folder, a new one"
    )
    return parse_arguments(parser, argv)


if __name__ == "__main__":
    command_line = read_command_line(read_arguments)  # before the heavy imports

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import data
from grading.dataset import Problem, check_disjoint, load_problems
from grading.next_steps import RUNS_OWN
from grading.report import augmentation_table
from grading.results import IDENTITY_FILE
from grading.samples import EVALUATE, SampleFile, by_question, read_samples
from grading.selection import STAGES, Selection, select
from run.config import COMMAND_LINE, CONFIG_FILE, Config, SettingsFiles, merge, read_files
from run.errors import UserError, counted
from run.manifest import METRICS_FILE
from run.new_folder import write_folder
from run.paths import hide_home, local_path
from run.setting_types import TRAIN_ROWS
from run.shell import script_command
from run.streams import is_one_of_several

TRAIN, TEST, DESCRIPTION = "train.jsonl", "test.jsonl", "augment.json"


def main(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    if is_one_of_several():
        raise UserError("augment.py: works in one process: type it without torchrun")
    output = Path(os.path.abspath(local_path(arguments.output)))
    files = read_samples(arguments.samples)
    config = settings_for(files, arguments.config, typed)
    next_command = training_command(output, config, arguments.config, files)

    # The rows, of which those to validate and to test on must not be trained on
    rows, test = (load_problems(config.dataset, split) for split in ("train", "test"))
    check_disjoint(rows, test)
    train, validation = data.carve_validation(rows, config.validation_size, config.seed)

    # The samples that are right, sound and new
    selection = select(train, by_question(files, train, validation, test, config.dataset))

    # The data set with them
    augmented = [*rows, *selection.added]
    sha256 = {
        "train_sha256": data.fingerprint(augmented),
        "validation_sha256": data.fingerprint(validation),
        "test_sha256": data.fingerprint(test),
        "dataset_train_sha256": data.fingerprint(rows),
    }
    settings = {key: getattr(config, key) for key in TRAIN_ROWS}
    description = describe(settings, files, selection, len(rows), sha256)
    contents = {
        TRAIN: as_jsonl(augmented),
        TEST: test_file(config.dataset, test),
        DESCRIPTION: (json.dumps(description, indent=2) + "\n").encode(),
    }
    is_new = write_data_set(output, contents)
    print(augmentation_table(description))
    if not selection.added:
        print(f"nothing was added, so its rows are the original ones: {cure(selection.total)}")
    done = "data set" if is_new else "unchanged since it was last written"
    print(f"{done}: {output}; next: {next_command}")


def cure(total: Mapping[str, int]) -> str:
    """What to do where no sample was kept, by how many reached each of the `STAGES`."""
    if total["right"] and not total["with_equations"]:
        return (
            f"of {counted(total['right'], 'right sample')}, none is a solution with an equation "
            "such as 48/2=24, and no other is kept: more samples help only if rows of the data "
            "set have equations"
        )
    return (
        "sample more, or at a higher temperature into another folder "
        f"({EVALUATE} --temperature T --output DIR)"
    )


def settings_for(
    files: Sequence[SampleFile], settings: SettingsFiles, typed: Mapping[str, str]
) -> Config:
    """The settings, in which the data set, validation_size and seed are those of the samples.

    Flags override them. Where nothing is recorded, they are those of the settings files.
    """
    recorded = next((one for one in files if "dataset" in one.identity), None)
    if recorded is None:
        settings.report_changes(typed)
        return settings.with_flags(typed)
    name = str(recorded.file.with_name(IDENTITY_FILE))
    known = {key: recorded.identity[key] for key in TRAIN_ROWS if key in recorded.identity}
    config = merge({**settings.layers, name: known, COMMAND_LINE: dict(typed)})
    changed = f", but {', '.join(typed)} from the command line" if typed else ""
    print(f"settings: {', '.join(known)} from {name}{changed}")
    return config


def training_command(
    output: Path, config: Config, settings: SettingsFiles, files: Sequence[SampleFile]
) -> str:
    """The command that trains a run of its own on ``output``, with the same validation rows.

    All else is as in ``settings`` if a settings file was named, or else as in the run whose model
    the samples are from.
    """
    runs = [found for one in files if (found := settings_of_run(one))]
    if len(settings.layers) == 1 and runs:
        settings = read_files(runs[0])
    _, *names = settings.layers
    run_name = re.sub(r"[^A-Za-z0-9._-]+", "-", output.name).lstrip("._-")[:128] or "augmented"
    flags = {"config": names[0]} if names else {}
    flags |= {"dataset": output, "run_name": run_name}
    for key in ("validation_size", "seed"):
        if settings.values.get(key) != str(getattr(config, key)):
            flags[key] = getattr(config, key)
    return script_command("train.py", *(f"--{key}={value}" for key, value in flags.items()))


def settings_of_run(samples: SampleFile) -> Path | None:
    """The settings, as its training resolved them, of the run whose model ``samples`` are from."""
    above = list(Path(os.path.abspath(samples.file)).parents)[2:4]
    places = above[1:] if above[:1] and above[0].name == RUNS_OWN else []
    if checkpoint := samples.identity.get("checkpoint"):
        places.append(local_path(str(checkpoint)).parent)
    for place in places:
        if (place / METRICS_FILE).is_file() and (place / CONFIG_FILE.name).is_file():
            return Path(os.path.relpath(place / CONFIG_FILE.name))
    return None


def describe(
    settings: Mapping[str, Any],
    files: Sequence[SampleFile],
    selection: Selection,
    num_rows: int,
    sha256: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``augment.json``.

    Args:
        settings: those in `TRAIN_ROWS`.
        num_rows: of the original train split, with the validation rows.
        sha256: fingerprints of the rows, as in ``training.json``.
    """
    about = ("checkpoint", "weights", "temperature", "seed", "with_calculator")
    sources = [
        {"file": hide_home(str(one.file)), "sha256": one.sha256}
        | {key: one.identity.get(key) for key in about}
        | {name: selection.counts[source][name] for name in STAGES}
        for source, one in enumerate(files)
    ]
    num_problems, kept = len(selection.kept), Counter(selection.kept.values())
    return {
        **settings,
        "dataset": hide_home(settings["dataset"]),
        "data": dict(sha256),
        "rows": {"original": num_rows, "added": len(selection.added)},
        "samples": sources,
        "total": selection.total,
        "num_problems": num_problems,
        "num_sampled": selection.num_sampled,
        "lists_per_problem": selection.num_lists / num_problems,
        "problems_by_kept": {str(number): kept[number] for number in sorted(kept)},
    }


def as_jsonl(problems: Sequence[Problem]) -> bytes:
    """In ASCII, so that no program mistakes a U+2028 in a question for the end of the line."""
    rows = ({"question": problem.question, "answer": problem.answer} for problem in problems)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_file(dataset: str, test: Sequence[Problem]) -> bytes:
    """The data set's own ``test.jsonl`` or, if its test rows have another format, these rows."""
    file = local_path(dataset) / TEST
    return file.read_bytes() if file.is_file() else as_jsonl(test)


def write_data_set(output: Path, contents: Mapping[str, bytes]) -> bool:
    """Write a new folder, whole or not at all.

    Returns:
        Whether it was written; it is not if it has been there before, with the same content.

    Raises:
        UserError: there is something else.
    """
    is_folder = output.is_dir() and not output.is_symlink()
    if not is_folder and (output.exists() or output.is_symlink()):
        raise UserError(f"{output}: exists and is not a folder: name a new one with --output")
    found = {path.name: path for path in output.iterdir()} if is_folder else {}
    if not found:
        write_folder(output, contents)
        return True
    if found.keys() == contents.keys() and all(
        path.is_file() and path.read_bytes() == contents[name] for name, path in found.items()
    ):
        return False
    raise UserError(f"{output}: contains something else: name a new folder with --output")


if __name__ == "__main__":
    run_script(main, *command_line)
