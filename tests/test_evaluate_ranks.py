"""Evaluation and perplexity by several processes of a job: the results are those of one."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from conftest import flags

import evaluate
import perplexity
from engine.decoding import Completion
from engine.ranks import ALONE
from engine.strategy import decode
from run.errors import UserError
from run.script import run_script

SETTINGS = {"max_new_tokens": "12", "decode_slots": "3"}
FOLDERS = (".", "calculator", "samples")
TIMING = ("seconds", "tokens_per_second")


def run(name: str, argv: list[str], **parts: Any) -> None:
    """What the last lines of a script do."""
    script = {"evaluate": evaluate, "perplexity": perplexity}[name]

    def story() -> None:
        script.main(*script.read_arguments(argv), **parts)

    run_script(story)


def rows_of(folder: Path) -> list[str]:
    """The lines of a predictions.jsonl, in the order of the problems and samples."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return sorted(
        lines, key=lambda line: [json.loads(line).get(key, 0) for key in ("id", "sample")]
    )


def without_timing(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    timing = content.get("timing", content)
    assert all(timing.pop(key) > 0 for key in TIMING)
    return content


@pytest.fixture
def arguments(settings: dict[str, str]) -> list[str]:
    return ["--ckpt", settings["model"], *flags(settings | SETTINGS), "--output"]


@pytest.fixture
def everything(arguments: list[str]) -> list[str]:
    return ["--samples", "3", "--calculator", "true", *arguments]


def test_three_ranks_write_what_one_process_writes(
    call: Callable[..., Any], everything: list[str], tmp_path: Path
) -> None:
    """Guards against completions that are lost, doubled, swapped, or depend on the dealing."""
    one, three = tmp_path / "one", tmp_path / "three"
    alone = call(evaluate, *everything, str(one))
    assert alone.code == 0, alone.err
    ended = jobs.run(3, tmp_path / "job", run, "evaluate", [*everything, str(three)])
    for folder in FOLDERS:
        assert rows_of(three / folder) == rows_of(one / folder)
        for name in ("scores.json", "evaluation.json"):
            files = (place / folder / name for place in (three, one))
            assert without_timing(next(files)) == without_timing(next(files)), (folder, name)
    assert len(rows_of(three / "samples")) == 36
    said = ended[0].out.replace(str(three), str(one)).splitlines()
    assert said == alone.out.splitlines() and said[-1] == f"results: {one}"
    assert [each.out + each.err for each in ended[1:]] == ["", ""] and ended[0].err == ""
