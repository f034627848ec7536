"""Perplexity is exp(all nats / all supervised tokens), whatever the batching."""

import copy
import math
import random

import pytest
import torch
from conftest import PROMPT, flags
from transformers import PreTrainedTokenizerBase

import data
import perplexity
from engine import packing
from engine.llama import Llama
from engine.measure import measure
from grading import dataset


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
    for split, count in (("train", 100), ("validation", 17), ("test", 12)):
        outcome = call(perplexity, "--ckpt", settings["model"], "--split", split, *flags(settings))
        assert outcome.code == 0, outcome.err
        problems = data.load_split(settings["dataset"], split, 17, 0)
        assert len(problems) == count
        expected = measure(model, data.encode(tokenizer, problems, PROMPT), 512)
        printed = dict(line.split() for line in outcome.out.splitlines()[-2:])
        assert float(printed["loss"]) == pytest.approx(expected.loss, rel=1e-7)
        assert float(printed["perplexity"]) == pytest.approx(expected.perplexity, rel=1e-7)
        assert len(printed["perplexity"].replace(".", "")) >= 6


def test_script_limit(call, settings: dict[str, str]) -> None:
    outcome = call(perplexity, "--ckpt", settings["model"], "--limit", "3", *flags(settings))
    assert " on test: 3 rows" in outcome.out
    call(
        perplexity, "--ckpt", settings["model"], "--limit", "0", *flags(settings)
    ).assert_user_error("'0'")
