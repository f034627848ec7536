"""What benchmarks/accuracy.py promises: right problems, no work done twice, and honest tables."""

import contextlib
import json
import operator
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import demo
import standin
from grading import rules
from grading.dataset import load_problems
from grading.score import score, score_samples
from run.errors import UserError

sys.path.append(str(Path(standin.__file__).parent / "benchmarks"))

import accuracy
import accuracy_results
import multi_step

EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = <<(\d+)([-+*])(\d+)=(\d+)>>(\d+)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


# ---------------------------------------------------------------- the problems


def test_problems_are_right_distinct_and_reproducible() -> None:
    """Guards against a benchmark that teaches wrong sums, or tests on what it trained."""
    problems = multi_step.make_problems(2500, seed=0)
    assert len({problem["question"] for problem in problems}) == len(problems) == 2500
    assert problems[:50] == multi_step.make_problems(50, seed=0)
    assert problems[:50] != multi_step.make_problems(50, seed=1)
    counts = Counter()
    for problem in problems:
        assert "{" not in problem["question"] + problem["answer"]
        known = set(re.findall(r"\d+", problem["question"]))
        steps = EQUATION.findall(problem["answer"])
        counts[len(steps)] += 1
        assert problem["answer"].count("<<") == len(steps)
        for left, sign, right, *again, result, shown in steps:
            assert [left, sign, right] == again and {left, right} <= known
            assert OPERATORS[sign](int(left), int(right)) == int(result) == int(shown)
            assert 0 < int(result) <= multi_step.LARGEST
            known.add(result)
        assert rules.gold_answer(problem["answer"]) == steps[-1][-1]
    assert set(counts) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("kind", multi_step.KINDS, ids=lambda kind: kind.question[:30])
def test_solutions_of_a_kind_agree_and_differ(kind: multi_step.Kind) -> None:
    """Guards against a solution that is wrong, needs nothing, or is another one in other words."""
    rng, lists = random.Random(0), set()
    for _ in range(50):
        given = multi_step.draw_given(kind, rng)
        results = {multi_step.solve(solution, given)["r"] for solution in kind.solutions}
        assert len(results) == 1
    assert len(kind.solutions) >= 3
    calculated = [[step[0] for step in solution.split()] for solution in kind.solutions]
    for solution, letters in zip(kind.solutions, calculated, strict=True):
        used = {letter for step in solution.split() for letter in step[2::2]}
        assert letters[-1] == "r" and used == {*kind.given, *letters} - {"r"}
        lists.add(tuple(step[2:] for step in solution.split()))
    assert len(lists) == len(kind.solutions)
    assert {letter for letters in calculated for letter in letters} == set(kind.sentences)


def test_every_solution_is_written_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against answers that all follow one solution, of which samples find no others."""
    written, write = Counter(), multi_step.write_answer

    def record(kind: multi_step.Kind, solution: str, *rest: Any) -> str:
        written[kind.question, solution] += 1
        return write(kind, solution, *rest)

    monkeypatch.setattr(multi_step, "write_answer", record)
    multi_step.make_problems(2000, seed=0)
    for kind in multi_step.KINDS:
        counts = [written[kind.question, solution] for solution in kind.solutions]
        assert min(counts) > 0.6 * sum(counts) / len(counts)


# ---------------------------------------------------------------- the tables


def completions(right: set[int], total: int = 20) -> list[dict[str, Any]]:
    return [
        {"id": number, "gold": "7", "completion": f"#### {7 if number in right else 8}"}
        for number in range(total)
    ]


def write_result(output: Path, seed: int, method: accuracy_results.Method, right: set[int]) -> None:
    """What the scripts leave in a run's folder, of a run that takes 100 seconds in two parts."""
    run_folder = output / f"seed-{seed}" / method.name
    results = run_folder / "eval" / "test"
    results.mkdir(parents=True)
    (run_folder / "finished.json").write_text(json.dumps({"step": 12}))
    write_scores(results, right)
    data = accuracy_results.data_of(output, method, seed)
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("{}\n" * (30 + method.k))
    if method.k:
        made = {"total": {"drawn": 120, "right": 30 + seed}, "lists_per_problem": 1.25}
        (data / "augment.json").write_text(json.dumps(made))
    with (output / "seconds.jsonl").open("a") as file:
        for seconds in (40, 60):
            line = {"result": f"seed-{seed}/{method.name}", "seconds": seconds}
            file.write(json.dumps(line) + "\n")


