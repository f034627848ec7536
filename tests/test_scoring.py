"""The published rules to the letter, and no score of incomplete predictions."""

import errno
import itertools
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from conftest import real_folder

import evaluate
from grading import dataset, rescore, rules, score
from grading.predictions import PredictionsFile, graded_row
from grading.results import GREEDY, SAMPLES
from grading.scores_file import Scored, additional_scores, score_predictions, write_all_scores
from run.errors import UserError

# Where the rules disagree; verified with the code of grade-school-math and lm-evaluation-harness.
TABLE = [
    ("#### 18.", "18", "nYY"),
    ("#### 18.0", "18", "nnn"),
    ("#### $18", "18", "nnY"),
    ("#### 18%", "18", "YYY"),
    ("#### 2,125", "2,125", "YYY"),
    ("####18", "18", "nnY"),
    ("#### −10", "-10", "nnn"),
    ("#### 36/2", "18", "nnn"),
    ("#### 18e0", "18", "YYn"),
    ("#### 18 … #### 5", "18", "YYn"),
    ("#### 5 … #### 18", "18", "nnY"),
    ("So she makes $18 every day.", "18", "nnY"),
    ("The total is 18...", "18", "nnn"),
    ("#### 018", "18", "nnn"),
    # Beyond the published table: what else a completion may contain.
    ("", "18", "nnn"),
    ("#### ", "18", "nnn"),
    ("#### -10", "-10", "YYY"),
    ("#### 1450000", "1,450,000", "YYY"),
    ("#### 18\n#### 19", "18", "YYn"),
    ("#### 18\n\nQuestion: 5?\nAnswer: #### 7", "18", "YYY"),
    ("no idea. Question: what? #### 18", "18", "Ynn"),
    ("#### ,", "18", "nnn"),
    ("#### 18<|im_end|>#### 5", "18", "YYY"),
    # A multiplication sign's ASCII minus, and digits of another script.
    ("#### ١٨", "18", "nnn"),
]


@pytest.mark.parametrize(("completion", "gold", "verdicts"), TABLE)
def test_every_rule_on_every_row(completion: str, gold: str, verdicts: str) -> None:
    """Guards against a grader that is looser or stricter than the published one."""
    found = {name: rule(completion, gold) for name, rule in rules.RULES.items()}
    assert found == {
        name: verdict == "Y"
        for name, verdict in zip(
            ("openai", "lm_eval_strict", "lm_eval_flexible"), verdicts, strict=True
        )
    }


def test_every_real_gold_parses_and_scores_itself() -> None:
    """Guards against a gold answer that no completion could ever match."""
    folder = str(real_folder("GSM8K_DIR"))
    commas = 0
    for split in ("train", "test"):
        for problem in dataset.load_problems(folder, split):
            commas += "," in problem.gold
            assert all(
                rule(problem.answer, problem.gold)
                for name, rule in rules.RULES.items()
                if "flex" not in name
            )
            assert rules.extract_openai(problem.answer) == problem.gold.replace(",", "")
    assert commas == 79 + 14


def prediction(identity: int, completion: str = "#### 1", gold: str = "1") -> dict[str, object]:
    return {
        "id": identity,
        "gold": gold,
        "completion": completion,
        "stop": "eos",
        "correct": completion == "#### 1",
    }


def test_score_counts() -> None:
    rows = [prediction(0), prediction(2, "#### 2"), prediction(1, "The answer is 1"), prediction(3)]
    rows[1]["stop"] = "length"
    scores = score.score(rows, 4, "rows")
    assert (scores["exact_match"], scores["num_correct"], scores["num_problems"]) == (0.5, 2, 4)
    assert scores["rules"] == {"openai": 0.5, "lm_eval_strict": 0.5, "lm_eval_flexible": 0.75}
    assert scores["stopped_by_length"] == 1


