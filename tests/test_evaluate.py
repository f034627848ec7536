"""Evaluation from end to end: complete lines, resuming, and the right settings."""

import itertools
import json
import os
import random
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROMPT, as_a_process, flags, make_config, processes, seal, small_run, tree
from transformers import AutoTokenizer, LlamaForCausalLM

import data
import evaluate
import perplexity
import train
from engine.decoding import Completion
from engine.loading import load_tokenizer
from engine.strategy import Sampling, decode
from grading import dataset, predictions, rules
from grading.predictions import PredictionsFile
from run.errors import Stopped, UserError
from run.evaluation import COLUMNS, Score, log_scores
from run.model_source import Source
from run.tracker import RunPath


@pytest.fixture(scope="module")
def trained_once(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of `run_folder`'s run, which each test gets a copy of."""
    folder = tmp_path_factory.mktemp("trained")
    settings = small_run(model_folder, data_folder, folder)
    train.main(make_config(settings | {"max_new_tokens": "12"}), report=lambda *_: None)
    return folder / "runs"


@pytest.fixture
def run_folder(trained_once: Path, settings: dict[str, str]) -> Path:
    """A trained run, whose model writes something, none of it right."""
    shutil.copytree(trained_once, settings["output_dir"])
    return Path(settings["output_dir"]) / "test"


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "scores.json").read_text())


def test_evaluation_of_a_run(call, settings: dict[str, str], run_folder: Path) -> None:
    """It needs the checkpoint alone, and writes the files of the interface."""
    best = run_folder / "best"
    outcome = call(evaluate, "--ckpt", str(best))
    assert outcome.code == 0, outcome.err
    rows, scores = read(run_folder / "eval" / "test")
    problems = dataset.load_problems(settings["dataset"], "test")
    assert sorted(row["id"] for row in rows) == list(range(12))
    model = LlamaForCausalLM.from_pretrained(best).eval()
    tokenizer = AutoTokenizer.from_pretrained(best)
    prompts = data.encode_prompts(load_tokenizer(best), problems, PROMPT)
    for row in rows:
        problem, ids = problems[row["id"]], torch.tensor([prompts[row["id"]]])
        keys = ["id", "question", "gold", "completion", "answer", "correct", "stop", "num_tokens"]
        assert list(row) == [*keys, "label", "false_equation", "steps"]
        assert (row["question"], row["gold"]) == (problem.question, problem.gold)
        assert row["answer"] == rules.extract_openai(row["completion"])
        assert row["correct"] == rules.correct_openai(row["completion"], row["gold"])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(output, skip_special_tokens=True)
        assert row["num_tokens"] == len(output)
        assert row["stop"] == ("eos" if output[-1] == tokenizer.eos_token_id else "length")
    expected = {
        "exact_match",
        "num_correct",
        "num_problems",
        "ci95",
        "rules",
        "stopped_by_length",
        "checkpoint",
    }
    assert (
        expected | {"data_sha256", "prompt", "max_new_tokens", "seconds", "tokens_per_second"}
        <= scores.keys()
    )
    # All that a completion depends on, none of which may change where an evaluation goes on.
    identity = json.loads((run_folder / "eval" / "test" / "evaluation.json").read_text())
    depends = {"weights", "tokenizer", "split", "data_sha256", "prompt", "max_new_tokens", "dtype"}
    assert identity.keys() - {"timing"} == depends | {"checkpoint", "num_problems"}
    assert scores["num_problems"] == 12 and set(scores["rules"]) == {
        "openai",
        "lm_eval_strict",
        "lm_eval_flexible",
    }
    logged = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {"step": 14, "epoch": 2.0, "eval/exact_match": scores["exact_match"]}
    assert expected.items() <= logged.items()
    assert all(name.startswith("eval/") for name in logged.keys() - {"step", "epoch", "time"})
    assert f"{scores['exact_match']:.2%}" in outcome.out


