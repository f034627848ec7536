"""The report: what it shows is so, and nothing in it can act."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import made_up
import matplotlib
import pytest
from conftest import flags, run_folder

import evaluate
import report
import train
from engine import usage
from grading.compare import compare
from page import write
from page.curves import Chart, Curve, Logged, charts_of
from page.facts import (
    Epochs,
    Facts,
    deviations_of,
    epochs_of,
    facts_of,
    progress_of,
    settings_of,
)
from page.plot import draw, number
from page.problems import choices_of, entries_of
from page.record import read_record
from page.text import LONGEST, checked, in_digits, visible
from run import run_log

KINDS = ["right", "arithmetic", "right", "reasoning", "format", "cut", "flexible", "right"]
OTHER_KINDS = ["right", "right", "reasoning", "right", "format", "cut", "flexible", "right"]


@pytest.fixture(autouse=True)
def no_reports() -> None:
    """Here reports are written."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_up.make_run(tmp_path / "first", made_up.rows_of(KINDS))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    rows = made_up.rows_of(OTHER_KINDS)
    return made_up.make_run(tmp_path / "second", rows, learning_rate=1e-5)


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        words: list[str] = []
        self._words = words
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = [tag] if tag in ("script", "style") else []

    def handle_endtag(self, tag: str) -> None:
        self._inside = []

    def handle_data(self, data: str) -> None:
        if self._inside == ["script"]:
            self.scripts.append(data)
        elif not self._inside:
            self._words.append(data)

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def page_of(*folders: Path, split: str | None = None) -> Page:
    return Page(write.write_report(folders, split))


# ---------------------------------------------------------------- when it is written


def test_training_and_evaluation_leave_a_report(call, settings: dict[str, str]) -> None:
    """Guards against a report that is not there, or is of another evaluation than it says."""
    folder = run_folder(settings)
    outcome = call(train, *flags(settings | {"epochs": "1"}))
    assert outcome.code == 0 and f"report: {folder / 'report.html'}\n" in outcome.out
    assert "problems" not in Page(folder / "report.html").ids()
    best = str(folder / "best")
    outcome = call(evaluate, "--ckpt", best, "--limit", "5", "--verify-batching", "0")
    assert outcome.code == 0 and f"report: {folder / 'report.html'}\n" in outcome.out
    page = Page(folder / "report.html")
    assert {"training", "problems", "problem-0", "problem-4"} <= set(page.ids())
    before = (folder / "report.html").read_bytes()
    other = ["--limit", "3", "--verify-batching", "0"]
    outcome = call(evaluate, "--ckpt", best, "--split", "validation", *other)
    assert f"report: {folder / 'report-validation.html'}\n" in outcome.out
    assert (folder / "report.html").read_bytes() == before
    assert "exact match, validation" in Page(folder / "report-validation.html").text
    # Outside the run's own folder it is beside the predictions.
    elsewhere = folder.parent / "elsewhere"
    outcome = call(evaluate, "--ckpt", best, "--output", str(elsewhere), *other)
    assert f"report: {elsewhere / 'report.html'}\n" in outcome.out
    assert (folder / "report.html").read_bytes() == before


