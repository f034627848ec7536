"""Expressions are worth what GSM8K says, and hostile ones nothing; false equations are found."""

import json
from fractions import Fraction

import pytest
from conftest import real_folder

import calculator
from calculator import evaluate, first_false_equation, is_true


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", Fraction(24)),
        ("1+2*3", Fraction(7)),
        ("(1+2)*3", Fraction(9)),
        ("10-3-2", Fraction(5)),
        ("16/4/2", Fraction(2)),
        ("2*20*.01", Fraction(2, 5)),
        ("1,450,000+1", Fraction(1_450_001)),
        ("20%*50", Fraction(10)),
        ("0.1+0.2", Fraction(3, 10)),
        ("-3--2", Fraction(-1)),
        ("+30+46", Fraction(76)),
        ("3*+6", Fraction(18)),
        ("560//10", Fraction(56)),
        ("7//2", Fraction(3)),
        (" 3 + 4 ", Fraction(7)),
    ],
)
def test_values(expression: str, value: Fraction) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "()", "(", ")", "1+", "*2", "1 2", "2**3", "9**9**9", "1/0", "1/(2-2)", "1//0", "abs(1)", "1e5"),
        *(
            "0x10",
            "1_000",
            "٣+٤",
            "½",
            "1+x",
            "1;2",
            "__import__('os')",
            "1==1",
            "1=1",
            "(1+2",
            "1)",
            "1.2.3",
            "%",
            ".",
            "5.",
            "1,,2",
            ",1",
        ),
        *("9" * 5000, "+".join("1" * 500), "(" * 5000, "(" * 60 + "1" + ")" * 60, "-" * 150 + "1", "9" * 40),
        "*".join(["9999999999"] * 15),
    ],
)
def test_hostile_text_has_no_value(expression: str) -> None:
    """Guards against code that runs, numbers that fill the memory, and recursion without an end."""
    assert evaluate(expression) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 + 4 = <<3+4=7>>7 eggs.\n#### 7", None),
        ("3 + 4 = <<3+4=8>>8 eggs.", "3 + 4 = 8"),
        ("They are <<3+4=8>>8 eggs.", "<<3+4=8>>"),
        ("Right <<1+1=2>>2, wrong <<2+2=5>>5, wrong <<3+3=7>>7", "<<2+2=5>>"),
        ("3 + 4 = 8 eggs", "3 + 4 = 8"),
        ("First 3 + 4 = 8, then <<2+2=5>>5", "3 + 4 = 8"),
        ("$1,200 - $200 = $1,000. Then 5 × 3 = 15 and 6 ÷ 2 = 3, and 7 − 2 = 5", None),
        ("$1,200 - $200 = $900", "1,200 -  200 = 900"),
        ("4 x 5 = 21", "4 * 5 = 21"),
        ("25% of it: 25% * 80 = 20", None),
        ("30 / 60 = 50% and 30 / 60 * 100 = 50%", None),
        ("100 / 3 = 33.33 and 100 / 3 = 33.3", None),
        ("100 / 3 = 33.34", "100 / 3 = 33.34"),
        ("100 / 3 = 33", "100 / 3 = 33"),
        ("2x - 3 = 7, x + 26 + 52 = 91, x+26 = 91", None),  # not arithmetic
        ("40 marbles - 3 - 5 = 32, at 6:00+48 = 6:48", None),
        ("3 / 2 = 1 1/2 and 600 * 30 = 18 000", None),
        ("2+3=5+1=6", None),
        ("2+3=5+1=7", "5+1 = 7"),
        (".5*60 = 30 and $.25 / $.05 = 5", None),
        ("- 5 + 6 = 11\n* 5 + 6 = 12", "5 + 6 = 12"),
        ("5 = 6, = 7, <<=>>, <<x=5>>, <<1/0=5>>, <<2+2", None),  # nothing to check
        ("", None),
    ],
)
def test_the_first_false_equation(text: str, found: str | None) -> None:
    assert first_false_equation(text) == found


@pytest.mark.parametrize(
    "text",
    [
        *(
            "1 " * 50_000,
            "1" + " " * 100_000,
            "(" * 100_000 + "=",
            "<<" * 50_000,
            "1+" * 50_000 + "=1",
            "1+1=" * 30_000,
        ),
        *("<<" + "9" * 100_000 + "=1>>", "=1 " * 50_000, "1=" + " " * 100_000, "1," * 50_000 + "=2", "3 x" * 40_000),
    ],
)
def test_long_hostile_text_is_read_through(text: str) -> None:
    """Guards against a regular expression whose time grows with the square of the text: these would take hours."""
    first_false_equation(text)


def test_every_annotation_of_the_real_data_is_true() -> None:
    folder = real_folder("GSM8K_DIR")
    for split, count in (("train", 23_716), ("test", 4_282)):
        rows = [
            json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line
        ]
        found = [match for row in rows for match in calculator.ANNOTATION.finditer(row["answer"])]
        assert len(found) == count
        assert [match[0] for match in found if is_true(match[1], match[2]) is not True] == []
