"""Perplexity is exp(all nats / all supervised tokens), whatever the batching."""

import copy
import math
import random
import re

import pytest
import torch
from conftest import PROMPT, flags, real_folder
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

import data
import perplexity
from engine import packing
from engine.llama import Llama
from engine.loading import load_tokenizer
from engine.loss import LinearCrossEntropy
from engine.many_texts import _starts
from engine.measure import StepResult, measure, perplexity_of
from engine.tokenizer import Tokenizer
from grading import dataset
from grading.answer_parts import PARTS, part_of_each


@pytest.fixture(scope="module")
def examples(
    tokenizer: PreTrainedTokenizerBase, problems: list[dataset.Problem]
) -> list[packing.Example]:
    return data.encode(tokenizer, problems[-30:], PROMPT)


def test_uniform_model_has_the_vocabulary_size(
    model: Llama, examples: list[packing.Example]
) -> None:
    """Guards against a base other than e, and against a mean over the wrong number of tokens."""
    torch.nn.init.zeros_(model.pretrained.lm_head.weight)
    result = measure(model, examples, 512)
    assert result.perplexity == pytest.approx(model.config.vocab_size, rel=1e-6)


def test_equals_a_plain_loop_over_transformers_logits(
    model: Llama, examples: list[packing.Example]
) -> None:
    """Guards against labels off by one, prompt tokens that count, and a missing EOS."""
    reference = copy.deepcopy(model.pretrained)
    reference.set_attn_implementation("sdpa")
    nats, tokens = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = (
                reference(input_ids=torch.tensor([example.input_ids]), use_cache=False)
                .logits[0]
                .double()
            )
        for position in range(1, len(example.input_ids)):
            if example.labels[position] != packing.IGNORE:
                nats -= logits[position - 1].log_softmax(-1)[example.input_ids[position]].item()
                tokens += 1
    result = measure(model, examples, 512)
    assert result.num_tokens == tokens
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)


def test_a_loss_that_is_no_number_has_no_perplexity() -> None:
    """Guards against a broken model that seems to have a perplexity, if a bad one."""
    assert math.isnan(perplexity_of(math.nan))
    assert perplexity_of(1e4) == math.inf and perplexity_of(0.0) == 1
    assert perplexity_of(708.9) == math.exp(708.9)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_step_is_finite_by_its_loss_and_its_norm(value: float) -> None:
    """Guards against weights that are lost in an optimizer step, for one of the two looks sound."""
    assert StepResult(2.0, 4, 1.0, 64).is_finite
    assert not StepResult(value, 4, 1.0, 64).is_finite
    assert not StepResult(2.0, 4, value, 64).is_finite


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_large_vocabulary_loses_nothing(model: Llama, with_gradients: bool) -> None:
    """Guards against the float32 sum of softmax and cross_entropy on a CPU, which is too small.

    It loses improbable tokens beside probable ones: 6 % of the first loss here, and the sixth
    digit of a real model's.
    """
    logits = torch.full((2, 49_152), -17.0)
    logits[0, 5] = logits[1, 40_000] = 0
    labels = torch.tensor([5, 7])
    inputs = torch.eye(2), logits.T.contiguous(), labels  # whose product is the logits
    nats, *each = LinearCrossEntropy.apply(
        *inputs, with_gradients, model.kernels, not with_gradients
    ).flatten()
    expected = cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(nats, expected.sum(), rtol=0, atol=1e-6)
    if each:
        torch.testing.assert_close(torch.stack(each), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [110, 256, 1000, 100_000])
def test_budget_and_order_change_nothing(
    model: Llama, examples: list[packing.Example], budget: int
) -> None:
    """Guards against the mean of batch means as validation loss."""
    budget = max(budget, max(len(example.input_ids) for example in examples))
    expected = measure(model, examples, 10_000)
    shuffled = random.Random(budget).sample(examples, len(examples))
    assert measure(model, shuffled, budget).perplexity == pytest.approx(
        expected.perplexity, rel=1e-6
    )