def test_wilson_interval_against_published_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for correct, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ):
        assert score.wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert score.wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize(
    ("rows", "count", "fragment"),
    [
        ([prediction(0), prediction(1)], 3, "missing ids 2"),
        ([prediction(0), prediction(0), prediction(1)], 2, "duplicate ids 0"),
        ([prediction(0), prediction(2)], 2, "missing ids 1, unknown ids 2"),
        ([prediction(0), prediction(5)], 1, "unknown ids 5"),
        ([], 0, "no problems"),
        ([prediction(0), prediction(1, "", "")], 2, "problem 1: the gold answer ''"),
        ([prediction(0, "#### x", "x")], 1, "the gold answer 'x'"),
        ([prediction(0, "", "[invalid]")], 1, "the gold answer '[invalid]'"),
    ],
)
def test_incomplete_predictions_give_no_score(rows: list[dict], count: int, fragment: str) -> None:
    """Guards against a wrong denominator, and against 'no answer' that equals 'no gold'."""
    with pytest.raises(UserError) as error:
        score.score(rows, count, "rows")
    assert fragment in str(error.value)


# ---------------------------------------------------------------- --rescore


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rescore_writes_scores_beside_the_file_or_elsewhere(call, tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    write(file, [prediction(1), prediction(0, "#### 3")])
    before = file.read_bytes()
    outcome = call(evaluate, "--rescore", str(file))
    assert outcome.code == 0, outcome.err
    assert "50.00%   1 of 2" in outcome.out
    assert json.loads((tmp_path / "scores.json").read_text())["exact_match"] == 0.5
    assert call(evaluate, "--rescore", str(file), "--output", str(tmp_path / "new")).code == 0
    assert (tmp_path / "new" / "scores.json").read_bytes() == (
        tmp_path / "scores.json"
    ).read_bytes()
    here = str(tmp_path / "new" / "..")  # in another spelling
    assert call(evaluate, "--rescore", str(file), "--output", here).code == 0
    assert file.read_bytes() == before


def test_rescore_does_not_trust_the_verdicts_in_the_file(call, tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [prediction(0, "#### 3") | {"correct": True}])
    assert call(evaluate, "--rescore", str(tmp_path / "p.jsonl")).code == 0
    assert json.loads((tmp_path / "scores.json").read_text())["exact_match"] == 0.0


def bare(identity: int, completion: str = "#### 1", **more: object) -> dict[str, object]:
    """A row as another program might write it."""
    return {"id": identity, "gold": "1", "completion": completion} | more


def test_rescore_of_rows_without_verdict_and_stop(call, tmp_path: Path) -> None:
    """Guards against a KeyError, and against a 0 where the count is unknown."""
    write(tmp_path / "p.jsonl", [bare(0), bare(1, "#### 2"), bare(2, "It is 1", steps=-1), bare(3)])
    outcome = call(evaluate, "--rescore", str(tmp_path / "p.jsonl"))
    assert outcome.code == 0, outcome.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["num_correct"], scores["stopped_by_length"], scores["stop_unknown"]) == (
        2,
        None,
        4,
    )
    assert scores["errors"] == {"arithmetic": 0, "reasoning": 1, "format": 1, "cut": None}
    assert "max_new_tokens   unknown" in outcome.out and "cut unknown" in outcome.out
    assert "contradicts" not in outcome.out
    assert call(evaluate, "--compare", *[str(tmp_path / "p.jsonl")] * 2).code == 0


def test_how_completions_ended_is_counted_where_it_is_known(call, tmp_path: Path) -> None:
    write(
        tmp_path / "p.jsonl",
        [bare(0, stop="length"), bare(1, "", stop="length"), bare(2), bare(3, stop="eos")],
    )
    outcome = call(evaluate, "--rescore", str(tmp_path / "p.jsonl"))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["stopped_by_length"], scores["stop_unknown"], scores["errors"]["cut"]) == (
        2,
        1,
        1,
    )
    assert "       2   and unknown for 1\n" in outcome.out
    write(tmp_path / "p.jsonl", [prediction(0)])
    (tmp_path / "scores.json").unlink()
    outcome = call(evaluate, "--rescore", str(tmp_path / "p.jsonl"))
    assert (
        "stop_unknown" not in json.loads((tmp_path / "scores.json").read_text())
        and "known" not in outcome.out
    )


