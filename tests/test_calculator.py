"""The value of expressions, hostile ones included; false equations; forced results."""

import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import real_folder
from transformers import LlamaForCausalLM

import standin
from engine import verify
from engine.decoding import Completion, greedy_decode
from engine.loading import load_model, load_tokenizer
from engine.tokenizer import Tokenizer
from grading import arithmetic
from grading.arithmetic import first_false_equation, is_true, value_of
from grading.calculator import ForcedResults, write_result
from run.errors import UserError


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
        ("50%%", Fraction(1, 200)),
        ("+".join(["1"] * 60), Fraction(60)),  # many terms are not nested
        (" 3 + 4 ", Fraction(7)),
    ],
)
def test_values(expression: str, value: Fraction) -> None:
    assert value_of(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            " ",
            "()",
            "(",
            ")",
            "1+",
            "*2",
            "1 2",
            "2**3",
            "9**9**9",
            "1/0",
            "1/(2-2)",
            "1//0",
            "abs(1)",
            "1e5",
        ),
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
        *(
            "9" * 5000,
            "+".join("1" * 500),
            "(" * 5000,
            "(" * 60 + "1" + ")" * 60,
            "-" * 150 + "1",
            "9" * 40,
        ),
        "*".join(["9999999999"] * 15),
        "/".join(["9999999999"] * 15),
    ],
)
def test_hostile_text_has_no_value(expression: str) -> None:
    """Guards against code that is run, numbers that fill the memory, and endless recursion."""
    assert value_of(expression) is None


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
        ("1 / 3 = 33.3%, 1 / 3 * 100 = 33.3%, 1 / 4 = 25.0% and <<2/3=66.67%>>66.67%", None),
        ("7 / 20 = 35.5%", "7 / 20 = 35.5%"),  # the tenth of a percent is no tenth
        ("1 / 4 = 25.04% and 7 / 20 * 100 = 35.1%", "1 / 4 = 25.04%"),
        ("<<1/3=0.33\t>>0.33 and <<1/3=33.3\u00a0%>>33.3 %, or <<1/3=(.33)>>.33", None),
        ("100 / 3 = 33.34", "100 / 3 = 33.34"),
        ("100 / 3 = 33", "100 / 3 = 33"),
        ("2x - 3 = 7, x + 26 + 52 = 91, x+26 = 91", None),  # not arithmetic
        ("40 marbles - 3 - 5 = 32, at 6:00+48 = 6:48", None),
        ("3 / 2 = 1 1/2 and 600 * 30 = 18 000", None),
        ("2+3=5+1=6", None),
        ("2+3=5+1=7", "5+1 = 7"),
        (".5*60 = 30 and $.25 / $.05 = 5", None),
        ("- 5 + 6 = 11\n* 5 + 6 = 12", "5 + 6 = 12"),
        (" <<2+2=5>>3+3=7", "<<2+2=5>>"),  # the space before it does not make the other the first
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
        *(
            "<<" + "9" * 100_000 + "=1>>",
            "=1 " * 50_000,
            "1=" + " " * 100_000,
            "1," * 50_000 + "=2",
            "3 x" * 40_000,
        ),
    ],
)
def test_long_hostile_text_is_read_through(text: str) -> None:
    """Guards against a regular expression of quadratic time, which would take hours here."""
    first_false_equation(text)


def test_every_annotation_of_the_real_data_is_true() -> None:
    folder = real_folder("GSM8K_DIR")
    for split, count in (("train", 23_716), ("test", 4_282)):
        rows = [
            json.loads(line)
            for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
            if line
        ]
        found = [match for row in rows for match in arithmetic.ANNOTATION.finditer(row["answer"])]
        assert len(found) == count
        assert [match[0] for match in found if is_true(match[1], match[2]) is not True] == []


# ---------------------------------------------------------------- calculator decoding


