"""A real offline run of W&B, as W&B's own reader finds it, against metrics.jsonl."""

import json
import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Killed, kill, make_config, run_folder, small_run, step_that

import evaluate
import train
from engine.measure import Measurement
from page import write
from run.code_version import code_commit
from run.tracker import summary_of

ROOT = Path(train.__file__).parent


def read(file: Path, *words: str) -> str:
    """What ``wandb leet inspect --json`` prints of a ``.wandb`` file."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *words]
    command += ["--run-file", str(file), str(file.parent.parent)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def histories(file: Path) -> list[dict[str, Any]]:
    """The lines that were logged, without what W&B adds."""
    records = map(json.loads, read(file).splitlines())
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: item[key] for key in item if not key.startswith("_")} for item in items]


def numbers_of(file: Path) -> list[dict[str, Any]]:
    """The same without the tables."""
    return [line for line in histories(file) if not any("._type" in key for key in line)]


def table_of(file: Path, line: dict[str, Any], name: str) -> list[dict[str, Any]]:
    content = json.loads((file.parent / "files" / line[f"{name}.path"]).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


@pytest.fixture(scope="module")
def tracked(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[Path]]]:
    """A run that is killed, resumed with a worse epoch, and evaluated; its three .wandb files."""
    import wandb

    folder = tmp_path_factory.mktemp("tracked")
    settings = small_run(model_folder, data_folder, folder) | {"wandb_mode": "offline"}
    worse = Measurement(99.0, 1e43, 1, {"reasoning": Measurement(98.0, 1e42, 1)})
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            patch.delenv(name)
        patch.setattr(write, "write_report", lambda *_: "left out in tests")
        wandb.teardown()  # it reads the environment once
        config, run = make_config(settings), run_folder(settings)
        with pytest.raises(Killed):
            train.main(config, step=step_that(kill, at=10))
        train.main(config, measure=lambda *_: worse)
        arguments = ["--ckpt", str(run / "best"), "--verify-batching", "0", "--calculator", "true"]
        evaluate.main(*evaluate.read_arguments(arguments))
        wandb.teardown()
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    yield run, files


def test_wandb_has_exactly_the_numbers_of_metrics(tracked: tuple[Path, list[Path]]) -> None:
    """Guards against a number that is rounded, lost or logged at another step."""
    run, files = tracked
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for file in files for line in numbers_of(file)]
    assert [line["step"] for line in found[8:12]] == [8, 9, 8, 9]  # since the kill was in step 10
    assert found[:8] + found[10:] == lines
    assert [line["step"] for line in lines if "val/loss" in line] == [7, 14]
    assert {"eval/exact_match", "eval/calculator_exact_match"} <= lines[-1].keys()


def test_wandb_knows_how_each_process_ended(tracked: tuple[Path, list[Path]]) -> None:
    """Guards against a run that W&B shows as finished after a crash."""
    ended = [
        record["exit"].get("exit_code", 0)
        for file in tracked[1]
        for record in map(json.loads, read(file).splitlines())
        if record["type"] == "exit"
    ]
    assert ended == [1, 0, 0]


def test_what_is_synced_later_goes_on_from_what_was_synced_before(
    tracked: tuple[Path, list[Path]],
) -> None:
    """Guards against an evaluation that 'wandb sync' takes for the whole run.

    Its config and summary would take the place of the training's. What it does with this mark was
    seen with a server that records its requests.
    """
    records = [json.loads(line) for file in tracked[1] for line in read(file).splitlines()]
    runs = [record["run"] for record in records if record["type"] == "run"]
    assert [run.get("resume") for run in runs] == [True] * 3
    assert len({run["run_id"] for run in runs}) == 1


def test_every_number_has_its_axis_and_its_summary(tracked: tuple[Path, list[Path]]) -> None:
    """Guards against a pattern that W&B lets another one override, now and then."""
    for file in tracked[1]:
        records = map(json.loads, read(file).splitlines())
        defined = [record["metric"] for record in records if record["type"] == "metric"]
        assert all(metric["step_metric"] == "step" for metric in defined[1:])
        summaries = {metric.get("name"): metric.get("summary") for metric in defined}
        for name in {name for line in numbers_of(file) for name in line}:
            chosen = summary_of(name)
            assert summaries.get(name) == (chosen and {chosen: True}), name


def test_summaries_are_those_of_the_whole_run(tracked: tuple[Path, list[Path]]) -> None:
    """Guards against the lowest loss since the last restart, shown as the run's."""
    run, files = tracked
    summaries = [json.loads(read(file, "--summary"))["summary"] for file in files]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "val/loss" in line)
    for name in ("val/loss", "val/perplexity", "val/perplexity_reasoning"):
        assert summaries[0][name] == summaries[1][name] == {"min": first[name]}, name
    assert summaries[1]["train/loss"] == [n["train/loss"] for n in lines if "train/loss" in n][-1]
    for line in lines[:-1]:  # an evaluation that is synced later takes the summary's place
        for name in line.keys() - {"step", "epoch", "time"}:
            assert summaries[2][name] == summaries[1][name], name
    scores = json.loads((run / "eval" / "test" / "scores.json").read_text())
    shown = {name: value for name, value in summaries[2].items() if name.startswith("eval/")}
    assert shown["eval/exact_match"] == {"max": scores["exact_match"]}
    low, high = scores["ci95"]
    assert shown["eval/exact_match_low"] == {"max": low}
    assert shown["eval/exact_match_high"] == {"max": high}
    for rule in ("lm_eval_strict", "lm_eval_flexible"):
        assert shown[f"eval/{rule}"] == {"max": scores["rules"][rule]}
        assert shown[f"eval/{rule}_low"]["max"] <= shown[f"eval/{rule}"]["max"]
    for name, errors in (("", scores["errors"]), ("calculator_", scores["calculator"]["errors"])):
        for kind, count in errors.items():
            assert shown[f"eval/{name}errors_{kind}"] == count


