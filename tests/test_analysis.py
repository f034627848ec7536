"""Labels of wrong completions, accuracy by kind of problem, and the paired comparison."""

import json
import shutil
from pathlib import Path
from typing import Any

import made_up
import pytest
from conftest import real_folder
from scipy.stats import multinomial

import evaluate
from grading import compare, dataset, mistakes, report, rules
from grading.score import wilson_interval
from run.errors import UserError


@pytest.mark.parametrize(
    ("completion", "gold", "stop", "label", "equation"),
    [
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7", "eos", None, None),
        ("3 + 4 = <<3+4=9>>9\n#### 7", "7", "eos", None, None),  # right despite it
        ("3 + 4 = <<3+4=8>>8\n#### 8", "7", "eos", "arithmetic", "3 + 4 = 8"),
        ("It is <<3+4=8>>8\n#### 8", "7", "eos", "arithmetic", "<<3+4=8>>"),
        ("It is 3 * 4 = 13", "12", "eos", "arithmetic", "3 * 4 = 13"),
        ("3 * 4 = <<3*4=12>>12\n#### 12", "7", "eos", "reasoning", None),
        ("I do not know.", "7", "eos", "reasoning", None),
        ("", "7", "eos", "reasoning", None),
        ("So the answer is 7", "7", "eos", "format", None),
        ("So she makes $7 every day.", "7", "eos", "format", None),
        ("The total is 1,450...", "1450", "eos", "format", None),  # by the last number alone
        ("The total is 7...\n\nQuestion: And 8?", "7", "eos", "format", None),
        ("It is 3 + 4 = 8, no, 7", "7", "eos", "format", "3 + 4 = 8"),
        ("#### $7", "7", "eos", "format", None),
        ("#### 7.0", "7", "eos", "format", None),
        ("#### 7.", "7", "eos", "format", None),
        ("#### 8, no, 7", "7", "eos", "reasoning", None),  # although the flexible rule is right
        ("#### 1,450", "-3", "eos", "reasoning", None),
        ("3 + 4 = 7, and 7 + 1", "9", "length", "cut", None),
        ("3 + 4 = 7, and 7 + 1", "9", None, "reasoning", None),  # it is unknown why it stopped
        ("3 + 4 = 8, and 8 + 1", "9", "length", "cut", "3 + 4 = 8"),
        ("The answer is 7", "7", "length", "cut", None),
        (
            "#### 8\n\nQuestion: What is 2 + 2 = 5?",
            "7",
            "eos",
            "reasoning",
            None,
        ),  # another question's equation
    ],
)
def test_labels(
    completion: str, gold: str, stop: str | None, label: str | None, equation: str | None
) -> None:
    verdict = rules.grade(completion, gold, stop)
    assert (verdict.label, verdict.false_equation) == (label, equation)


def row(identity: int, right: bool, **more: Any) -> dict[str, Any]:
    completion = "#### 1" if right else "#### 2"
    return {
        "id": identity,
        "gold": "1",
        "completion": completion,
        "stop": "eos",
        "correct": right,
    } | more


def test_counts() -> None:
    rows = [
        row(0, True, steps=1, question="one two"),
        row(1, False, steps=1, question="word " * 30),
        row(2, False, steps=12, question="word " * 31) | {"completion": "1 + 1 = 3"},
        row(3, True, steps=8, question="word " * 61),
        row(4, False) | {"completion": "the answer is 1"},  # from a file without steps
        row(5, False, steps=2, question="word " * 45) | {"stop": "length"},
    ]
    assert mistakes.analyse(rows) == {
        "errors": {"arithmetic": 1, "reasoning": 1, "format": 1, "cut": 1},
        "rules_disagree": [4],
        "by_steps": {
            "1": {"num_correct": 1, "num_problems": 2},
            "2": {"num_correct": 0, "num_problems": 1},
            "8+": {"num_correct": 1, "num_problems": 2},
        },
        "by_question_words": {
            "1-30": {"num_correct": 1, "num_problems": 2},
            "31-45": {"num_correct": 0, "num_problems": 2},
            "61+": {"num_correct": 1, "num_problems": 1},
        },
    }
    table = report.analysis_table(mistakes.analyse(rows))
    assert (
        "arithmetic 1, reasoning 1, format 1, cut 1" in table
        and "ids 4" in table
        and "8+: 50%" in table
    )


def test_steps_of_an_answer() -> None:
    assert rules.count_steps("a\nb\n#### 1") == 2
    assert rules.count_steps("#### 1") == 0
    assert rules.count_steps("a\n\n \nb\u2028c\n#### 1\n") == 2


