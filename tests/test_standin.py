"""The stand-ins of demo, tests and benchmarks are what they say."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import demo
import standin
from grading import rules
from run.errors import UserError


def test_problems_are_right_distinct_and_reproducible() -> None:
    """Guards against a demo that teaches wrong sums, or tests on what it trained."""
    problems = standin.make_problems(demo.NUM_TRAIN + demo.NUM_TEST, seed=0)
    assert len({problem["question"] for problem in problems}) == len(problems) == 8200
    assert problems[:50] == standin.make_problems(50, seed=0)
    for problem in problems:
        steps = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", problem["answer"])
        assert 1 <= len(steps) <= 2 and problem["answer"].count("<<") == len(steps)
        for left, sign, right, result, repeated in steps:
            left, right = int(left), int(right)
            assert (
                {"+": left + right, "-": left - right, "*": left * right}[sign]
                == int(result)
                == int(repeated)
                >= 0
            )
        assert rules.gold_answer(problem["answer"]) == steps[-1][3]


def test_answers_differ_in_the_order_of_operands() -> None:
    """Without another valid solution to find, rejection sampling would add nothing."""
    swapped = Counter(
        (sign, (first, second) != (left, right))
        for problem in standin.make_problems(2000, seed=0)
        for kind, numbers in [
            ("+", r"has (\d+) \w+\. \w+ buys (\d+)"),
            ("*", r"fills (\d+) \w+ with (\d+)"),
        ]
        for left, right in re.findall(numbers, problem["question"])
        for first, sign, second in re.findall(r"(\d+) (.) (\d+) = <<\1\2\3=", problem["answer"])
        if sign == kind and left != right
    )
    for sign in "+*":
        total = swapped[sign, True] + swapped[sign, False]
        assert total > 300 and 0.4 < swapped[sign, True] / total < 0.6


def test_stand_in_model_is_a_hugging_face_llama_of_about_a_million(tmp_path: Path) -> None:
    problems = standin.make_problems(2000, seed=0)
    standin.make_tokenizer(
        (f"{p['question']}\n{p['answer']}" for p in problems), tmp_path, vocab_size=512
    )
    standin.make_model(tmp_path, hidden_size=128, intermediate_size=352, layers=4, heads=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == "llama" and model.config.vocab_size == 512
    assert 0.8e6 < model.num_parameters() < 1.2e6


def test_demo_replaces_its_own_folder_only(tmp_path: Path) -> None:
    """Guards against a demo that deletes what it did not make."""
    own, foreign = tmp_path / "demo", tmp_path / "foreign"
    for _ in range(2):
        demo.prepare_folder(own)
        (own / "data" / "train.jsonl").touch()
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"was not made by demo\.py"):
        demo.prepare_folder(foreign)
    assert (foreign / "thesis.tex").exists()


def test_demo_prints_the_score_and_where_everything_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo" / "run" / "eval" / "test"
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps({"exact_match": 0.945, "num_problems": 200}))
    demo.report(tmp_path / "demo" / "run", root=tmp_path)
    out = capsys.readouterr().out
    assert "exact match 94.5% on 200 problems" in out and "demo/run/best" in out