@pytest.mark.parametrize(
    ("value", "text", "written"),
    [
        ("10", "<<5*2", "10"),
        ("1450000", "<<1,450,000*1", "1450000"),
        ("0", "<<5-5", "0"),
        ("-2", "<<5-7", "-2"),
        ("1/5", "<<1/5", "0.2"),
        ("-1/4", "<<0.25-.5", "-.25"),
        ("1/2", "<<.25*2", ".5"),
        ("1/2", "It costs $.25, and <<1/2", ".5"),
        ("1/2", ".25 or 0.25: <<1/2", "0.5"),
        ("1/2", "<<1.5/3", "0.5"),
        ("3/2", "<<.5*3", "1.5"),
        ("1/1024", "<<1/1024", "0.0009765625"),
        ("1/2048", "<<1/2048", None),
        ("10/3", "<<10/3", None),
    ],
)
def test_results_are_written_as_gsm8k_writes_them(
    value: str, text: str, written: str | None
) -> None:
    assert write_result(Fraction(value), text) == written


def test_every_result_of_the_real_data_is_written_as_what_stands_there() -> None:
    """Guards against rounding, and against a spelling that the data set does not have."""
    folder, same, count = real_folder("GSM8K_DIR"), 0, 0
    for split in ("train", "test"):
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
            answer = json.loads(line)["answer"]
            for match in arithmetic.ANNOTATION.finditer(answer):
                written = write_result(value_of(match[1]), answer[: match.end(1)])
                assert value_of(written) == value_of(match[2]), match[0]
                same, count = same + (written == match[2]), count + 1
    assert count == 23_716 + 4_282
    assert same == 27_247  # the others have trailing zeros, or both 0.5 and .5 in one row


@pytest.fixture(scope="module")
def forced(tokenizer: Tokenizer) -> ForcedResults:
    return ForcedResults(tokenizer)


def up_to_equals(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.ids_of([text.removeprefix(" ")])[0]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (" She has 2*3=<<2*3=", "6>>"),
        (" <<1+1=2>>2 and <<10-15=", "-5>>"),
        (" <<(3+4)=", "7>>"),
        (" <<20%*50=", "10>>"),
        (" <<.5*.5=", ".25>>"),
        (" A\n<<1,000+1=", "1001>>"),
        (" <<1<<2+2=", "4>>"),
    ],
)
def test_results_are_forced(forced: ForcedResults, tokenizer, text: str, result: str) -> None:
    ids = up_to_equals(tokenizer, text)
    assert tokenizer.decode([*ids[:-1], *forced.after(ids)]) == (text + result).removeprefix(" ")
    assert forced.after(ids[:-1]) == [] and forced.after([*ids, *forced.after(ids)[1:]]) == []


@pytest.mark.parametrize(
    "text",
    [
        *(
            "=",
            " 2+3=",
            "<<=",
            "<<=>>=",
            "<<>>2+3=",
            "<<2+3>>=",
            "<<2+3=5>>=",
            "<<2+3==",
            "<<2+3=5=",
            "<<x=",
            "<<2+=",
            "<<٣=",
        ),
        *(
            "<<9**9=",
            "<<9**9**9=",
            "<<1/0=",
            "<<1/(2-2)=",
            "<<10/3=",
            "<<" * 300 + "=",
            "<<" + "9" * 3000 + "=",
        ),
        *(
            "<<" + "(" * 500 + "1" + ")" * 500 + "=",
            "<<" + "-" * 500 + "1=",
            "<<__import__('os')=",
            "<<1;2=",
            "<<1_0=",
        ),
        *(
            "<<" + "*".join(["9999999999"] * 15) + "=",
            "<<½=",
            "<<0x10=",
            "<<1e5=",
            "<<2+3\n<=",
            "<</s>=",
        ),
    ],
)
def test_hostile_text_forces_nothing(forced: ForcedResults, tokenizer, text: str) -> None:
    """Guards against code that is run, memory that fills up, and unwanted results."""
    assert forced.after(up_to_equals(tokenizer, text)) == []