def test_real_answers_are_without_mistakes() -> None:
    """Two of the 1,319 published answers contain a false equation.

    A rule that finds more is wrong.
    """
    false = {}
    for number, problem in enumerate(dataset.load_problems(str(real_folder("GSM8K_DIR")), "test")):
        verdict = rules.grade(problem.answer, problem.gold, "eos")
        assert (verdict.label, verdict.false_equation) == (None, None)
        verdict = rules.grade(problem.answer.replace("####", "####x"), "123454321", "eos")
        if verdict.label == "arithmetic":
            false[number] = verdict.false_equation
    assert false == {501: "364 / 4 = 273", 1024: "32 -  20 = 300"}


# ---------------------------------------------------------------- --compare


def runs(
    both: int, lost: int, won: int, neither: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    kinds = (
        [(True, True)] * both
        + [(True, False)] * lost
        + [(False, True)] * won
        + [(False, False)] * neither
    )
    return [row(i, one) for i, (one, _) in enumerate(kinds)], [
        row(i, other) for i, (_, other) in enumerate(kinds)
    ]


Z_SQUARED = 3.841458820694124  # of the 95 % quantile of a normal distribution


@pytest.mark.parametrize(
    ("lost", "won", "p_value"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (1, 7, 2 * (1 + 8) / 2**8),
        (7, 1, 2 * (1 + 8) / 2**8),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (0, 5, 2 / 2**5),
        (0, 6, 2 / 2**6),
        (6, 0, 2 / 2**6),
    ],
)
def test_comparison_by_hand(lost: int, won: int, p_value: float) -> None:
    first, second = runs(20, lost, won, 14)
    result = compare.compare(first, second[::-1], ("a", "b"))
    total = 34 + lost + won
    assert result.num_problems == total and result.num_correct == (20 + lost, 20 + won)
    assert (len(result.lost), len(result.won)) == (lost, won)
    assert result.p_value == pytest.approx(p_value, rel=1e-12)
    assert result.difference == pytest.approx((won - lost) / total)
    low, high = result.interval
    assert low < result.difference < high
    assert (low > 0 or high < 0) == (p_value < 0.05)


@pytest.mark.parametrize("won", [0, 6, 34, 40])
def test_the_interval_of_a_difference_by_hand(won: int) -> None:
    """Tango's equation has simple solutions if nothing is lost. One limit is Wilson's."""
    one, other = runs(0, 0, won, 40 - won)
    low, high = compare.compare(one, other, ("a", "b")).interval
    assert low == pytest.approx((won - Z_SQUARED) / (40 + Z_SQUARED), abs=1e-7)
    assert high == pytest.approx(wilson_interval(won, 40)[1], abs=1e-7)
    mirrored = compare.compare(other, one, ("b", "a")).interval
    assert mirrored == pytest.approx((-high, -low), abs=1e-7)


@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.1), (0.0, 0.3), (0.1, 0.1), (0.6, 0.02)])
def test_the_interval_of_a_difference_holds_the_true_one(lost: float, won: float) -> None:
    """In 95 % of all pairs of runs, however many problems are won or lost in each."""
    total, held = 50, 0.0
    for num_lost in range(total + 1):
        for num_won in range(total + 1 - num_lost):
            counts = num_lost, num_won, total - num_lost - num_won
            chance = multinomial.pmf(counts, total, (lost, won, 1 - lost - won))
            if chance > 1e-9:
                first, second = runs(counts[2], num_lost, num_won, 0)
                low, high = compare.compare(first, second, ("a", "b")).interval
                held += chance * (low <= won - lost <= high)
    assert 0.94 < held < 0.99


def test_only_common_problems_are_compared() -> None:
    first, second = (
        [row(0, True), row(1, True), row(2, False)],
        [row(1, False), row(2, True), row(9, True)],
    )
    result = compare.compare(first, second, ("a", "b"))
    assert (result.num_problems, result.num_correct, result.lost, result.won) == (
        2,
        (1, 1),
        [1],
        [2],
    )