def test_a_verdict_that_the_rule_contradicts_is_said(call, tmp_path: Path) -> None:
    """Guards against another grader's file, whose different numbers nobody would notice."""
    rows = [bare(0, correct=False), bare(1, "#### 2", correct=True), bare(2, correct=True), bare(3)]
    write(tmp_path / "p.jsonl", rows)
    write(tmp_path / "agreed.jsonl", rows[2:])
    said = "p.jsonl: 2 rows have a 'correct' that the headline rule contradicts (ids 0, 1): "
    said += "the rule counts"
    for arguments in (["--rescore", "p.jsonl"], ["--compare", "agreed.jsonl", "p.jsonl"]):
        outcome = call(evaluate, arguments[0], *(str(tmp_path / name) for name in arguments[1:]))
        assert (
            outcome.code == 0 and outcome.out.count("contradicts") == 1 and said in outcome.out
        ), outcome
    assert json.loads((tmp_path / "scores.json").read_text())["num_correct"] == 3


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        ({"correct": "yes"}, "'correct' is 'yes', not of type bool"),
        ({"correct": 1}, "'correct' is 1, not of type bool"),
        ({"correct": None}, "'correct' is None, not of type bool"),
        ({"stop": 5}, "'stop' is 5, not of type str"),
        ({"sample": "0"}, "'sample' is '0', not of type int"),
        ({"gold": 1}, "'gold' is 1, not of type str"),
        ({"completion": None}, "'completion' is None, not of type str"),
    ],
)
def test_what_is_there_must_be_of_its_type(
    call, tmp_path: Path, more: dict[str, object], fragment: str
) -> None:
    write(
        tmp_path / "p.jsonl",
        [bare(0), bare(1, **more) if "completion" not in more else bare(1) | more],
    )
    for arguments in (["--rescore"], ["--compare", str(tmp_path / "p.jsonl")]):
        outcome = call(evaluate, *arguments, str(tmp_path / "p.jsonl"))
        outcome.assert_user_error(
            "line 2: is not a valid prediction", fragment, "an object with id, gold, completion"
        )


def test_an_evaluation_goes_on_from_rows_without_verdict(tmp_path: Path) -> None:
    """Guards against a running score that trusts the verdicts in the file."""
    problem = dataset.Problem("1 - 0?", "1\n#### 1")
    with PredictionsFile(tmp_path, {}, 4) as file:
        for index, completion in enumerate(("#### 1", "#### 1", "#### 3")):
            file.write(graded_row(index, None, problem, completion, "eos", 1))
        assert file.num_correct == 2
    rows = [json.loads(line) for line in file.file.read_text().splitlines()]
    del rows[0]["correct"], rows[0]["stop"]
    rows[1]["correct"], rows[2]["correct"] = False, True
    write(file.file, rows)
    again = PredictionsFile(tmp_path, {}, 4)
    assert (again.num_correct, again.missing()) == (2, [(3, 0)])
    with again:
        again.write(graded_row(3, None, problem, "#### 1", "eos", 1))
    assert again.num_correct == 3