def test_no_report_is_no_failure(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a finished run that ends in an error because of its report."""
    (run / "report.html").mkdir()
    write.report_if_possible(run)
    assert re.fullmatch(r"no report: .*report.html: can't be written \(Is a directory\).*\n",
                        capsys.readouterr().out)  # fmt: skip
    (run / "report.html").rmdir()
    monkeypatch.setattr(write, "render", lambda _: 1 / 0)
    write.report_if_possible(run)
    assert capsys.readouterr().out == "no report: ZeroDivisionError: division by zero\n"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write.report_if_possible(run)
    assert "no report: a report needs the package matplotlib: pip" in capsys.readouterr().out
    assert not (run / "report.html").exists()


def test_samples_alone_have_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train" / "samples").mkdir(parents=True)
    write.report_evaluation(tmp_path / "train", None)
    assert capsys.readouterr().out == ""


def test_of_samples_the_first_is_shown_and_said_to_be(tmp_path: Path) -> None:
    """Guards against those that were finished first, which are the short ones."""
    rows = [
        row | {"sample": sample}
        for sample, kind in ((2, "cut"), (0, "right"), (1, "arithmetic"))
        for row in made_up.rows_of([kind] * 3)
    ]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(tmp_path).text
    assert "100.0% 95 % interval" in text and "3 of 3 correct" in text
    assert "Of each problem, this is only the first of its samples." in text
    assert "samples per problem" not in text
    scores = {"num_problems": 3, "maj_at": {"1": 0.5}, "pass_at": {"1": 0.55}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    text = page_of(tmp_path).text
    assert "samples per problem, k maj@k pass@k 1 50.0% 55.0%" in text
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[3:6]))
    assert "its samples" not in page_of(tmp_path).text


# ---------------------------------------------------------------- what it shows


def test_the_scores_are_those_of_the_evaluation(run: Path) -> None:
    scores = json.loads((run / "eval" / "test" / "scores.json").read_text())
    text = page_of(run).text
    low, high = scores["ci95"]
    assert (
        f"exact match, test {scores['exact_match']:.1%} 95 % interval {low:.1%} – {high:.1%}"
        in text
    )
    for rule, title in (
        ("lm_eval_strict", "strict-match"),
        ("lm_eval_flexible", "flexible-extract"),
    ):
        assert re.search(rf"{title} [^%]* {scores['rules'][rule]:.1%} ", text), rule
    for label, count in scores["errors"].items():
        assert re.search(rf"{label} [a-z_ ,]+ {count} ", text), label
    for steps, count in scores["by_steps"].items():
        assert f" {steps} {count['num_correct'] / count['num_problems']:.1%} " in text, steps
    for words, count in scores["by_question_words"].items():
        assert f" {words} {count['num_correct'] / count['num_problems']:.1%} " in text, words
    assert f"wrong by another {len(scores['rules_disagree'])} " in text and scores["rules_disagree"]


def test_other_scores_are_shown(run: Path) -> None:
    scores = {
        "calculator": {"exact_match": 0.625, "won": [1, 4], "lost": [0], "p_value": 0.25},
        "samples": {"maj_at": {"1": 0.5, "4": 0.75}, "pass_at": {"1": 0.55, "4": 0.875}},
    }
    made_up.write_predictions(run / "eval" / "test", made_up.rows_of(KINDS), **scores)
    made_up.write_predictions(run / "eval" / "validation", made_up.rows_of(OTHER_KINDS))
    text = page_of(run).text
    assert "With the calculator: 62.5% , 2 problems won and 1 lost, p = 0.25." in text
    assert "1 50.0% 55.0% 4 75.0% 87.5%" in text and "drawn with" not in text
    assert "All evaluations: test 37.5%, validation 50.0%." in text
    assert "The 95 % interval of maj@" not in text
    scores["samples"] |= {"with_calculator": True, "temperature": 0.7, "ci95": [0.6125, 0.85]}
    made_up.write_predictions(run / "eval" / "test", made_up.rows_of(KINDS), **scores)
    text = page_of(run).text
    assert "Samples, at temperature 0.7, drawn with the calculator" in text
    assert "The 95 % interval of maj@4 is 61.3% – 85.0%." in text


def test_one_problem_is_not_called_problems(run: Path, other: Path) -> None:
    calculator = {"exact_match": 1.0, "won": [0], "lost": [], "p_value": 1.0}
    for folder in (run, other):
        rows = made_up.rows_of(["arithmetic"])
        made_up.write_predictions(folder / "eval" / "test", rows, calculator=calculator)
    text = page_of(run, other).text
    assert "With the calculator: 100.0% , 1 problem won and 0 lost, p = 1." in text
    assert "on the 1 problem that both have" in text and "Reset 1 problem " in text
    assert " 1 problems" not in text


def test_the_curves_are_those_of_the_metrics() -> None:
    lines = [
        {"step": 2, "train/loss": 3.0, "train/unheard_of": 7.0},
        {"step": 1, "train/loss": 4.0, "train/unheard_of": 6.0},
        {"step": 2, "train/loss": 2.0},  # written again after a resume
        {"step": 3, "train/loss": float("nan")},
        {"step": 4, "train/loss": "high", "val/loss": 0.5, "val/perplexity_equations": 1.5},
        {"step": 8, "val/loss": 0.25, "val/perplexity_equations": 1.25},
        {"eval/exact_match": 0.5, "step": 8},
    ]
    charts = {chart.title: chart for chart in charts_of([Logged("run", lines, 4)])}
    assert list(charts) == [
        "Loss",
        "Perplexity by kind of token",
        "Unheard of, training",
    ]
    training, validation = charts["Loss"].curves
    assert training.points == [(1, 4.0), (2, 2.0)] and training.best is None
    assert validation.points == [(4, 0.5), (8, 0.25)] and validation.best == (4, 0.5)
    assert charts["Loss"].is_logarithmic  # from 4 to 0.25
    assert charts["Perplexity by kind of token"].curves[0].label == "equations"
    # Without a best checkpoint, the lowest loss marks the best.
    [loss, *_] = charts_of([Logged("run", lines, None)])
    assert loss.curves[1].best == (8, 0.25)


def test_a_chart_shows_what_it_can_in_lines_and_in_words() -> None:
    """Guards against a logarithm of 0, an empty chart, and a page that says nothing aloud."""
    lines = [
        {"step": 1, "train/loss": 0.0, "train/grad_norm": 0.01, "train/mfu": 0.5},
        {"step": 2, "train/loss": 5.0, "train/grad_norm": 5.0, "val/exact_match": 0.5},
        {"step": 4, "val/loss": 0.25, "val/loss_equations": 1.0, "val/exact_match": 0.75},
        {"step": 8, "val/loss_equations": 0.5},
    ]
    charts = charts_of([Logged("one", lines, 4)])
    titles = ["Loss", "Exact match on the validation rows", "Gradient norm"]
    assert [(chart.title, chart.is_logarithmic) for chart in charts] == [
        (title, False) for title in titles
    ]
    assert charts[0].summary == (
        "Loss over optimizer steps. training: 0 at step 1 to 5 at step 2; validation: 0.25 at step "
        "4 to 0.25 at step 4, best checkpoint at step 4 with 0.25."
    )
    assert charts[1].curves[0].best is None
    [loss, *_] = charts_of([Logged("one", lines, 4), Logged("two", lines[:2], None)])
    labels = ["one, training", "one, validation", "two, training"]
    assert [curve.label for curve in loss.curves] == labels


def test_a_line_does_not_cross_what_it_can_not_show() -> None:
    """Guards against a run that diverged and looks steady between its few finite perplexities."""
    infinite = float("inf")
    values = [500.0, infinite, 1e213, 510.0, 512.0, float("nan"), 512.0, infinite]
    lines = [{"step": step, "train/perplexity": value} for step, value in enumerate(values, 1)]
    lines += [{"step": 2, "train/loss": 9.0}, {"step": 8, "train/perplexity": 511.0}]  # resumed
    [chart] = charts_of([Logged("run", lines, None)])
    assert chart.curves[0].pieces == [
        [(1, 500.0)], [(4, 510.0), (5, 512.0)], [(7, 512.0), (8, 511.0)],
    ]  # fmt: skip
    assert chart.summary.endswith(" to 511 at step 8, off the chart in 3 steps.")
    svg = str(draw(chart, "one"))
    assert svg.count("var(--curve-1); stroke-width: 1.4") == 3
    assert len(re.findall(r"<use [^>]*var\(--curve-1\)", svg)) == 1


def test_the_facts_are_those_of_the_run() -> None:
    """Guards against numbers of another step, and a speed that only the first step had."""
    settings = {"model": "some/model", "epochs": 3, "batch_size": 128, "learning_rate": 2e-5}
    best = {"step": 24, "epoch": 2.0, "validation_loss": 0.123456, "validation_perplexity": "high"}
    speeds = [{"step": n, "train/tokens_per_second": 1000.0 * n * n} for n in (1, 2, 3)]
    assert facts_of(settings, best, speeds, {"checkpoint": "runs/a/best"}) == Facts(
        about=[
            ("Checkpoint", "runs/a/best"),
            ("Model", "some/model"),
            ("Recipe", "3 epochs, batches of 128, learning rate 2e-5"),
            ("Throughput", "4,000 tokens per second"),
        ],
        best=[("best epoch", "2"), ("validation loss", "0.1235")],
    )
    assert facts_of({"epochs": 1}, {}, [], {}).about == [("Recipe", "1 epoch")]
    lines = [
        {"step": 24, "epoch": 2.0, "val/loss": 0.4, "val/exact_match": 0.5},
        {"step": 12, "epoch": 1.0, "val/loss": 0.5},  # from before a resume
        {"step": 30, "train/loss": 1.0},
        {"val/loss": 1.0},
        {"step": 36, "val/loss": float("inf"), "val/exact_match": 0.25},
    ]
    assert epochs_of(lines, 24) == Epochs(
        columns=["Loss", "Exact match"],
        rows=[
            ("1", 12, ["0.5", "–"], False),
            ("2", 24, ["0.4", "50.0%"], True),  # as the scores, which are above it
            ("–", 36, ["∞", "25.0%"], False),
        ],
    )
    assert settings_of([{"a": 1, "b": 2e-5}, {"a": 1, "c": True}]) == [
        ("a", ["1", "1"], False),
        ("b", ["2e-5", "–"], True),
        ("c", ["–", "true"], True),
    ]


def test_all_that_training_logs_has_a_title() -> None:
    """Guards against titles made of a metric's name, such as "Memory gib, training"."""
    sources = [Path(module.__file__).read_text() for module in (run_log, usage)]
    logged = set(re.findall(r'"((?:train|val)/\w+)"', "".join(sources))) - {
        "val/samples"
    }  # a table
    assert {"val/loss", "train/mask_rate", "train/memory_gib", "train/mfu"} <= logged
    lines = [{"step": step} | dict.fromkeys(sorted(logged), 1.0) for step in (1, 2)]
    titles = {chart.title: chart.unit for chart in charts_of([Logged("run", lines, None)])}
    assert [title for title in titles if title.endswith((", training", ", validation"))] == []
    assert titles["Memory"] == "GiB" and titles["MFU"] == "share of the device's peak"


def test_two_runs_share_their_charts() -> None:
    both = [Logged(name, made_up.metrics(), 24) for name in ("one", "two")]
    charts, [alone, *_] = charts_of(both), charts_of(both[:1])
    assert [curve.label for curve in charts[0].curves] == [
        "one, training", "one, validation", "two, training", "two, validation",
    ]  # fmt: skip
    assert [curve.is_dashed for curve in charts[0].curves] == [False, False, True, True]
    dashed = [str(draw(chart, "one")).count("dasharray: ") for chart in (alone, charts[0])]
    assert dashed == [1, 2 + 2]  # the lines of the best checkpoints, and the second run's curves
    rate = next(chart for chart in charts if chart.title == "Learning rate")
    assert [curve.colour for curve in rate.curves] == [1, 2]


def test_a_drawing_has_all_points_and_takes_its_colours_from_the_page() -> None:
    chart = charts_of([Logged("run", made_up.metrics(), 24)])[0]
    svg = str(draw(chart, "one"))
    assert "#0102" not in svg and "var(--curve-1)" in svg and "optimizer steps</text>" in svg
    # Each validation is a dot, and the best one a ring as well.
    assert len(re.findall(r"<use [^>]*var\(--curve-2\)", svg)) == len(made_up.LOSSES) + 1
    assert set(re.findall(r'id="([^"]+)"', svg)) == set(re.findall(r'(?<=#)one-[^")]+', svg))
    assert not set(re.findall(r'id="([^"]+)"', svg)) & set(
        re.findall(r'id="([^"]+)"', draw(chart, "two"))
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "0.5"), (12000, "12,000"), (2e-5, "2e-5"), (0, "0"), (1e-10, "1e-10"),
     (1.5e24, "1.5e24"), (1000.2, "1,000.2"), (-2.5e6, "-2.5e6")],
)  # fmt: skip
def test_numbers_of_axes_are_short(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("values", "is_logarithmic"),
    [((6.2, 450_000.0), True), ((0.05, 5e24), True), ((1.1, 900.0), True), ((4.0, 3e24), False),
     ((14_930.0, 14_930.9), False), ((6.2383246, 6.2383247), False)],
    ids=["diverged", "far", "falling", "exploded", "steady", "stuck"],
)  # fmt: skip
def test_the_labels_of_an_axis_are_apart(values: tuple[float, ...], is_logarithmic: bool) -> None:
    """Guards against labels that overlap, are cut off, or say one number at different heights."""
    curve = Curve("training", list(enumerate(values, start=1)), gaps=[], colour=1)
    svg = str(draw(Chart("Loss", "nats", [curve], is_logarithmic), "one"))
    labels = re.findall(r'text-anchor: end[^>]* y="([0-9.]+)"[^>]*>([^<]+)<', svg)
    heights = sorted(float(height) for height, _ in labels)
    assert len(labels) >= 3 and len({text for _, text in labels}) == len(labels)
    assert min(upper - lower for lower, upper in pairwise(heights)) > 10  # at 11.5 pixels
    assert max(len(text) for _, text in labels) <= 7