def test_measuring_leaves_the_mode_alone_and_uses_eval(
    model: Llama, examples: list[packing.Example]
) -> None:
    """Guards against validation with dropout, and against training on without it."""
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for training in (True, False):
        measure(model.train(training), examples, 10_000)
        assert model.training is training
    assert modes and not any(modes)


def test_script_reports_what_measure_says(
    call, settings: dict[str, str], model: Llama, tokenizer
) -> None:
    """The command line, on a plain Hugging Face folder, on every split."""
    for split, count in (("train", 26), ("validation", 17), ("test", 12)):
        outcome = call(perplexity, "--ckpt", settings["model"], "--split", split, *flags(settings))
        assert outcome.code == 0, outcome.err
        problems, _ = data.load_split(settings["dataset"], split, 17, 0)
        assert len(problems) == count
        expected = measure(model, data.encode(tokenizer, problems, PROMPT), 512)
        printed = dict(line.split() for line in outcome.out.splitlines()[-2:])
        assert float(printed["loss"]) == pytest.approx(expected.loss, rel=1e-7)
        assert float(printed["perplexity"]) == pytest.approx(expected.perplexity, rel=1e-7)
        assert len(printed["perplexity"].replace(".", "")) >= 6
        found = re.findall(r"^  ([a-z ]+?) +(\d+) tokens, loss (\S+), ", outcome.out, re.MULTILINE)
        assert [name for name, *_ in found] == ["reasoning", "equations", "final answer"]
        assert sum(int(tokens) for _, tokens, _ in found) == expected.num_tokens
        nats = sum(int(tokens) * float(loss) for _, tokens, loss in found)
        assert nats / expected.num_tokens == pytest.approx(expected.loss, rel=1e-6)


# ---------------------------------------------------------------- by class


def test_parts_of_an_answer() -> None:
    """Guards against a result that counts twice, and against an EOS of no part."""
    answer = "48/2 = <<48/2=24>>24, <<x>> <<>> < <<\n1>>.\n#### 24<<1=1>>"
    shown = "".join("REF"[part] for part in part_of_each(answer))
    assert shown == "RRRRRRR" + "E" * 11 + "RRRR" + "EEEEE" + "REEEE" + "R" * 11 + "F" * 15
    assert len(shown) == len(answer) + 1
    assert part_of_each("no mark") == bytes(7) + bytes([2])
    assert part_of_each("#### 8") == bytes([2] * 7)
    assert PARTS == ("reasoning", "equations", "final_answer")


def classes_by_bytes(tokenizer: Tokenizer, problem: dataset.Problem, ids: list[int]) -> list[int]:
    """The classes of an answer's tokens, by the bytes that the vocabulary spells."""
    parts = part_of_each(problem.answer)
    # By byte: first the separator, which belongs to the answer's first character.
    letters = [0, *(n for n, letter in enumerate(problem.answer) for _ in letter.encode())]
    classes, position = [], 0
    for token_id in ids:
        piece = tokenizer.piece(token_id)
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
        classes.append(parts[letters[position]])
        position += 1 if is_byte else len(piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())
    assert position == len(letters)
    return [*classes, 2]


def assert_classes(tokenizer: Tokenizer, problems: list[dataset.Problem]) -> int:
    """Compare the classes of all tokens with `classes_by_bytes`; the number of byte pieces."""
    plain = data.encode(tokenizer, problems, PROMPT)
    num_bytes = 0
    for problem, example, same in zip(
        problems, data.encode(tokenizer, problems, PROMPT, by_class=True), plain, strict=True
    ):
        assert (example, example.line) == (same, same.line) and not same.classes
        answer = [label for label in example.labels if label != packing.IGNORE]
        assert example.classes == classes_by_bytes(tokenizer, problem, answer[:-1]), problem
        num_bytes += sum(tokenizer.piece(i).startswith("<0x") for i in answer)
    return num_bytes


STRADDLING = [
    dataset.Problem("Many bytes?", "\U0001f600<<1+1=2>>\u4e03\n<<\u516b=8>>\U0001f600\n#### 8"),
    dataset.Problem("At once?", "#### 8"),
    dataset.Problem("Of spaces?", "   <<1=1>>   #### 8"),
]