def test_many_samples_are_read_in_less_memory_than_their_file_takes(tmp_path: Path) -> None:
    """Guards against gigabytes for the 717,000 samples of RFT's recipe, whose questions repeat."""
    problem = dataset.Problem("How many? " * 150, "1\n#### 1")
    with PredictionsFile(tmp_path, {}, 2, 1000) as file:
        for index in range(2000):
            row = graded_row(index % 2, index // 2, problem, f"{index}\n#### 1", "eos", 1)
            file.write(row)
    size = file.file.stat().st_size
    tracemalloc.start()
    try:
        again = PredictionsFile(tmp_path, {}, 2, 1000)
        with again:
            assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()
    assert list(again.rows.values()) == list(file.rows.values()) and not again.missing()
    file.file.write_bytes(file.file.read_bytes() + b'{"id": 1, "sam')  # as a kill leaves it
    with PredictionsFile(tmp_path, {}, 2, 1000):
        assert file.file.stat().st_size == size


@pytest.mark.parametrize("beside", ["evaluation.json", "scores.json"])
def test_rescore_knows_how_many_problems_were_asked(call, tmp_path: Path, beside: str) -> None:
    """Guards against a file whose end was lost, which the ids alone would not reveal."""
    write(tmp_path / "predictions.jsonl", [prediction(0), prediction(1)])
    (tmp_path / beside).write_text('{"num_problems": 3, "exact_match": 1.0}')
    call(evaluate, "--rescore", str(tmp_path / "predictions.jsonl")).assert_user_error(
        "missing ids 2"
    )
    assert beside == "scores.json" or not (tmp_path / "scores.json").exists()


def test_samples_with_no_file_beside_them_are_counted_by_their_problems(
    call, tmp_path: Path
) -> None:
    write(tmp_path / "p.jsonl", [bare(index) | {"sample": n} for index in (0, 1) for n in (0, 1)])
    outcome = call(evaluate, "--rescore", str(tmp_path / "p.jsonl"))
    assert outcome.code == 0 and "assuming that it contains all 2\n" in outcome.out, outcome.err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}\n",
        "nonsense\n",
        '{"id": "0"}\n',
        json.dumps(prediction(0) | {"id": True}) + "\n",
        "[]\n",
        "\xff\n",
    ],
)
def test_rescore_refuses_what_is_no_predictions_file(call, tmp_path: Path, content: str) -> None:
    (tmp_path / "p.jsonl").write_text(content, encoding="latin-1")
    call(evaluate, "--rescore", str(tmp_path / "p.jsonl")).assert_user_error("p.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


OWN = {"weights": "w", "data_sha256": "d", "num_problems": 2, "seconds": 5.0}
VERIFIED = OWN | {"exact_match": 1.0, "verified_batching": {"problems": 4, "differences": 0}}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """A folder as an evaluation leaves it."""
    folder = tmp_path / "eval"
    folder.mkdir()
    write(folder / "predictions.jsonl", [prediction(0), prediction(1)])
    (folder / "evaluation.json").write_text(json.dumps(OWN))
    (folder / "scores.json").write_text(json.dumps(VERIFIED))
    return folder


@pytest.mark.parametrize(
    "name", ["fixed.jsonl", "fixed", "predictions.jsonl.old", "predictions.json"]
)
def test_a_file_beside_an_evaluation_is_another_one(call, evaluation: Path, name: str) -> None:
    """Guards against scores that claim another file's weights, seconds and verification."""
    write(evaluation / name, [bare(0), bare(1, "#### 2"), bare(2)])
    before = content(evaluation)
    assert call(evaluate, "--rescore", str(evaluation / name)).code == 0
    after = content(evaluation)
    (new,) = after.keys() - before.keys()
    assert new == name.removesuffix(".jsonl") + ".scores.json" and before.items() <= after.items()
    scores = json.loads(after[new])
    assert (scores["num_problems"], scores["num_correct"], scores["predictions"]) == (3, 2, name)
    assert not {"weights", "seconds", "verified_batching", "data_sha256"} & scores.keys()
    write(evaluation / name, [bare(0), bare(1)])  # replaces its own scores
    assert call(evaluate, "--rescore", str(evaluation / name)).code == 0
    assert json.loads((evaluation / new).read_text())["num_problems"] == 2
    assert call(evaluate, "--rescore", str(evaluation / "predictions.jsonl")).code == 0
    assert (
        json.loads((evaluation / "scores.json").read_text()).items()
        >= (VERIFIED | {"num_correct": 2}).items()
    )


@pytest.mark.parametrize("held", ["predictions.jsonl", "evaluation.json"])
def test_the_scores_of_an_evaluation_that_has_begun_have_their_place(
    call, evaluation: Path, held: str
) -> None:
    for file in list(evaluation.iterdir()):
        if file.name != held:
            file.unlink()
    write(evaluation / "a.jsonl", [bare(0)])
    outcome = call(evaluate, "--rescore", str(evaluation / "a.jsonl"))
    assert (
        outcome.code == 0
        and f"scores: {evaluation / 'a.scores.json'}, since scores.json belongs to" in outcome.out
    )
    assert {path.name for path in evaluation.iterdir()} == {held, "a.jsonl", "a.scores.json"}


def test_several_files_share_a_folder(call, tmp_path: Path) -> None:
    """With the same number of rows, and with different numbers."""
    for name, rows in (("a", 6), ("b", 4), ("c", 6)):
        write(
            tmp_path / f"{name}.jsonl",
            [bare(index, f"#### {index % 2 if name == 'a' else 1}") for index in range(rows)],
        )
    for name in "abc":
        assert call(evaluate, "--rescore", str(tmp_path / f"{name}.jsonl")).code == 0
    for name in "ac":  # each again into its own scores
        assert call(evaluate, "--rescore", str(tmp_path / f"{name}.jsonl")).code == 0
    files = ("scores.json", "b.scores.json", "c.scores.json")
    assert {path.name for path in tmp_path.glob("*.json")} == set(files)
    found = [json.loads((tmp_path / file).read_text()) for file in files]
    assert [(scores["num_correct"], scores["num_problems"]) for scores in found] == [
        (3, 6),
        (4, 4),
        (6, 6),
    ]


@pytest.mark.parametrize("held", ["all", "scores.json", "evaluation.json", "predictions.jsonl"])
@pytest.mark.parametrize("name", ["a.jsonl", "predictions.jsonl"])
def test_scores_of_other_predictions_are_not_replaced(
    call, evaluation: Path, held: str, name: str
) -> None:
    """Those of a complete or unfinished evaluation in --output."""
    for file in list(evaluation.iterdir()):
        if held not in ("all", file.name):
            file.unlink()
    other = evaluation.parent / name
    write(other, [bare(index) for index in range(6)])
    before = content(evaluation.parent)
    outcome = call(evaluate, "--rescore", str(other), "--output", str(evaluation))
    outcome.assert_user_error(str(evaluation), "of other predictions", "--output")
    assert content(evaluation.parent) == before


def test_scores_elsewhere_are_replaced_by_those_of_the_same(call, evaluation: Path) -> None:
    new, foreign = evaluation.parent / "new", evaluation.parent / "a.jsonl"
    for _ in range(2):
        assert (
            call(
                evaluate, "--rescore", str(evaluation / "predictions.jsonl"), "--output", str(new)
            ).code
            == 0
        )
        (evaluation / "evaluation.json").write_text(
            json.dumps(OWN | {"num_problems": 3})
        )  # it was resumed
        write(evaluation / "predictions.jsonl", [prediction(0), prediction(1), prediction(2)])
    assert json.loads((new / "scores.json").read_text())["num_problems"] == 3
    write(foreign, [bare(0)])
    for _ in range(2):
        assert call(evaluate, "--rescore", str(foreign), "--output", str(new / "2")).code == 0
    before = content(new)
    write(foreign, [bare(0), bare(1)])
    outcome = call(evaluate, "--rescore", str(foreign), "--output", str(new / "2"))
    outcome.assert_user_error("scores.json of other predictions")
    (foreign.parent / "scores.json").write_text('{"predictions": "b.jsonl"}')
    (foreign.parent / "a.scores.json").write_text("precious")
    call(evaluate, "--rescore", str(foreign)).assert_user_error(
        "contains a.scores.json of other predictions"
    )
    assert content(new) == before and (foreign.parent / "a.scores.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("ids", "fragment"),
    [
        ([1, 2, 3], "of each id from 0: they are 1 to 3: subtract 1 from each"),
        ([3, 1, 2], "they are 1 to 3"),
        ([7, 8], "numbered from 0"),
        ([0, 0, 1], "duplicate ids 0"),
        ([1], "they are 1 to 1"),
        ([], "contains no problems: name a file with predictions"),
    ],
)
def test_the_cure_for_ids_is_one(call, tmp_path: Path, ids: list[int], fragment: str) -> None:
    """Guards against the advice to run evaluate.py again, which wrote none of these rows."""
    write(tmp_path / "p.jsonl", [bare(index) for index in ids])
    outcome = call(evaluate, "--rescore", str(tmp_path / "p.jsonl"))
    outcome.assert_user_error(fragment)
    assert "evaluate.py" not in outcome.err


def test_going_on_is_the_cure_only_where_it_is_one(call, evaluation: Path) -> None:
    file = str(evaluation / "predictions.jsonl")
    write(evaluation / "predictions.jsonl", [prediction(0)])
    call(evaluate, "--rescore", file).assert_user_error("missing ids 1", "run evaluate.py again")
    write(evaluation / "predictions.jsonl", [prediction(0), prediction(1), prediction(9)])
    outcome = call(evaluate, "--rescore", file)
    outcome.assert_user_error("unknown ids 9")
    assert "evaluate.py" not in outcome.err


def test_rows_as_other_programs_write_them(call, tmp_path: Path) -> None:
    """A byte order mark, and null for an unknown stop."""
    write(tmp_path / "p.jsonl", [bare(0, stop=None), bare(1, stop="length")])
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "p.jsonl").read_bytes())
    outcome = call(evaluate, "--rescore", str(tmp_path / "p.jsonl"))
    assert outcome.code == 0, outcome.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["stopped_by_length"], scores["stop_unknown"]) == (1, 1)
    assert call(evaluate, "--compare", *[str(tmp_path / "p.jsonl")] * 2).code == 0