@pytest.mark.parametrize(
    "missing", ["eval", "metrics.jsonl", "best", "settings", "stop and steps", "rows"]
)
def test_what_is_missing_is_left_out(run: Path, missing: str) -> None:
    """Guards against an old or unfinished run that can't be looked at."""
    if missing == "settings":
        (run / "best" / "training.json").write_text('{"step": 1')
    elif missing == "stop and steps":
        keys = ("id", "gold", "completion")
        rows = [{key: row[key] for key in keys} for row in made_up.rows_of(KINDS)]
        rows[0]["steps"] = 1  # of the others it is unknown
        (run / "eval" / "test" / "predictions.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    elif missing == "rows":
        (run / "eval" / "test" / "predictions.jsonl").write_text("")
    elif (run / missing).is_dir():
        shutil.rmtree(run / missing)
    else:
        (run / missing).unlink()
    page = page_of(run)
    assert ("problems" in page.ids()) == (missing not in ("eval", "rows"))
    assert "No evaluation is shown" not in page.text
    assert ("training" in page.ids()) == (missing != "metrics.jsonl")
    assert ("settings" in page.ids()) == (missing not in ("best", "settings"))
    if missing == "stop and steps":
        assert "cut stopped at max_new_tokens unknown" in page.text


def test_a_training_too_short_for_a_chart_is_shown(run: Path) -> None:
    """Guards against a validation that is nowhere, and a link to a place that is not there."""
    shutil.rmtree(run / "eval")
    last = made_up.metrics()[-2:]  # one line each of training and validation
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in last))
    page = page_of(run)
    assert "Skip to the training" in page.text and "training" in page.ids()
    assert "Validation epoch step loss perplexity" in page.text and " 3 36 0.45 1.568" in page.text
    assert not [tag for tag, _ in page.elements if tag in ("svg", "figure")]
    (run / "metrics.jsonl").write_text(json.dumps(last[0]))
    shutil.rmtree(run / "best")
    page = page_of(run)
    links = [attributes.get("href") for tag, attributes in page.elements if tag == "a"]
    assert links == [] and "1,036 tokens per second" in page.text


