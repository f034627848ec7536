"""What a page says about a run in words: its recipe, its epochs, its settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf
from statistics import median
from typing import Any

from page.curves import in_words, is_number, series_of
from run.errors import counted
from run.paths import hide_home
from run.setting_types import in_yaml

Metrics = Sequence[Mapping[str, Any]]
HASHED = ("test", "validation")  # the splits whose own rows training.json has the hash of
SHARES = {"val/exact_match"}  # shown in percent, as the scores are


@dataclass(frozen=True)
class Facts:
    """The words at the head of a page.

    Attributes:
        about: pairs of a label and a text, such as ``Model`` and its name.
        best: pairs of a label and a number, of the best checkpoint.
    """

    about: list[tuple[str, str]]
    best: list[tuple[str, str]]


@dataclass(frozen=True)
class Epochs:
    """The validations of a run as a table.

    Attributes:
        columns: the names of the numbers.
        rows: epoch, optimizer step, the numbers, and whether this is the best checkpoint.
    """

    columns: list[str]
    rows: list[tuple[str, int, list[str], bool]]


def facts_of(
    settings: Mapping[str, Any],
    best: Mapping[str, Any],
    metrics: Metrics,
    evaluation: Mapping[str, Any],
) -> Facts:
    """What is known of a run.

    Args:
        settings: of its checkpoint; empty if unknown.
        best: ``training.json`` of the best checkpoint; empty if there is none.
        metrics: the lines of ``metrics.jsonl``.
        evaluation: the identity of its predictions; empty if there is none.
    """
    about = []
    if checkpoint := evaluation.get("checkpoint"):
        about.append(("Checkpoint", str(checkpoint)))
    about += [
        (title, str(settings[key]))
        for key, title in (("model", "Model"), ("dataset", "Data set"), ("method", "Method"))
        if key in settings
    ]
    recipe = [
        words.format(_short(settings[key]))
        for key, words in (
            ("epochs", "{} epoch" if settings.get("epochs") == 1 else "{} epochs"),
            ("batch_size", "batches of {}"),
            ("learning_rate", "learning rate {}"),
            ("dtype", "{}"),
        )
        if key in settings
    ]
    if settings.get("fp8") is True:
        recipe.append("products in FP8")
    if recipe:
        about.append(("Recipe", ", ".join(recipe)))
    speeds = [value for _, value in series_of(metrics, "train/tokens_per_second")]
    if speeds:
        about.append(("Throughput", f"{median(speeds):,.0f} tokens per second"))
    numbers = [
        (title, _four_digits(best[key]))
        for key, title in (
            ("epoch", "best epoch"),
            ("validation_loss", "validation loss"),
            ("validation_perplexity", "perplexity"),
        )
        if is_number(best.get(key))
    ]
    return Facts([(label, hide_home(text)) for label, text in about], numbers)


def progress_of(newest: Mapping[str, Any]) -> str:
    """``0.53 of 3 epochs`` of a training that is not finished; empty if it is, or this is unknown.

    Args:
        newest: the description of the newest checkpoint; empty if unknown.
    """
    made, epochs = newest.get("epoch"), newest.get("settings", {}).get("epochs")
    if not (is_number(made) and is_number(epochs) and made < epochs):
        return ""
    hundredths = floor(round(100 * made, 6))  # not rounded up, but 0.29 is 29 of them
    return f"{hundredths / 100:g} of {counted(epochs, 'epoch')}"


def deviations_of(run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """What an evaluation was given, or decoded with, other than the settings of its run say.

    Args:
        run: the description of a checkpoint; empty if unknown.
        evaluation: see `facts_of`.

    Returns:
        words such as ``max_new_tokens 20``.
    """
    pairs = [
        (f"{key} {in_yaml(evaluation[key])}", evaluation[key], run["settings"][key])
        for key in ("prompt", "max_new_tokens", "dtype")
        if key in evaluation and key in run.get("settings", {})
    ]
    # That of train is recorded with the validation rows in it.
    split, known = evaluation.get("split"), run.get("data")
    rows = known.get(f"{split}_sha256") if split in HASHED and isinstance(known, dict) else None
    if rows is not None and "data_sha256" in evaluation:
        pairs.insert(0, ("rows of another data set", evaluation["data_sha256"], rows))
    return [hide_home(words) for words, used, own in pairs if used != own]


def epochs_of(metrics: Metrics, best_step: float | None) -> Epochs:
    """One row per validation, with every number that it logged."""
    lines = {
        line["step"]: line
        for line in metrics
        if isinstance(line.get("step"), int) and any(name.startswith("val/") for name in line)
    }
    names = list(
        dict.fromkeys(name for line in lines.values() for name in line if name.startswith("val/"))
    )
    rows = [
        (
            _four_digits(line.get("epoch")),
            step,
            [(_percent if name in SHARES else _four_digits)(line.get(name)) for name in names],
            step == best_step,
        )
        for step, line in sorted(lines.items())
    ]
    return Epochs([in_words(name) for name in names], rows)


def settings_of(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Each setting, its value in each run, and whether these differ."""
    names = dict.fromkeys(name for settings in runs for name in settings)
    return [
        (name, values, len(set(values)) > 1) for name in names if (values := _values(runs, name))
    ]


def _values(runs: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return [hide_home(in_yaml(settings[name])) if name in settings else "–" for settings in runs]


def _four_digits(value: object) -> str:
    if value == inf:  # the perplexity of a loss of 710
        return "∞"
    return f"{value:,.4g}" if is_number(value) else "–"


def _percent(value: object) -> str:
    return f"{value:.1%}" if is_number(value) else "–"


def _short(value: object) -> str:
    """``2e-5`` for ``2e-05``; of what should be a number and is none, all of it."""
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