def test_odd_golds_are_said_when_a_file_is_scored_again(call, tmp_path: Path) -> None:
    rows = [
        prediction(0),
        prediction(1, "#### 3", "3.0"),
        prediction(2, "#### 7", "007"),
        prediction(3, "", "1,000"),
    ]
    write(tmp_path / "p.jsonl", rows)
    outcome = call(evaluate, "--rescore", str(tmp_path / "p.jsonl"))
    assert (
        "p.jsonl: 2 of 4 gold answers are not spelt plainly, the first in id 1: 3.0, and"
        in outcome.out
    )
    write(tmp_path / "q.jsonl", [rows[0], rows[3]])
    assert "spelt" not in call(evaluate, "--rescore", str(tmp_path / "q.jsonl")).out


def test_scores_that_can_not_be_written_say_what_helps(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "p.jsonl", [bare(0)])
    monkeypatch.setattr(rescore, "write_scores", refuse)
    call(evaluate, "--rescore", str(tmp_path / "p.jsonl")).assert_user_error(
        f"{tmp_path}: can't be written ({os.strerror(errno.ENOSPC)}): choose another --output"
    )


def test_rescore_goes_with_no_model_flags(call, tmp_path: Path) -> None:
    outcome = call(evaluate, "--rescore", "x", "--ckpt", "y", "--dtype", "float32")
    outcome.assert_user_error("--ckpt, --dtype can't be used with --rescore")
    outcome = call(evaluate, "--rescore", "x", "--verify-batching", "0")
    outcome.assert_user_error("--verify-batching can't be used with --rescore")
    call(evaluate, "--rescore", str(tmp_path / "none")).assert_user_error("none: can't be read")
    call(evaluate, "--rescore", str(tmp_path)).assert_user_error("can't be read")
    call(evaluate, "--rescore", ".").assert_user_error("error: .: can't be read (Is a directory)")