@pytest.mark.parametrize("place", ["last/training.json", "finished.json"])
def test_without_a_best_checkpoint_the_newest_has_the_settings(run: Path, place: str) -> None:
    (run / "last").mkdir()
    (run / "best" / "training.json").rename(run / place)
    record = read_record(run, None)
    assert record.best == {} and record.description["settings"]["epochs"] == 3
    (run / place).write_text('{"settings": []}')
    assert read_record(run, None).description == {}


def test_the_evaluation_is_the_one_that_is_named_or_the_test_split(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = run / "eval"
    for name in ("validation", "last-test"):
        made_up.write_predictions(places / name, made_up.rows_of(OTHER_KINDS))
    monkeypatch.chdir(run)
    record = read_record(Path("."), None)
    assert record.name == "first" and list(record.exact_match) == sorted(record.exact_match)
    assert record.evaluation.name == "test"
    assert read_record(run, "last-test").evaluation.name == "last-test"
    shutil.rmtree(places / "test")
    assert read_record(run, None).evaluation.name == "validation"
    shutil.rmtree(places / "validation")
    assert read_record(run, None).evaluation.name == "last-test"


@pytest.mark.parametrize("scores", ["[]", "{", '{"calculator": {}, "samples": [1]}'])
def test_damaged_scores_cost_only_themselves(run: Path, scores: str) -> None:
    (run / "eval" / "test" / "scores.json").write_text(scores)
    text = page_of(run).text
    assert "exact match, test 37.5%" in text and "With the calculator" not in text


@pytest.mark.parametrize(
    "damaged", [10**400, 1.79e308, "high", None, [1], {}], ids=lambda it: str(it)[:4]
)
def test_a_damaged_number_costs_only_itself(run: Path, damaged: Any) -> None:
    """Guards against a report that ends in an error because of one number in one file."""
    with (run / "metrics.jsonl").open("a") as metrics:
        names = list(dict.fromkeys(name for line in made_up.metrics() for name in line))
        for name in names:
            metrics.write(json.dumps({"step": 40, "val/loss": 0.9, name: damaged}) + "\n")
    training = json.loads((run / "best" / "training.json").read_text())
    settings = dict.fromkeys(("epochs", "batch_size", "learning_rate", "dtype", "model"), damaged)
    numbers = dict.fromkeys(("step", "epoch", "validation_loss", "validation_perplexity"), damaged)
    (run / "best" / "training.json").write_text(
        json.dumps(training | numbers | {"settings": settings})
    )
    scores = {
        "num_problems": damaged,
        "exact_match": damaged,
        "calculator": {"exact_match": damaged, "won": [], "lost": [], "p_value": damaged},
        "samples": {"maj_at": {"1": damaged}, "pass_at": {"1": damaged}}
        | {"ci95": damaged, "temperature": damaged},
    }
    file = run / "eval" / "test" / "scores.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scores))
    page = page_of(run)
    assert "exact match, test 37.5%" in page.text and "training" in page.ids()


@pytest.mark.parametrize("fp8", [True, False, None])
def test_the_recipe_says_in_what_a_run_computes(run: Path, fp8: bool | None) -> None:
    """Guards against runs in FP8 that look like others, and a word for each run that has none."""
    file = run / "best" / "training.json"
    training = json.loads(file.read_text())
    file.write_text(json.dumps(training | {"settings": {"dtype": "bfloat16", "fp8": fp8}}))
    assert ("Recipe bfloat16, products in FP8" in page_of(run).text) is (fp8 is True)


@pytest.mark.parametrize(
    ("made", "epochs", "words"),
    [(0.537, 3, "0.53 of 3 epochs"), (2.999, 3, "2.99 of 3 epochs"), (0.5, 1, "0.5 of 1 epoch"),
     (29 / 100, 3, "0.29 of 3 epochs"), (3.0, 3, ""), (3.0, None, ""), ("high", 3, "")],
)  # fmt: skip
def test_a_training_that_is_not_finished_says_so(
    run: Path, other: Path, made: float, epochs: int, words: str
) -> None:
    """Guards against the curves of half an epoch below the words "3 epochs"."""
    newest = {"epoch": made, "settings": {"epochs": epochs}}
    assert progress_of(newest) == words and progress_of({}) == ""
    (other / "last").mkdir()
    (other / "last" / "training.json").write_text(json.dumps(newest))
    said = f"Unfinished: {words} so far."
    assert (said in page_of(other).text) is bool(words)
    assert (said.replace(":", ": second has saved") in page_of(run, other).text) is bool(words)


def test_what_an_evaluation_did_not_take_from_its_run_is_said(run: Path) -> None:
    """Guards against a score of other rows below the name of the run's data set."""
    settings = {"prompt": "{question}", "max_new_tokens": 512, "dtype": "bfloat16"}
    trained = {"settings": settings, "data": {"test_sha256": "t", "train_sha256": "of more"}}
    same = settings | {"split": "test", "data_sha256": "t"}
    other = same | {"data_sha256": "u"}
    for known, evaluation in ((trained, same), (trained, same | {"split": "train"}), ({}, other),
                              (trained | {"data": None}, other)):  # fmt: skip
        assert deviations_of(known, evaluation) == []
    file = run / "best" / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | trained))
    assert "Evaluated with other settings" not in page_of(run).text
    scores = {"data_sha256": "u", "max_new_tokens": 20, "prompt": "Q:\n{question}"}
    made_up.write_predictions(run / "eval" / "test", made_up.rows_of(KINDS), **same | scores)
    assert (
        "Evaluated with other settings than the run's: rows of another data set, "
        'prompt "Q:\\n{question}", max_new_tokens 20.'
    ) in page_of(run).text


