"""Properties of whatever is read, over inputs that nobody thought of (Hypothesis)."""

import json
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

import data
from engine import packing
from engine.device import cpu_kernels
from engine.faults import is_each_alone
from grading import arithmetic, dataset, predictions, rules, score
from grading.dataset import Problem
from run import config, manifest, training_json
from run.errors import UserError

# The same inputs each time, and nothing kept: a failure here is a failure everywhere.
settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")

VALUES = config.read_settings(config.CONFIG_FILE)[0]
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)


def written(content: bytes, name: str = "file") -> Path:
    """A file of this content, in a folder that lives as long as the process."""
    folder = Path(mkdtemp(dir=ROOT[0]))
    (folder / name).write_bytes(content)
    return folder / name


ROOT: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _root(tmp_path_factory: pytest.TempPathFactory) -> None:
    ROOT[:] = [tmp_path_factory.mktemp("properties")]


# ---------------------------------------------------------------- settings


@given(
    st.sampled_from(config.KEYS),
    st.text() | st.integers().map(str) | st.floats().map(str) | any_json,
)
@example("epochs", "1_0")
@example("learning_rate", "1e400")
def test_a_setting_of_any_value_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    try:
        made = config.make_config(VALUES | {key: value}, "here")
    except UserError as error:
        assert f"{key}: " in str(error) or "micro_batch_tokens: " in str(error)
        assert len(str(error)) < 1000
    else:
        assert config.make_config(VALUES | {key: getattr(made, key)}, "there") == made


@given(
    model=printable,
    prompt=st.tuples(printable, printable)
    .map("{question}".join)
    .filter(lambda p: p.count("{question}") == 1),
    learning_rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    epochs=st.integers(1, 10**9),
    compile=st.booleans(),
    checkpoint_steps=st.none() | st.integers(1, 10**9),
    run_name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", fullmatch=True),
)
@example(
    model="no",
    prompt="yes {question}",
    learning_rate=1e-5,
    epochs=1,
    compile=True,
    checkpoint_steps=None,
    run_name="null",
)
@example(
    model="1e5",
    prompt="'\"{question}#:",
    learning_rate=5e-324,
    epochs=1,
    compile=False,
    checkpoint_steps=1,
    run_name="0x1",
)
def test_settings_are_read_back_as_they_were(**changed: Any) -> None:
    """Guards against YAML's own ideas of numbers, truth and quotes."""
    try:
        made = config.make_config(VALUES | changed, "here")
    except UserError:
        return
    values, _ = config.read_settings(written(config.settings_text(made).encode()))
    assert config.make_config(values, "there") == made


@given(
    st.binary() | st.text().map(str.encode) | any_json.map(lambda value: json.dumps(value).encode())
)
@example(b"a: &a [*a]")
@example(b"? [a]\n: b")
@example(b"a: !!python/name:os.system b")
def test_a_settings_file_of_any_content_is_read_or_refused(content: bytes) -> None:
    try:
        values, comments = config.read_settings(written(content))
    except UserError:
        return
    assert values.keys() == comments.keys() and all(type(value) is str for value in values.values())


# ---------------------------------------------------------------- rows


@given(st.binary() | any_json.map(lambda value: json.dumps(value).encode()))
@example(b'{"question": "?", "answer": "#### 1"}\n{"question": "?", "answer": "#### 1"')
def test_data_of_any_content_is_read_or_refused_with_its_line(content: bytes) -> None:
    file = written(content, "train.jsonl")
    try:
        problems = dataset.load_problems(str(file.parent), "train")
    except UserError as error:
        assert str(error).startswith(str(file)) and len(str(error)) < 600
    else:
        for problem in problems:
            rules.check_gold(problem.gold)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip()
)
numbers = st.from_regex(
    r"-?[0-9]{1,3}(,[0-9]{3})?(\.[0-9]+)?", fullmatch=True, alphabet=st.characters(codec="ascii")
)
reasonings = texts.filter(lambda text: "#" not in text)


@given(st.lists(st.tuples(texts, reasonings, numbers), min_size=1, max_size=5), st.booleans())
def test_valid_rows_are_read_as_they_are(
    rows: list[tuple[str, str, str]], ascii_only: bool
) -> None:
    """Guards against splitting at what Python, but not JSON Lines, takes for the end of a line."""
    lines = [
        json.dumps({"question": q, "answer": f"{r}\n#### {n}"}, ensure_ascii=ascii_only)
        for q, r, n in rows
    ]
    file = written("\n".join(lines).encode(), "test.jsonl")
    problems = dataset.load_problems(str(file.parent), "test")
    assert [(p.question, p.answer, p.gold) for p in problems] == [
        (q, f"{r}\n#### {n}", n) for q, r, n in rows
    ]
    assert [p.line for p in problems] == list(range(1, len(rows) + 1))