# ---------------------------------------------------------------- samples


def drawn(problem: int, answers: list[str | None], gold: str = "7") -> list[dict]:
    return [
        {
            "id": problem,
            "sample": n,
            "gold": gold,
            "completion": "none" if a is None else f"#### {a}",
            "stop": "eos",
        }
        for n, a in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("answers", "voted"),
    [
        (["7", "8", "7"], "7"),
        (["8", "7", "7", "8"], "8"),  # a tie goes to the first
        (["9", "8", "7", "8", "7"], "8"),
        ([None, None, "7"], "7"),  # no answer is not a vote
        ([None], None),
        ([], None),
    ],
)
def test_majority_vote(answers: list[str | None], voted: str | None) -> None:
    assert score.majority_vote(answers) == voted


@pytest.mark.parametrize("num_samples", [1, 3, 6])
def test_pass_at_is_the_share_of_all_subsets(num_samples: int) -> None:
    """Guards against the biased 1 - (1 - c / n) ** k, by counting every subset."""
    for num_correct in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(range(num_samples), k))
            share = sum(any(number < num_correct for number in subset) for subset in subsets) / len(
                subsets
            )
            assert score.pass_at(k, num_samples, num_correct) == pytest.approx(share, abs=1e-12)


def test_scores_of_samples_by_hand() -> None:
    rows = [*drawn(1, ["8", "7", "7"]), *drawn(0, ["1,000", None, "5"], gold="1,000")]
    found = score.score_samples(rows, 2, 3, "x")
    assert found["exact_match"] == pytest.approx(3 / 6) and (
        found["num_problems"],
        found["num_samples"],
    ) == (2, 3)
    assert found["maj_at"] == {"1": 0.5, "2": 0.5, "3": 1.0}
    assert found["pass_at"] == pytest.approx({"1": 0.5, "2": (1 + 2 / 3) / 2, "3": 1.0})
    assert found["ci95"] == pytest.approx(score.wilson_interval(2, 2))
    assert score.score_samples(rows[::-1], 2, None, "x") == found