def test_an_evaluation_that_goes_on_is_shown_so_far(run: Path) -> None:
    file = run / "eval" / "test" / "predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], "garbage\n", *lines[3:6], lines[6][:20]]))
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "tr')
    text = page_of(run).text
    assert "Unfinished: 6 of 8 problems so far." in text
    assert "Left out: 1 damaged line of predictions.jsonl." in text
    file.write_text("".join([*lines, lines[0]]))  # which two processes have written
    (file.parent / "scores.json").unlink()
    (file.parent / "evaluation.json").write_text('{"num_problems": 7}')
    evaluation = read_record(run, None).evaluation
    assert (evaluation.num_problems, evaluation.are_samples) == (8, False)


def test_an_evaluation_that_goes_on_with_more_problems_is_unfinished(run: Path) -> None:
    """Guards against the scores of a first look that are shown as those of all problems."""
    folder = run / "eval" / "test"
    samples = {"maj_at": {"1": 0.5}, "pass_at": {"1": 0.55}}
    made_up.write_predictions(folder, made_up.rows_of(KINDS[:5]), samples=samples)
    made_up.write_predictions(run / "eval" / "validation", made_up.rows_of(OTHER_KINDS))
    scores = (folder / "scores.json").read_bytes()
    made_up.write_predictions(folder, made_up.rows_of(KINDS))
    (folder / "scores.json").write_bytes(scores)  # a kill came before the new ones
    file = folder / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:7]))
    text = page_of(run).text
    assert "Unfinished: 7 of 8 problems so far." in text
    assert "All evaluations: test not scored yet, validation 50.0%." in text
    assert "samples per problem" not in text


