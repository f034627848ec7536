"""Evaluation and perplexity by several processes of a job: the results are those of one."""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from conftest import flags, run_folder
from safetensors.torch import load_file, save_file
from torch import distributed

import data
import evaluate
import perplexity
import train
from engine import dealing
from engine.decoding import Completion
from engine.llama import Llama
from engine.loading import load_model, load_tokenizer
from engine.measure import measure
from engine.ranks import Ranks, job
from engine.strategy import Greedy, Sampling, decode, describe, remake
from engine.verify import spread
from grading.answer_parts import PARTS
from grading.dataset import load_problems
from grading.predictions import writing_into
from run.errors import UserError
from run.script import read_command_line, run_script
from run.wandb_run import start_tracker

SCRIPTS = {"evaluate": evaluate, "perplexity": perplexity}
FOLDERS = (".", "calculator", "samples")
PROMPT = "Question: {question}\nAnswer:"


def run(name: str, argv: list[str], **parts: Any) -> None:
    """What the last lines of a script do."""
    script = SCRIPTS[name]

    def story() -> None:
        script.main(*script.read_arguments(argv), **parts)

    run_script(story)


def rank() -> int:
    return int(os.environ["RANK"])


def rows_of(folder: Path) -> list[str]:
    """The lines of a predictions.jsonl, in the order of the problems and samples."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    order = [(row["id"], row.get("sample", 0), line) for row, line in zip(rows, lines, strict=True)]
    return [line for *_, line in sorted(order)]


def without_timing(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    timing = content.get("timing", content)
    assert all(timing.pop(key) > 0 for key in ("seconds", "tokens_per_second"))
    return content


@pytest.fixture(scope="module")
def greedy(model_folder: Path, data_folder: Path) -> list[str]:
    """The arguments of an evaluation, but for the folder."""
    settings = {
        "dataset": str(data_folder),
        "dtype": "float32",
        "max_new_tokens": "12",
        "decode_slots": "3",
        "wandb_mode": "disabled",
    }
    return ["--ckpt", str(model_folder), *flags(settings), "--output"]


@pytest.fixture(scope="module")
def everything(greedy: list[str]) -> list[str]:
    return ["--samples", "3", "--calculator", "true", *greedy]


@pytest.fixture(scope="module")
def one(everything: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results of one process, and what it printed."""
    folder = tmp_path_factory.mktemp("one")
    ended = jobs.run(1, folder / "job", partial(run, "evaluate"), [*everything, str(folder)])
    return folder, ended[0].out


def test_three_ranks_write_what_one_process_writes(
    one: tuple[Path, str], everything: list[str], tmp_path: Path
) -> None:
    """Guards against completions that are lost, doubled, swapped, or depend on the dealing."""
    folder, printed = one
    ended = jobs.run(3, tmp_path / "job", run, "evaluate", [*everything, str(tmp_path)])
    for name in FOLDERS:
        assert rows_of(tmp_path / name) == rows_of(folder / name)
        for file in ("scores.json", "evaluation.json"):
            assert without_timing(tmp_path / name / file) == without_timing(folder / name / file)
    assert len(rows_of(tmp_path)) == 12 and len(rows_of(tmp_path / "samples")) == 36
    assert ended[0].out.replace(str(tmp_path), str(folder)) == printed
    assert "verified: 4 of 4" in printed and "maj@3" in printed
    assert "".join(each.err for each in ended) + ended[1].out + ended[2].out == ""


def test_more_ranks_than_problems(one: tuple[Path, str], greedy: list[str], tmp_path: Path) -> None:
    """And what a few of them wrote, one process completes."""
    arguments = [*greedy, str(tmp_path)]
    jobs.run(3, tmp_path / "job", run, "evaluate", ["--limit", "2", *arguments])
    assert rows_of(tmp_path) == rows_of(one[0])[:2]
    ended = jobs.run(1, tmp_path / "job", run, "evaluate", arguments)
    assert "resuming: 2 of 12 problems" in ended[0].out
    assert rows_of(tmp_path) == rows_of(one[0])


def test_samples_of_train_rows_by_two_ranks(call: Any, greedy: list[str], tmp_path: Path) -> None:
    """Guards against ranks that wait for a greedy decoding, which these do without."""
    arguments = ["--split", "train", "--samples", "2", "--limit", "9", "--validation_size", "17"]
    arguments += greedy
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(evaluate, *arguments, str(one)).code == 0
    ended = jobs.run(2, tmp_path / "job", run, "evaluate", [*arguments, str(two)])
    assert "2 samples per problem" in ended[0].out, ended[0].err
    assert [path.name for path in two.iterdir()] == ["samples"]
    assert rows_of(two / "samples") == rows_of(one / "samples")
    assert len(rows_of(two / "samples")) == 18


