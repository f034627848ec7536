"""Draws a run as an SVG: its training and validation loss, and its score with the interval.

python benchmarks/picture.py --run demo/run --output docs/demo.svg
python benchmarks/picture.py --run demo/run --split validation --output validation.svg

Reads metrics.jsonl, best/training.json and eval/SPLIT/scores.json of the run. The picture has its
own background, so it is readable on a dark page too. Needs only Python.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run.errors import UserError
from run.script import run_script

Point = tuple[float, float]

WIDTH, HEIGHT = 860, 340
PAPER, INK, GREY, GRID = "#ffffff", "#1f2328", "#59636e", "#d8dee4"
BLUE, ORANGE = "#0969da", "#bc4c00"
FONT = "-apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
SCORE_STEPS = (0.01, 0.05, 0.1, 0.25, 1.0)  # the score axis ends on multiples of one of these


@dataclass(frozen=True)
class Axis:
    """Maps the values from ``low`` to ``high`` onto the pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def picture(metrics: Sequence[dict[str, Any]], best: dict[str, Any], scores: dict[str, Any]) -> str:
    """The complete SVG.

    Args:
        metrics: the lines of metrics.jsonl.
        best: the best checkpoint's training.json.
        scores: the scores.json of its evaluation.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="{FONT}" font-size="13">',
        f"<title>{escape(summary(best, scores))}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>',
        *loss_panel(metrics, best),
        *score_panel(scores),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def summary(best: dict[str, Any], scores: dict[str, Any]) -> str:
    low, high = scores["ci95"]
    return (
        f"Best after epoch {best['epoch']:g}: validation loss {best['validation_loss']:.4g}, "
        f"exact match {scores['exact_match']:.1%} on {scores['num_problems']} problems "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )


def loss_panel(metrics: Sequence[dict[str, Any]], best: dict[str, Any]) -> list[str]:
    """Loss over optimizer steps on a logarithmic axis, with the best epoch marked."""
    training = curve(metrics, "train/loss")
    validation = curve(metrics, "val/loss")
    losses = [loss for _, loss in training + validation]
    if not training or not validation:
        raise UserError("metrics.jsonl: needs a finite training and validation loss above 0")
    left, right, top, bottom = 62, 560, 56, HEIGHT - 50
    x = Axis(0, max(step for step, _ in training + validation), left, right)
    levels = loss_levels(min(losses), max(losses))
    y = Axis(levels[0], levels[-1], bottom, top, logarithmic=True)

    parts = [text(left, 30, "Loss, nats per token", INK, weight=600)]
    for level in levels:
        parts.append(line(left, y(level), right, y(level), GRID))
        parts.append(text(left - 8, y(level) + 4, f"{level:g}", GREY, anchor="end"))
    for step in ticks(x.high):
        parts.append(text(x(step), bottom + 20, f"{step:,}", GREY, anchor="middle"))
    parts.append(text((left + right) / 2, bottom + 40, "optimizer steps", GREY, anchor="middle"))

    best_x, best_y = x(best["step"]), y(best["validation_loss"])
    parts.append(line(best_x, top, best_x, bottom, ORANGE, dashes="4 4"))
    parts.append(path(training, x, y, BLUE, 1.5))
    parts.append(path(validation, x, y, ORANGE, 2))
    parts += [circle(x(step), y(loss), 3.5, ORANGE, ORANGE) for step, loss in validation]
    parts.append(circle(best_x, best_y, 7, "none", ORANGE))
    label = f"best: epoch {best['epoch']:g}, {best['validation_loss']:.4g}"
    # On the side of the marked step that has more room.
    late = best_x > (left + right) / 2
    parts.append(
        text(best_x + (-10 if late else 10), top + 14, label, ORANGE, "end" if late else "start")
    )
    for shift, colour, name in ((-170, BLUE, "training"), (-80, ORANGE, "validation")):
        parts.append(line(right + shift, 26, right + shift + 16, 26, colour, width=3))
        parts.append(text(right + shift + 22, 30, name, INK))
    return parts


def score_panel(scores: dict[str, Any]) -> list[str]:
    """The exact match in large digits, and its interval on an axis."""
    left, right = 620, WIDTH - 32
    score, (low, high) = scores["exact_match"], scores["ci95"]
    first, last, step = score_axis(low, high)
    x = Axis(first, last, left, right)
    height = 222
    parts = [
        text(left, 30, f"Exact match, {scores['split']} problems", INK, weight=600),
        text(left, 112, f"{score:.1%}", INK, size=48, weight=600),
        text(left, 140, f"{scores['num_correct']:,} of {scores['num_problems']:,} correct", GREY),
        text(left, 182, f"95 % interval {low:.1%} to {high:.1%}", GREY),
        line(left, height + 24, right, height + 24, GRID),
    ]
    for index in range(round((last - first) / step) + 1):
        value = first + index * step
        parts.append(line(x(value), height + 24, x(value), height + 29, GREY))
        parts.append(text(x(value), height + 46, f"{value:.0%}", GREY, anchor="middle"))
    parts.append(line(x(low), height, x(high), height, BLUE, width=3))
    parts += [line(x(end), height - 8, x(end), height + 8, BLUE, width=3) for end in (low, high)]
    parts.append(circle(x(score), height, 6, PAPER, BLUE))
    return parts


def curve(metrics: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """One metric over the steps, without values that have no logarithm."""
    values = [(line["step"], line[name]) for line in metrics if name in line]
    return [(step, value) for step, value in values if math.isfinite(value) and value > 0]


def loss_levels(lowest: float, highest: float) -> list[float]:
    """The grid lines: powers of ten and, in a narrow range, also 2 and 5 times powers of ten."""
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    if last - first > 2:
        return [10.0**power for power in range(first, last + 1)]
    levels = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(index for index, level in enumerate(levels) if level <= lowest)
    end = min(index for index, level in enumerate(levels) if level >= highest)
    return levels[start : max(end, start + 1) + 1]


def ticks(highest: float) -> range:
    """Round numbers from 0 to ``highest``."""
    magnitude = 10 ** math.floor(math.log10(highest))
    step = next(
        (size for size in (magnitude, magnitude // 2, magnitude // 5) if size * 4 <= highest),
        magnitude // 5,
    )
    return range(0, int(highest) + 1, max(step, 1))


def score_axis(low: float, high: float) -> tuple[float, float, float]:
    """First, last and step of the finest axis with at most six steps that contains the interval."""
    for step in SCORE_STEPS:
        first, last = math.floor(low / step) * step, math.ceil(high / step) * step
        if last > first and (last - first) / step <= 6.5:
            break
    return first, last, step


def text(
    x: float,
    y: float,
    words: str,
    colour: str,
    anchor: str = "start",
    size: int = 13,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
        f'font-size="{size}" font-weight="{weight}">{escape(words)}</text>'
    )


def line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dashes: str = "none"
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}" stroke-dasharray="{dashes}"/>'
    )


def circle(x: float, y: float, radius: float, fill: str, stroke: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{stroke}" '
        'stroke-width="2.5"/>'
    )


def path(points: Sequence[Point], x: Axis, y: Axis, colour: str, width: float) -> str:
    corners = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return (
        f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="{width}" '
        'stroke-linejoin="round"/>'
    )


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--split", default="test", help="the split whose score is shown")
    parser.add_argument("--output", type=Path, required=True, help="SVG file to write")
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> None:
    files = (
        arguments.run / "metrics.jsonl",
        arguments.run / "best" / "training.json",
        arguments.run / "eval" / arguments.split / "scores.json",
    )
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing; train the run and evaluate its best first")
    metrics, best, scores = (file.read_text(encoding="utf-8") for file in files)
    rows = [json.loads(row) for row in metrics.splitlines()]
    arguments.output.write_text(
        picture(rows, json.loads(best), json.loads(scores)), encoding="utf-8"
    )


if __name__ == "__main__":
    run_script(main, read_arguments(sys.argv[1:]))
