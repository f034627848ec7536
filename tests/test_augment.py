"""Samples of the train rows become more train rows, and nothing else of the data set changes."""

import json
import os
import random
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Killed,
    flags,
    kill,
    make_config,
    real_folder,
    run_folder,
    seal,
    step_that,
    tree,
)
from safetensors.torch import load_file, save_file

import augment
import data
import evaluate
import perplexity
import train
from engine.decoding import Completion
from engine.loading import load_tokenizer
from grading.dataset import Problem, load_problems
from grading.next_steps import next_steps
from grading.rules import gold_answer
from grading.samples import read_samples
from grading.selection import (
    STAGES,
    Sample,
    equation_list,
    is_well_annotated,
    judge,
    select,
)
from run import training_json
from run.config import Config

ROW = Problem(
    "How many clips?",
    "She sold 48/2 = <<48/2=24>>24 clips in May.\nAll in all <<48+24=72>>72 clips.\n#### 72",
)
TRUE = "May: <<48/2=24>>24.\nAll: <<24+48=72>>72.\n#### 72"

# ---------------------------------------------------------------- which samples are kept


@pytest.mark.parametrize(
    ("completion", "stage"),
    [
        (TRUE, "true"),
        (" " + TRUE, "true"),
        (TRUE + "\n\nQuestion: What is 1 + 1 = 3?\n#### 5", "true"),  # cut off
        (TRUE + "% \x1b[31m\ud800", "true"),
        ("It is 48/2 = 24, and 24 + 48 = 72.\n#### 72", "true"),  # without annotations
        ("May: <<48/2=24>>24.\nAll: <<24+48=72>>72.\n#### 71", "drawn"),
        ("May: <<48/2=24>>24.\nAll: <<24+48=72>>72.\n#### 72.0", "drawn"),
        ("May: <<48/2=24>>24.\nAll: <<24+48=72>>72.\nThe answer is 72", "drawn"),
        ("", "drawn"),
        ("\x1b]0;title\x07", "drawn"),
        ("#### 72", "right"),
        ("\n\n#### 72", "right"),
        ("It is <<24+48=72>>72. #### 72", "right"),
        ("####\n<<24+48=72>>72\n#### 72", "right"),
        ("#<<24+48=72>>\n##### 72", "right"),
        ("It is <<24+48=72>>72.\n\nQuestion: And <<24+48=72>>?\n#### 72", "right"),
        ("It is <<24+48=72>>72.</s>\nIt is 72.\n#### 72", "right"),
        ("\x1b[2J<<24+48=72>>72\n#### 72", "right"),
        ("So\r<<24+48=72>>72\n#### 72", "right"),
        *(
            (f"So{letter} <<24+48=72>>72\n#### 72", "right")
            for letter in "\0\x08\x0b\x1f\x7f\x9f\ud800\udfff\ufffd"
        ),
        ("So\t<<24+48=72>>72\n#### 72", "true"),
        ("All in all 72 clips.\n#### 72", "well_formed"),
        ("48/2 and 24 + 48 give it.\n#### 72", "well_formed"),
        ("<<48/2=25>>24.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("<<48/2=24>>25.\nAll: 48/2 = <<24+48=72>>72.\n#### 72", "with_equations"),
        ("48/2 = 25.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("<<x=24>>24.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("<<=>><<24+48=72>>72.\n#### 72", "with_equations"),
        ("<<1/0=72>>72.\n#### 72", "with_equations"),
        ("It is 24 + 48 = 72, 24 + 48 = 71.\n#### 72", "with_equations"),
        ("May: <<48*2>>24.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("May: <<48/2=24.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("May: <<48/2=24>>25.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("All: <<24+48=72>>$71.\n#### 72", "with_equations"),
        ("May: <<48/2=24>>24.0 clips.\nAll: <<24+48=72>>$72.\n#### 72", "true"),
        ("A part: <<18/24=3/4>>3/4. All: <<24+48=72>>72 in 24 days.\n#### 72", "true"),
    ],
)
def test_how_far_a_sample_gets(completion: str, stage: str) -> None:
    found, answer = judge(completion, "72")
    assert found == stage
    assert bool(answer) == (stage not in ("drawn", "right"))
    if answer:
        assert gold_answer(answer) == "72" and answer.endswith("\n#### 72")
        assert answer == answer.strip()
        answer.encode()


def test_the_answers_of_gsm8k_are_well_annotated() -> None:
    """Guards against right samples that are left out for a notation that the data set has."""
    rows = load_problems(str(real_folder("GSM8K_DIR")), "train")
    assert [row.line for row in rows if not is_well_annotated(row.answer)] == []


@pytest.mark.parametrize(("written", "gold"), [("1450000", "1,450,000"), ("-1,0", "-10")])
def test_a_number_is_spelt_like_the_rows_own(written: str, gold: str) -> None:
    """Guards against a gold answer that another sample, or the row, spells in another way."""
    _, answer = judge(f"So <<2-1=1>>1.\n#### {written}", gold)
    assert gold_answer(answer) == gold


def kept(*completions: str) -> list[str]:
    samples = {ROW.question: [Sample(0, completion) for completion in completions]}
    return [problem.answer for problem in select([ROW], samples).added]


def test_one_sample_of_each_new_list_is_kept_the_first() -> None:
    other_words = TRUE.replace("May", "In May").replace("48/2=24", " 48\t/ 2 = 24 ")
    other_order = "<<24+48=72>>72 since <<48/2=24>>24.\n#### 72"
    other_form = TRUE.replace("48/2=24", "48*0.5=24")
    assert kept(TRUE, other_words) == [TRUE]
    assert kept(other_words, TRUE) == [other_words]
    assert kept(TRUE, other_order, other_form) == [TRUE, other_order, other_form]
    assert kept(ROW.answer, ROW.answer.replace("She", "He")) == []  # the row's own list
    assert kept(ROW.answer.replace("48+24=72", "24+48=72")) != []  # another order of operands
    assert equation_list(ROW.answer) == ("48/2=24", "48+24=72")


def test_all_rows_of_a_question_count_and_no_other_question() -> None:
    """Guards against a second round that adds what the first round has added."""
    twin = Problem("Another question?", ROW.answer)
    samples = {ROW.question: [Sample(0, TRUE)], twin.question: [Sample(1, TRUE)]}
    selection = select([ROW, twin, Problem(ROW.question, TRUE)], samples)
    assert selection.added == [Problem(twin.question, TRUE)]
    assert selection.kept == {ROW.question: 0, twin.question: 1}
    assert selection.counts[0]["distinct"] == 1 and selection.counts[0]["kept"] == 0
    assert selection.counts[1]["kept"] == 1 and selection.num_lists == 4


def test_a_million_characters_take_no_time() -> None:
    """Guards against a pattern whose time grows with the square of a text."""
    hostile = ["<<" * 500_000, "<<1+1=" * 160_000, "1+" * 500_000, "= 1 " * 250_000, " " * 10**6]
    for text in [*hostile, "#" * 10**6, "#### " * 200_000, "9" * 10**6]:
        judge(f"{text}\n#### 72", "72")
        judge(text, "72")


# ---------------------------------------------------------------- the data set that is written


def new_lists(problem: Problem) -> list[str]:
    """Samples of a problem: its own solution, two of a new list, one of another, and a wrong one.

    Two of the five are kept.
    """
    gold = problem.gold.replace(",", "")
    return [
        problem.answer,
        f"It is {gold}*1 = <<{gold}*1={gold}>>{gold}.\n#### {gold}",
        f"One finds <<{gold}*1={gold}>>{gold}.\n#### {gold} of them",
        f"Or <<0+{gold}={gold}>>{gold}.\n#### {gold}",
        f"It is <<{gold}*1={gold}>>{gold}.\n#### 9{gold}",
    ]


def write_samples(
    folder: Path,
    problems: Sequence[Problem],
    complete: Callable[[Problem], list[str]] = new_lists,
    **identity: Any,
) -> Path:
    """Write what `evaluate.py --split train --samples K` writes, in any order of the lines."""
    rows = [
        {"id": number, "sample": sample, "question": problem.question, "gold": problem.gold}
        | {"completion": completion}
        for number, problem in enumerate(problems)
        for sample, completion in enumerate(complete(problem))
    ]
    random.Random(len(str(folder))).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {
        "checkpoint": "~/best",
        "weights": "5eed",
        "split": "train",
        "temperature": 0.7,
        "seed": 0,
        "num_problems": len(problems),
        "num_samples": len(complete(problems[0])),
    }
    (folder / "evaluation.json").write_text(json.dumps(known | identity))
    return file


@pytest.fixture
def rows_of(data_folder: Path) -> dict[str, list[Problem]]:
    """The rows of each split of the data set that the tests use."""
    names = ("train", "validation", "test")
    return {name: data.load_split(str(data_folder), name, 17, 0)[0] for name in names}


@pytest.fixture
def file(data_folder: Path, rows_of: dict[str, list[Problem]], tmp_path: Path) -> Path:
    about = {"dataset": str(data_folder), "validation_size": 17, "seed": 0}
    return write_samples(tmp_path / "run" / "samples", rows_of["train"], **about)


def test_an_augmented_folder(
    call, file: Path, data_folder: Path, rows_of: dict[str, list[Problem]], tmp_path: Path
) -> None:
    """Guards against a row of the original that is lost, and other validation or test rows."""
    data_folder = Path(shutil.copytree(data_folder, tmp_path / "old"))
    tests = (data_folder / "test.jsonl").read_text().replace('{"question"', '{"more":1, "question"')
    (data_folder / "test.jsonl").write_text(tests)
    recorded(file, dataset=str(data_folder))
    output = tmp_path / "new" / "data"
    outcome = call(augment, "--samples", str(file), "--output", str(output))
    assert outcome.code == 0, outcome.err
    before, after = (load_problems(str(folder), "train") for folder in (data_folder, output))
    assert after[: len(before)] == before and len(after) == len(before) + 2 * 26
    assert (output / "test.jsonl").read_bytes() == (data_folder / "test.jsonl").read_bytes()
    for seed, size in ((0, 17), (0, 5)):
        split = "validation", size, seed
        assert data.load_split(str(output), *split) == data.load_split(str(data_folder), *split)
    assert data.load_split(str(output), "validation", 17, 0)[0] == rows_of["validation"]
    golds = {problem.question: problem.gold for problem in rows_of["train"]}
    assert all(row.gold == golds[row.question] for row in after[len(before) :])

    about = json.loads((output / "augment.json").read_text())
    reached = list(about["total"].values())
    assert tuple(about["total"]) == STAGES and sorted(reached, reverse=True) == reached
    own = [judge(row.answer, row.gold)[0] for row in rows_of["train"]]
    assert own.count("right") == 1  # which contains </s>
    assert reached[:3] == [130, 104, 103] and reached[-1] == 52
    assert reached[3:6] == [
        78 + 25 - own.count("well_formed"),
        78 + own.count("true"),
        52 + own.count("true"),
    ]
    trained = data.load_for_training(str(output), 17, 0).sha256
    assert about["data"].items() >= trained.items()
    assert about["rows"] == {"original": len(before), "added": 52}
    assert about["problems_by_kept"] == {"2": 26} and about["num_sampled"] == 26
    (source,) = about["samples"]
    assert source["temperature"] == 0.7 and source["checkpoint"] == "~/best"
    assert source["weights"] == "5eed" and source["seed"] == 0
    assert source.items() >= about["total"].items()
    for shown in ("0.7: 52 of 130 kept", "95   43 original, 52 new", "by kept samples 2: 26"):
        assert shown in outcome.out


def test_the_same_command_gives_the_same_bytes(
    call, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an order that hangs on hashes, clocks, or which sample was finished first."""
    arguments = ["--samples", str(file), "--output"]
    for name in "ab":
        assert call(augment, *arguments, str(tmp_path / name)).code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    outcome = call(augment, *arguments, str(tmp_path / "a"))
    assert outcome.code == 0 and "unchanged" in outcome.out
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(sorted(lines)))
    assert call(augment, *arguments, str(tmp_path / "c")).code == 0
    train_rows = {(tmp_path / name / "train.jsonl").read_bytes() for name in "abc"}
    assert len(train_rows) == 1


def test_several_files_are_merged_in_their_order(
    call, file: Path, rows_of: dict[str, list[Problem]], tmp_path: Path
) -> None:
    """And another temperature is said. What another program has sampled needs no records."""
    other = write_samples(
        tmp_path / "other",
        rows_of["train"],
        lambda row: [new_lists(row)[2], f"So <<{row.gold}-0={row.gold}>>!\n#### {row.gold}"],
        temperature=1.0,
    )
    foreign = tmp_path / "foreign.jsonl"
    line = {"id": 7, "question": rows_of["train"][0].question, "gold": rows_of["train"][0].gold}
    foreign.write_text(json.dumps(line | {"completion": "<<2*9=18>>\n#### " + line["gold"]}))
    foreign.write_text(foreign.read_text() + "\n")
    names = [str(other), str(file), str(foreign)]
    output = tmp_path / "out"
    outcome = call(augment, "--samples", *names, "--output", str(output))
    assert outcome.code == 0, outcome.err
    assert "temperature 0.7: 26 of 130" in outcome.out and "1 of 1 kept" in outcome.out
    assert "the files differ in their temperature" in outcome.out
    about = json.loads((output / "augment.json").read_text())
    assert [source["temperature"] for source in about["samples"]] == [1.0, 0.7, None]
    new = [row.answer for row in load_problems(str(output), "train")[43:]]
    assert sum("One finds" in answer for answer in new) == 26  # the first, of the file named first
    assert not any("It is" in answer for answer in new)
    assert new[3].startswith("<<2*9=18>>")


def test_a_second_round_adds_only_what_is_new(call, file: Path, tmp_path: Path) -> None:
    """The augmented folder is a data set like any other, whose rows' lists are known."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert call(augment, "--samples", str(file), "--output", str(first)).code == 0
    arguments = ["--samples", str(file), "--dataset", str(first), "--output", str(second)]
    outcome = call(augment, *arguments)
    assert outcome.code == 0 and "nothing was added, so its rows are the original" in outcome.out
    assert "--temperature T --output DIR)" in outcome.out
    assert load_problems(str(second), "train") == load_problems(str(first), "train")
    hashes = [
        json.loads((folder / "augment.json").read_text())["data"] for folder in (first, second)
    ]
    assert hashes[1]["dataset_train_sha256"] == hashes[0]["train_sha256"]
    assert json.loads((second / "augment.json").read_text())["problems_by_kept"] == {"0": 26}


@pytest.mark.parametrize("before", ["", "It is so.\n"])
def test_samples_without_equations_are_no_reason_to_draw_more(
    call, data_folder: Path, rows_of: dict[str, list[Problem]], tmp_path: Path, before: str
) -> None:
    """Guards against days of sampling for a data set whose answers are numbers alone."""
    about = {"dataset": str(data_folder), "validation_size": 17, "seed": 0}
    written = write_samples(
        tmp_path / "samples", rows_of["train"], lambda row: [f"{before}#### {row.gold}"], **about
    )
    outcome = call(augment, "--samples", str(written), "--output", str(tmp_path / "out"))
    assert outcome.code == 0 and "of 26 right samples, none is a solution with an" in outcome.out
    assert "sample more" not in outcome.out


@pytest.mark.parametrize(
    ("name", "run_name"),
    [
        ("rft-8", "rft-8"),
        ("it's new; $HOME", "it-s-new-HOME"),
        (".七", "augmented"),
        ("x" * 129, "x" * 128),
    ],
)
def test_the_next_command_trains_a_run_of_its_own(
    call, file: Path, settings: dict[str, str], tmp_path: Path, name: str, run_name: str
) -> None:
    """Guards against the finished run's name, another model, and other rows to validate on."""
    config = tmp_path / "a config.yaml"
    written = settings | {"validation_size": "16", "seed": "1"}  # not those of the samples
    config.write_text("".join(f"{key}: {value}\n" for key, value in written.items()))
    output = tmp_path / name
    arguments = ["--samples", str(file), "--output", str(output), "--config", str(config)]
    outcome = call(augment, *arguments)
    assert outcome.code == 0, outcome.err
    words = shlex.split(outcome.out.rpartition("next: ")[2])
    assert words[1].endswith("train.py")
    planned, *others = train.read_arguments(words[2:])
    assert others == [False, None]
    expected = settings | {"dataset": str(output), "run_name": run_name}
    assert planned == make_config(expected)
    assert run_folder(expected) != run_folder(settings)


def test_other_formats_of_the_data_set(call, file: Path, data_folder: Path, tmp_path: Path) -> None:
    """Guards against test rows that are lost because they are no test.jsonl."""
    folder = tmp_path / "arrays"
    folder.mkdir()
    for split in ("train", "test"):
        lines = (data_folder / f"{split}.jsonl").read_bytes().splitlines()
        (folder / f"{split}.json").write_bytes(b"[" + b",".join(lines) + b"]")
    for name, dataset in (("a", data_folder), ("b", folder)):
        arguments = ["--samples", str(file), "--dataset", str(dataset)]
        assert call(augment, *arguments, "--output", str(tmp_path / name)).code == 0
    written = [(tmp_path / name / "train.jsonl").read_bytes() for name in "ab"]
    assert written[0] == written[1]
    tests = [load_problems(str(tmp_path / name), "test") for name in "ab"]
    assert tests[0] == tests[1] and len(tests[0]) == 12


# ---------------------------------------------------------------- bad input


def changed(file: Path, key: str, value: object, line: int = 2) -> Path:
    """Change a value in a line of ``file``."""
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    rows[line - 1] = {**rows[line - 1], key: value}
    if value is None:
        del rows[line - 1][key]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recorded(file: Path, **values: object) -> Path:
    about = file.with_name("evaluation.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | values))
    return file


def repeated(file: Path) -> Path:
    """With its second line in place of the first."""
    _, second, *others = file.read_text().splitlines(keepends=True)
    file.write_text("".join([second, second, *others]))
    return file


def overlapping(file: Path, rows: dict[str, list[Problem]]) -> Path:
    """With a data set whose train rows contain a test row."""
    folder = file.parents[1] / "overlapping"
    folder.mkdir()
    for split, more in (("train", rows["test"][:1]), ("test", [])):
        written = augment.as_jsonl([*rows[split], *more])
        (folder / f"{split}.jsonl").write_bytes(written)
    return recorded(file, dataset=str(folder))


def pipe(file: Path) -> Path:
    os.mkfifo(file.with_name("pipe"))
    return file.with_name("pipe")


BAD_FILES: list[tuple[Callable[[Path, dict[str, list[Problem]]], Path], str]] = [
    (lambda f, _: f.with_name("nowhere.jsonl"), "nowhere.jsonl: can't be read (No such file"),
    (lambda f, _: f.parent, "is not a file"),
    (lambda f, _: pipe(f), "is not a file"),
    (lambda f, _: (f.write_bytes(b""), f)[1], "is empty"),
    (lambda f, _: (os.truncate(f, f.stat().st_size - 9), f)[1], "line 130: is not a valid predict"),
    (lambda f, _: (f.write_bytes(b"{" * 10**6 + b"\n"), f)[1], "line 1: is not a valid prediction"),
    (lambda f, _: (f.write_bytes(b"\xff\xfe\n"), f)[1], "line 1: is not a valid prediction"),
    (lambda f, _: changed(f, "gold", None), "line 2: is not a valid prediction (KeyError: 'gold'"),
    (lambda f, _: changed(f, "gold", 5), "line 2: is not a valid prediction"),
    (lambda f, _: changed(f, "completion", None), "line 2: is not a valid prediction"),
    (lambda f, _: changed(f, "question", None), "line 2: has no question"),
    (lambda f, _: changed(f, "question", ["x"]), "line 2: has no question"),
    (lambda f, _: changed(f, "gold", "77123"), "line 2: the gold answer is '77123', but "),
    (
        lambda f, _: changed(f, "question", "What?\x1b[2J"),
        r"'What?\x1b[2J' is not a train question",
    ),
    (lambda f, _: changed(f, "question", "\ud800" * 10**6), "is not a train question of "),
    (lambda f, r: changed(f, "question", r["test"][0].question), "is a test question of "),
    (lambda f, r: changed(f, "question", r["validation"][3].question), "is a validation question "),
    (lambda f, _: recorded(f, split="test"), "contains samples of the test rows"),
    (lambda f, _: recorded(f, split="validation"), "of the validation rows"),
    (
        lambda f, _: (
            recorded(f, split="test").with_name("evaluation.json").rename(f.parent / "scores.json"),
            f,
        )[1],
        "of the test rows",
    ),
    (
        lambda f, _: recorded(f, num_samples=6),
        "contains 130 different samples in 130 lines, but 156",
    ),
    (lambda f, _: (f.write_bytes(f.read_bytes() * 2), f)[1], "130 different samples in 260 lines"),
    (lambda f, _: repeated(f), "129 different samples in 130 lines"),
    (lambda f, _: recorded(f, num_samples="x"), "evaluation.json: is damaged"),
    (lambda f, _: recorded(f, temperature=[1]), "its temperature is '[1]', not a number"),
    (lambda f, _: recorded(f, validation_size="many"), "validation_size: 'many' must be"),
    (lambda f, _: recorded(f, validation_size=200), "validation_size 200 leaves nothing"),
    (lambda f, _: recorded(f, validation_size=30), "is a validation question of "),
    (lambda f, _: recorded(f, dataset="./nowhere"), "dataset './nowhere' is neither"),
    (overlapping, "train and test share 1 question, such as"),
    (lambda f, _: (f.with_name("evaluation.json").write_text("[]"), f)[1], "json: is damaged"),
]


@pytest.mark.parametrize(("spoil", "fragment"), BAD_FILES)
def test_bad_samples_are_one_line_and_nothing_is_written(
    call,
    file: Path,
    rows_of: dict[str, list[Problem]],
    tmp_path: Path,
    spoil: Callable[[Path, dict[str, list[Problem]]], Path],
    fragment: str,
) -> None:
    bad = spoil(file, rows_of)
    before = {path for path in tmp_path.rglob("*")}
    outcome = call(augment, "--samples", str(bad), "--output", str(tmp_path / "out"))
    outcome.assert_user_error(fragment)
    assert len(outcome.err) < 700 and outcome.err[:-1].isprintable()
    assert {path for path in tmp_path.rglob("*")} == before


def test_the_same_draws_twice_are_refused(call, file: Path, tmp_path: Path) -> None:
    """Guards against counts that hold a sample twice, as more samples than were drawn."""
    copy = Path(shutil.copy(file, tmp_path / "copy.jsonl"))
    more = Path(shutil.copytree(file.parent, tmp_path / "more")) / file.name
    changed(more, "completion", "")  # such as with fewer samples
    for names in ([file, file], [file, copy], [file, more]):
        arguments = ["--samples", *map(str, names), "--output", str(tmp_path / "out")]
        call(augment, *arguments).assert_user_error(str(names[1]), "same draws", str(names[0]))
    drawn_by = ("weights", "tokenizer", "prompt", "dtype", "seed", "with_calculator")
    about = more.with_name("evaluation.json").read_text()
    for key in drawn_by:
        recorded(more, **{key: 5})
        assert len(read_samples([file, more])) == 2
        more.with_name("evaluation.json").write_text(about)
    recorded(more, temperature=1.0)
    arguments = ["--samples", str(file), str(more), "--output", str(tmp_path / "out")]
    assert call(augment, *arguments).code == 0


def test_a_gold_may_lack_its_commas(call, file: Path, tmp_path: Path) -> None:
    """As other programs write it, and as every rule reads it."""
    text = file.read_text()
    assert '"gold": "1,450,000"' in text
    file.write_text(text.replace('"gold": "1,450,000"', '"gold": "1450000"'))
    assert call(augment, "--samples", str(file), "--output", str(tmp_path / "out")).code == 0


@pytest.mark.parametrize(
    "kind", ["file", "link", "dangling", "other", "more", "less", "changed", "the data set"]
)
def test_nothing_that_is_there_is_written_over(
    call, file: Path, data_folder: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "out"
    arguments = ["--samples", str(file), "--output", str(output)]
    if kind in ("more", "changed"):
        assert call(augment, *arguments).code == 0
        (output / ("notes.txt" if kind == "more" else "test.jsonl")).write_text("mine")
    elif kind == "less":
        assert call(augment, *arguments).code == 0
        (output / "augment.json").unlink()
    elif kind == "file":
        output.write_text("mine")
    elif kind in ("link", "dangling"):
        if kind == "link":
            (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / "elsewhere")
    elif kind == "other":
        output.mkdir()
        (output / "train.jsonl").mkdir()
    else:
        arguments[-1] = str(data_folder)
    before = tree(tmp_path), tree(data_folder)
    call(augment, *arguments).assert_user_error(arguments[-1], "--output")
    assert (tree(tmp_path), tree(data_folder)) == before
    assert kind not in ("link", "dangling") or output.is_symlink()


def test_an_empty_folder_is_filled_and_a_full_disk_leaves_none(
    call, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against half a data set, on which a run would train without a word."""
    output = tmp_path / "out"
    arguments = ["--samples", str(file), "--output", str(output)]
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "augment.json":
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        call(augment, *arguments).assert_user_error("augment.json", "No space left", "make room")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    output.mkdir()
    assert call(augment, *arguments).code == 0
    assert {path.name for path in output.iterdir()} == {"train.jsonl", "test.jsonl", "augment.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


@pytest.mark.parametrize(
    ("below", "fragment"),
    [("train.jsonl/x", "train.jsonl is not a folder"), ("train.jsonl/x/y", "is not a folder")],
)
def test_a_folder_that_cannot_be_made_is_one_line(
    call, file: Path, data_folder: Path, below: str, fragment: str
) -> None:
    output = str(data_folder / below)
    outcome = call(augment, "--samples", str(file), "--output", output)
    outcome.assert_user_error(f"{output}: ", fragment, "--output")


def test_no_folder_can_be_made_where_the_system_makes_none(
    call, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /proc, where the error is one of those that are otherwise this program's own."""

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    output = str(tmp_path / "out")
    outcome = call(augment, "--samples", str(file), "--output", output)
    outcome.assert_user_error(f"{output}: can't be made (No such file", "choose another --output")


def test_the_longest_name_is_written(call, file: Path, tmp_path: Path) -> None:
    """Guards against a hidden folder with a longer name than the one that was typed."""
    output = tmp_path / ("x" * 255)
    assert call(augment, "--samples", str(file), "--output", str(output)).code == 0
    assert (output / "augment.json").exists()


def test_flags_override_what_is_recorded(call, file: Path, tmp_path: Path) -> None:
    """And rows that would be validated on with the flags are not trained on."""
    arguments = ["--samples", str(file), "--output", str(tmp_path / "out")]
    outcome = call(augment, *arguments, "--validation_size", "30")
    outcome.assert_user_error("is a validation question of")
    outcome = call(augment, *arguments, "--seed", "1")
    outcome.assert_user_error("is a validation question of")
    assert call(augment, *arguments, "--validation_size", "5").code == 0
    about = json.loads((tmp_path / "out" / "augment.json").read_text())
    assert about["validation_size"] == 5 and about["num_problems"] == 38
    assert about["problems_by_kept"] == {"0": 12, "2": 26} and about["num_sampled"] == 26
    assert about["lists_per_problem"] == (38 + 52) / 38  # of the rows, and of what was kept


def test_one_process_is_enough(
    call, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "is_one_of_several", lambda: True)
    outcome = call(augment, "--samples", str(file), "--output", str(tmp_path / "out"))
    outcome.assert_user_error("works in one process")


# ---------------------------------------------------------------- samples of the train rows


def lines_of(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    return sorted(rows, key=lambda row: (row["id"], row["sample"]))


@pytest.fixture
def base(settings: dict[str, str]) -> list[str]:
    """Arguments of `evaluate.py` that sample the train rows by the base model."""
    return ["--ckpt", settings["model"], *flags(settings), "--split", "train", "--samples"]


def test_only_the_rows_to_train_on_are_sampled_and_more_samples_go_on(
    call, base: list[str], rows_of: dict[str, list[Problem]], tmp_path: Path
) -> None:
    """Guards against validation rows, a greedy pass, and a second run that repeats the first."""
    output = tmp_path / "out"
    outcome = call(evaluate, *base, "1", "--output", str(output))
    assert outcome.code == 0, outcome.err
    assert [path.name for path in output.iterdir()] == ["samples"]
    first = lines_of(output / "samples")
    assert [row["question"] for row in first] == [row.question for row in rows_of["train"]]
    assert [row["gold"] for row in first] == [row.gold for row in rows_of["train"]]
    tokens = sum(row["num_tokens"] for row in first)
    scores = json.loads((output / "samples" / "scores.json").read_text())
    assert scores["num_tokens"] == tokens and f"tokens of all samples{tokens:>11,}" in outcome.out
    assert f"{scores['seconds']:,.1f} s at {scores['tokens_per_second']:,.1f} tok" in outcome.out

    outcome = call(evaluate, *base, "2", "--output", str(output))
    assert "resuming: 26 of 52 samples" in outcome.out
    both = lines_of(output / "samples")
    assert [row for row in both if row["sample"] == 0] == first
    second = [row["completion"] for row in both if row["sample"] == 1]
    pairs = zip(second, (row["completion"] for row in first), strict=True)
    assert sum(one != other for one, other in pairs) > 13


def test_another_model_draws_other_random_numbers(
    call, base: list[str], settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against samples of similar models that are worth no more than those of one."""
    twin = tmp_path / "twin"
    shutil.copytree(settings["model"], twin)
    weights = load_file(twin / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name][0] *= 1 + 1e-6
    save_file(weights, twin / "model.safetensors", {"format": "pt"})
    found = []
    for name, model in {"one": settings["model"], "two": str(twin)}.items():
        arguments = ["--ckpt", model, *base[2:], "1", "--limit", "20"]
        assert call(evaluate, *arguments, "--output", str(tmp_path / name)).code == 0
        found.append([row["completion"] for row in lines_of(tmp_path / name / "samples")])
    assert sum(one != other for one, other in zip(*found, strict=True)) > 15


def test_another_temperature_draws_other_random_numbers(
    call, base: list[str], tmp_path: Path
) -> None:
    """Guards against samples at two temperatures that are hardly worth more than those at one."""
    found = []
    for temperature in ("0.7", "0.700001"):
        arguments = [*base, "1", "--limit", "20", "--temperature", temperature]
        assert call(evaluate, *arguments, "--output", str(tmp_path / temperature)).code == 0
        found.append([row["completion"] for row in lines_of(tmp_path / temperature / "samples")])
    assert sum(one != other for one, other in zip(*found, strict=True)) > 15


def test_samples_of_train_go_on_after_a_kill(call, base: list[str], tmp_path: Path) -> None:
    for name in "ab":
        assert call(evaluate, *base, "2", "--output", str(tmp_path / name)).code == 0
        file = tmp_path / name / "samples" / "predictions.jsonl"
        file.write_bytes(file.read_bytes()[:-999])
        outcome = call(augment, "--samples", str(file), "--output", str(tmp_path / "new"))
        outcome.assert_user_error("line 4", "evaluate")
        os.truncate(file, file.read_bytes().rindex(b"\n") + 1)
        outcome = call(augment, "--samples", str(file), "--output", str(tmp_path / "new"))
        outcome.assert_user_error("but 52 were asked for", "it resumes where it stopped")
    assert call(evaluate, *base, "2", "--output", str(tmp_path / "a")).code == 0
    assert len(lines_of(tmp_path / "a" / "samples")) == 52
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--samples", "2", "--seed", "1"], "--seed 1: would take rows that"),
        (["--samples", "2", "--validation_size", "5"], "--validation_size 5: would take rows"),
        (["--seed", "1"], "--seed 1: would take rows that"),
        (["--samples", "2", "--verify-batching", "1"], "--split train with --samples decodes only"),
    ],
)
def test_what_would_sample_validation_rows_is_refused(
    call, stopped: Path, arguments: list[str], fragment: str
) -> None:
    arguments = ["--ckpt", str(stopped / "best"), "--split", "train", *arguments]
    call(evaluate, *arguments).assert_user_error(fragment)
    assert not (stopped / "eval").exists()


def test_other_rows_than_the_run_was_trained_on_are_noticed(
    call, stopped: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against the hash of the train split, which includes the validation rows."""
    shutil.copytree(settings["dataset"], tmp_path / "data")
    description = stopped / "best" / "training.json"
    description.write_text(
        description.read_text().replace(settings["dataset"], str(tmp_path / "data"))
    )
    seal(stopped / "best")
    train_file = tmp_path / "data" / "train.jsonl"
    train_file.write_text("".join(train_file.read_text().splitlines(keepends=True)[:-1]))
    arguments = ["--ckpt", str(stopped / "best"), "--split", "train"]
    for script in (evaluate, perplexity):
        outcome = call(script, *arguments)
        outcome.assert_user_error("the train rows of dataset", "are not the ones")


def knowing(problems: Sequence[Problem]) -> Callable[..., Iterator[Completion]]:
    """`engine.strategy.decode` by a model that knows several solutions of all ``problems``."""
    by_question = {problem.question: problem for problem in problems}

    def decode(model: Any, prompts: Any, how: Any, names: Sequence[str], **_: Any) -> Any:
        tokenizer = load_tokenizer(Path(model.pretrained.config.name_or_path))
        for index, name in enumerate(names):
            sample, _, question = name.partition("/")
            text = new_lists(by_question[question])[int(sample)]
            yield Completion(index, len(prompts[index]), tokenizer.ids_of([text])[0], "eos")

    return decode


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("runs/a/eval/train", "rft-a-16"),
        ("it's 0.7", "rft-it's 0.7-16"),
        (".", "rft-here-16"),
        ("-odd", "rft--odd-16"),
    ],
)
def test_the_command_after_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, name: str
) -> None:
    """Guards against a folder that an earlier augmentation has filled, and lost settings."""
    here = tmp_path / "here"
    write_samples(here / output / "samples", [ROW], num_samples=16)
    monkeypatch.chdir(here)
    known = {"split": "train", "limit": None, "config": "my recipe.yaml"}
    line = next_steps("best", Path(output), known, is_sampled=True)[-1]
    config, *paths = shlex.split(line)[2:]
    assert config == "--config=my recipe.yaml"
    arguments, _ = augment.read_arguments(paths)
    assert arguments.samples == [Path(output) / "samples" / "predictions.jsonl"]
    assert arguments.output == f"./data/{name}"


def test_the_whole_way(
    call,
    stopped: Path,
    settings: dict[str, str],
    rows_of: dict[str, list[Problem]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sample, augment, train, be killed, resume, sample again: by the scripts as they are."""
    parts = evaluate.Parts(decode=knowing(rows_of["train"]))
    log = (stopped / "metrics.jsonl").read_bytes()
    sampling = ["--split", "train", "--samples", "4", "--max_new_tokens", "200", "--ckpt"]
    outcome = call(evaluate, *sampling, str(stopped / "best"), parts=parts)
    assert outcome.code == 0, outcome.err
    assert (stopped / "metrics.jsonl").read_bytes() == log and "not logged" not in outcome.out
    file = stopped / "eval" / "train" / "samples" / "predictions.jsonl"
    words = shlex.split(outcome.out.splitlines()[-1])
    assert words[1].endswith("augment.py") and outcome.out.count("next, ") == 1
    assert words[2:] == ["--samples", str(file), "--output", "./data/rft-test-4"]
    monkeypatch.chdir(tmp_path)
    outcome, output = call(augment, *words[2:]), tmp_path / "data" / "rft-test-4"
    assert outcome.code == 0, outcome.err
    assert "settings: dataset, validation_size, seed from" in outcome.out
    # As the sampled run was trained, of which nothing is typed here, but on the new rows.
    words = shlex.split(outcome.out.rpartition("next: ")[2])
    planned, *_ = train.read_arguments(words[2:])
    trained = training_json.read_description(stopped / "best")["settings"]
    assert planned == Config(**trained | {"dataset": str(output), "run_name": "rft-test-4"})

    losses = {
        dataset: call(
            perplexity,
            *("--ckpt", settings["model"], "--split", "validation"),
            *flags(settings | {"dataset": dataset}),
        ).out
        for dataset in (settings["dataset"], str(output))
    }
    assert losses[settings["dataset"]] == losses[str(output)] and "loss " in losses[str(output)]

    new = settings | {"dataset": str(output), "run_name": "new", "checkpoint_steps": "4"}
    new |= {"epochs": "1"}
    with pytest.raises(Killed):
        train.main(make_config(new), step=step_that(kill, at=7))
    outcome = call(train, *flags(new))
    assert outcome.code == 0 and "resuming" in outcome.out, outcome.err
    best = run_folder(new) / "best"
    about = json.loads((best / "training.json").read_text())
    assert about["step"] == 20  # 43 - 17 + 52 rows
    assert (
        json.loads((output / "augment.json").read_text())["data"].items() >= about["data"].items()
    )
    assert call(evaluate, "--ckpt", str(best), "--limit", "2").code == 0

    outcome = call(evaluate, *sampling, str(best), parts=parts)
    assert "78 rows of 26 questions, each of which is asked once" in outcome.out, outcome.err
    again = file.parents[4] / "new" / "eval" / "train" / "samples" / "predictions.jsonl"
    assert len(lines_of(again.parent)) == 104
    (tmp_path / "mine.yaml").write_text("epochs: 9\n")
    both = ["--output", str(tmp_path / "both"), "--config", str(tmp_path / "mine.yaml")]
    outcome = call(augment, "--samples", str(file), str(again), *both)
    assert outcome.code == 0, outcome.err
    words = shlex.split(outcome.out.rpartition("next: ")[2])
    assert train.read_arguments(words[2:])[0].epochs == 9  # the file that is named, not the run's
    outcome = call(augment, "--samples", str(file), str(again), *both[:2])
    words = shlex.split(outcome.out.rpartition("next: ")[2])
    assert train.read_arguments(words[2:])[0].epochs == trained["epochs"] != 1  # the first run's
    written = [(folder / "train.jsonl").read_bytes() for folder in (output, tmp_path / "both")]
    assert written[0] == written[1]  # the second run knows nothing new