def test_a_folder_of_predictions_is_enough(tmp_path: Path) -> None:
    folder = tmp_path / "some-model" / "eval" / "test"
    made_up.write_predictions(folder, made_up.rows_of(KINDS))
    page = page_of(folder)
    assert (folder / "report.html").is_file()
    assert page.text.startswith("some-model: report") and "problem-7" in page.ids()
    # Its name, and that of its split, say which one it is.
    other = shutil.move(folder, folder.with_name("greedy"))
    for split in ("greedy", "test"):
        assert "problem-7" in page_of(other, split=split).ids()
    assert [file.name for file in other.glob("*.html")] == ["report.html"]


# ---------------------------------------------------------------- completions


@pytest.mark.parametrize(
    ("completion", "shown"),
    [
        ("It is <<1+1=2>>2", 'It is <span class="true">&lt;&lt;1+1=2&gt;&gt;</span>2'),
        (
            "1+1=<<1+1=3>>3.",
            '<span class="false">1+1=&lt;&lt;1+1=3&gt;&gt;3</span>'
            '<em class="value">false: it is 2</em>.',
        ),
        (
            "1/3 = <<1/3=0.33>>0.34",  # only the number after the annotation is false
            '<span class="false">1/3 = </span><span class="true">&lt;&lt;1/3=0.33&gt;&gt;</span>'
            '<span class="false">0.34</span><em class="value">false: it is 0.333333</em>',
        ),
        (
            "333,333 / 2 = 166,666",  # which with six digits would be what it is
            '<span class="false">333,333 / 2 = 166,666</span>'
            '<em class="value">false: it is 166,666.5</em>',
        ),
        (
            "1+1=3. 1+1=4.",
            '<span class="false">1+1=3</span><em class="value">false: it is 2</em>. '
            '<span class="false">1+1=4</span><em class="value">false: it is 2</em>.',
        ),
        (
            "1+2=<<1+1=3>>4",  # the annotation is another equation
            '<span class="false">1+2=&lt;&lt;1+1=3&gt;&gt;</span>'
            '<em class="value">false: it is 2</em>'
            '<span class="false">4</span><em class="value">false: it is 3</em>',
        ),
        ("half of x = 3", "half of x = 3"),
        ("", '<em class="value">no text</em>'),
        (" \n", ' \n<em class="value">only spaces</em>'),
        ("\u00a0", '<code title="NO-BREAK SPACE">U+00A0</code>'),
        ("#### 5", '<span class="answer">#### 5</span>'),
        (
            "#### 1\nQuestion: 1+1=3",
            '<span class="answer">#### 1</span>\n<span class="ignored">Question: 1+1=3</span>',
        ),
    ],
)
def test_equations_and_answers_are_marked(completion: str, shown: str) -> None:
    assert checked(completion, correct=False) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("1234567", "1,234,567"),
        ("-1/3", "-0.333333"),
        ("1000001/10", "100,000.1"),
        ("-333333/2", "-166,666.5"),
        ("-370370367037/3", "-123,456,789,012.33"),
        ("200000000000000001/2", "1e17"),
    ],
)
def test_what_an_equation_really_is_has_few_digits(value: str, shown: str) -> None:
    assert in_digits(Fraction(value)) == shown


def test_a_right_answer_is_marked_as_such() -> None:
    assert checked("#### 5", correct=True) == '<span class="answer right">#### 5</span>'