@pytest.mark.parametrize(
    ("rows", "fragment"),
    [
        (drawn(0, ["1", "2"]), "each sample 0 to 2 (violated by 0)"),
        ([*drawn(0, ["1", "2", "3"]), *drawn(0, ["1", "2", "3"])], "exactly one"),
        ([*drawn(0, ["1", "2"]), *drawn(1, ["1", "2", "3", "4"])], "(violated by 0, 1)"),
        (drawn(1, ["1", "2", "3"]), "missing ids 0"),
        (drawn(0, ["1", "2", "3"], gold="x"), "the gold answer 'x' is not a number"),
        ([], "0 predictions"),
    ],
)
def test_no_score_of_samples_that_are_not_whole(rows: list[dict], fragment: str) -> None:
    with pytest.raises(UserError) as error:
        score.score_samples(rows, 1, 3, "x")
    assert fragment in str(error.value)


@pytest.mark.parametrize("name", ["evaluation.json", "scores.json"])
@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("maj_at", {"1": 0.5}),
        ("maj_at", None),
        ("pass_at", {"1": 0.5}),
        ("timing", 1),
        ("timing", {"seconds": 2.0}),
        ("seconds", "x"),
        ("seconds", 2.0),
        ("calculator", {"exact_match": 0.5}),
        ("samples", {"num_samples": 4}),
    ],
)
def test_scores_that_someone_wrote_beside_the_settings_are_not_taken_over(
    call, tmp_path: Path, name: str, num_samples: int, key: str, value: object
) -> None:
    """Guards against a traceback, and scores of samples among those of greedy decoding."""
    row = {"id": 0, "gold": "1", "completion": "#### 1"}
    rows = [row] if num_samples == 1 else [row | {"sample": n} for n in range(num_samples)]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    (tmp_path / name).write_text(json.dumps({"num_problems": 1, key: value}))
    outcome = call(evaluate, "--rescore", str(file))
    assert outcome.code == 0, outcome.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    expected = {"1": 1.0, "2": 1.0} if num_samples > 1 else None
    assert scores.get("maj_at") == scores.get("pass_at") == expected
    assert scores.get(key) in (None, expected, 2.0)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([bare(0), bare(1, stop="eos")], [bare(0, stop="eos"), bare(1, stop="eos")]),
        (
            [bare(0) | {"sample": n, "num_tokens": 5} for n in (0, 1)],
            [bare(0) | {"sample": n} for n in (0, 1)],
        ),
    ],
)
def test_what_earlier_scores_counted_is_counted_again_or_gone(
    call, tmp_path: Path, before: list[dict], now: list[dict]
) -> None:
    """Guards against numbers of rows that are gone: "unknown for 1", and a count of tokens."""
    found = []
    for place, contents in ((tmp_path / "again", [before, now]), (tmp_path / "once", [now])):
        place.mkdir()
        for rows in contents:
            write(place / "predictions.jsonl", rows)
            outcome = call(evaluate, "--rescore", str(place / "predictions.jsonl"))
            assert outcome.code == 0, outcome.err
        found.append((place / "scores.json").read_text())
    assert found[0] == found[1]


