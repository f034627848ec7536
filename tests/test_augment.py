"""Samples of the train rows become more train rows, and nothing else of the data set changes."""

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPT, Killed, flags, kill, make_config, run_folder, step_that, tree

import augment
import data
import evaluate
import perplexity
import train
from engine.decoding import Completion
from engine.loading import load_tokenizer
from grading.dataset import Problem, load_problems
from grading.rules import gold_answer
from grading.selection import STAGES, Sample, equation_list, judge, select

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
        ("\x1b[2J<<24+48=72>>72\n#### 72", "right"),
        ("So\r<<24+48=72>>72\n#### 72", "right"),
        ("\ud83d <<24+48=72>>72\n#### 72", "right"),
        ("\ufffd <<24+48=72>>72\n#### 72", "right"),
        ("All in all 72 clips.\n#### 72", "well_formed"),
        ("48/2 and 24 + 48 give it.\n#### 72", "well_formed"),
        ("<<48/2=25>>24.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("<<48/2=24>>25.\nAll: 48/2 = <<24+48=72>>72.\n#### 72", "with_equations"),
        ("48/2 = 25.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("<<x=24>>24.\nAll: <<24+48=72>>72.\n#### 72", "with_equations"),
        ("<<=>><<24+48=72>>72.\n#### 72", "with_equations"),
        ("<<1/0=72>>72.\n#### 72", "with_equations"),
        ("It is 24 + 48 = 72, 24 + 48 = 71.\n#### 72", "with_equations"),
    ],
)
def test_how_far_a_sample_gets(completion: str, stage: str) -> None:
    found, answer = judge(completion, "72")
    assert found == stage
    assert bool(answer) == (stage not in ("drawn", "right"))
    if answer:
        assert gold_answer(answer) == "72" and answer.endswith("\n#### 72")
        answer.encode()


@pytest.mark.parametrize(("written", "gold"), [("1450000", "1,450,000"), ("-1,0", "-10")])
def test_a_number_is_spelt_like_the_rows_own(written: str, gold: str) -> None:
    """Guards against a gold answer that another sample, or the row, spells in another way."""
    _, answer = judge(f"So <<2-1=1>>1.\n#### {written}", gold)
    assert gold_answer(answer) == gold


def kept(*completions: str) -> list[str]:
    samples = {ROW.question: [Sample(0, completion) for completion in completions]}
    return [problem.answer for problem in select([ROW], samples).added]


def test_one_sample_of_each_new_list_is_kept_the_first() -> None:
    other_words = TRUE.replace("May", "In May").replace("48/2=24", " 48 / 2 = 24 ")
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
