"""From rows to labels: only answer and EOS are supervised, no row is repeated or lost silently."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import PROMPT, real_folder, write_rows
from sentencepiece import SentencePieceProcessor

import data
from engine import packing
from engine.device import cpu_kernels
from engine.loading import load_tokenizer
from engine.tokenizer import Tokenizer
from grading import dataset, rules
from grading.dataset import Problem
from run import files
from run.errors import UserError, one_line


def assert_boundary(
    folder: Path, problems: Sequence[Problem], prompt: str
) -> list[packing.Example]:
    """Prompt ids + answer ids == SentencePiece's ids of the joint text; the rest is unlabelled.

    Returns:
        The rows as examples.
    """
    tokenizer, reference = (
        load_tokenizer(folder),
        SentencePieceProcessor(model_file=str(folder / "tokenizer.model")),
    )
    prompts = data.encode_prompts(tokenizer, problems, prompt)
    examples = data.encode(tokenizer, problems, prompt)
    separator = "" if prompt.endswith("\n") else " "
    texts = [prompt.replace("{question}", problem.question) for problem in problems]
    whole = [
        text + separator + problem.answer for text, problem in zip(texts, problems, strict=True)
    ]
    theirs = zip(reference.encode(texts), reference.encode(whole), strict=True)
    for problem, prompt_ids, example, (alone, joint) in zip(
        problems, prompts, examples, theirs, strict=True
    ):
        assert prompt_ids == [tokenizer.bos_token_id, *alone]
        assert example.input_ids == [tokenizer.bos_token_id, *joint, tokenizer.eos_token_id]
        assert example.input_ids[: len(prompt_ids)] == prompt_ids
        answer_ids = example.input_ids[len(prompt_ids) :]
        assert example.labels == [packing.IGNORE] * len(prompt_ids) + answer_ids
        assert example.line == problem.line
        assert answer_ids[-1] == tokenizer.eos_token_id
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
        assert example.input_ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(answer_ids[:-1]).removeprefix(" ") == problem.answer.removeprefix(
            " "
        )
    return examples


@pytest.mark.parametrize("prompt", [PROMPT, "Q: {question}\n\n### Answer:\n", "{question}"])
def test_boundary_of_fixture_rows(
    tokenizer_folder: Path, problems: list[Problem], prompt: str
) -> None:
    """Guards against a second BOS, a lost EOS, a first answer token that is never decoded, a space
    after a line break, and the number of another line."""
    numbered = [replace(problem, line=2 * n + 5) for n, problem in enumerate(problems)]
    assert_boundary(
        tokenizer_folder,
        [p for p in numbered if not (prompt[-1] == "\n" and p.answer[0] == " ")],
        prompt,
    )


@pytest.mark.parametrize("layout", ["TOKENIZER_DIR", "TOKENIZER_HUB_DIR"])
def test_boundary_of_all_real_rows(layout: str) -> None:
    folder = real_folder("GSM8K_DIR")
    train, test = (dataset.load_problems(str(folder), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 1319)
    examples = assert_boundary(real_folder(layout), train + test, PROMPT)
    assert max(len(example.input_ids) for example in examples) == 577


def test_the_example_in_the_docstring_is_the_first_row() -> None:
    """Guards against an example that is not what the code does."""
    tokenizer = load_tokenizer(real_folder("TOKENIZER_DIR"))
    rows = dataset.load_problems(str(real_folder("GSM8K_DIR")), "train")[:1]
    [example] = data.encode(tokenizer, rows, PROMPT)
    shown = " ".join(data.__doc__.split())
    for text in (rows[0].question, rows[0].answer):
        assert " ".join(text.split()) in shown
    assert f"it becomes {len(example.input_ids)} tokens" in shown
    first_label = example.labels.count(packing.IGNORE)
    columns = [*range(5), *range(first_label - 2, first_label + 2), -2, -1]
    for name, values in (
        ("token", [tokenizer.piece(index) for index in example.input_ids]),
        ("input_ids", example.input_ids),
        ("labels", example.labels),
    ):
        cells = [str(values[column]) for column in columns]
        assert " ".join([name, *cells[:5], "...", *cells[5:9], "...", *cells[9:]]) in shown


def test_a_prompt_that_merges_with_the_answer_is_refused(tokenizer: Tokenizer) -> None:
    """Guards against training on ids that are never decoded: '▁' + 'x' became '▁x'."""
    with pytest.raises(UserError, match=r"merges its end .* line 4,"):
        data.encode(
            tokenizer,
            [Problem("How many?", "There are 3\n#### 3", line=4)],
            "Question: {question} Answer: ",
        )


def test_special_tokens_in_the_prompt_are_said_to_be_text(
    tokenizer: Tokenizer, problems: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a chat template that is trained on letter by letter, in silence."""
    files.forget_what_was_said()
    data.encode(tokenizer, problems, PROMPT)
    assert capsys.readouterr().out == ""  # though a question contains </s>
    data.encode(tokenizer, problems, "<s>[INST] {question} [/INST]")
    data.encode_prompts(tokenizer, problems, "<s>[INST] {question} [/INST]")
    line = f"prompt: read as plain text, though special tokens of model {tokenizer.name}: '<s>' ("
    out = capsys.readouterr().out
    assert out.startswith(line) and out.count("\n") == 1


