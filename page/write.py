"""Writes a run, or two side by side, as one HTML file that needs nothing else."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grading.compare import compare
from grading.results import PREDICTIONS_FILE
from page.curves import Logged, charts_of
from page.facts import deviations_of, epochs_of, facts_of, progress_of, settings_of
from page.plot import draw
from page.problems import choices_of, entries_of
from page.record import FIRST_SHOWN, Record, read_records
from page.scores import RULE_NAMES, scores_of
from page.text import visible
from run.errors import UserError, cause_of, counted
from run.files import replace_file
from run.paths import hide_home

FOLDER = Path(__file__).parent
MARK = '<meta name="generator" content="report.py">'  # at the beginning of every report
PACKAGES = {"jinja2", "markupsafe", "matplotlib"}  # that only a report needs


def write_report(
    folders: Sequence[Path], split: str | None = None, file: Path | None = None
) -> Path:
    """Write the report of one run, or of two.

    Args:
        folders: one or two, each a run's or one that contains a ``predictions.jsonl``.
        split: see `read_record`; for two folders, `read_records`.
        file: where to write. None: see `report_file`.

    Returns:
        The file.

    Raises:
        UserError: there is nothing to show, a package is missing, or the file can't be written.
    """
    records = read_records(folders, split)
    file = file or report_file(folders, records, split)
    _check_replaceable(file)
    try:
        content = render(records)
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise UserError(
            f"a report needs the package {error.name}: pip install -r requirements.txt"
        ) from None
    try:
        replace_file(file, content)
    except OSError as error:
        raise _not_written(file, error) from None
    return file


def report_file(folders: Sequence[Path], records: Sequence[Record], split: str | None) -> Path:
    """``report.html`` in the folder of the run.

    The report of an evaluation other than the test split, and that of two runs, have names of their
    own, so that they do not replace it.
    """
    name = "report"
    if split not in (None, FIRST_SHOWN[0]) and records[-1].exact_match:
        name += f"-{split}"
    if len(records) > 1:
        name += f"-against-{records[0].name}"
    return folders[-1] / f"{name}.html"


def _check_replaceable(file: Path) -> None:
    """Raises UserError if ``file`` exists and is not a report."""
    try:
        with file.open("rb") as stream:
            is_report = MARK.encode() in stream.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _not_written(file, error) from None
    if not is_report:
        raise UserError(
            f"{file}: exists and is not a report, so it is kept: name another file with --output"
        )


def _not_written(file: Path, error: OSError) -> UserError:
    return UserError(
        f"{file}: can't be written ({error.strerror}): name another file with --output"
    )


def report_if_possible(folder: Path, split: str | None = None) -> None:
    """`write_report`, and say where it is or, in one line, why there is none.

    At the end of a training or evaluation, no fault of a report may cost the result.
    """
    try:
        print(f"report: {write_report([folder], split)}")
    except Exception as error:
        print(f"no report: {error if isinstance(error, UserError) else cause_of(error)}")


def report_evaluation(output: Path, run_folder: Path | None) -> None:
    """`report_if_possible` after an evaluation into ``output``, which may be one of a run's.

    Samples alone, without greedy predictions, have no report.
    """
    if not (output / PREDICTIONS_FILE).is_file():
        return
    if run_folder is not None and output.resolve().parent == (run_folder / "eval").resolve():
        report_if_possible(run_folder, output.name)
    else:
        report_if_possible(output)


def render(records: Sequence[Record]) -> str:
    """The content of the page. The same records give the same bytes."""
    import jinja2
    from markupsafe import Markup

    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "counted": counted,
        "percent": "{:.1%}".format,
        "points": lambda share: f"{100 * share:+.1f}".replace("-", "−"),
        "visible": lambda text: visible(str(text)),
        "spelt": lambda text: visible(str(text)).striptags(),  # where there can be no elements
    }
    return environment.get_template("report.html").render(
        style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        **_training(records),
        **_evaluations(records),
    )


def _training(records: Sequence[Record]) -> dict[str, Any]:
    """What the template shows of how the runs were trained."""
    names = distinct_names(records)
    runs = [
        Logged(name, record.metrics, record.best.get("step"))
        for name, record in zip(names, records, strict=True)
    ]
    described = [record.description.get("settings", {}) for record in records]
    return {
        "names": names,
        "charts": [
            (chart, draw(chart, f"chart-{place}")) for place, chart in enumerate(charts_of(runs))
        ],
        "epochs": [epochs_of(run.metrics, run.best) for run in runs],
        "progress": [progress_of(record.newest) for record in records],
        "settings": settings_of(described),
        "facts": [
            facts_of(
                settings,
                record.best,
                record.metrics,
                record.evaluation.scores if record.evaluation else {},
            )
            for settings, record in zip(described, records, strict=True)
        ],
        "others": [record.exact_match for record in records],
        "are_apart": all(not record.evaluation and record.exact_match for record in records),
    }


def _evaluations(records: Sequence[Record]) -> dict[str, Any]:
    """What the template shows of what the runs wrote."""
    shown = [
        (name, record.evaluation, record.description)
        for name, record in zip(distinct_names(records), records, strict=True)
        if record.evaluation and record.evaluation.rows
    ]
    names, rows = [name for name, *_ in shown], [evaluation.rows for _, evaluation, _ in shown]
    entries = entries_of(rows)
    return {
        "evaluated": names,
        "evaluations": [evaluation for _, evaluation, _ in shown],
        "deviations": [deviations_of(run, evaluation.scores) for _, evaluation, run in shown],
        "scores": [scores_of(evaluation.rows, evaluation.scores) for _, evaluation, _ in shown],
        "comparison": compare(*rows, tuple(names)) if len(rows) > 1 else None,
        "entries": entries,
        "steps": sorted({entry.steps for entry in entries if entry.steps is not None}),
        "rule_names": {rule: name for rule, (name, _) in RULE_NAMES.items()},
        "choices": choices_of(entries, names),
    }


def distinct_names(records: Sequence[Record]) -> list[str]:
    """The names of the runs, told apart where two are equal."""
    names = [hide_home(record.name) for record in records]
    if len(set(names)) < len(names):
        return [f"{name} ({which})" for name, which in zip(names, ("first", "second"), strict=True)]
    return names