def test_tables_show_what_the_model_writes(tracked: tuple[Path, list[Path]]) -> None:
    """Guards against other problems each epoch, and completions that are another model's."""
    run, files = tracked
    tables = [
        (line["step"], table_of(file, line, "val/samples"))
        for file in files
        for line in histories(file)
        if "val/samples._type" in line
    ]
    assert [step for step, _ in tables] == [7, 14]
    asked = [[row["question"] for row in rows] for _, rows in tables]
    assert asked[0] == asked[1] and len(set(asked[0])) == 4
    rows = [row for _, table in tables for row in table]
    assert all(row["gold"] and row["stop"] in ("eos", "length") for row in rows)
    assert [row["model"] for row in tables[0][1]] != [row["model"] for row in tables[1][1]]
    for name, place in (("predictions", "test"), ("calculator_predictions", "test/calculator")):
        [line] = [line for line in histories(files[2]) if f"eval/{name}._type" in line]
        assert line["step"] == 7
        written = (run / "eval" / place / "predictions.jsonl").read_text().splitlines()
        rows = sorted(map(json.loads, written), key=lambda row: row["id"])
        found = table_of(files[2], line, f"eval/{name}")
        assert sorted(found, key=lambda row: row["id"]) == [
            {column: row.get(column) for column in found[0]} for row in rows
        ]
        assert {"id", "question", "gold", "completion", "correct", "label"} <= found[0].keys()


def test_config_says_what_was_trained_on_what(tracked: tuple[Path, list[Path]]) -> None:
    """Guards against a run in the dashboard whose data, plan or code nobody knows."""
    run, files = tracked
    config = json.loads(read(files[0], "--summary"))["config"]
    description = json.loads((run / "best" / "training.json").read_text())
    assert config["data"] == description["data"] and config["plan"] == description["plan"]
    assert {key: config[key] for key in description["settings"]} == description["settings"]
    assert config["commit"] == code_commit()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = description["validation_by_class"]
    found = {f"val/perplexity_{name}": part["perplexity"] for name, part in parts.items()}
    assert len(found) == 3 and found.items() <= lines[7].items()
    assert json.loads(read(files[2], "--summary"))["config"] == {}  # which leaves that of training


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With git and without, with a change and without."""

    def git(*words: str) -> str:
        author = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", "-C", str(tmp_path), *author, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    assert code_commit(tmp_path) is None  # nothing is committed
    git("add", "file")
    git("commit", "-qm", "m")
    git("tag", "-a", "v1", "-m", "m")
    head = git("rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", head) and code_commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert code_commit(tmp_path) == f"{head}-dirty"
    assert code_commit(tmp_path / "gone") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_commit(tmp_path) is None


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # in W&B's package
def test_the_workspace_shows_what_is_logged(
    tracked: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a panel that stays empty, and a view that is not what W&B takes.

    What would be sent is read: `wandb_workspaces.workspaces.internal.upsert_view2`.
    """
    pytest.importorskip("wandb_workspaces")
    from wandb_workspaces.workspaces import internal

    sent: list[dict[str, Any]] = []

    def send(api: None, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        sent.append(variables)
        return {"upsertView": {"view": {"id": "1", "name": "nw-1-v"}}}

    monkeypatch.setattr(internal, "execute_graphql", send)
    server = SimpleNamespace(app_url="https://wandb.example/")
    monkeypatch.setattr(internal.wandb, "Api", lambda: SimpleNamespace(_service_api=server))
    script = runpy.run_path(str(ROOT / "docs" / "wandb_workspace.py"))
    script["workspace"]("me", "mine").save()
    [view] = sent
    assert (view["entityName"], view["projectName"]) == ("me", "mine")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    panels = [panel for section in sections for panel in section["panels"]]
    plots = [panel["config"] for panel in panels if "metrics" in panel["config"]]
    assert {plot["xAxis"] for plot in plots} == {"step"}
    shown = {name for plot in plots for name in plot["metrics"]}
    lines = (tracked[0] / "metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)}
    assert shown - logged == {
        "train/mfu",
        "val/exact_match",
    }  # of a known GPU, or if it is the best
    unseen = {name for name in logged - shown if "calculator" not in name}
    assert unseen == {"step", "epoch", "time"} | {
        f"eval/lm_eval_{name}_{end}" for name in ("strict", "flexible") for end in ("low", "high")
    }
    spec = view["spec"]
    assert "val/samples" in spec and "eval/predictions" in spec