def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    """Guards against a question that contains </s>, which would end the sequence there."""
    [example] = data.encode(tokenizer, [Problem("</s><s>", "<unk></s> #1\n#### 1")], PROMPT)
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} & set(
        example.input_ids[1:-1]
    )


def test_a_question_with_braces_is_text(tokenizer: Tokenizer) -> None:
    """Guards against str.format on the texts of a row."""
    [ids] = data.encode_prompts(
        tokenizer, [Problem("{x} {question} {0}", "1\n#### 1")], "{{q}} {question}"
    )
    assert tokenizer.decode(ids) == "{{q}} {x} {question} {0}"


def test_long_rows_are_left_out_counted_and_reported(
    tokenizer: Tokenizer, problems: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a cut answer, which would teach a wrong ending."""
    examples = data.encode(tokenizer, problems, PROMPT)
    lengths = sorted(len(example.input_ids) for example in examples)
    limit = lengths[len(lengths) // 2]
    kept = data.leave_out_long(examples, limit, "train")
    left_out = sum(length > limit for length in lengths)
    assert [e for e in examples if len(e.input_ids) <= limit] == kept
    assert capsys.readouterr().out == (
        f"train: left out {left_out} of {len(examples)} rows, which have more than {limit} tokens\n"
    )
    assert data.leave_out_long(kept, limit, "train") == kept
    assert capsys.readouterr().out == ""
    rows = data.TrainingProblems(problems[:60], problems[60:], {})
    for side in data.encode_for_training(tokenizer, rows, PROMPT, limit):
        assert max(len(example.input_ids) for example in side) <= limit
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["train", "validation"]
    with pytest.raises(UserError, match="no train row is that short"):
        data.leave_out_long(examples, 5, "train")


# ---------------------------------------------------------------- splits and order


def test_validation_is_disjoint_from_train_and_stable(problems: list[Problem]) -> None:
    """Guards against a split that depends on machine, library version or the file's order."""
    train, validation = data.carve_validation(problems, 30, seed=7)
    assert len(validation) == 30 and len(train) == len(problems) - 30
    assert not set(train) & set(validation) and set(train) | set(validation) == set(problems)
    again = data.carve_validation(problems[::-1], 30, seed=7)
    assert (set(again[0]), set(again[1])) == (set(train), set(validation))
    assert set(data.carve_validation(problems, 30, seed=8)[1]) != set(validation)


def test_split_and_order_are_those_of_every_other_machine() -> None:
    """Fixed values: if they change, resumed and compared runs no longer see the same rows."""
    rows = [Problem(f"question {number}", "#### 1") for number in range(12)]
    chosen = [problem.question for problem in data.carve_validation(rows, 3, seed=0)[1]]
    assert chosen == EXPECTED_VALIDATION
    assert data.stable_permutation(8, 0, 1) == EXPECTED_ORDER


EXPECTED_VALIDATION = ["question 0", "question 2", "question 6"]
EXPECTED_ORDER = [7, 3, 4, 5, 0, 2, 6, 1]


def test_rows_of_one_question_stay_on_one_side() -> None:
    """Guards against augmented data leaking into validation."""
    rows = [Problem(f"question {number // 3}", f"way {number}\n#### 1") for number in range(60)]
    train, validation = data.carve_validation(rows, 10, seed=0)
    assert len(validation) == 9
    assert not {p.question for p in train} & {p.question for p in validation}


@pytest.mark.parametrize("size", [30, 31])
def test_a_validation_size_that_leaves_nothing_is_refused(size: int) -> None:
    """Guards against a message about row lengths, where all rows went to validation."""
    rows = [Problem(f"question {number}", "#### 1") for number in range(30)]
    with pytest.raises(UserError, match=f"validation_size {size} leaves nothing of the 30 train"):
        data.carve_validation(rows, size, seed=0)


def test_each_question_is_asked_once_by_its_first_row(
    tmp_path: Path, problems: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against samples graded by a row that was added, and against an idle message."""
    write_rows(tmp_path / "train.jsonl", problems[:30])
    write_rows(tmp_path / "test.jsonl", problems[30:35])
    expected, _ = data.load_questions(str(tmp_path), "train", 5, 0)
    assert capsys.readouterr().out == ""
    added = [Problem(problem.question, "Or so.\n" + problem.answer) for problem in expected]
    write_rows(tmp_path / "train.jsonl", problems[:30] + added)
    assert data.load_questions(str(tmp_path), "train", 5, 0)[0] == expected
    assert "50 rows of 25 questions" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 2, 60])
def test_rows_of_a_single_question_can_not_be_split(size: int) -> None:
    """Guards against a validation_size that is too small or leaves nothing, whatever it is."""
    for count in (1, 60):
        rows = [Problem("the question", f"way {number}\n#### 1") for number in range(count)]
        with pytest.raises(UserError, match="have only one question: add others"):
            data.carve_validation(rows, size, seed=0)


def test_real_splits_are_disjoint() -> None:
    folder = str(real_folder("GSM8K_DIR"))
    splits = [
        data.load_split(folder, split, 305, 0)[0] for split in ("train", "validation", "test")
    ]
    assert [len(split) for split in splits] == [7168, 305, 1319]
    questions = [{problem.question for problem in split} for split in splits]
    assert len(set.union(*questions)) == sum(map(len, questions)) == 8792


def test_a_test_question_in_train_is_refused(problems: list[Problem]) -> None:
    with pytest.raises(UserError, match="train and test share 1 question, such as"):
        dataset.check_disjoint(problems[:20], problems[19:30])
    copied = Problem(f" {problems[20].question.upper()}".replace(" ", "\n "), "#### 0")
    with pytest.raises(UserError, match="train and test share 1 question, such as"):
        dataset.check_disjoint([*problems[:20], copied, copied], problems[20:30])
    dataset.check_disjoint(problems[:20], problems[20:30])


def test_rows_of_a_run_are_disjoint_and_have_fingerprints(
    tmp_path: Path, problems: list[Problem]
) -> None:
    """Guards against a fingerprint of other rows: resumed runs and evaluations compare it."""
    for split, rows in (("train", problems[12:]), ("test", problems[:12])):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    found = data.load_for_training(str(tmp_path), 17, seed=3)
    assert (found.train, found.validation) == data.carve_validation(problems[12:], 17, seed=3)
    assert found.sha256 == {
        "train_sha256": data.fingerprint(problems[12:]),
        "validation_sha256": data.fingerprint(found.validation),
        "test_sha256": data.fingerprint(problems[:12]),
    }
    # Other words are other rows, and so is another order.
    reworded = replace(problems[0], answer="So: " + problems[0].answer)
    for other in ([reworded, *problems[1:12]], problems[11::-1]):
        assert data.fingerprint(other) != found.sha256["test_sha256"]
    write_rows(tmp_path / "test.jsonl", problems[:13])
    with pytest.raises(UserError, match="train and test share 1 question, such as"):
        data.load_for_training(str(tmp_path), 17, seed=3)


def test_windows_cover_each_epoch_once_in_another_order(
    tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    """Guards against skipped or repeated rows, and against the same order in each epoch."""
    examples = data.encode(tokenizer, problems[:50], PROMPT)
    batches = data.Batches(examples, batch_size=16, seed=3)
    assert batches.per_epoch == 4
    epochs = [[batches[step] for step in range(4 * epoch, 4 * epoch + 4)] for epoch in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [16, 16, 16, 2]
        flat = [example for batch in epoch for example in batch]
        assert sorted(map(id, flat)) == sorted(map(id, examples))
    assert epochs[0] != epochs[1] != epochs[2]
    # Computed, not replayed: asking for a later step first gives the same batch.
    fresh = data.Batches(examples, batch_size=16, seed=3)
    assert fresh[9] == epochs[2][1] and fresh[2] == epochs[0][2]


# ---------------------------------------------------------------- packing


def test_a_batch_is_packed_ahead_once_and_only_with_the_limit_of_its_step(
    tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    """Guards against the rows of another step, or a limit that memory has proved too large."""
    kernels = replace(cpu_kernels(with_onednn=False), packs_ahead=True)
    batches = data.Batches(data.encode(tokenizer, problems[:40], PROMPT), 12, seed=0)
    packer = packing.Packer(batches)
    first = packer.pack(packer.batch(0), 500, kernels)
    packer.pack_ahead(kernels)
    second = packer.batch(1)
    ahead = packer.pack(second, 500, kernels)
    assert packer.pack(second, 500, kernels) is ahead  # as it was packed, and kept for a second try
    assert tokens_in(first) == tokens_in(packing.pack(batches[0], 500, kernels))
    assert tokens_in(ahead) == tokens_in(packing.pack(batches[1], 500, kernels))
    half = packer.pack(second, 250, kernels)  # memory ran out
    assert max(batch.num_tokens for batch in half) <= 256
    packer.pack_ahead(kernels)
    other = packer.pack(batches[5], 250, kernels)  # not the rows that were packed ahead
    assert tokens_in(other) == tokens_in(packing.pack(batches[5], 250, kernels))
    third = packer.pack(packer.batch(2), 250, kernels)
    assert tokens_in(third) == tokens_in(packing.pack(batches[2], 250, kernels))


def tokens_in(micro_batches: list[packing.MicroBatch]) -> list[list[int]]:
    return [batch.input_ids.tolist() for batch in micro_batches]


def test_no_small_micro_batch_is_left_over() -> None:
    """Guards against a last one whose few operations a fast device finishes before the next."""
    kernels = replace(cpu_kernels(with_onednn=False), row_multiple=1)
    rows = [packing.Example([0] * 101, [0] * 101) for _ in range(10)]
    assert [batch.num_tokens for batch in packing.pack(rows, 850, kernels)] == [500, 500]


@pytest.mark.parametrize("multiple", [64, 1])
@pytest.mark.parametrize("budget", [150, 300, 1000])
def test_packing_loses_nothing_and_keeps_the_budget(
    tokenizer: Tokenizer, problems: list[Problem], budget: int, multiple: int
) -> None:
    """Guards against padding, cut sequences, positions that run on, and misplaced labels."""
    examples = data.encode(tokenizer, problems, PROMPT)
    kernels = replace(cpu_kernels(with_onednn=False), row_multiple=multiple)
    batches = packing.pack(examples, budget, kernels)
    found = []
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        assert (
            borders[0] == 0 and borders[-1] == batch.num_tokens and batch.num_tokens % multiple == 0
        )
        labelled = batch.output_positions[: batch.num_labels].tolist()
        assert len(batch.output_positions) == batch.num_labels + -batch.num_labels % multiple
        next_token = dict(zip(labelled, batch.labels.tolist(), strict=True))
        sequences = list(itertools.pairwise(borders))
        if max(labelled) < sequences[-1][0]:  # without a label: the padding
            start, end = sequences.pop()
            assert end - start < multiple
        assert sequences[-1][1] <= budget
        for start, end in sequences:
            ids = batch.input_ids[start:end].tolist()
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            labels = [packing.IGNORE] + [
                next_token.get(start + p, packing.IGNORE) for p in range(end - start)
            ]
            found.append(packing.Example([*ids, labels[-1]], labels))  # EOS is a label and no input
        assert batch.seqlens == tuple(b - a for a, b in itertools.pairwise(borders))
    assert sorted(found, key=str) == sorted(examples, key=str)
    # First-fit decreasing needs at most 11/9 of the optimum and 6/9 of a bin.
    fewest = math.ceil(sum(len(example.input_ids) for example in examples) / budget)
    assert len(batches) <= math.ceil(fewest * 11 / 9 + 6 / 9) + 1


# ---------------------------------------------------------------- files


def test_local_folder_is_read_to_the_letter(problems: list[Problem], tmp_path: Path) -> None:
    """Guards against splitlines, which breaks a row with U+2028, and against stripped texts."""
    write_rows(tmp_path / "train.jsonl", problems)
    assert dataset.load_problems(str(tmp_path), "train") == problems


def test_rows_as_other_programs_write_them(problems: list[Problem], tmp_path: Path) -> None:
    """Files put together by cat, a single row with a list of tags, an array after a blank line."""
    file = tmp_path / "train.jsonl"
    one, *_ = rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in problems]
    for text, count in (
        ("".join(f"\ufeff{row}\n" for row in rows), len(rows)),
        (json.dumps(json.loads(one) | {"tags": ["a"]}), 1),
        (f"\n [{one}]", 1),
    ):
        file.write_text(text)
        assert dataset.load_problems(str(tmp_path), "train") == problems[:count]


def test_real_data_is_the_published_one() -> None:
    folder = real_folder("GSM8K_DIR")
    for split in ("train", "test"):
        for problem in dataset.load_problems(str(folder), split):
            assert problem.answer.endswith(f"#### {problem.gold}")


GOOD = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"})


@pytest.mark.parametrize(
    ("bad", "fragment"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ('"text"', "is not a JSON object"),
        ('{"question": "x"}', "'answer' is missing"),
        ('{"answer": "#### 1"}', "'question' is missing"),
        ('{"question": 5, "answer": "#### 1"}', "'question' is 5"),
        ('{"question": " ", "answer": "#### 1"}', "'question' is"),
        ('{"question": "x", "answer": null}', "'answer' is null"),
        ('{"question": "x", "answer": "it is 5"}', "must end in a line '#### NUMBER'"),
        ('{"question": "x", "answer": "#### five"}', "'five'"),
        ('{"question": "x", "answer": "#### "}', "must end in"),
        ('{"question": "x", "answer": "#### 5\\nreally"}', "must end in"),
        ('{"question": "x", "answer": "#### 4\\n#### 5"}', "its only '####'"),
        ('{"question": "x", "answer": "#### ."}', "'.'"),
        ('{"question": "x", "answer": "####  18"}', r"'####\x20\x2018'"),
        ('{"question": "x", "answer": "#### ٣"}', r"'\u0663'"),
        ('{"question": "\\ud800", "answer": "#### 5"}', "an unpaired surrogate"),
        ('{"question": "\udcff", "answer": "#### 5"}', "is not valid JSON"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, bad: str, fragment: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(f"{GOOD}\n{bad}\n{GOOD}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        dataset.load_problems(str(tmp_path), "train")
    assert f"{file}, line 2: " in str(error.value) and fragment in str(error.value)


@pytest.mark.parametrize(
    ("answer", "shown", "what"),
    [
        ("It is 5", "'It is 5'", "but contains none"),
        ("So #### 5", "'So #### 5'", "but 'So ' precedes it on its line"),
        (" #### 5", "' #### 5'", "but ' ' precedes it"),
        ("x\r#### 5", r"'x\r#### 5'", r"but 'x\r' precedes it"),
        ("x\u2028#### 5", r"'x\u2028#### 5'", r"but 'x\u2028' precedes it"),
        ("##### 5", "'##### 5'", "but '#' precedes it"),
        ("#### 4 #### 4", "'#### 4 #### 4'", "but contains it 2 times"),
        ("x\n####", r"'x\n####'", "but no number follows it on its line"),
        ("####\n5", r"'####\n5'", "but no number follows it on its line"),
        ("#### 5\nor  6", r"'#### 5\nor\x20\x206'", r"but 'or\x20\x206' follows its line"),
        ("####5", "'####5'", "but '5' is where a single space must"),
        ("####  5", r"'####\x20\x205'", r"but '\x20\x20' is where a single space must"),
        ("####\xa05", r"'####\xa05'", r"but '\xa0' is where a single space must"),
        ("#### \xa05", r"'#### \xa05'", r"but ' \xa0' is where a single space must"),
        ("####\t5", r"'####\t5'", r"but '\t' is where"),
        ("#### 5\u200b", r"'#### 5\u200b'", r"(it contains '\u200b', ZERO WIDTH SPACE)"),
        ("#### 5\x00", r"'#### 5\x00'", r"(it contains '\x00')"),
        ("#### 5\r6", r"'#### 5\r6'", r"(it contains '\r')"),
        ("#### \u22125", r"'#### \u22125'", r"(it contains '\u2212', MINUS SIGN)"),
        ("#### \uff15", r"'#### \uff15'", r"(it contains '\uff15', FULLWIDTH DIGIT FIVE)"),
        ("#### 1/2", "'#### 1/2'", "(it contains '/')"),
        ("#### $5", "'#### $5'", "(it contains '$')"),
        ("#### 1e3", "'#### 1e3'", "(it contains 'e')"),
        ("#### 3.", "'#### 3.'", "the gold answer '3.' is not a number"),
        ("#### 3,14", "'#### 3,14'", "(a comma may only separate groups of three digits)"),
        ("#### 1000,000", "'#### 1000,000'", "(a comma may only separate groups"),
        ("#### 1,000,00", "'#### 1,000,00'", "(a comma may only separate groups"),
        ("#### 1.000,5", "'#### 1.000,5'", "(a comma may only separate groups"),
        (
            "y" * 900 + "\n####  5" + "z" * 900,
            r"yyy\n####\x20\x205zzz",
            "is where a single space must",
        ),
    ],
)
def test_a_bad_gold_is_shown_to_the_letter(
    tmp_path: Path, answer: str, shown: str, what: str
) -> None:
    """Guards against a message in which the gold looks right, as one_line normalises spaces."""
    row = json.dumps({"question": "x", "answer": answer})
    (tmp_path / "train.jsonl").write_text(f"{GOOD}\n{row}\n")
    with pytest.raises(UserError) as error:
        dataset.load_problems(str(tmp_path), "train")
    line = one_line(error.value)
    assert "line 2: the answer " in line and shown in line and what in line
    assert line.isascii() and line == str(error.value) and len(line) < 500


def test_golds_in_an_unusual_spelling_are_said(
    tmp_path: Path, problems: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a gold of 3.0, which a completion with 3 never equals, going unreported."""
    odd = {
        "3.0": "3",
        "007": "7",
        "-0": "0",
        "-0.0": "0",
        ".5": "0.5",
        "0.50": "0.5",
        "-01,450.10": "-1450.1",
    }
    plain = ["3", "0.5", "-3", "0", "100", "1,450,000", "10.01", "9" * 5000]
    for gold, spelt in [*odd.items(), *((gold, gold.replace(",", "")) for gold in plain)]:
        write_rows(tmp_path / "test.jsonl", [*problems[:2], Problem("?", f"x\n#### {gold}")])
        assert dataset.load_problems(str(tmp_path), "test")[-1].gold == gold
        out = capsys.readouterr().out
        assert rules.correct_openai(f"#### {spelt}", gold) == (gold in plain)
        assert (out == "") == (gold in plain)
        if out:
            assert (
                f"test: 1 of 3 gold answers are not spelt plainly, the first in row 3: {gold},"
                in out
            )
            assert f": {spelt} does not count" in out and out.count("\n") == 1


# ---------------------------------------------------------------- forms of a folder


def write_parquet(file: Path, problems: Sequence[Problem], **more: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "question": [p.question for p in problems],
        "answer": [p.answer for p in problems],
    } | more
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def write_array(file: Path, problems: Sequence[Problem], indent: int | None = None) -> None:
    rows = [{"question": p.question, "answer": p.answer} for p in problems]
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")


def write_shards(folder: Path, problems: Sequence[Problem]) -> None:
    for number, start in enumerate(range(0, len(problems), 50)):
        write_parquet(folder / f"train-{number:05}-of-00003.parquet", problems[start : start + 50])


def write_clone(folder: Path, problems: Sequence[Problem]) -> None:
    """As git clones the hub's repository, which also has the rows in another wording."""
    write_parquet(
        folder / "main" / "train-00000-of-00001.parquet", problems, source=["x"] * len(problems)
    )
    write_parquet(folder / "main" / "test-00000-of-00001.parquet", problems[:1])
    write_parquet(folder / "socratic" / "train-00000-of-00001.parquet", problems[:3])
    (folder / "README.md").touch()


FORMS: dict[str, Callable[[Path, Sequence[Problem]], None]] = {
    "lines": lambda folder, rows: write_rows(folder / "train.jsonl", list(rows)),
    "lines, named json": lambda folder, rows: write_rows(folder / "train.json", list(rows)),
    "array": lambda folder, rows: write_array(folder / "train.json", rows),
    "array over many lines": lambda folder, rows: write_array(
        folder / "train.json", rows, indent=2
    ),
    "array, named jsonl": lambda folder, rows: write_array(folder / "train.jsonl", rows, indent=2),
    "parquet": lambda folder, rows: write_parquet(folder / "train.parquet", rows),
    "parquet of categories": lambda folder, rows: write_parquet(
        folder / "train.parquet",
        rows,
        answer=pyarrow.array([p.answer for p in rows]).dictionary_encode(),
    ),
    "parquet of large text": lambda folder, rows: write_parquet(
        folder / "train.parquet",
        rows,
        question=pyarrow.array([p.question for p in rows], pyarrow.large_string()),
    ),
    "parquet of text views": lambda folder, rows: write_parquet(
        folder / "train.parquet",
        rows,
        question=pyarrow.array([p.question for p in rows], pyarrow.string_view()),
    ),
    "shards": write_shards,
    "parquet in main": lambda folder, rows: write_parquet(folder / "main" / "train.parquet", rows),
    "clone": write_clone,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(
    tmp_path: Path, problems: list[Problem], form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against rows that are lost, changed, out of order or taken from another file."""
    FORMS[form](tmp_path, problems)
    write_rows(tmp_path / "trains.jsonl", problems[:1])  # of no split
    write_parquet(tmp_path / "valid-00000-of-00001.parquet", problems[:1])
    (tmp_path / "train-00000-of-00001.parquet.part").touch()  # of a download that was cut
    found = dataset.load_problems(str(tmp_path), "train")
    assert found == problems and [problem.line for problem in found] == list(
        range(1, len(problems) + 1)
    )
    assert data.fingerprint(found) == data.fingerprint(problems)
    assert capsys.readouterr().out == ""
    if form in ("clone", "parquet in main"):
        assert dataset.load_problems(str(tmp_path / "main"), "train") == problems


def test_real_rows_are_the_same_from_parquet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = dataset.load_problems(str(real_folder("GSM8K_DIR")), "train")
    write_clone(tmp_path, rows)
    assert data.fingerprint(dataset.load_problems(str(tmp_path), "train")) == data.fingerprint(rows)
    assert len(rows) == 7473 and capsys.readouterr().out == ""


def test_several_forms_of_a_split_are_refused_by_name(
    tmp_path: Path, problems: list[Problem]
) -> None:
    """Guards against a silent choice between them."""
    for form, name in (
        ("array", "train.json"),
        ("parquet", "train.parquet"),
        ("shards", "train-00000-of-00003.parquet"),
        ("clone", "main/train-00000-of-00001.parquet"),
    ):
        folder = tmp_path / form
        FORMS["lines"](folder, [])
        FORMS[form](folder, problems)
        with pytest.raises(UserError) as error:
            dataset.load_problems(str(folder), "train")
        assert "train in 2 forms" in str(error.value) and f"(train.jsonl, {name})" in str(
            error.value
        )
        if form == "clone":  # the splits may differ in form
            assert dataset.load_problems(str(folder), "test") == problems[:1]


ROW = {"question": ["1 + 1?"], "answer": ["2\n#### 2"]}


@pytest.mark.parametrize(
    ("name", "put", "fragment"),
    [
        ("train.json", b"[]", "is empty"),
        ("train.json", b"[1]", "train.json, row 1: is not a JSON object"),
        ("train.json", f'[{{"question": {[5] * 999}}}]'.encode(), "row 1: 'question' is [5, 5, "),
        ("train.json", f"[{GOOD}, {{}}]".encode(), "train.json, row 2: 'question' is missing"),
        (
            "train.json",
            f"[{GOOD}\n,{GOOD}\n{GOOD}]".encode(),
            "train.json, line 3: is not valid JSON",
        ),
        ("train.json", f"[{GOOD},\n".encode(), "train.json, line 2: is not valid JSON"),
        ("train.json", b'[\n\n"caf\xe9"]', "train.json, line 3: is not valid JSON"),
        ("train.json", b"[" * 100_000, "train.json, line 1: is not valid JSON"),
        ("train.json", b"[" + b"9" * 10_000 + b"]", "train.json, line 1: is not valid JSON"),
        (
            "train.json",
            f'{{"rows": [{GOOD}]}}'.encode(),
            "train.json, line 1: 'question' is missing",
        ),
        ("train.json", b'{"rows": ' * 100_000, "train.json, line 1: is not valid JSON"),
        ("train.json", GOOD.encode("utf-16-le"), "train.json, line 1: is not valid JSON"),
        ("train.json", b"\xef\xbb\xbf", "is empty"),
        ("train.parquet", b"", "is damaged or not a Parquet file"),
        ("train.parquet", b"PAR1" * 9, "is damaged or not a Parquet file"),
        ("train.parquet", {"question": ["x"]}, "has 0 columns 'answer'"),
        (
            "train.parquet",
            pyarrow.table([["x"], ["y"], ["2\n#### 2"]], ["question", "question", "answer"]),
            "has 2 columns 'question'",
        ),
        ("train.parquet", ROW | {"answer": [5]}, "its column 'answer' is of type int64"),
        ("train.parquet", ROW | {"answer": [b"x"]}, "its column 'answer' is of type binary"),
        ("train.parquet", ROW | {"answer": [None]}, "its column 'answer' is of type null"),
        ("train.parquet", ROW | {"answer": [["x"]]}, "its column 'answer' is of type list"),
        (
            "train.parquet",
            {name: [*cells, None] for name, cells in ROW.items()},
            "parquet, row 2: 'question' is null",
        ),
        (
            "train.parquet",
            ROW | {"answer": ["2\n#### \xa02"]},
            r"parquet, row 1: the answer '2\n#### \xa02'",
        ),
        ("train.parquet", {"question": [], "answer": []}, "its column 'question' is of type null"),
        ("train-00000-of-00002.parquet", ROW, "lacks train-00001-of-00002.parquet"),
        ("train-00001-of-00001.parquet", ROW, "lacks train-00000-of-00001.parquet"),
        (
            "train-00000-of-00000.parquet",
            ROW,
            "has train-00000-of-00000.parquet in addition to 0 others",
        ),
        (
            "train.arrow",
            b"x",
            "train.jsonl: can't be read (No such file or directory): a data set folder contains",
        ),
    ],
)
def test_bad_files_of_every_form_are_one_line(
    tmp_path: Path, name: str, put: object, fragment: str
) -> None:
    if isinstance(put, bytes):
        (tmp_path / name).write_bytes(put)
    else:
        pyarrow.parquet.write_table(pyarrow.table(put), tmp_path / name)
    with pytest.raises(UserError) as error:
        dataset.load_problems(str(tmp_path), "train")
    assert (
        fragment in str(error.value)
        and str(tmp_path) in str(error.value)
        and len(str(error.value)) < 600
    )


@pytest.mark.parametrize("shape", [None, 2])
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_an_object_of_arrays_is_said_as_such(tmp_path: Path, name: str, shape: int | None) -> None:
    """On one line, which would only lack a question, and on many, whose first is not valid JSON."""
    rows = {"version": "1", "train": [json.loads(GOOD)], "test": []}
    (tmp_path / name).write_text(json.dumps(rows, indent=shape))
    with pytest.raises(
        UserError, match=f'{name}, line 1: .* under "train", "test": write that array alone'
    ):
        dataset.load_problems(str(tmp_path), "train")


@pytest.mark.parametrize("place", ["main", "data"])
def test_a_clone_of_the_hub_in_either_layout(
    tmp_path: Path, problems: list[Problem], place: str
) -> None:
    (tmp_path / place).mkdir()
    for split, rows in (("train", problems[1:]), ("test", problems[:1])):
        write_parquet(tmp_path / place / f"{split}-00000-of-00001.parquet", rows)
        write_rows(tmp_path / place / f"{split}.jsonl", problems[1:2])  # somebody's, of no form
    assert dataset.load_problems(str(tmp_path), "train") == problems[1:]
    assert dataset.load_problems(str(tmp_path), "test") == problems[:1]
    write_parquet(tmp_path / "train.parquet", problems)
    with pytest.raises(
        UserError, match=rf"in 2 forms \(train.parquet, {place}/train-00000-of-00001.parquet\)"
    ):
        dataset.load_problems(str(tmp_path), "train")


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.json", "train.parquet", "main/train-00000-of-00001.parquet"]
)
def test_a_file_that_git_has_not_fetched_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "main").mkdir()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=f"{name}: is a pointer .*: run git lfs pull"):
        dataset.load_problems(str(tmp_path), "train")


def test_a_bad_row_is_counted_in_its_own_part(tmp_path: Path, problems: list[Problem]) -> None:
    for number, row in enumerate((problems[0], Problem("x", "none"))):
        write_parquet(tmp_path / f"train-{number:05}-of-00002.parquet", [row])
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet, row 1: the answer"):
        dataset.load_problems(str(tmp_path), "train")


def test_parts_of_another_split_in_parts_are_refused(
    tmp_path: Path, problems: list[Problem]
) -> None:
    """Guards against duplicate rows from two downloads into one folder."""
    write_shards(tmp_path, problems)
    write_parquet(tmp_path / "train-00000-of-00001.parquet", problems)
    with pytest.raises(
        UserError, match=r"has train-00000-of-00001\.parquet in addition to 3 others"
    ):
        dataset.load_problems(str(tmp_path), "train")


def test_a_parquet_file_damaged_anywhere_is_read_or_refused(
    tmp_path: Path, problems: list[Problem]
) -> None:
    """Guards against a traceback, and, with page checksums, against other rows."""
    file = tmp_path / "train.parquet"
    table = pyarrow.table(
        {"question": [p.question for p in problems], "answer": [p.answer for p in problems]}
    )
    pyarrow.parquet.write_table(table, file, write_page_checksum=True, compression="none")
    whole, refused = file.read_bytes(), 0
    for place in range(0, len(whole), 61):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            assert dataset.load_problems(str(tmp_path), "train") == problems
        except UserError as error:
            refused += "train.parquet" in str(error)
    assert refused > len(whole) / 61 / 2


def test_bad_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").touch()
    (tmp_path / "folder" / "train.jsonl").mkdir(parents=True)
    for place, fragment in (
        (tmp_path, "can't be read"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "folder", "can't be read"),
        (
            tmp_path / "empty" / "train.jsonl",
            "is a file: name the folder that contains it; a data set folder contains",
        ),
        (tmp_path / "nowhere", "is neither a folder here nor a hub id"),
        ("gsm8k", "is neither a folder here nor a hub id"),
        ("owner/gsm8k", "can't be loaded from the hub"),
    ):
        with pytest.raises(UserError, match=fragment):
            dataset.load_problems(str(place), "train")


def test_hub_rows_are_checked_like_local_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach here. What it would return passes the same checks."""
    import datasets

    asked = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, object]]:
        asked.append((args, kwargs))
        return [json.loads(GOOD), {"question": "x", "answer": "none"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"openai/gsm8k, test row 2: .*####"):
        dataset.load_problems("openai/gsm8k", "test")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
