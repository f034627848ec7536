"""What the methods of benchmarks/accuracy.py reached, from their files, as tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from grading.compare import Comparison, compare_files
from grading.results import PREDICTIONS_FILE, SAMPLES, SCORES_FILE, read_scores
from run.manifest import FINISHED_FILE

SECONDS_FILE = "seconds.jsonl"
BEFORE, PLAIN, LONG = "before", "plain", "plain-long"
RESULTS = "eval/test"  # in the folder of a run
TRAIN_SAMPLES = f"eval/train/{SAMPLES}"


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        k: how many samples of each row go into its data; 0: none.
        epochs: None: so many that it takes at least as many optimizer steps as masked thought, and
            as the most samples.
    """

    name: str
    epochs: int | None
    k: int = 0
    mask_rate: float = 0.0


# ---------------------------------------------------------------- what is there


def data_of(output: Path, method: Method, seed: int) -> Path:
    return output / f"seed-{seed}" / f"data-{method.k}" if method.k else output / "data"


def steps_of(run_folder: Path) -> int:
    """The optimizer steps of a finished run."""
    return json.loads((run_folder / FINISHED_FILE).read_text(encoding="utf-8"))["step"]


def is_scored(results: Path) -> bool:
    """Whether both the greedy completions and the samples are scored."""
    return SAMPLES in read_scores(results / SCORES_FILE)


def num_samples(results: Path) -> int:
    """How many samples of each row are drawn and scored."""
    return read_scores(results / SCORES_FILE).get("num_samples", 0)


def seconds_of(result: Path, output: Path) -> float:
    """How long the commands took that made ``result``, those that were stopped included."""
    file = output / SECONDS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    times = [json.loads(line) for line in lines]
    name = name_of(result, output)
    return sum(line["seconds"] for line in times if line["result"] == name)


def name_of(result: Path, output: Path) -> str:
    return result.relative_to(output).as_posix()


@dataclass(frozen=True)
class Result:
    """What a method reached with one seed.

    Attributes:
        scores: the content of its ``scores.json``.
        against: its comparison with plain with the same seed; None for plain itself.
    """

    method: str
    seed: int
    rows: int
    steps: int
    seconds: float
    scores: Mapping[str, Any]
    against: Comparison | None


def read_result(output: Path, method: Method, seed: int) -> Result | None:
    """None if it is not scored yet."""
    run_folder, plain = (output / f"seed-{seed}" / name for name in (method.name, PLAIN))
    results = run_folder / RESULTS
    if not is_scored(results):
        return None
    files = (plain / RESULTS / PREDICTIONS_FILE, results / PREDICTIONS_FILE)
    with (data_of(output, method, seed) / "train.jsonl").open(encoding="utf-8") as lines:
        rows = sum(1 for _ in lines)
    return Result(
        method=method.name,
        seed=seed,
        rows=rows,
        steps=steps_of(run_folder),
        seconds=seconds_of(run_folder, output),
        scores=read_scores(results / SCORES_FILE),
        against=None if method.name == PLAIN else compare_files(*files),
    )


# ---------------------------------------------------------------- the tables


def report(output: Path, ladder: Sequence[Method], seeds: Sequence[int]) -> str:
    """A table of all runs and one of their means, over the seeds that are finished.

    ``s`` is the mean time of training.
    """
    before = read_scores(output / BEFORE / SCORES_FILE)
    by_seed = [[read_result(output, method, seed) for method in ladder] for seed in seeds]
    finished = [results for results in by_seed if None not in results]
    lines = [*table_of_runs(before, finished), "", *table_of_means(finished), ""]
    return "\n".join([*lines, *about_samples(output, ladder, seeds)])


def about_samples(output: Path, ladder: Sequence[Method], seeds: Sequence[int]) -> list[str]:
    """How many samples of the train rows were right, and how long they took, by seed."""
    lines = []
    for k in sorted({method.k for method in ladder if method.k}):
        files = [output / f"seed-{seed}" / f"data-{k}" / "augment.json" for seed in seeds]
        made = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        right = ", ".join(f"{one['total']['right'] / one['total']['drawn']:.1%}" for one in made)
        lists = ", ".join(f"{one['lists_per_problem']:.2f}" for one in made)
        lines.append(f"{k} samples of each train row: {right} right, {lists} lists a problem")
    folders = [output / f"seed-{seed}" / PLAIN / TRAIN_SAMPLES for seed in seeds]
    seconds = ", ".join(f"{seconds_of(folder, output):.0f}" for folder in folders)
    return [*lines, f"seconds for all of them: {seconds}"]


def table_of_runs(before: Mapping[str, Any], by_seed: Sequence[Sequence[Result]]) -> list[str]:
    lines = [
        "| method | seed | rows | steps | exact match, % | vs plain | won, lost | p "
        "| maj@k | pass@k |",
        "|" + " --- |" * 10,
        f"| {BEFORE} | - | - | 0 | {_match(before)} | - | - | - | {_votes(before)} |",
    ]
    for result in (result for results in by_seed for result in results):
        against, changed = "- | - | -", result.against
        if changed:
            counts = f"{len(changed.won)}, {len(changed.lost)}"
            against = f"{100 * changed.difference:+.1f} | {counts} | {changed.p_value:.2g}"
        lines.append(
            f"| {result.method} | {result.seed} | {result.rows} | {result.steps} "
            f"| {_match(result.scores)} | {against} | {_votes(result.scores)} |"
        )
    return lines


def table_of_means(by_seed: Sequence[Sequence[Result]]) -> list[str]:
    lines = [
        "| mean of the seeds | exact match, % | vs plain | least to most | p < 0.05 "
        "| maj@k | pass@k | s |",
        "|" + " --- |" * 8,
    ]
    for results in zip(*by_seed, strict=True):
        against, changed = "- | - | -", [result.against for result in results if result.against]
        if changed:
            gains = [100 * one.difference for one in changed]
            clear = [one.difference for one in changed if one.p_value < 0.05]
            better, worse = sum(gain > 0 for gain in clear), sum(gain < 0 for gain in clear)
            against = f"{mean(gains):+.1f} | {min(gains):+.1f} to {max(gains):+.1f} "
            against += f"| {better} better, {worse} worse of {len(gains)}"
        match = mean(result.scores["exact_match"] for result in results)
        votes = zip(*(_at_k(result.scores) for result in results), strict=True)
        at_k = " | ".join(f"{100 * mean(shares):.1f}" for shares in votes)
        lines.append(
            f"| {results[0].method} | {100 * match:.1f} | {against} | {at_k} "
            f"| {mean(result.seconds for result in results):.0f} |"
        )
    return lines


def _match(scores: Mapping[str, Any]) -> str:
    low, high = scores["ci95"]
    return f"{100 * scores['exact_match']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _votes(scores: Mapping[str, Any]) -> str:
    return " | ".join(f"{100 * share:.1f}" for share in _at_k(scores))


def _at_k(scores: Mapping[str, Any]) -> tuple[float, float]:
    """maj@k and pass@k of all the samples."""
    samples = scores[SAMPLES]
    k = str(samples["num_samples"])
    return samples["maj_at"][k], samples["pass_at"][k]
