"""Made-up runs for the tests of the report: files as a run writes them, without training."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grading.dataset import Problem
from grading.predictions import graded_row
from grading.scores_file import score_predictions, write_scores

STEPS = 12  # an epoch
LOSSES = (0.5, 0.4, 0.45)  # of validation: the second epoch is the best
HOSTILE = (
    "<script>document.title='pwned'</script></script><img src=x onerror=\"document.title='pwned'\">"
    '<a href="javascript:document.title=1">javascript:alert(1)</a> &lt;b&gt; {{ 7 * 7 }} '
    "\u202egnp.exe\u202c o" + "\u0489" * 200 + " \x1b[31m \ud800 \u200b end\n#### 7"
)


def problem(number: int) -> Problem:
    """Number ``number`` of many: ``number + 2``, after one to four steps."""
    steps = number % 4 + 1
    lines = [f"Step {step}: <<{number}+{step}={number + step}>>" for step in range(1, steps)]
    lines += [f"It is {number}+2=<<{number}+2={number + 2}>>{number + 2}."]
    return Problem(
        f"Anna has {number} apples and buys 2 of kind {chr(97 + number % 26)}. How many are there?",
        "\n".join([*lines, f"#### {number + 2}"]),
    )


def completion(number: int, kind: str) -> tuple[str, str]:
    """A completion that is right, or wrong in one of the ways, and why it ended."""
    right = problem(number).answer
    false = f"<<{number}+2={number + 12}>>{number + 12}"
    return {
        "right": (right, "eos"),
        "arithmetic": (f"It is {false}.\n#### {number + 12}", "eos"),
        "reasoning": (f"It is <<{number}+1={number + 1}>>.\n#### {number + 1}", "eos"),
        "format": (right + ".00", "eos"),
        "cut": ("It is " * 20, "length"),
        "flexible": (f"Surely {number + 2}", "eos"),
    }[kind]


def rows_of(kinds: Sequence[str], hostile: int | None = None) -> list[dict[str, Any]]:
    """One row per kind, in the order of ids.

    Args:
        hostile: the id of a row whose texts attack the report.
    """
    rows = []
    for number, kind in enumerate(kinds):
        text, stop = completion(number, kind)
        if number == hostile:
            text = HOSTILE
        rows.append(graded_row(number, None, problem(number), text, stop, len(text) // 3))
        if number == hostile:
            rows[-1]["question"] += HOSTILE
    return rows


def write_predictions(folder: Path, rows: Sequence[Mapping[str, Any]], **scores: Any) -> None:
    """The three files of an evaluation; ``scores`` are added to ``scores.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "checkpoint": "checkpoints/run/best",
        "weights": "0",
        "split": folder.name,
        "num_problems": len(rows),
    }
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(lines)
    (folder / "evaluation.json").write_text(json.dumps(identity))
    scored = score_predictions(rows, identity, folder, {})
    write_scores(folder / "scores.json", scored.content | scores)


def metrics() -> list[dict[str, float]]:
    """The lines of three epochs."""
    lines = []
    for step in range(1, 3 * STEPS + 1):
        place, loss = {"step": step, "epoch": step / STEPS, "time": 0.0}, 0.3 + 2 / step
        numbers = {
            "train/loss": loss,
            "train/perplexity": math.exp(loss),
            "train/learning_rate": 2e-5 * (1 - step / 40),
            "train/grad_norm": 1 + 1 / step,
            "train/tokens_per_second": 1000.0 + step,
        }
        lines.append(place | numbers)
        if step % STEPS == 0:
            loss = LOSSES[step // STEPS - 1]
            lines.append(
                place
                | {"val/loss": loss, "val/perplexity": math.exp(loss)}
                | {"val/perplexity_reasoning": math.exp(1.2 * loss)}
                | {"val/perplexity_final_answer": math.exp(0.2 * loss)}
            )
    return lines


def make_run(folder: Path, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    """The folder of a finished and evaluated run."""
    write_predictions(folder / "eval" / "test", rows)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    (folder / "best").mkdir()
    description = {
        "step": 2 * STEPS,
        "epoch": 2.0,
        "validation_loss": LOSSES[1],
        "validation_perplexity": math.exp(LOSSES[1]),
        "settings": {"model": "some/model", "epochs": 3, "learning_rate": 2e-5} | settings,
    }
    (folder / "best" / "training.json").write_text(json.dumps(description))
    return folder