@pytest.mark.parametrize("length", [LONGEST - 3, LONGEST, LONGEST + 1, 10**5])
def test_nothing_of_a_completion_is_lost(length: int) -> None:
    """Guards against text that vanishes between two marks, and a file without bounds."""
    text = ("so 2+2=5, and <<3*3=9>>9 & <b>\n" * (length // 20))[:length]
    shown = re.sub(r"<em.*?</em>", "", checked(text, correct=False))
    assert re.sub("<[^>]+>", "", shown).replace("&lt;", "<").replace("&gt;", ">").replace(
        "&amp;", "&"
    ) == text[:LONGEST]  # fmt: skip
    assert (f"{length - LONGEST:,} more characters" in checked(text, correct=False)) == (
        length > LONGEST
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\u202e", '<code title="RIGHT-TO-LEFT OVERRIDE">U+202E</code>'),
        ("\x1b[", '<code title="control character">U+001B</code>['),
        ("\ud800", '<code title="control character">U+D800</code>'),
        ("a\u200b\u00a0b", 'a<code title="ZERO WIDTH SPACE">U+200B</code>'
         '<code title="NO-BREAK SPACE">U+00A0</code>b'),
        ("a\n\tb é 七 €", "a\n\tb é 七 €"),
        ("a\r", 'a<code title="control character">U+000D</code>'),
    ],
)  # fmt: skip
def test_what_is_invisible_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


# ---------------------------------------------------------------- two runs


def test_two_runs_show_what_was_won_and_lost(run: Path, other: Path) -> None:
    rows = made_up.rows_of(KINDS), made_up.rows_of(OTHER_KINDS)
    expected = compare(*rows, ("first", "second"))
    entries = entries_of(rows)
    assert [entry.number for entry in entries if entry.change == "won"] == expected.won == [1, 3]
    assert [entry.number for entry in entries if entry.change == "lost"] == expected.lost == [2]
    page = page_of(run, other)
    assert (other / "report-against-first.html").is_file() and not (other / "report.html").exists()
    assert f"Won {len(expected.won)} , lost {len(expected.lost)}" in page.text
    assert f"(McNemar) {expected.p_value:.3g}: chance may well" in page.text
    assert "+12.5 points from first to second" in page.text and " interval is −" in page.text
    assert "learning_rate 2e-5 1e-5" in page.text and ", 1 of which differs setting" in page.text


def test_two_runs_show_an_evaluation_that_both_have(run: Path, other: Path) -> None:
    """Guards against the test split of one run beside the validation split of the other."""
    made_up.write_predictions(run / "eval" / "validation", made_up.rows_of(OTHER_KINDS))
    made_up.write_predictions(other / "eval" / "validation", made_up.rows_of(OTHER_KINDS))
    shutil.rmtree(other / "eval" / "test")
    page = page_of(run, other)
    assert page.text.count("exact match, validation 50.0%") == 2 and "comparison" in page.ids()
    # A folder of predictions says of which split it is.
    page = page_of(run, shutil.move(other / "eval" / "validation", other / "elsewhere"))
    assert "exact match, validation 50.0%" in page.text and "comparison" in page.ids()


def test_two_runs_without_a_common_evaluation_show_their_curves(run: Path, other: Path) -> None:
    (other / "eval" / "test").rename(other / "eval" / "validation")
    made_up.write_predictions(other / "eval" / "last-test", made_up.rows_of(KINDS))
    page = page_of(run, other)
    assert (
        "No evaluation is shown, since the runs have none of the same name: first has test, "
        "second has last-test and validation."
    ) in page.text
    assert "training" in page.ids() and not {"scores", "problems"} & set(page.ids())
    # A run that is not evaluated yet hides nothing of the other.
    shutil.rmtree(other / "eval")
    page = page_of(run, other)
    assert {"training", "scores", "problems"} <= set(page.ids())
    # Nor is there a score or an answer that could be either run's.
    assert "Scores first Exact match on test, by rule" in page.text
    assert page.text.count("steps #1 first It is") == 1


def test_each_badge_says_whose_it_is(run: Path, other: Path) -> None:
    """Guards against "right wrong" as all that is said of two runs, aloud or to the eye."""
    text = page_of(run, other).text
    assert "Before each question are the results of first and second, in this order." in text
    assert " 1 won first: arithmetic second: right Anna has 1 apples" in text
    assert "first: right" not in page_of(run).text


def test_a_problem_shows_what_either_run_knows_of_it() -> None:
    """Guards against rows of other programs that hide what evaluate.py has written beside them."""
    plain = {"id": 3, "gold": "5", "completion": "#### 5"}
    new = plain | {"completion": "Surely 5", "question": "2 + 3?", "steps": 2}
    new |= {"num_tokens": 1234, "stop": "length"}
    alone, both = entries_of([[plain], [new, plain | {"id": 1, "num_tokens": "?", "stop": "eos"}]])
    assert (alone.number, alone.length, alone.tags) == (1, 6, ["second-right"])
    assert (both.number, both.length, both.steps, both.question) == (3, 1234, 2, "2 + 3?")
    assert [answer.ending for answer in both.answers] == ["", "cut at the limit, 1,234 tokens"]
    assert [answer.result for answer in both.answers] == ["right", "cut"]
    assert alone.answers[1].ending == "ended by itself"
    seconds = ["second-wrong", "second-cut", "second-disagree"]
    assert both.tags == ["lost", "first-right", *seconds]
    for row, change in ((plain, "both-right"), (plain | {"completion": ""}, "both-wrong")):
        assert entries_of([[row], [row]])[0].change == change


def test_filters_count_what_they_find() -> None:
    rows = made_up.rows_of(KINDS), made_up.rows_of([*OTHER_KINDS, "cut"])
    entries = entries_of(rows)
    choices = choices_of(entries, ("one", "two"))
    assert [title for title, options in choices if options] == ["Both runs", "one", "two"]
    for _, options in choices:
        for tag, _, count in options:
            assert sum(tag in entry.tags for entry in entries) == count > 0
    assert entries[8].answers[0] is None and entries[8].change is None


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    shutil.copytree(run, tmp_path / "copies" / "first")
    assert page_of(run, tmp_path / "copies" / "first").text.startswith(
        "first (first) and first (second): report"
    )


# ---------------------------------------------------------------- what it must not do


def test_nothing_that_a_model_wrote_can_act(tmp_path: Path) -> None:
    """Guards against text that is not escaped, in any place that text can come from."""
    attack = "\"'><script>x</script><img src=x onerror=x>\u202e"
    rows = made_up.rows_of(KINDS, hostile=3)
    rows[1] |= {"label": attack, "answer": attack, "steps": attack, "stop": attack}
    run = made_up.make_run(tmp_path / "run", rows, model=attack, **{attack: attack})
    scores = json.loads((run / "eval" / "test" / "scores.json").read_text())
    (run / "eval" / "test" / "scores.json").write_text(
        json.dumps(scores | {"checkpoint": attack, "split": attack})
    )
    with (run / "metrics.jsonl").open("a") as metrics:
        for step in (1, 2):
            metrics.write(json.dumps({"step": step, f"val/{attack}": 1.0, "epoch": attack}) + "\n")
    hostile = tmp_path / "<script>x<\u202e"
    run.rename(hostile)
    page = page_of(hostile)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1 and "img" not in tags and "iframe" not in tags
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "xlink:href", "src", "action"):
            link = attributes.get(name) or "#"
            assert link.startswith("#") or (tag, link) == ("link", "data:,"), (tag, link)
    [policy] = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in policy
    assert page.text.isprintable()
    assert "<script>document.title='pwned'</script></script>" in page.text