def test_random_text_never_raises(forced: ForcedResults, tokenizer) -> None:
    rng, pieces = (
        random.Random(0),
        ["<<", ">>", "=", "1", "20", "+", "-", "*", "/", "(", ")", ".", "%", ",", " ", "\n", "x"],
    )
    results = 0
    for _ in range(1500):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 14))) + "="
        found = forced.after(ids := up_to_equals(tokenizer, text))
        results += bool(found)
        if found:
            written = tokenizer.decode([*ids[:-1], *found])
            assert written.endswith(">>") and arithmetic.ANNOTATION.search(
                written[written.rindex("<<") :]
            )
    assert results > 10
    for ids in ([rng.randrange(len(tokenizer)) for _ in range(20)] for _ in range(300)):
        forced.after(ids)


def test_an_equals_sign_that_merges_with_its_neighbours(tmp_path: Path) -> None:
    """Guards against a result that is missed, or written twice, where "=-" or ")=" is one token."""
    texts = [f"<<({n}-{n + 3})=-3>>-3 and <<{n}-{n + 3}=-3>>" for n in range(10, 60)] * 3
    standin.make_tokenizer(texts, tmp_path, vocab_size=290)
    tokenizer = load_tokenizer(tmp_path)
    merged = [
        piece
        for piece in map(tokenizer.piece, range(len(tokenizer)))
        if "=" in piece and len(piece.strip("▁")) > 1
    ]
    assert any(piece.startswith("=-") for piece in merged) and any(
        "=" in piece[1:] for piece in merged
    )
    forced = ForcedResults(tokenizer)
    for text in ("<<(11-14)=-3>>", "<<11-14=-3>>"):
        ids = up_to_equals(tokenizer, text)
        number = next(n for n, piece in enumerate(map(tokenizer.piece, ids)) if "=" in piece)
        assert [*ids[:number], *forced.after(ids[: number + 1])] == ids
    # The model begins a negative number where the result is positive: its "=-" is replaced.
    wrong = up_to_equals(tokenizer, "<<14-11=-3>>")
    number = next(n for n, piece in enumerate(map(tokenizer.piece, wrong)) if "=" in piece)
    assert tokenizer.decode([*wrong[:number], *forced.after(wrong[: number + 1])]) == "<<14-11=3>>"


class Merging:
    """A tokenizer that, once it ``merges``, loses an "=" after a newline."""

    def __init__(self, tokenizer: Tokenizer):
        self.merges = False
        self._tokenizer = tokenizer
        self.piece, self.decode = tokenizer.piece, tokenizer.decode

    def __len__(self) -> int:
        return len(self._tokenizer)

    def ids_of(self, texts: list[str]) -> list[list[int]]:
        if self.merges:
            texts = [text.replace("\n=", "\n") for text in texts]
        return self._tokenizer.ids_of(texts)


def test_tokens_that_would_spell_something_else_are_not_forced(tokenizer: Tokenizer) -> None:
    """Guards against a half result, from a tokenizer that merges where none is known to."""
    merging, ids = Merging(tokenizer), up_to_equals(tokenizer, " <<2+3=")
    forced = ForcedResults(merging)
    assert forced.after(ids)
    merging.merges = True
    assert forced.after(ids) == []


def test_a_tokenizer_that_cannot_write_results_is_refused(tmp_path: Path) -> None:
    standin.make_tokenizer(
        ["Neither digits nor signs in here, none at all."] * 9, tmp_path, vocab_size=290
    )
    tokenizer = load_tokenizer(tmp_path)
    ForcedResults(tokenizer)  # bytes are enough
    pieces = [tokenizer.piece(index).replace("<0x3D>", "?") for index in range(len(tokenizer))]
    tokenizer.piece = pieces.__getitem__
    with pytest.raises(UserError, match="calculator true: the model's tokenizer can't continue"):
        ForcedResults(tokenizer)


def test_real_tokenizer_writes_results_as_it_was_trained_to() -> None:
    """Guards against tokens that spell the result in an order the model has never seen."""
    tokenizer = load_tokenizer(real_folder("TOKENIZER_DIR"))
    forced, count = ForcedResults(tokenizer), 0
    for line in (
        (real_folder("GSM8K_DIR") / "test.jsonl").read_text(encoding="utf-8").split("\n")[:150]
    ):
        answer = json.loads(line)["answer"]
        if any(
            write_result(value_of(m[1]), answer[: m.end(1)]) != m[2]
            for m in arithmetic.ANNOTATION.finditer(answer)
        ):
            continue
        ids = up_to_equals(tokenizer, f" {answer}")
        for number, piece in enumerate(map(tokenizer.piece, ids)):
            if "=" in piece and (found := forced.after(ids[: number + 1])):
                # Up to ">>", which may merge with the text after it.
                assert ids[number : number + len(found) - 1] == found[:-1]
                count += 1
        assert sum(1 for _ in arithmetic.ANNOTATION.finditer(answer)) <= count
    assert count > 300