def test_classes_of_tokens_are_those_of_their_first_characters(
    tokenizer: Tokenizer, problems: list[dataset.Problem]
) -> None:
    """Guards against offsets in bytes, and against those of the prompt's tokens."""
    assert assert_classes(tokenizer, [*problems, *STRADDLING]) > 50


def test_classes_of_gsm8k_with_llama_2() -> None:
    """The real rows and tokenizer, of which a ``▁<<`` begins in the reasoning."""
    tokenizer = load_tokenizer(real_folder("TOKENIZER_DIR"))
    rows = dataset.load_problems(str(real_folder("GSM8K_DIR")), "test")
    assert assert_classes(tokenizer, [*rows[:400], *STRADDLING]) > 1000
    [example] = data.encode(tokenizer, rows[:1], PROMPT, by_class=True)
    pieces = [tokenizer.piece(i) for i in example.input_ids[-len(example.classes) :]]
    first = pieces.index("\N{LOWER ONE EIGHTH BLOCK}<<")
    assert example.classes[first : first + 2] == [0, 1]


def test_offsets_without_their_spaces() -> None:
    """Guards against a token whose first character is the space that its tokenizer cuts off."""
    assert _starts([(0, 3), (4, 6), (6, 7), (6, 7), (6, 7), (8, 8)]) == [0, 3, 6, 6, 6, 7]


@pytest.mark.parametrize("budget", [110, 1000])
def test_classes_add_up_to_the_whole(
    model: Llama, tokenizer: Tokenizer, problems: list[dataset.Problem], budget: int
) -> None:
    """Guards against a class that depends on the packing, and a whole that the classes change."""
    plain = data.encode(tokenizer, problems[-30:], PROMPT)
    examples = data.encode(tokenizer, problems[-30:], PROMPT, by_class=True)
    budget = max(budget, max(len(example.input_ids) for example in examples))
    whole = measure(model, examples, budget, PARTS)
    alone = measure(model, plain, budget)
    assert (whole.loss, whole.perplexity, whole.num_tokens) == (
        alone.loss,
        alone.perplexity,
        alone.num_tokens,
    )
    assert alone.by_class == {} and list(whole.by_class) == list(PARTS)
    parts = whole.by_class.values()
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    nats = sum(part.loss * part.num_tokens for part in parts)
    assert nats == pytest.approx(whole.loss * whole.num_tokens, rel=1e-12)
    shuffled = random.Random(budget).sample(examples, len(examples))
    other = measure(model, shuffled, 10_000, PARTS)
    for name, part in whole.by_class.items():
        assert other.by_class[name].num_tokens == part.num_tokens
        assert other.by_class[name].loss == pytest.approx(part.loss, rel=1e-6)
        assert part.perplexity == math.exp(part.loss)
    # As a slow loop over Transformers' logits finds them.
    nats, tokens = [0.0] * 3, [0] * 3
    for example in examples[:4]:
        with torch.no_grad():
            logits = model.pretrained(torch.tensor([example.input_ids]), use_cache=False).logits[0]
        begin = len(example.input_ids) - len(example.classes)
        for position, number in enumerate(example.classes, start=begin):
            token = example.input_ids[position]
            nats[number] -= logits[position - 1].double().log_softmax(-1)[token].item()
            tokens[number] += 1
    few = measure(model, examples[:4], budget, PARTS)
    for number, name in enumerate(PARTS):
        if tokens[number]:
            assert few.by_class[name].num_tokens == tokens[number]
            assert few.by_class[name].loss == pytest.approx(nats[number] / tokens[number], rel=1e-5)
    assert list(few.by_class) == [name for number, name in enumerate(PARTS) if tokens[number]]


def test_script_limit(call, settings: dict[str, str]) -> None:
    outcome = call(perplexity, "--ckpt", settings["model"], "--limit", "3", *flags(settings))
    assert " on test: 3 rows" in outcome.out
    call(
        perplexity, "--ckpt", settings["model"], "--limit", "0", *flags(settings)
    ).assert_user_error("'0'")