def test_exact_match_of_a_model_that_knows_the_answers(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against predictions that are scored against another problem's gold answer."""
    problems = dataset.load_problems(settings["dataset"], "test")
    tokenizer = load_tokenizer(Path(settings["model"]))

    def oracle(model, prompts, *_, **__):
        for index in reversed(range(len(prompts))):
            answer = problems[index].answer if index % 4 else "#### 123456"
            ids = tokenizer.ids_of([answer])[0]
            yield Completion(index, len(prompts[index]), ids, "eos")

    arguments = [
        "--ckpt",
        settings["model"],
        "--output",
        str(tmp_path / "out"),
        "--verify-batching",
        "0",
    ]
    parts = evaluate.Parts(decode=oracle)
    outcome = call(evaluate, *arguments, *flags(settings), parts=parts)
    assert outcome.code == 0, outcome.err
    rows, scores = read(tmp_path / "out")
    assert scores["exact_match"] == 0.75
    for row in rows:  # whose tokens are those of its text, and EOS
        assert row["num_tokens"] == len(tokenizer.ids_of([row["completion"]])[0]) + 1


def test_best_of_the_configured_run_is_the_default(
    call, settings: dict[str, str], run_folder: Path
) -> None:
    outcome = call(evaluate, *flags({key: settings[key] for key in ("output_dir", "run_name")}))
    assert outcome.code == 0, outcome.err
    assert (run_folder / "eval" / "test" / "scores.json").is_file()


@pytest.mark.parametrize("script", [evaluate, perplexity])
def test_another_model_is_not_ignored(
    call, settings: dict[str, str], run_folder: Path, tmp_path: Path, script: Any
) -> None:
    """Guards against a score of the run's best that is taken for that of the model typed."""
    shutil.copytree(settings["model"], other := tmp_path / "other")
    where = flags({key: settings[key] for key in ("output_dir", "run_name")})
    for words in (where, ["--ckpt", str(run_folder / "best")]):
        outcome = call(script, *words, "--model", str(other))
        outcome.assert_user_error(f"--model {other}: ", "contains all weights", "with --ckpt")
    assert not (run_folder / "eval").exists()
    assert call(script, *where, "--model", settings["model"], "--limit", "1").code == 0


def test_a_flag_overrides_the_checkpoint(call, run_folder: Path, tmp_path: Path) -> None:
    arguments = ["--ckpt", str(run_folder / "best"), "--output", str(tmp_path / "out")]
    assert call(evaluate, *arguments, "--max_new_tokens", "3").code == 0
    assert max(row["num_tokens"] for row in read(tmp_path / "out")[0]) == 3
    assert not (run_folder / "eval").exists()


def test_a_settings_file_does_not_and_it_is_said(
    call, settings: dict[str, str], run_folder: Path, tmp_path: Path
) -> None:
    """Guards against a file that was typed, and has no effect in silence."""
    own, best = tmp_path / "own.yaml", str(run_folder / "best")
    dataset = os.path.relpath(settings["dataset"])  # another spelling of the same
    own.write_text(f"max_new_tokens: 3\nseed: 0\ndataset: {dataset}\nepochs: 9\n")
    words = ["--ckpt", best, "--config", str(own), "--limit", "1", "--output", str(tmp_path / "a")]
    outcome = call(evaluate, *words)
    line = f"settings: not from {own}, since the checkpoint has its own: max_new_tokens (a flag "
    assert outcome.code == 0 and outcome.out.count(line) == 1, outcome.err + outcome.out
    outcome = call(evaluate, *words[:-1], str(tmp_path / "b"), "--max_new_tokens", "3")
    assert outcome.code == 0 and "not from" not in outcome.out, outcome.err + outcome.out
    own.write_text("dataset: ~no-such-user/gsm8k\n")  # as of a file from another machine
    outcome = call(evaluate, *words[:-1], str(tmp_path / "c"))
    assert outcome.code == 0 and "has its own: dataset (a flag" in outcome.out, outcome.err


def test_validation_split_is_the_one_training_held_out(
    call, settings: dict[str, str], run_folder: Path
) -> None:
    """Guards against an evaluation that ignores the seed or the size of the split."""
    assert call(evaluate, "--ckpt", str(run_folder / "best"), "--split", "validation").code == 0
    rows, _ = read(run_folder / "eval" / "validation")
    expected = data.load_split(settings["dataset"], "validation", 17, 0)[0]
    assert [row["question"] for row in sorted(rows, key=lambda row: row["id"])] == [
        p.question for p in expected
    ]
    assert "eval/validation_exact_match" in (run_folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("flag", [("--seed", "1"), ("--validation_size", "30")])
@pytest.mark.parametrize("script", [evaluate, perplexity])
def test_rows_are_divided_as_in_training(
    call, settings: dict[str, str], run_folder: Path, script: Any, flag: tuple[str, str]
) -> None:
    """Guards against --seed for other samples, which takes other rows as well."""
    best = ["--ckpt", str(run_folder / "best")]
    for split, used in (("validation", "may have been trained on"), ("train", "was validated on")):
        for where in ([], ["--dataset", f"{settings['dataset']}/."]):
            outcome = call(script, *best, "--split", split, *flag, *where)
            outcome.assert_user_error(f"{' '.join(flag)}: would take rows that", used)
    assert not (run_folder / "eval").exists()
    # Of a model without a record, nobody knows.
    plain = ["--ckpt", settings["model"], "--split", "validation"]
    asked = settings | {flag[0].removeprefix("--"): flag[1]}
    assert call(script, *plain, *flags(asked)).code == 0


def test_other_rows_are_taken_only_where_a_flag_names_them(settings: dict[str, str]) -> None:
    """Guards against any other flag that lets changed rows pass, and a data set's own split."""
    known = {"data": {"test_sha256": "t", "validation_sha256": "v"}}
    known["settings"] = {"validation_size": 17, "seed": 0}

    def source(*typed: str, **changed: str) -> Source:
        config = make_config(settings | changed)
        return Source("best", config, known, typed=frozenset(typed))

    source().check_rows("test", {"test": "t"})
    for split in ("test", "validation"):
        with pytest.raises(UserError, match=f"the {split} rows of dataset .* are not the ones"):
            source("max_new_tokens", "dtype").check_rows(split, {split: "other"})
        source("dataset").check_rows(split, {split: "other"})
    source("dataset", "seed", seed="1").check_rows("validation", {"validation": "other"})


def test_slots_change_nothing(call, run_folder: Path, tmp_path: Path) -> None:
    found = []
    for slots in ("1", "5", "64"):
        folder = tmp_path / slots
        arguments = [
            "--ckpt",
            str(run_folder / "best"),
            "--output",
            str(folder),
            "--decode_slots",
            slots,
        ]
        assert call(evaluate, *arguments).code == 0
        found.append(sorted(read(folder)[0], key=lambda row: row["id"]))
    assert found[0] == found[1] == found[2]


def test_limit_then_all_goes_on(call, settings: dict[str, str], run_folder: Path) -> None:
    """A first look at a few problems is not wasted, nor logged as the run's score."""
    best = str(run_folder / "best")
    assert call(evaluate, "--ckpt", best, "--limit", "5").code == 0
    rows, scores = read(run_folder / "eval" / "test")
    assert sorted(row["id"] for row in rows) == list(range(5)) and scores["num_problems"] == 5
    problems = dataset.load_problems(settings["dataset"], "test")
    assert all(row["question"] == problems[row["id"]].question for row in rows)
    assert "eval/" not in (run_folder / "metrics.jsonl").read_text()
    outcome = call(evaluate, "--ckpt", best)
    assert "resuming: 5 of 12" in outcome.out
    assert read(run_folder / "eval" / "test")[0][:5] == rows
    outcome = call(evaluate, "--ckpt", best, "--limit", "5")
    outcome.assert_user_error("contains 12 problems, but 5 are asked for now", "--output")
    file = run_folder / "eval" / "test" / "predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(next(line for line in lines if line.startswith('{"id": 11,')))
    outcome = call(evaluate, "--ckpt", best, "--limit", "5")
    outcome.assert_user_error("contains 12 problems, but 5 are asked for now")


def test_an_interrupted_evaluation_goes_on(
    call, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against lost completions, and against the half line that a kill leaves."""
    best, folder = str(run_folder / "best"), run_folder / "eval" / "test"
    assert call(evaluate, "--ckpt", best).code == 0
    whole, file = read(folder), folder / "predictions.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: content.index(b"\n", len(content) // 2) + 20])
    (folder / "scores.json").unlink()
    outcome = call(evaluate, "--ckpt", best)
    assert outcome.code == 0 and "resuming: " in outcome.out
    rows, scores = read(folder)
    assert sorted(rows, key=str) == sorted(whole[0], key=str)
    assert {k: v for k, v in scores.items() if k not in ("seconds", "tokens_per_second")} == {
        k: v for k, v in whole[1].items() if k not in ("seconds", "tokens_per_second")
    }


@pytest.mark.parametrize(("seconds", "syncs"), [(0.0, 12 + 1), (4.0, 3 + 1), (1000.0, 1)])
def test_lines_are_synced(
    call,
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    syncs: int,
) -> None:
    """Guards against completions lost in a power cut. The last ones are synced at the end."""
    calls, file = [], tmp_path / "out" / "predictions.jsonl"
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if file.exists() and os.path.sameopenfile(descriptor, opened.fileno()):
            calls.append(file.read_bytes().count(b"\n"))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    clock = partial(next, itertools.count())  # a second passes with each line, and with each sync
    monkeypatch.setattr(predictions, "time", SimpleNamespace(monotonic=clock))
    parts = evaluate.Parts(open_predictions=partial(PredictionsFile, seconds_between_syncs=seconds))
    file.parent.mkdir()
    with file.open("wb") as opened:
        assert (
            call(
                evaluate,
                "--ckpt",
                settings["model"],
                *flags(settings),
                "--output",
                str(file.parent),
                parts=parts,
            ).code
            == 0
        )
    assert len(calls) == syncs and calls[-1] == 12 and calls == sorted(calls)


def test_kills_at_any_moment_lose_nothing_that_was_written(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against completions kept in memory, and a rerun that decodes them again or differs."""
    arguments = [
        "--ckpt",
        settings["model"],
        *flags(settings | {"max_new_tokens": "60", "decode_slots": "2"}),
        "--output",
    ]
    assert call(evaluate, *arguments, str(tmp_path / "whole")).code == 0
    whole, _ = read(tmp_path / "whole")
    file, seen = tmp_path / "killed" / "predictions.jsonl", b""
    rng, kills = random.Random(0), 0
    while seen.count(b"\n") < 9:
        process = processes.Process(
            target=as_a_process, args=["evaluate", os.devnull, *arguments, str(file.parent)]
        )
        process.start()
        wanted = seen.count(b"\n") + rng.randrange(1, 5)
        while process.is_alive() and not (
            file.exists() and file.read_bytes().count(b"\n") >= wanted
        ):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        kills += process.is_alive()
        process.kill()
        process.join()
        left = file.read_bytes()
        assert left.startswith(seen)  # what was there still is, byte for byte
        seen = left[: left.rindex(b"\n") + 1]
    assert kills >= 2
    assert call(evaluate, *arguments, str(file.parent)).code == 0
    assert file.read_bytes().startswith(seen)
    assert sorted(read(file.parent)[0], key=str) == sorted(whole, key=str)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (["--max_new_tokens", "5"], "max_new_tokens was 12 and is 5"),
        (["--prompt", "{question}"], "prompt was"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
    ],
)
def test_predictions_of_another_evaluation_are_not_mixed_in(
    call, run_folder: Path, change: list[str], fragment: str
) -> None:
    best, file = str(run_folder / "best"), run_folder / "eval" / "test" / "predictions.jsonl"
    assert call(evaluate, "--ckpt", best).code == 0
    before = file.read_bytes()
    call(evaluate, "--ckpt", best, *change).assert_user_error(
        "another evaluation", fragment, "--output"
    )
    assert file.read_bytes() == before


def test_another_checkpoint_is_another_evaluation(call, run_folder: Path) -> None:
    assert call(evaluate, "--ckpt", str(run_folder / "best")).code == 0
    shutil.rmtree(run_folder / "best")
    shutil.copytree(run_folder / "last", run_folder / "best")
    shutil.copy(run_folder / "last" / "config.json", run_folder / "best" / "config.json")
    weights = run_folder / "best" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    seal(run_folder / "best")
    call(evaluate, "--ckpt", str(run_folder / "best")).assert_user_error(
        "another evaluation", "weights was"
    )


def test_the_spelling_of_a_path_is_no_difference(
    call, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(evaluate, "--ckpt", str(run_folder / "best")).code == 0
    monkeypatch.chdir(run_folder)
    assert call(evaluate, "--ckpt", "best").code == 0


def test_a_refused_evaluation_leaves_nothing_behind(call, run_folder: Path) -> None:
    """Guards against a mistake whose remains make the correct command fail."""
    best = str(run_folder / "best")
    call(evaluate, "--ckpt", best, "--max_new_tokens", "5000").assert_user_error("1024 positions")
    assert not (run_folder / "eval").exists()
    (run_folder / "eval" / "test").mkdir(parents=True)
    file = run_folder / "eval" / "test" / "predictions.jsonl"
    file.write_text('{"id": 0, "que')  # killed in its first line
    assert call(evaluate, "--ckpt", best).code == 0
    assert sorted(row["id"] for row in read(file.parent)[0]) == list(range(12))
    (run_folder / "other").mkdir()
    (run_folder / "other" / "predictions.jsonl").write_text("precious")
    outcome = call(evaluate, "--ckpt", best, "--output", str(run_folder / "other"))
    outcome.assert_user_error("is not a predictions.jsonl of this program")
    assert (run_folder / "other" / "predictions.jsonl").read_text() == "precious"


def test_the_same_evaluation_again_changes_no_number(call, run_folder: Path) -> None:
    best, folder = str(run_folder / "best"), run_folder / "eval" / "test"
    assert call(evaluate, "--ckpt", best).code == 0
    scores, metrics = (
        (folder / "scores.json").read_bytes(),
        (run_folder / "metrics.jsonl").read_bytes(),
    )
    assert call(evaluate, "--ckpt", best).code == 0
    assert (folder / "scores.json").read_bytes() == scores
    assert (run_folder / "metrics.jsonl").read_bytes() == metrics
    assert call(evaluate, "--rescore", str(folder / "predictions.jsonl")).code == 0
    assert json.loads((folder / "scores.json").read_text()) == json.loads(scores)


def test_a_score_on_other_data_is_not_logged_as_the_runs(
    call, settings: dict[str, str], run_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(settings["dataset"], tmp_path / "other")
    test = tmp_path / "other" / "test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:3]))
    arguments = [
        "--ckpt",
        str(run_folder / "best"),
        "--dataset",
        str(tmp_path / "other"),
        "--output",
    ]
    outcome = call(evaluate, *arguments, str(tmp_path / "out"))
    assert outcome.code == 0 and "not logged as the run's score" in outcome.out
    assert "eval/" not in (run_folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("key", ["prompt", "max_new_tokens", "dtype", "data_sha256"])
def test_a_score_by_other_settings_is_not_logged_as_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """Guards against a curve whose points have been decoded in different ways."""
    settings = {"prompt": "p", "max_new_tokens": 8, "dtype": "float32"}
    description = {"settings": settings, "data": {"test_sha256": "a"}}
    identity = settings | {"split": "test", "data_sha256": "a"} | {key: "other"}
    named = {"run_name": "test", "wandb_mode": "disabled", "wandb_project": "p"}
    score = Score({"exact_match": 1.0}, True, {})
    log_scores(tmp_path, description, identity, [score], **named)
    assert "not logged as the run's score" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("newest", ["last/training.json", "finished.json"])
def test_scores_are_logged_at_the_step_of_their_checkpoint(tmp_path: Path, newest: str) -> None:
    """Guards against the step of a later checkpoint, of which only the run in W&B is taken, and one
    of two scores or tables that takes the other's place."""
    settings = {"prompt": "p", "max_new_tokens": 8, "dtype": "float32", "wandb_project": "before"}
    best = {"settings": settings, "data": {"test_sha256": "a"}, "step": 7, "epoch": 1.0}
    best |= {"wandb_run_id": "old", "wandb_project": "before"}
    later = {"step": 14, "epoch": 2.0, "wandb_run_id": "new", "wandb_project": "moved"}
    (tmp_path / "last").mkdir()
    (tmp_path / newest).write_text(json.dumps(best | later))
    tables: list[tuple[int, str, list[Any]]] = []
    runs: list[Any] = []

    def start(mode: str, *, run: Any, **given: Any) -> Any:
        runs.append(run)
        return SimpleNamespace(
            go_on_from=lambda lines: None,
            log=lambda line: None,
            table=lambda *table: tables.append(table),
            finish=lambda _: None,
        )

    named = {"run_name": "test", "wandb_mode": None, "wandb_project": "before"}
    identity = {**settings, "split": "test", "data_sha256": "a"}
    rows = [{"id": 0, "seconds": 2}]
    scores = [Score({name: 0.5}, True, {f"{name}s": rows}) for name in ("one", "other")]
    log_scores(tmp_path, best, identity, scores, start_tracker=start, **named)
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    expected = {"step": 7, "epoch": 1.0, "eval/one": 0.5, "eval/other": 0.5}
    assert {key: value for key, value in line.items() if key != "time"} == expected
    assert runs == [RunPath("new", "moved")]
    assert [table[:2] for table in tables] == [(7, "eval/ones"), (7, "eval/others")]
    assert tables[0][2] == [dict.fromkeys(COLUMNS) | {"id": 0}]


def test_files_of_a_foreign_folder_are_not_replaced(call, run_folder: Path, tmp_path: Path) -> None:
    arguments = ["--ckpt", str(run_folder / "best"), "--output", str(tmp_path)]
    for name in ("scores.json", "evaluation.json"):
        (tmp_path / name).write_text("precious")
        call(evaluate, *arguments).assert_user_error(f"contains {name} of something else")
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()


def test_last_has_a_folder_of_its_own(call, run_folder: Path) -> None:
    for name in ("best", "last"):
        assert call(evaluate, "--ckpt", str(run_folder / name), "--limit", "2").code == 0
    assert {path.name for path in (run_folder / "eval").iterdir()} == {"test", "last-test"}


@pytest.mark.parametrize("spelling", [".", "../best/.", "../../link"])
def test_best_has_one_folder_however_it_is_named(
    call, run_folder: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """Guards against a folder -test, and against a link to best that is not best."""
    (run_folder.parent / "link").symlink_to(run_folder / "best")
    monkeypatch.chdir(run_folder / "best")
    assert call(evaluate, "--ckpt", spelling, "--limit", "2").code == 0
    assert [path.name for path in (run_folder / "eval").iterdir()] == ["test"]


def test_a_plain_model_folder(call, settings: dict[str, str]) -> None:
    """A base model takes the settings of the file. Nothing is written into its folder."""
    before = sorted(Path(settings["model"]).iterdir())
    outcome = call(evaluate, "--ckpt", settings["model"], *flags(settings))
    assert outcome.code == 0, outcome.err
    folder = Path(settings["output_dir"]) / Path(settings["model"]).name / "eval" / "test"
    assert read(folder)[1]["num_problems"] == 12
    assert sorted(Path(settings["model"]).iterdir()) == before


def test_a_checkpoint_copied_out_of_its_run(call, settings: dict[str, str], tmp_path: Path) -> None:
    """Guards against files next to a folder that is not ours."""
    assert call(train, *flags(settings | {"epochs": "1"})).code == 0
    run_folder = Path(settings["output_dir"]) / "test"
    shutil.copytree(run_folder / "best", tmp_path / "elsewhere" / "best")
    outcome = call(evaluate, "--ckpt", str(tmp_path / "elsewhere" / "best"))
    assert outcome.code == 0, outcome.err
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["best"]
    assert (Path(settings["output_dir"]) / "best" / "eval" / "test" / "scores.json").is_file()


def test_completions_that_do_not_fit_the_model_are_refused(call, settings: dict[str, str]) -> None:
    outcome = call(
        evaluate, "--ckpt", settings["model"], *flags(settings | {"max_new_tokens": "1020"})
    )
    outcome.assert_user_error(
        "the longest prompt with max_new_tokens", "1024 positions", "smaller max_new_tokens"
    )


# ---------------------------------------------------------------- calculator and samples


def test_the_score_with_a_calculator_stands_beside_the_one_without(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against a headline that includes the calculator, and a gain that is not paired."""
    problems = dataset.load_problems(settings["dataset"], "test")
    tokenizer = load_tokenizer(Path(settings["model"]))

    def oracle(model, prompts, how, names, **limits):
        for completion in decode(model, prompts, how, names, **limits):
            right = completion.index % 4 == 0 or (how.calculator and completion.index % 2 == 0)
            text = problems[completion.index].answer if right else "#### 123456"
            completion.token_ids = tokenizer.ids_of([text])[0]
            yield completion

    parts = evaluate.Parts(decode=oracle)
    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path / "out")]
    arguments += ["--verify-batching", "0"]
    assert call(evaluate, *arguments, parts=parts).code == 0
    assert "calculator" not in read(tmp_path / "out")[1]
    outcome = call(evaluate, *arguments, "--calculator", "true", parts=parts)
    assert outcome.code == 0, outcome.err
    assert (
        "resuming: 12 of 12" in outcome.out
        and "with the calculator        50.00%   6 of 12, won 3, lost 0" in outcome.out
    )
    scores = read(tmp_path / "out")[1]
    assert scores["exact_match"] == 0.25 and scores["calculator"]["exact_match"] == 0.5
    assert scores["calculator"]["won"] == [2, 6, 10] and scores["calculator"]["lost"] == []
    assert scores["calculator"]["p_value"] == pytest.approx(0.25)
    # An evaluation without it loses nothing, nor does scoring again.
    for again in (arguments, ["--rescore", str(tmp_path / "out" / "predictions.jsonl")]):
        assert call(evaluate, *again).code == 0
        assert read(tmp_path / "out")[1] == scores
    own = read(tmp_path / "out" / "calculator")[1]
    assert (
        call(evaluate, "--rescore", str(tmp_path / "out" / "calculator" / "predictions.jsonl")).code
        == 0
    )
    assert read(tmp_path / "out" / "calculator")[1] == own and own["exact_match"] == 0.5
    # Completions with the calculator must not be resumed as those without.
    elsewhere = [
        word.replace(str(tmp_path / "out"), str(tmp_path / "out" / "calculator"))
        for word in arguments
    ]
    call(evaluate, *elsewhere).assert_user_error("with_calculator was true and is null")
    files = [str(tmp_path / "out" / name / "predictions.jsonl") for name in (".", "calculator")]
    assert "won 3: ids 2, 6, 10" in call(evaluate, "--compare", *files).out


def test_calculator_decoding_is_verified(call, settings: dict[str, str], tmp_path: Path) -> None:
    outcome = call(
        evaluate,
        "--ckpt",
        settings["model"],
        *flags(settings),
        "--output",
        str(tmp_path),
        "--calculator",
        "true",
    )
    assert outcome.code == 0, outcome.err
    assert "verified: 4 of 4 completions with the calculator match " in outcome.out
    rows, scores = read(tmp_path / "calculator")
    assert (
        len(rows) == 12
        and scores["with_calculator"] is True
        and scores["verified_batching"]["differences"] == 0
    )


def test_samples(call, settings: dict[str, str], tmp_path: Path) -> None:
    """Samples do not depend on the slots, on earlier samples, or on how many there are."""
    found = {}
    for name, samples, slots in (("a", "3", "1"), ("b", "3", "5"), ("c", "4", "64")):
        arguments = [
            "--ckpt",
            settings["model"],
            *flags(settings),
            "--output",
            str(tmp_path / name),
        ]
        outcome = call(evaluate, *arguments, "--samples", samples, "--decode_slots", slots)
        assert outcome.code == 0, outcome.err
        rows, scores = read(tmp_path / name / "samples")
        found[name] = {(row["id"], row["sample"]): row["completion"] for row in rows}
        beside = read(tmp_path / name)[1]["samples"]
        assert (
            beside["num_samples"] == int(samples)
            and beside["temperature"] == 0.7
            and beside["seed"] == 0
        )
        assert beside["maj_at"] == scores["maj_at"] and beside["pass_at"] == scores["pass_at"]
        assert f"maj@{samples}" in outcome.out and "pass@1" in outcome.out
    assert len(found["c"]) == 48 and len(set(found["c"].values())) > 24
    assert found["a"] == found["b"] == {key: text for key, text in found["c"].items() if key[1] < 3}
    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path / "a")]
    assert "36 of 48 samples are in" in call(evaluate, *arguments, "--samples", "4").out
    assert {
        (row["id"], row["sample"]): row["completion"] for row in read(tmp_path / "a" / "samples")[0]
    } == found["c"]
    outcome = call(evaluate, *arguments, "--samples", "3")
    outcome.assert_user_error("contains 4 samples, but 3 are asked for now")
    outcome = call(evaluate, *arguments, "--samples", "4", "--temperature", "0.5")
    outcome.assert_user_error("belongs to another evaluation", "temperature was 0.7 and is 0.5")
    outcome = call(evaluate, *arguments, "--samples", "4", "--seed", "1")
    outcome.assert_user_error("seed was 0 and is 1")
    outcome = call(evaluate, *arguments, "--samples", "4", "--calculator", "true")
    outcome.assert_user_error("with_calculator was false and is true")
    assert not (tmp_path / "a" / "calculator").exists()  # refused before any decoding
    scores = read(tmp_path / "a")[1]
    for folder in (tmp_path / "a", tmp_path / "a" / "samples"):
        before = read(folder)[1]
        assert call(evaluate, "--rescore", str(folder / "predictions.jsonl")).code == 0
        assert read(folder)[1] == before
    assert scores["samples"]["num_samples"] == 4


def test_interrupted_samples_go_on(call, settings: dict[str, str], tmp_path: Path) -> None:
    """Guards against samples that depend on earlier ones, and a score of half of them."""
    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path)]
    arguments += ["--samples", "3"]
    assert call(evaluate, *arguments).code == 0
    whole, scores = read(tmp_path / "samples")
    file = tmp_path / "samples" / "predictions.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    outcome = call(evaluate, "--rescore", str(tmp_path / "predictions.jsonl"))
    assert "is incomplete" in outcome.out and "samples" not in read(tmp_path)[1]
    file.write_bytes(b"damaged\n")  # must not cost the greedy score
    outcome = call(evaluate, "--rescore", str(tmp_path / "predictions.jsonl"))
    assert outcome.code == 0 and "is incomplete" in outcome.out
    file.write_bytes(content[: len(content) // 2])
    assert call(evaluate, *arguments).code == 0
    again, rescored = read(tmp_path / "samples")
    assert sorted(again, key=str) == sorted(whole, key=str)
    assert (
        rescored["maj_at"] == scores["maj_at"]
        and read(tmp_path)[1]["samples"]["pass_at"] == scores["pass_at"]
    )


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--temperature", "0.5"], "set their number with --samples K"),
        (["--samples", "0"], "'0' must be a positive integer"),
        (["--samples", "2", "--temperature", "0"], "'0' must be a positive, finite number"),
        (["--samples", "2", "--temperature", "nan"], "'nan' must be a positive, finite number"),
        (["--samples", "2", "--rescore", "x"], "--samples can't be used with --rescore"),
        (["--calculator", "yes please"], "calculator"),
    ],
)
def test_mistyped_samples(
    call, settings: dict[str, str], arguments: list[str], fragment: str
) -> None:
    base = [] if "--rescore" in arguments else ["--ckpt", settings["model"], *flags(settings)]
    call(evaluate, *base, *arguments).assert_user_error(fragment)


@pytest.mark.parametrize("place", ["best", "last/deeper/still", "previous", "link"])
def test_nothing_is_written_into_a_checkpoint(call, run_folder: Path, place: str) -> None:
    """Guards against results that the next save removes, with the checkpoint that they are in."""
    shutil.rmtree(run_folder / "previous", ignore_errors=True)  # the next save makes it again
    shutil.copytree(run_folder / "best", run_folder.parent / "copy")
    (run_folder / "link").symlink_to(run_folder / "best")
    predictions = run_folder.parent / "predictions.jsonl"
    predictions.write_text('{"id": 0, "gold": "1", "completion": "#### 1"}\n')
    output, before = run_folder / place, tree(run_folder.parent)
    for source in (["--ckpt", str(run_folder / "best")], ["--rescore", str(predictions)]):
        outcome = call(evaluate, *source, "--output", str(output))
        outcome.assert_user_error(f"command line: --output {output}: is in a checkpoint")
        assert tree(run_folder.parent) == before
    for name in ("best", "copy"):  # which are in no run
        elsewhere = str(run_folder.parent / name)
        assert call(evaluate, "--rescore", str(predictions), "--output", elsewhere).code == 0


def test_a_stop_among_the_samples_takes_nothing_from_the_greedy_score(
    call, run_folder: Path
) -> None:
    """Guards against an exact match that is never logged, since the rerun decodes nothing."""

    def stopped(model, prompts, how, names, **limits):
        if isinstance(how, Sampling):
            raise KeyboardInterrupt
        yield from decode(model, prompts, how, names, **limits)

    def logged() -> dict[str, float]:
        return json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])

    arguments = ["--ckpt", str(run_folder / "best"), "--samples", "2"]
    assert call(evaluate, *arguments, parts=evaluate.Parts(decode=stopped)).code == 130
    assert logged()["eval/exact_match"] == read(run_folder / "eval" / "test")[1]["exact_match"]
    assert call(evaluate, *arguments).code == 0
    assert {
        "eval/maj_at_1",
        "eval/maj_at_2",
    } <= logged().keys() and "eval/exact_match" not in logged()
    assert call(evaluate, *arguments[:2], "--calculator", "true").code == 0
    assert "eval/calculator_exact_match" in logged() and "eval/exact_match" not in logged()


def test_samples_with_the_calculator_say_so(call, run_folder: Path) -> None:
    """Guards against a majority vote that is taken for the model's own."""
    best, folder = str(run_folder / "best"), run_folder / "eval" / "test"
    outcome = call(evaluate, "--ckpt", best, "--samples", "2", "--calculator", "true")
    assert "2 samples per problem at temperature 0.7, with the calculator" in outcome.out
    logged = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    scores = read(folder / "samples")[1]
    assert logged["eval/calculator_maj_at_2"] == scores["maj_at"]["2"]
    assert not any(name.startswith("eval/maj_at") for name in logged)
    shutil.rmtree(folder)
    outcome = call(evaluate, "--ckpt", best, "--samples", "2")
    assert outcome.code == 0 and "with the calculator" not in outcome.out


def test_a_kill_among_the_samples_keeps_what_was_measured(call, run_folder: Path) -> None:
    """Guards against a greedy decoding whose time nobody knows, and that is verified again."""
    output = run_folder / "eval" / "test"
    killed: list[dict[str, Any]] = []

    def look(model, prompts, how, names, **limits):
        if isinstance(how, Sampling):  # where a kill would leave no scores.json
            assert not (output / "scores.json").exists()
            killed.append(json.loads((output / "evaluation.json").read_text())["timing"])
        yield from decode(model, prompts, how, names, **limits)

    arguments = ["--ckpt", str(run_folder / "best"), "--samples", "2"]
    assert call(evaluate, *arguments, parts=evaluate.Parts(decode=look)).code == 0
    assert killed[0].keys() == {"seconds", "tokens_per_second", "verified_batching"}
    (output / "scores.json").unlink()
    outcome = call(evaluate, *arguments[:2])
    assert outcome.code == 0 and "verified" not in outcome.out
    assert killed[0].items() <= read(output)[1].items()


def end_by_an_error(*_: object, **__: object) -> None:
    raise UserError("the disk is full")


def end_by_a_signal(*_: object, **__: object) -> None:
    raise Stopped(15, "SIGTERM")


@pytest.mark.parametrize("place", ["verification", "scores.json", "metrics.jsonl", "tracker"])
@pytest.mark.parametrize("end", [end_by_an_error, end_by_a_signal])
def test_what_ends_after_the_last_completion_does_not_cost_the_score(
    call, run_folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, end
) -> None:
    """Whatever ended it, the next evaluation decodes nothing and logs the score, once."""
    best, folder = str(run_folder / "best"), run_folder / "eval" / "test"

    def logged() -> list[float]:
        lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
        return [line["eval/exact_match"] for line in lines if "eval/exact_match" in line]

    parts = evaluate.Parts()
    with monkeypatch.context() as patch:
        if place == "verification":
            patch.setattr(LlamaForCausalLM, "generate", end)
        elif place == "tracker":
            parts = evaluate.Parts(start_tracker=end)
        elif place == "scores.json":
            replace = Path.replace
            patch.setattr(
                Path, "replace", lambda p, to: (end if to.name == place else replace)(p, to)
            )
        else:
            path_open = Path.open
            patch.setattr(
                Path,
                "open",
                lambda p, mode="r", *a, **s: (
                    end if mode == "a+b" and p.name == place else path_open
                )(p, mode, *a, **s),
            )
        assert call(evaluate, "--ckpt", best, parts=parts).code in (2, 143)
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 12 and logged() == []
    assert (folder / "scores.json").exists() == (place in ("metrics.jsonl", "tracker"))
    for _ in range(2):
        outcome = call(evaluate, "--ckpt", best, "--verify-batching", "0")
        assert outcome.code == 0 and "resuming: 12 of 12" in outcome.out
        assert logged() == [read(folder)[1]["exact_match"]]


@pytest.mark.parametrize("stops", [False, True])
def test_scores_are_written_once(
    call, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """Guards against scores that are written, read back and written again; a stop included."""
    written: list[str] = []
    original = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if target.name == "scores.json":
            written.append(str(target.parent.relative_to(tmp_path)))
        return original(path, target)

    def stopped(model, prompts, how, names, **limits):
        if stops and isinstance(how, Sampling):
            raise KeyboardInterrupt
        yield from decode(model, prompts, how, names, **limits)

    monkeypatch.setattr(Path, "replace", replace)
    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path / "out")]
    arguments += ["--samples", "2", "--calculator", "true"]
    outcome = call(evaluate, *arguments, parts=evaluate.Parts(decode=stopped))
    assert outcome.code == (130 if stops else 0)
    folders = ["out", "out/calculator"] if stops else ["out", "out/calculator", "out/samples"]
    assert sorted(written) == folders
    scores = read(tmp_path / "out")[1]
    assert scores["calculator"]["num_problems"] == 12 and ("samples" in scores) != stops


def test_a_decoding_that_failed_its_verification_is_left_out(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against a greedy scores.json that reports what its own evaluation has just refused."""

    def broken(model, prompts, how, names, **limits):
        for completion in decode(model, prompts, how, names, **limits):
            if how.calculator:
                completion.token_ids[2:3] = [9]
            yield completion

    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path)]
    outcome = call(
        evaluate, *arguments, "--calculator", "true", parts=evaluate.Parts(decode=broken)
    )
    outcome.assert_user_error("4 of 4 completions differ")
    scores = read(tmp_path)[1]
    assert scores["num_problems"] == 12 and "calculator" not in scores
    assert not (tmp_path / "calculator" / "scores.json").exists()
