"""Which curves a page shows, from the lines of metrics.jsonl."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from run.errors import counted

Point = tuple[float, float]  # optimizer step, value

# Those that have a title of their own, in this order. Series of one chart are separated by a space.
TITLES = {
    "train/loss val/loss": ("Loss", "nats per token"),
    "train/perplexity val/perplexity": ("Perplexity", "per token"),
    "val/perplexity_": ("Perplexity by kind of token", "per token"),
    "val/exact_match": ("Exact match on the validation rows", "share"),
    "train/learning_rate": ("Learning rate", ""),
    "train/grad_norm": ("Gradient norm", "before clipping"),
    "train/tokens_per_second": ("Throughput", "tokens per second"),
    "train/memory_gib": ("Memory", "GiB"),
    "train/mfu": ("MFU", "share of the device's peak"),
    "train/mask_rate": ("Mask rate", "share of the answers' tokens"),
    "train/micro_batch_tokens": ("Micro-batch after running out of memory", "tokens"),
}
BY_KIND = ("val/perplexity_", "val/loss_")  # of a loss by kind, only the perplexity is shown
WIDE = 10  # the ratio of largest to smallest value from which an axis is logarithmic
LARGEST = 1e100  # a greater number is damage; an axis has no room around the largest floats
POSITIVE = ("loss", "perplexity")  # their axes may be logarithmic


@dataclass(frozen=True)
class Logged:
    """What a run logged.

    Attributes:
        name: the run's, for the legend if there are two.
        metrics: the lines of ``metrics.jsonl``.
        best_step: the optimizer step of the best checkpoint; None if that is gone.
    """

    name: str
    metrics: Sequence[Mapping[str, Any]]
    best_step: float | None

    @cached_property
    def best(self) -> float | None:
        """The step of the best checkpoint or, if it is gone, of the lowest validation loss."""
        losses = series_of(self.metrics, "val/loss")
        lowest = min(losses, key=lambda point: point[1])[0] if losses else None
        return lowest if self.best_step is None else self.best_step


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: what the legend says.
        points: finite values by optimizer step.
        gaps: the steps of what is infinite or no number, in their order.
        colour: its number in the style sheet, from 1.
        is_dotted: whether each point is marked, as those of a validation are.
        is_dashed: whether the line is dashed, as those of a second run are.
        best: the point of the best checkpoint.
    """

    label: str
    points: list[Point]
    gaps: list[float]
    colour: int
    is_dotted: bool = False
    is_dashed: bool = False
    best: Point | None = None

    @property
    def pieces(self) -> list[list[Point]]:
        """The points, parted at the gaps: a line across one would show what was never logged."""
        parted = groupby(self.points, lambda point: bisect(self.gaps, point[0]))
        return [list(piece) for _, piece in parted]

    @property
    def lack(self) -> str:
        """What the line does not show, in words; empty if it shows all."""
        return f"off the chart in {counted(len(self.gaps), 'step')}" if self.gaps else ""


@dataclass(frozen=True)
class Chart:
    """Curves over optimizer steps."""

    title: str
    unit: str
    curves: list[Curve]
    is_logarithmic: bool

    @property
    def summary(self) -> str:
        """The chart in words, for those who can't see it."""
        parts = []
        for curve in self.curves:
            (first, start), (last, end) = curve.points[0], curve.points[-1]
            words = f"{curve.label}: {start:.4g} at step {first:g} to {end:.4g} at step {last:g}"
            if curve.best:
                words += f", best checkpoint at step {curve.best[0]:g} with {curve.best[1]:.4g}"
            if curve.lack:
                words += f", {curve.lack}"
            parts.append(words)
        return f"{self.title} over optimizer steps. {'; '.join(parts)}."


def charts_of(runs: Sequence[Logged]) -> list[Chart]:
    """One chart for each of `TITLES`, and for any other series of training and validation.

    Args:
        runs: one, or two to be shown in the same charts.
    """
    known = {name for key in TITLES for name in key.split()}
    series = [name for run in runs for line in run.metrics for name in line]
    grouped = [name for name in dict.fromkeys(series) if name.startswith(("train/", "val/"))]
    others = [name for name in grouped if name not in known and not name.startswith(BY_KIND)]
    groups = {
        key: [name for name in grouped if name in key.split()]
        or [name for name in grouped if key.endswith("_") and name.startswith(key)]
        for key in TITLES
    } | {name: [name] for name in others}
    charts = []
    for key, members in groups.items():
        title, unit = TITLES.get(key, (f"{in_words(key)}, {_label(key)}", ""))
        curves = _curves(runs, members)
        if any(len(curve.points) > 1 for curve in curves):
            charts.append(Chart(title, unit, curves, _is_logarithmic(key, curves)))
    return charts


def _curves(runs: Sequence[Logged], members: Sequence[str]) -> list[Curve]:
    curves = []
    for number, run in enumerate(runs):
        for place, member in enumerate(members):
            points = series_of(run.metrics, member)
            if not points:
                continue
            label = _label(member) if len(members) > 1 else ""
            shown = run.name if len(runs) > 1 else ""
            # Two runs differ by colour in the charts of one series each, and by dashes in all.
            colour = place + 1 if len(members) > 1 else number + 1
            best = next((point for point in points if point[0] == run.best), None)
            curves.append(
                Curve(
                    label=", ".join(filter(None, (shown, label))) or _label(member),
                    points=points,
                    gaps=gaps_of(run.metrics, member),
                    colour=colour,
                    is_dotted=member.startswith("val/"),
                    is_dashed=number > 0,
                    best=best if member in ("val/loss", "val/perplexity") else None,
                )
            )
    return curves


def series_of(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """The finite values of a metric, by step; of a step that was logged twice, the later one."""
    found: dict[float, float] = {}
    for line in metrics:
        step, value = line.get("step"), line.get(name)
        if is_number(step) and is_number(value):
            found[step] = value
    return sorted(found.items())


def gaps_of(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The steps at which a metric was logged, and never with a value that `series_of` has."""
    logged = {line["step"] for line in metrics if name in line and is_number(line.get("step"))}
    return sorted(logged.difference(step for step, _ in series_of(metrics, name)))


def is_number(value: object) -> bool:
    """Whether this is a finite number, and no integer of 400 digits."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def _is_logarithmic(key: str, curves: Sequence[Curve]) -> bool:
    values = [value for curve in curves for _, value in curve.points]
    return (
        any(word in key for word in POSITIVE)
        and min(values) > 0
        and max(values) > WIDE * min(values)
    )


def _label(name: str) -> str:
    """``training`` for ``train/loss``, ``final answer`` for ``val/perplexity_final_answer``."""
    room, _, metric = name.partition("/")
    if name.startswith(BY_KIND):
        return metric.partition("_")[2].replace("_", " ")
    return {"train": "training", "val": "validation"}[room]


def in_words(name: str) -> str:
    """``Mean length`` for ``val/mean_length``."""
    return name.partition("/")[2].replace("_", " ").capitalize()