def write_scores(results: Path, right: set[int]) -> None:
    rows = completions(right)
    samples = [row | {"sample": number} for row in rows for number in range(2)]
    scores = score(rows, len(rows), "made up")
    scores["samples"] = score_samples(samples, len(rows), 2, "made up")
    (results / "scores.json").write_text(json.dumps(scores))
    (results / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_pair_runs_by_seed_and_show_losses(tmp_path: Path) -> None:
    """Guards against a gain that is another seed's, and a loss that is not shown as one."""
    ladder = [accuracy_results.Method("plain", 1), accuracy_results.Method("rft-4", 1, 4)]
    (tmp_path / "before").mkdir()
    write_scores(tmp_path / "before", set())
    plain, method = ({0: range(10), 1: range(14)}, {0: range(16), 1: range(4, 10)})
    for seed in (0, 1):
        write_result(tmp_path, seed, ladder[0], set(plain[seed]))
        write_result(tmp_path, seed, ladder[1], set(method[seed]))
    write_result(tmp_path, 2, ladder[0], set())  # this seed is not finished

    runs, _, means = accuracy_results.report(tmp_path, ladder, [0, 1, 2]).partition("\n\n")
    lines = [cells(line) for line in runs.splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        ["before", "-"], ["plain", "0"], ["rft-4", "0"], ["plain", "1"], ["rft-4", "1"],
    ]  # fmt: skip
    assert lines[1][2:7] == ["30", "12", "50.0 (29.9 to 70.1)", "-", "-"]
    # Won 6 and lost none: p = 2 / 2^6. Lost 8 and won none: p = 2 / 2^8.
    assert lines[2][2:] == [
        "34", "12", "80.0 (58.4 to 91.9)", "+30.0", "6, 0", "0.031", "80.0", "80.0",
    ]  # fmt: skip
    assert lines[4][4:8] == ["30.0 (14.5 to 51.9)", "-40.0", "0, 8", "0.0078"]

    means, samples = means.split("\n\n")
    assert samples.splitlines()[0] == (
        "4 samples of each train row: 25.0%, 25.8% right, 1.25, 1.25 lists a problem"
    )
    lines = [cells(line) for line in means.splitlines()[2:]]
    assert lines[0] == ["plain", "60.0", "-", "-", "-", "60.0", "60.0", "100"]
    assert lines[1] == [
        "rft-4", "55.0", "-5.0", "-40.0 to +30.0", "1 better, 1 worse of 2", "55.0", "55.0", "100",
    ]  # fmt: skip


# ---------------------------------------------------------------- the work


@pytest.mark.parametrize(("mft", "rft", "longest"), [(80, 91, "10"), (121, 91, "13")])
def test_work_is_done_once_in_the_order_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mft: int, rft: int, longest: str
) -> None:
    """Guards against a run that starts anew after a stop, or trains on rows not yet made."""
    commands: list[tuple[str, ...]] = []

    def run(self: accuracy.Work, result: Path, script: str, *flags: str) -> None:
        commands.append((script, *flags))
        result.mkdir(parents=True, exist_ok=True)
        if script == "train.py":
            steps = {"plain": 40, "mft": mft, "rft-8": rft}.get(result.name, 1)
            (result / "finished.json").write_text(json.dumps({"step": steps}))
        elif script == "evaluate.py":
            write_scores(result, set(range(5)))
            if "train" in flags:
                count = {"num_samples": int(flag(flags, "--samples"))}
                (result / "scores.json").write_text(json.dumps(count))
        else:
            (result / "train.jsonl").write_text("{}\n")
            made = {"total": {"drawn": 2, "right": 1}, "lists_per_problem": 1}
            (result / "augment.json").write_text(json.dumps(made))
        raise UserError("stopped after each command")

    monkeypatch.setattr(accuracy.Work, "run", run)
    data = tmp_path / "data"
    accuracy.write_data(data, *[multi_step.make_problems(40, seed) for seed in (0, 1)])
    flags = ["--model", "m", "--dataset", str(data), "--rows", "30", "--k", "8", "2"]
    flags += ["--seeds", "3", "--epochs", "4", "--output", str(tmp_path / "out")]
    for _ in range(20):
        with contextlib.suppress(UserError):
            accuracy.main(flags)
    made = [f"{script} {flag(words, '--run_name')}" for script, *words in commands]
    assert made == [
        "evaluate.py -",
        "train.py plain", "evaluate.py -",
        "train.py mft", "evaluate.py -",
        "evaluate.py -", "augment.py -", "train.py rft-2", "evaluate.py -",
        "evaluate.py -", "augment.py -", "train.py rft-8", "evaluate.py -",
        "train.py mft-rft-8", "evaluate.py -",
        "train.py plain-long", "evaluate.py -",
    ]  # fmt: skip
    by_name = {flag(words, "--run_name"): words for script, *words in commands}
    epochs = {name: flag(words, "--epochs") for name, words in by_name.items()}
    assert (
        epochs["plain"] == epochs["rft-2"] == "4" and epochs["mft"] == epochs["mft-rft-8"] == "12"
    )
    assert epochs["plain-long"] == longest  # of 10 steps each
    assert flag(commands[0], "--max_new_tokens") == "512"  # as after training
    rates = {name: flag(words, "--mask_rate") for name, words in by_name.items()}
    assert [name for name, rate in rates.items() if rate != "-"] == ["mft", "mft-rft-8"]
    for name, words in by_name.items():
        k = re.search(r"rft-(\d)$", name)
        rows = f"seed-3/data-{k[1]}" if k else "data"
        assert name == "-" or flag(words, "--dataset") == str(tmp_path / "out" / rows)
    sampling = [words for _, *words in commands if flag(words, "--split") == "train"]
    assert [flag(words, "--samples") for words in sampling] == ["2", "8"]
    with pytest.raises(UserError, match="was made with another --epochs"):
        accuracy.main([*flags[:-4], "--epochs", "5", *flags[-2:]])


def flag(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1] if name in words else "-"


def test_without_a_model_it_makes_one_and_its_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a default that nothing has tried."""
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(accuracy.Work, "run", lambda self, *words: commands.append(words[1:]))
    for module, name, count in (
        (demo, "NUM_TRAIN", 600), (demo, "NUM_TEST", 20), (accuracy, "TEST_ROWS", 40),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, count)
    output = tmp_path / "out"
    arguments = accuracy.read_arguments(["--rows", "60", "--output", str(output)])
    output.mkdir()
    accuracy.Work(arguments).prepare()
    train, evaluate = commands
    for words, name, folder in (
        (train, "--config", accuracy.ROOT / "demo.yaml"),
        (train, "--model", output / "start" / "model"),
        (train, "--dataset", output / "start" / "data"),
        (evaluate, "--ckpt", output / "base" / "best"),
        (evaluate, "--dataset", output / "data"),
    ):
        assert flag(words, name) == str(folder)
    assert (output / "start" / "model" / "model.safetensors").is_file()
    rows = {split: load_problems(str(output / "data"), split) for split in ("train", "test")}
    assert [len(rows[split]) for split in ("train", "test")] == [60, 40]
    assert not {row.question for row in rows["train"]} & {row.question for row in rows["test"]}