# ---------------------------------------------------------------- scores.json


def test_each_rule_is_logged_with_an_interval_of_its_own() -> None:
    """Guards against the headline's interval around another rule, and shares that are cut off."""
    shares = {"openai": 0.5, "lm_eval_strict": 0.29, "lm_eval_flexible": 0.58}
    assert [int(share * 100) for share in shares.values()] == [50, 28, 57]
    numbers = {"num_correct": 50, "num_problems": 100, "rules": shares}
    numbers["errors"] = {"arithmetic": 0, "cut": None}
    logged = Scored([], {}, numbers).logged
    for name, count in (("exact_match", 50), ("lm_eval_strict", 29), ("lm_eval_flexible", 58)):
        assert logged[name] == count / 100
        assert (logged[f"{name}_low"], logged[f"{name}_high"]) == score.wilson_interval(count, 100)
    assert logged["errors_arithmetic"] == 0 and "errors_cut" not in logged


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, "other") for key in ("weights", "split", "data_sha256", "prompt", "dtype")),
        ("max_new_tokens", 4),
        ("num_problems", 1),
        ("num_samples", 3),
    ],
)
def test_samples_of_another_evaluation_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    """Guards against a majority vote beside the exact match of other weights, rows or prompts."""
    names = ("weights", "split", "data_sha256", "prompt", "max_new_tokens", "dtype")
    identity = {name: name for name in names} | {"num_problems": 2}
    of_samples = identity | {"num_samples": 2}
    greedy = score_predictions([prediction(0), prediction(1)], identity, tmp_path, {})
    rows = [*drawn(0, ["8", "7"]), *drawn(1, ["7", "8"])]
    (tmp_path / "samples").mkdir()
    file, beside = (
        tmp_path / "samples" / name for name in ("predictions.jsonl", "evaluation.json")
    )
    write(file, rows)
    with file.open("a") as stream:  # as a kill leaves it
        stream.write('{"id": 1, "sam')
    beside.write_text(json.dumps(of_samples))
    assert additional_scores(greedy, tmp_path)["samples"]["num_samples"] == 2
    write(file, [row for row in rows if key != "num_problems" or row["id"] < value])
    beside.write_text(json.dumps(of_samples | {key: value}))
    assert additional_scores(greedy, tmp_path) == {}
    assert "belongs to another evaluation: left out of scores.json" in capsys.readouterr().out


def test_samples_take_no_place_of_greedy_scores(tmp_path: Path) -> None:
    """Guards against a mean of samples as the exact match of a greedy decoding that was not done,
    and a table in W&B of 700,000 rows."""
    rows = [*drawn(0, ["8", "7"]), *drawn(1, ["7", "8"])]
    samples = score_predictions(rows, {"num_problems": 2, "num_samples": 2}, tmp_path, {})
    (tmp_path / "samples").mkdir()
    assert write_all_scores(tmp_path, {GREEDY: None, SAMPLES: samples}) == {}
    assert write_all_scores(tmp_path, {SAMPLES: samples}) == samples.content
    assert not (tmp_path / "scores.json").exists() and not samples.tables