@given(
    st.lists(st.integers(0, 8), min_size=2, max_size=30), st.integers(1, 12), st.integers(0, 2**32)
)
def test_the_validation_split_is_a_partition_by_question(
    questions: list[int], size: int, seed: int
) -> None:
    problems = [Problem(str(question), f"{row}\n#### 1") for row, question in enumerate(questions)]
    try:
        train, validation = data.carve_validation(problems, size, seed)
    except UserError:
        return
    assert Counter(train) + Counter(validation) == Counter(problems)
    assert 0 < len(validation) <= size
    assert not {p.question for p in train} & {p.question for p in validation}


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(40, 90))
def test_micro_batches_hold_every_sequence_once(lengths: list[int], budget: int) -> None:
    examples = [
        packing.Example([number] * length, [number] * length)
        for number, length in enumerate(lengths)
    ]
    kernels = cpu_kernels(with_onednn=False)
    batches = packing.pack(examples, budget, kernels)
    for batch in batches:
        assert sum(batch.seqlens) == batch.num_tokens
        assert batch.num_tokens % kernels.row_multiple == 0
        assert batch.num_labels <= budget
    assert is_each_alone(examples, budget) == (len(batches) == len(examples))
    labels = Counter(label for batch in batches for label in batch.labels.tolist())
    assert labels == {number: length - 1 for number, length in enumerate(lengths)}


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(40, 200))
@example([31, 31, 31, 31, 31, 31, 13, 13, 13], 66)  # does not fit evenly into as many
def test_micro_batches_are_as_few_as_first_fit_needs_and_about_equally_full(
    lengths: list[int], budget: int
) -> None:
    """Guards against a small last one, one more to be even, and one that exceeds the budget."""
    examples = [packing.Example([0] * length, [0] * length) for length in lengths]
    inputs = [length - 1 for length in lengths]
    first_fit = packing._first_fit(inputs, budget)
    batches = packing.pack(examples, budget, replace(cpu_kernels(False), row_multiple=1))
    assert len(batches) == len(first_fit)
    assert all(batch.num_tokens <= budget or len(batch.seqlens) == 1 for batch in batches)
    sizes = sorted(batch.num_tokens for batch in batches)
    if sizes != sorted(sum(inputs[index] for index in members) for members in first_fit):
        # The fullest was the emptiest before its last row.
        assert sizes[-1] - sizes[0] <= max(inputs)


# ---------------------------------------------------------------- scoring


@given(st.text(), numbers, st.sampled_from(["eos", "length"]))
@example("#### " + "," * 50, "1", "eos")
@example("#### -", "-1", "eos")
def test_any_completion_gets_a_score_and_one_label(completion: str, gold: str, stop: str) -> None:
    verdicts = {name: rule(completion, gold) for name, rule in rules.RULES.items()}
    verdict = rules.grade(completion, gold, stop)
    assert verdict.by_rule == verdicts
    assert (verdict.label is None) == verdict.correct == verdicts["openai"]
    assert (verdict.false_equation is not None) <= (verdict.label is not None)


@given(
    reasonings,
    numbers,
    numbers,
    st.text().filter(lambda text: not text[:1].isnumeric() and text[:1] not in ".,"),
)
def test_the_first_number_after_the_marks_counts_and_commas_do_not(
    reasoning: str, number: str, gold: str, rest: str
) -> None:
    found = f"{reasoning}\n#### {number}{rest}"
    assert rules.correct_openai(found, gold) == (number.replace(",", "") == gold.replace(",", ""))
    assert rules.correct_openai(found, number)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_score(counts: tuple[int, int]) -> None:
    correct, total = counts
    low, high = score.wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    z, share = 1.959963984540054, correct / total  # Wilson's own formula
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    assert high - low == pytest.approx(2 * half, rel=1e-9)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_predictions_are_read_as_they_were_written(completions: list[str]) -> None:
    """With half surrogate pairs, line separators and escapes in them."""
    folder = Path(mkdtemp(dir=ROOT[0]))
    problem = Problem("?", "1 + 1 = 2\n#### 2")
    with predictions.PredictionsFile(folder / "eval", {}, len(completions)) as file:
        for number, completion in enumerate(completions):
            file.write(predictions.graded_row(number, None, problem, completion, "eos", 1))
    rows = predictions.read_predictions(folder / "eval" / "predictions.jsonl")
    assert [row["completion"] for row in rows] == completions