@pytest.mark.parametrize(
    ("first", "second", "fragment"),
    [
        ([row(0, True)], [row(1, True)], "no problem in common"),
        ([row(0, True)], [row(0, True) | {"gold": "5"}], "id 0 has the gold '1' in one and '5'"),
        (
            [row(0, True, question="a")],
            [row(0, True, question="b")],
            "id 0 has the question 'a' in one and 'b'",
        ),
        (
            [row(0, True, question="a  b")],
            [row(0, True, question="a b")],
            r"'a\x20\x20b' in one and 'a b'",
        ),
        (
            [row(0, True, question="a\xa0b")],
            [row(0, True, question="a b")],
            r"'a\xa0b' in one and 'a b'",
        ),
        (
            [row(0, True, question="a" * 99)],
            [row(0, True, question="a" * 98 + "b")],
            f"'{'a' * 21}' in one",
        ),
        (
            [row(0, True, question="a" * 99)],
            [row(0, True, question="a" * 90)],
            f"'{'a' * 20}' in the other",
        ),
        ([row(0, True), row(0, False)], [row(0, True)], "a: duplicate ids 0"),
        ([row(0, True)], [row(0, True) | {"gold": "1.0"}], "id 0 has the gold '1' in one and"),
        ([], [], "no problem in common"),
    ],
)
def test_what_can_not_be_compared(first: list[dict], second: list[dict], fragment: str) -> None:
    """Guards against a p-value over different problems with the same ids."""
    with pytest.raises(UserError) as error:
        compare.compare(first, second, ("a", "b"))
    assert fragment in str(error.value)


def test_golds_that_differ_in_commas_are_of_the_same_problem() -> None:
    """As the rule counts them, and as other programs write them, some without the questions."""
    first, second = [row(0, True) | {"gold": "1,450"}], [row(0, True) | {"gold": "1450"}]
    assert compare.compare(first, second, ("a", "b")).num_problems == 1
    second[0] |= {"question": "How many?"}
    assert compare.compare(first, second, ("a", "b")).num_problems == 1


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([row(0, True) | {"gold": "one"}], "problem 0: the gold answer 'one' is not a number"),
        ([row(0, True) | {"sample": n} for n in range(2)], "contains several samples of each"),
    ],
)
def test_what_has_no_score_is_not_compared(
    call, tmp_path: Path, rows: list[dict[str, Any]], fault: str
) -> None:
    (tmp_path / "a").write_text("".join(json.dumps(each) + "\n" for each in rows))
    outcome = call(evaluate, "--compare", *[str(tmp_path / "a")] * 2)
    outcome.assert_user_error(f"a: {fault}")


def test_an_unfinished_evaluation_is_not_compared(call, tmp_path: Path) -> None:
    """Guards against a gain on what is finished first, which is no fair selection."""
    made_up.write_predictions(tmp_path / "one", made_up.rows_of(["right"] * 4))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    files = [tmp_path / name / "predictions.jsonl" for name in ("one", "other")]
    files[1].write_text("".join(files[1].read_text().splitlines(keepends=True)[:3]))
    for pair in (files, files[::-1]):
        call(evaluate, "--compare", *map(str, pair)).assert_user_error(
            f"{files[1]}: contains 3 predictions for 4 problems", "it resumes where it stopped"
        )
    part = files[1].rename(files[1].with_name("part.jsonl"))  # a choice of one's own
    outcome = call(evaluate, "--compare", str(files[0]), str(part))
    assert "on the 3 problems in common" in outcome.out


def test_compare_from_the_command_line(call, tmp_path: Path) -> None:
    """Verdicts in the files are not trusted, nothing is written, and no model is needed."""
    for name, rows in zip(("a", "b"), runs(5, 0, 6, 1), strict=True):
        text = "".join(json.dumps(each | {"correct": True}) + "\n" for each in rows)
        (tmp_path / name).write_text(text)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    outcome = call(evaluate, "--compare", a, b)
    assert outcome.code == 0, outcome.err
    low, high = compare.compare(*runs(5, 0, 6, 1), (a, b)).interval
    assert low < 0.5 < high
    for fragment in (
        "12 problems in common",
        f" 41.67%   5 of 12   {a}\n",
        f" 91.67%   11 of 12   {b}\n",
        "difference (second minus first)  +50.00%\n",
        f" {low:+.2%} to {high:+.2%}\n",
        "p-value (McNemar)   0.03125\n",
        "won 6: ids 5, 6",
        "lost 0",
    ):
        assert fragment in outcome.out, fragment
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    # With --samples 1, a problem has one completion as well.
    one = [each | {"sample": 0} for each in runs(5, 0, 6, 1)[0]]
    Path(a).write_text("".join(json.dumps(each) + "\n" for each in one))
    assert "12 problems in common" in call(evaluate, "--compare", a, b).out
    call(evaluate, "--compare", a, b, "--ckpt", "x").assert_user_error(
        "--ckpt can't be used with --compare"
    )
    call(evaluate, "--compare", a, b, "--rescore", a).assert_user_error(
        "--rescore can't be used with --compare"
    )
    call(evaluate, "--compare", a, b, "--dtype", "float32").assert_user_error(
        "--dtype can't be used with --compare"
    )
    call(evaluate, "--compare", a, str(tmp_path / "none")).assert_user_error("none: can't be read")


