"""--rescore and --compare: judge predictions again, without a model."""

import argparse
import os
from pathlib import Path
from typing import Any

from grading.compare import compare_files
from grading.predictions import writing_into
from grading.report import comparison_table, evaluation_report
from grading.results import (
    CALCULATOR,
    IDENTITY_FILE,
    NUMBERS,
    PREDICTIONS_FILE,
    SAMPLES,
    SCORES_FILE,
    TIMING,
    previous_timing,
    read_identity,
    read_predictions,
    read_scores,
)
from grading.rules import say_odd_golds
from grading.scores_file import (
    SAME_EVALUATION,
    Scored,
    additional_scores,
    score_predictions,
    write_scores,
)
from run.errors import UserError
from run.script import check_printed


def judge_files(arguments: argparse.Namespace) -> bool:
    """Do what evaluate.py's --rescore or --compare asks for; returns whether it was one of them.

    This needs nothing that only an evaluation imports, which takes seconds.
    """
    if arguments.rescore:
        rescore(arguments.rescore, arguments.output)
    elif arguments.compare:
        print(comparison_table(compare_files(*arguments.compare), [*map(str, arguments.compare)]))
        check_printed()
    return bool(arguments.rescore or arguments.compare)


def rescore(file: Path, output: Path | None) -> None:
    """Score predictions again, into a ``scores.json`` next to them or in ``output``."""
    if file.is_dir() or not os.access(file, os.R_OK):  # raise the error before a folder is made
        read_predictions(file)
    folder = output or file.parent
    with writing_into(folder):
        target = folder / SCORES_FILE if output else _scores_file_for(file)
        scored = _score_file(file)
        scores = scored.content
        if file.name == PREDICTIONS_FILE:
            scores |= additional_scores(scored, file.parent)
        elif not output:
            scores["predictions"] = file.name
        if file.name != PREDICTIONS_FILE or folder.resolve() != file.parent.resolve():
            _check_replaceable(target, scores)
        try:
            write_scores(target, scores)
        except OSError as error:
            raise UserError(
                f"{folder}: can't be written ({error.strerror}): choose another --output"
            ) from None
    print(evaluation_report(scores, str(file)))
    if target.name != SCORES_FILE:
        print(f"scores: {target}, since {SCORES_FILE} belongs to other predictions")


def _score_file(file: Path) -> Scored:
    """Score predictions by their rows and, for a ``predictions.jsonl``, the files next to it.

    Files next to a file of another name describe other predictions.
    """
    rows = read_predictions(file)
    identity: dict[str, Any] = {}
    timing: dict[str, Any] = {}
    if file.name == PREDICTIONS_FILE:
        timing = previous_timing(file.parent)
        identity = read_identity(file.with_name(IDENTITY_FILE)) or read_identity(
            file.with_name(SCORES_FILE)
        )
        for name in (CALCULATOR, SAMPLES, "timing", *TIMING, *NUMBERS):
            identity.pop(name, None)  # it is added again below, if these predictions have it
    if "num_problems" not in identity:
        identity["num_problems"] = len({row["id"] for row in rows})
        print(
            f"{file}: no file next to it says how many problems were asked: "
            f"assuming that it contains all {identity['num_problems']}"
        )
    scored = score_predictions(rows, identity, file, timing)
    say_odd_golds({f"id {row['id']}": row["gold"] for row in rows}, str(file))
    return scored


def _scores_file_for(file: Path) -> Path:
    """The file for the scores of ``file``: ``scores.json``, unless it belongs to other predictions.

    Files with names other than ``predictions.jsonl`` may share a folder with each other, and with
    an evaluation.
    """
    plain = file.with_name(SCORES_FILE)
    if file.name == PREDICTIONS_FILE:
        return plain
    taken = any(file.with_name(name).exists() for name in (PREDICTIONS_FILE, IDENTITY_FILE))
    if taken or (plain.exists() and read_scores(plain).get("predictions") != file.name):
        return file.with_name(f"{file.name.removesuffix('.jsonl')}.{SCORES_FILE}")
    return plain


def _check_replaceable(target: Path, scores: dict[str, Any]) -> None:
    """Raises UserError if ``target`` contains the scores of other predictions, or later will."""
    others = (PREDICTIONS_FILE, IDENTITY_FILE) if target.name == SCORES_FILE else ()
    found = [name for name in others if target.with_name(name).exists()]
    if target.exists():
        before = read_scores(target)
        if "predictions" in scores:
            same = ("predictions",)
        elif "weights" in scores:
            same = SAME_EVALUATION
        else:
            same = tuple(scores)
        if any(before.get(key) != scores.get(key) for key in same):
            found.append(target.name)
    if found:
        raise UserError(
            f"{target.parent}: contains {' and '.join(found)} of other predictions, which must not "
            "be replaced: choose another --output"
        )