def noted(file: Path, *arguments: Any, **keywords: Any) -> Any:
    with file.open("a") as stream:
        stream.write("started\n")
    return start_tracker(*arguments, **keywords)


def test_the_score_of_a_run_is_logged_once(
    call: Any, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against one line in metrics.jsonl, and one run in W&B, for each process."""
    assert call(train, *flags(settings | {"epochs": "1"})).code == 0
    parts = evaluate.Parts(start_tracker=partial(noted, tmp_path / "trackers"))
    best = run_folder(settings) / "best"
    story = partial(run, parts=parts)
    jobs.run(2, tmp_path / "job", story, "evaluate", ["--ckpt", str(best)])
    log = (run_folder(settings) / "metrics.jsonl").read_text()
    assert log.count('"eval/exact_match"') == 1
    assert (tmp_path / "trackers").read_text() == "started\n"
    assert len(rows_of(run_folder(settings) / "eval" / "test")) == 12


# ---------------------------------------------------------------- kills and faults


def two_and_no_more(
    model: Any, prompts: list[list[int]], how: Any, names: list[str], **limits: Any
) -> Iterator[Completion]:
    """Decodes two prompts, and then goes on and on without finishing another."""
    yield from decode(model, prompts[:2], how, names[:2], **limits)
    while True:
        yield from limits["arrived"]()
        time.sleep(0.01)


@pytest.mark.parametrize(("victim", "ranks_afterwards"), [(0, 2), (2, 1)])
def test_a_kill_loses_nothing_that_any_rank_has_finished(
    one: tuple[Path, str], greedy: list[str], tmp_path: Path, victim: int, ranks_afterwards: int
) -> None:
    """Guards against completions that wait until rank 0 is done, and a resume that needs as many.

    All ranks are still decoding when one is killed and torchrun, in whose place the test acts,
    stops the others.
    """
    arguments = [*greedy, str(tmp_path)]
    file = tmp_path / "predictions.jsonl"
    parts = evaluate.Parts(decode=two_and_no_more)
    started = jobs.Job(3, tmp_path / "job", partial(run, parts=parts), "evaluate", arguments)
    until = time.monotonic() + jobs.SECONDS
    while time.monotonic() < until and not (file.exists() and file.read_bytes().count(b"\n") == 6):
        time.sleep(0.01)
    processes = started.processes
    processes[victim].kill()
    processes[victim].join()
    for process in processes:
        if process.is_alive():
            process.terminate()
    ended = started.end(seconds=10)
    codes = [each.code for each in ended]
    assert codes == [-signal.SIGKILL if number == victim else 143 for number in range(3)], ended
    assert "".join(each.err for each in ended).count("\n") == 1, ended
    assert "SIGTERM; what is saved is kept" in "".join(each.err for each in ended)
    left = file.read_text()
    assert left.count("\n") == 6 and {json.loads(row)["id"] for row in left.splitlines()}
    ended = jobs.run(ranks_afterwards, tmp_path / "job", run, "evaluate", arguments)
    assert "resuming: 6 of 12 problems" in ended[0].out
    assert file.read_text().startswith(left) and rows_of(tmp_path) == rows_of(one[0])


def out_of_memory_on(
    victim: int, model: Any, prompts: Any, how: Any, names: Any, **limits: Any
) -> Iterator[Completion]:
    if rank() == victim:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return two_and_no_more(model, prompts, how, names, **limits)


def wrong_on_rank_1(
    model: Any, prompts: Any, how: Any, names: Any, **limits: Any
) -> Iterator[Completion]:
    for completion in decode(model, prompts, how, names, **limits):
        if rank() == 1:
            completion.token_ids[2:3] = [9]
        yield completion


@pytest.mark.parametrize(
    ("replaced", "line"),
    [
        (partial(out_of_memory_on, 0), "error: out of memory while evaluating (OutOfMemoryError: "),
        (partial(out_of_memory_on, 2), "error: out of memory while evaluating (OutOfMemoryError: "),
        (wrong_on_rank_1, "error: 1 of 4 completions differ from Transformers' generate"),
    ],
)
def test_a_fault_on_one_rank_ends_all_with_one_line(
    greedy: list[str], tmp_path: Path, replaced: Any, line: str
) -> None:
    """Guards against a rank that waits for one that is gone, and a check of rank 0's work alone."""
    story = partial(run, parts=evaluate.Parts(decode=replaced))
    started = time.monotonic()
    ended = jobs.Job(3, tmp_path / "job", story, "evaluate", [*greedy, str(tmp_path)]).end()
    assert time.monotonic() - started < 30
    written = "".join(each.err for each in ended)
    assert [each.code for each in ended] == [2, 2, 2], ended
    assert written.startswith(line) and written.count("\n") == 1, ended
    assert not (tmp_path / "scores.json").exists()


def run_unequally(name: str, argv: list[str]) -> None:
    run(name, [*argv, *(["--max_new_tokens", "5"] if rank() == 1 else [])])


def calculate_unequally(name: str, argv: list[str]) -> None:
    run(name, [*argv, "--calculator", "true" if rank() == 0 else "false"])


@pytest.mark.parametrize(
    ("function", "holds", "line"),
    [
        (
            calculate_unequally,
            False,
            "error: torchrun: calculator is True for process 0 and False for process 1: give all",
        ),
        (
            run_unequally,
            False,
            "error: torchrun: max_new_tokens is 12 for process 0 and 5 for pro",
        ),
        (run, True, "another process is evaluating into it: wait for it, or choose another"),
    ],
)
def test_a_refusal_is_one_line(
    greedy: list[str], tmp_path: Path, function: Any, holds: bool, line: str
) -> None:
    place = tmp_path / "out"
    arguments = [*greedy[:-1], "--output", str(place)]
    if function is run_unequally:
        position = arguments.index("--max_new_tokens")
        del arguments[position : position + 2]
        arguments += ["--config", str(tmp_path / "own.yaml")]
        (tmp_path / "own.yaml").write_text("max_new_tokens: 12\n")
    with writing_into(place) if holds else writing_into():
        ended = jobs.Job(2, tmp_path / "job", function, "evaluate", arguments).end()
    assert [each.code for each in ended] == [2, 2], ended
    written = "".join(each.err for each in ended)
    assert line in written and written.count("\n") == 1, ended
    assert not list(place.glob("*"))


def read_words(*words: str) -> None:
    sys.argv[1:] = words
    read_command_line(evaluate.read_arguments)


def test_what_reads_files_is_not_done_by_many(tmp_path: Path) -> None:
    """Guards against several processes that replace the same scores."""
    ended = jobs.Job(2, tmp_path, read_words, "--rescore", "predictions.jsonl").end()
    assert [each.code for each in ended] == [2, 2]
    assert "--rescore reads files, for which one process is enough" in ended[0].err
    assert ended[0].err.count("\n") == 1 and ended[1].err == ""


# ---------------------------------------------------------------- dealing


@pytest.mark.parametrize("count", [0, 2, 12, 1319])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_prompt_is_dealt_once_and_evenly(count: int, size: int) -> None:
    parts = dealing.parts_of(count, size)
    assert sorted(position for part in parts for position in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    ranks_of = {position: number for number, part in enumerate(parts) for position in part}
    verified = {ranks_of[position] for position in spread(range(count), 4)}
    assert len(verified) >= min(2, size, count)  # in plain turns, three ranks have none of 12


@pytest.mark.parametrize("calculator", [None, "a calculator"])
@pytest.mark.parametrize("how", [Greedy, partial(Sampling, 0.7, 3)])
def test_every_rank_decodes_in_the_same_way(how: Any, calculator: Any) -> None:
    """Guards against completions without the calculator, or with another seed."""
    sent = json.loads(json.dumps(describe(how(calculator))))
    assert remake(sent, "a calculator") == how(calculator)


def work_for(seconds: float, worker: dealing.Worker) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert worker.give_sign() == []
        time.sleep(0.01)
    worker.send(Completion(0, 3, [5, 6], "eos"))


def test_a_rank_that_falls_silent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an endless wait for a machine that has lost its power."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, seconds in (("SECONDS_BETWEEN_LOOKS", 0.01), ("SECONDS_BETWEEN_SIGNS", 0.05)):
        monkeypatch.setattr(dealing, name, seconds)
    monkeypatch.setattr(dealing, "TIMEOUT", timedelta(seconds=0.3))
    deal = dealing.Deal(Ranks(0, 2, store), [(0, 0), (1, 0)], {"some": "how"})
    worker = dealing.Worker(Ranks(1, 2, store))
    ids, how = next(worker.parts())
    assert deal.own == [(0, 0)] and ids == [[1, 0]] and how == {"some": "how"}
    at_work = threading.Thread(target=work_for, args=(0.9, worker))  # longer than the limit
    at_work.start()
    assert list(deal.rest()) == [Completion(1, 3, [5, 6], "eos")]
    at_work.join()
    deal = dealing.Deal(Ranks(0, 2, store), [(0, 0), (1, 0)], {})
    with pytest.raises(UserError, match="no other process of this job has given a sign of life"):
        list(deal.rest())


# ---------------------------------------------------------------- perplexity


def run_counted(argv: list[str], folder: Path) -> None:
    """And say how many forward passes this process made."""
    forward, passes = Llama.forward, []

    def counted(*arguments: Any) -> torch.Tensor:
        passes.append(1)
        return forward(*arguments)

    def story() -> None:
        perplexity.main(*perplexity.read_arguments(argv))
        (folder / f"{os.environ.get('RANK', 0)}.passes").write_text(str(len(passes)))

    Llama.forward = counted
    run_script(story)


def measured(model_folder: Path, data_folder: Path) -> None:
    """In float64, with micro-batches of one row to several."""
    model = load_model(model_folder, torch.float64, torch.device("cpu"))
    problems = load_problems(str(data_folder), "test")
    examples = data.encode(load_tokenizer(model_folder), problems, PROMPT, by_class=True)
    with job(torch.device("cpu")) as here:
        model.ranks = here
        for limit in (100, 300, 10000):
            whole = measure(model, examples, limit, PARTS)
            print(json.dumps([whole.loss, *(part.loss for part in whole.by_class.values())]))


def test_perplexity_is_that_of_one_process(
    model_folder: Path, data_folder: Path, greedy: list[str], tmp_path: Path
) -> None:
    losses, printed, passes = [], [], []
    arguments = [*greedy[:-1], "--split", "test", "--max_length", "256"]
    arguments += ["--micro_batch_tokens", "256"]
    for size in (1, 3):
        place = tmp_path / str(size)
        ended = jobs.run(size, place, measured, model_folder, data_folder)
        losses += [list(map(json.loads, each.out.splitlines())) for each in ended]
        ended = jobs.run(size, place, run_counted, arguments, place)
        printed.append(re.findall(r"[0-9.]+", ended[0].out.replace(str(model_folder), "")))
        passes.append([int(file.read_text()) for file in place.glob("*.passes")])
        assert all(each.out + each.err == "" for each in ended[1:])
    first = losses[0][0]
    assert len(first) == 4
    assert all(found == pytest.approx(first, rel=1e-12) for each in losses for found in each)
    assert printed[0][:2] == printed[1][:2] and printed[0][0] == "12"  # rows, supervised tokens
    found = [[float(number) for number in numbers[2:]] for numbers in printed]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and len(found[0]) == 3 * 3 + 2
    assert len(passes[1]) == 3 and max(passes[1]) < passes[0][0] / 2  # each measures a part


def run_other(other: dict[str, str], name: str, argv: list[str]) -> None:
    """With the words in ``other`` in place of ours on rank 1."""
    run(name, [other.get(word, word) if rank() == 1 else word for word in argv])


@pytest.mark.parametrize(
    ("script", "differs"),
    [("perplexity", "weights"), ("evaluate", "weights"), ("evaluate", "data_sha256")],
)
def test_other_weights_or_rows_on_one_process_are_refused(
    model_folder: Path,
    data_folder: Path,
    greedy: list[str],
    tmp_path: Path,
    script: str,
    differs: str,
) -> None:
    """Guards against the result of a mixture: a copy that is not the same, under the same name."""
    ours = model_folder if differs == "weights" else data_folder
    copy = shutil.copytree(ours, tmp_path / ours.name)
    if differs == "weights":
        weights = load_file(copy / "model.safetensors")
        weights["model.norm.weight"] *= 1.01
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    else:
        first, *others = (copy / "test.jsonl").read_text().splitlines(keepends=True)
        (copy / "test.jsonl").write_text("".join([*others, first]))
    output = tmp_path / "out"
    arguments = greedy[:-1] if script == "perplexity" else [*greedy, str(output)]
    other = {str(ours): str(copy)}
    ended = jobs.Job(2, tmp_path / "job", partial(run_other, other), script, arguments).end()
    written = "".join(each.err for each in ended)
    assert [each.code for each in ended] == [2, 2], ended
    assert written.startswith(f"error: torchrun: {differs} is ") and written.count("\n") == 1, ended
    assert not list(output.glob("*"))