# ---------------------------------------------------------------- in decoding

SYMBOLS = ["<<", "=", "+", "1", "2", "3", ">>"]


@pytest.fixture(scope="module")
def counting_folder(
    make_llama: Callable[..., LlamaForCausalLM], tokenizer: Tokenizer, tmp_path_factory
) -> Path:
    """A model that writes only digits, signs and the delimiters of annotations."""
    folder, model = tmp_path_factory.mktemp("counting"), make_llama(len(tokenizer), seed=7, std=0.4)
    kept = torch.zeros(len(tokenizer), 1)
    kept[[ids_by_piece(tokenizer)[symbol] for symbol in SYMBOLS]] = 1
    model.lm_head.weight.data.mul_(kept)
    model.save_pretrained(folder)
    return folder


def ids_by_piece(tokenizer: Tokenizer) -> dict[str | None, int]:
    return {tokenizer.piece(index): index for index in range(len(tokenizer))}


def slowly(
    folder: Path, tokenizer: Tokenizer, prompt: list[int], limit: int
) -> tuple[list[int], int]:
    """One prompt at a time, without a cache, with results found in the text alone."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written, results = [], 0
    while len(written) < limit:
        with torch.no_grad():
            written.append(model(torch.tensor([prompt + written])).logits[0, -1].argmax().item())
        text = tokenizer.decode(written)
        opened = text.rfind("<<")
        expression = text[opened + 2 : -1]
        if (
            len(written) == limit
            or opened < 0
            or not text.endswith("=")
            or set(expression) & set("<>=")
        ):
            continue
        value = value_of(expression)
        if value is not None and (result := write_result(value, text[:-1])) is not None:
            written += [ids_by_piece(tokenizer)[piece] for piece in (*result, ">>")]
            results += 1
    return written[:limit], results


COUNTING = [
    [1, *(3 + (7 * n + 11 * number) % 400 for number in range(1 + 5 * n % 40))] for n in range(12)
]


@pytest.fixture(scope="module")
def counted(counting_folder: Path, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """What the slow reference writes to each prompt, and how many results are in it."""
    return [slowly(counting_folder, tokenizer, prompt, 40) for prompt in COUNTING]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_batched_calculator_decoding_equals_a_slow_reference(
    counting_folder: Path, counted: list[tuple[list[int], int]], forced: ForcedResults, slots: int
) -> None:
    """Guards against a result in a neighbour's text, and one that is missing in the cache."""
    prompts, expected = COUNTING, counted
    model = load_model(counting_folder, torch.float32, torch.device("cpu"))
    limits = {"max_new_tokens": 40, "eos_token_ids": frozenset({2})}
    found = list(greedy_decode(model, prompts, slots=slots, calculator=forced, **limits))
    plain = list(greedy_decode(model, prompts, slots=slots, **limits))
    assert sum(results for _, results in expected) >= 10
    assert {one.index: one.token_ids for one in found} == dict(
        enumerate(ids for ids, _ in expected)
    )
    assert {one.index: one.token_ids for one in found} != {
        one.index: one.token_ids for one in plain
    }
    by_index = {one.index: one for one in found}
    assert (
        verify.compare_with_generate(
            model, dict(enumerate(prompts)), by_index, calculator=forced, **limits
        )
        == {}
    )
    by_index[3] = Completion(3, len(prompts[3]), [*by_index[3].token_ids[:-1], 5], "length")
    assert list(
        verify.compare_with_generate(
            model, dict(enumerate(prompts)), by_index, calculator=forced, **limits
        )
    ) == [3]