def test_no_home_folder_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    places = {"model": str(tmp_path / "alice" / "llama"), "output_dir": f"{tmp_path}/alice/runs"}
    run = made_up.make_run(tmp_path / "alice" / "runs" / "run", made_up.rows_of(KINDS), **places)
    page = page_of(run)
    assert "~/llama" in page.text and "~/runs" in page.text
    assert "alice" not in (run / "report.html").read_text()


def test_the_same_files_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """Guards against the time, the user's settings of matplotlib or the order of a set in it."""
    first = write.write_report([run]).read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.hashsalt": "other"}):
        copy = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
        (copy / "report.html").unlink()
        assert write.write_report([copy]).read_bytes() == first


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "none such"])
def test_the_backend_of_a_notebook_is_not_needed(run: Path, backend: str) -> None:
    """A notebook hands its own to the commands in its cells, whose environment may lack it."""
    root = Path(report.__file__).parent
    command = [sys.executable, str(root / "report.py"), "--run", str(run)]
    environment = os.environ | {"MPLBACKEND": backend}
    end = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (end.returncode, end.stderr) == (0, ""), end


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--run", "nowhere"], ["nowhere", "is not a folder"]),
        (["--run", "empty"], ["empty", "neither metrics.jsonl nor", "checkpoints/RUN_NAME"]),
        (["--run", "first", "--split", "train"], ["--split train", "there is test"]),
        (["--run", "first/eval/test", "--split", "train"], ["--split train", "is of test"]),
        (["--run", "first", "first", "first"], ["names 3 folders"]),
        (["--run", "first", "--output", "notes.txt"], ["notes.txt", "is not a report", "--output"]),
        (["--run", "first", "--output", "none/a.html"], ["none/a.html", "--output"]),
        (["--run", "first", "other-data"], ["first and other-data", "id 0 has the question"]),
    ],
)
def test_what_can_not_be_shown_is_refused(
    call: Any,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fragments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    rows = [row | {"question": "Another?"} for row in made_up.rows_of(KINDS)]
    made_up.write_predictions(tmp_path / "other-data", rows)
    call(report, *arguments).assert_user_error(*fragments)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.rglob("*.html"))


def test_a_report_is_written_where_it_is_asked_for(call: Any, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "a report.html"
    for _ in range(2):  # the second one replaces the first
        outcome = call(report, "--run", str(run), "--output", str(file))
        assert outcome.code == 0 and outcome.out == f"report: {file}\n"
    assert "problem-0" in Page(file).ids()


def test_a_fault_of_ours_is_not_hidden(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against `report.py` that blames a package for any missing module."""
    monkeypatch.setattr(write, "render", lambda _: __import__("no_such_module"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        write.write_report([run])