# ---------------------------------------------------------------- as text

SAMPLED = {
    "num_samples": 2,
    "temperature": 0.7,
    "with_calculator": True,
    "exact_match": 0.5,
    "maj_at": {"1": 0.5, "2": 0.6},
    "pass_at": {"1": 0.51, "2": 0.8},
    "ci95": [0.3, 0.85],
}
SCORES = {
    "exact_match": 0.95,
    "num_correct": 19,
    "num_problems": 20,
    "ci95": [0.7639, 0.9911],
    "rules": {"openai": 0.95, "lm_eval_strict": 0.9, "lm_eval_flexible": 1.0},
    "stopped_by_length": 1,
    "stop_unknown": 2,
    "errors": {"arithmetic": 1, "reasoning": 0, "format": None},
    "rules_disagree": [3, 4],
    "by_steps": {
        "1": {"num_correct": 3, "num_problems": 4},
        "2": {"num_correct": 1, "num_problems": 2},
    },
    "by_question_words": {"1-30": {"num_correct": 1, "num_problems": 4}},
    "calculator": {
        "exact_match": 1.0,
        "num_correct": 20,
        "num_problems": 20,
        "won": [7, 8],
        "lost": [1],
        "p_value": 0.04,
    },
    "samples": SAMPLED,
}
REPORT = """\
best on test
  exact match                95.00%   19 of 20
  95 % interval (Wilson)     76.39% to 99.11%
    OpenAI (headline)         95.00%
    lm-eval strict-match      90.00%
    lm-eval flexible-extract 100.00%
  cut by max_new_tokens           1   and unknown for 2
  wrong, by kind           arithmetic 1, reasoning 0, format unknown
  rules disagree                  2   ids 3, 4
  by steps of the gold     1: 75%, 2: 50%
  by words of question     1-30: 25%
  with the calculator       100.00%   20 of 20, won 2, lost 1, p = 0.04
  sampled: 2 samples per problem at temperature 0.7, with the calculator
    mean of all               50.00%
    maj@1 50.00%, maj@2 60.00%
    pass@1 51.00%, pass@2 80.00%
    95 % interval of maj@2     30.00% to 85.00%"""
EFFORT = """
    tokens of all samples      1,234
    last decoding took           2.0 s at 617.0 tokens per second"""


def test_a_report_has_each_number_in_its_place() -> None:
    """Guards against an interval or a share that stands where another one belongs."""
    assert report.evaluation_report(SCORES, "best on test") == REPORT
    samples = SAMPLED | {"num_tokens": 1234, "seconds": 2.0, "tokens_per_second": 617.0}
    of_samples = REPORT.partition("  sampled")[2]
    assert report.evaluation_report(samples, "train") == f"train{of_samples}{EFFORT}"


def test_a_report_of_augmented_rows_has_each_number_in_its_place() -> None:
    files = [("a", 0.7, 3), ("b", None, 2)]
    stages = zip(report.STAGE_NAMES, (40, 20, 16, 12, 10, 8, 5), strict=True)
    description = {
        "num_problems": 37,
        "num_sampled": 36,
        "samples": [
            {"file": file, "temperature": temperature, "kept": kept, "drawn": 20}
            for file, temperature, kept in files
        ],
        "total": dict(stages),
        "rows": {"original": 10, "added": 5},
        "lists_per_problem": 1.5,
        "problems_by_kept": {"0": 1, "1": 2, "2": 3, "3": 4, "4": 5, "5": 6, "8": 7, "9": 9},
    }
    assert (
        report.augmentation_table(description)
        == """\
36 of 37 train problems are sampled
  temperature 0.7: 3 of 20 kept   a
  temperature greedy or unknown: 2 of 20 kept   b
  the files differ in their temperature
  samples                         40   100.00%
  right                           20    50.00%
    in the data's format          16    40.00%
    with equations                12    30.00%
    all equations true            10    25.00%
    distinct lists of them         8    20.00%
    new for their problem          5    12.50%
  lists of equations            1.50   per problem, with the row's own
  train rows                      15   10 original, 5 new
  problems by kept samples 0: 1, 1: 2, 2: 3, 3-4: 9, 5-8: 13, 9-16: 9"""
    )
    description["samples"][1]["temperature"] = 0.7
    assert "differ" not in report.augmentation_table(description)