@given(st.binary() | any_json.map(lambda value: json.dumps(value).encode()), st.booleans())
def test_predictions_of_any_content_are_read_or_refused(
    content: bytes, drop_cut_line: bool
) -> None:
    try:
        rows = predictions.read_predictions(written(content), drop_cut_line)
        score.score(rows, len(rows), "here")
    except UserError as error:
        assert len(str(error)) < 600


# ---------------------------------------------------------------- the calculator

# Expressions as trees: a number, or an operator and two expressions.
decimals = st.tuples(st.integers(0, 9999), st.integers(0, 3)).map(
    lambda pair: Fraction(pair[0], 10 ** pair[1])
)
trees = st.recursive(
    decimals, lambda inner: st.tuples(st.sampled_from("+-*/"), inner, inner), max_leaves=6
)


def text_of(tree: Any) -> str:
    if isinstance(tree, Fraction):
        return str(float(tree)) if tree.denominator > 1 else str(tree)
    return f"({text_of(tree[1])} {tree[0]} {text_of(tree[2])})"


def value_of(tree: Any) -> Fraction:
    if isinstance(tree, Fraction):
        return tree
    left, right = value_of(tree[1]), value_of(tree[2])
    return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[
        tree[0]
    ](right)


@given(trees)
def test_an_expression_is_worth_what_it_is(tree: Any) -> None:
    """Against Python's own exact fractions."""
    try:
        expected = value_of(tree)
    except ZeroDivisionError:
        expected = None
    found = arithmetic.value_of(text_of(tree))
    assert found == expected or (found is None and len(text_of(tree)) > arithmetic.LONGEST)


@given(st.lists(decimals, min_size=2, max_size=6), st.data())
def test_products_come_before_sums_and_the_left_before_the_right(
    values: list[Fraction], draw: st.DataObject
) -> None:
    operators = draw.draw(
        st.lists(st.sampled_from("+-*"), min_size=len(values) - 1, max_size=len(values) - 1)
    )
    words = [text_of(values[0])]
    for operator, value in zip(operators, values[1:], strict=True):
        words += [operator, text_of(value)]
    terms, signs = [values[0]], [1]
    for operator, value in zip(operators, values[1:], strict=True):
        if operator == "*":
            terms[-1] *= value
        else:
            terms.append(value)
            signs.append(1 if operator == "+" else -1)
    assert arithmetic.value_of(" ".join(words)) == sum(
        sign * term for sign, term in zip(signs, terms, strict=True)
    )


@given(st.text() | st.text("0123456789+-*/().,%$ =<>x×"))
@example("9" * 300)
@example("(" * 150 + "1" + ")" * 150)
@example("9**9")
def test_any_text_has_a_bounded_value_or_none(text: str) -> None:
    value = arithmetic.value_of(text)
    assert value is None or abs(value) <= arithmetic.LARGEST


# ---------------------------------------------------------------- checkpoints


def manifest_of(sizes: dict[str, float]) -> bytes:
    files = {name: {"size": size, "xxh3_128": ""} for name, size in sizes.items()}
    return json.dumps({"files": files}).encode()


@given(
    st.binary()
    | any_json.map(lambda v: json.dumps(v).encode())
    | any_json.map(lambda v: json.dumps({"files": v}).encode())
)
@example(manifest_of({"training.json": 1e400}))
@example(manifest_of({"training.json": 1, "a\0b": 1}))
@example(manifest_of({"training.json": 2, "\ud800": 1}))
def test_a_manifest_of_any_content_is_a_fault(content: bytes) -> None:
    file = written(content, manifest.MANIFEST_FILE)
    (file.parent / manifest.DESCRIPTION_FILE).write_text("{}")
    assert manifest.fault_of(file.parent)


@given(st.binary() | any_json.map(lambda value: json.dumps(value).encode()))
def test_a_description_of_any_content_is_read_or_refused(content: bytes) -> None:
    with pytest.raises(UserError):
        training_json.read_description(written(content, manifest.DESCRIPTION_FILE).parent)
