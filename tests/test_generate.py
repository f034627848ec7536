"""Batched greedy decoding writes what Transformers' generate writes for each problem alone."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PROMPT
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import data
import generate
from generate import Completion, greedy_decode
from model import load_model

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase, problems: list[data.Problem]) -> list[list[int]]:
    """Prompts of very different lengths, from BOS alone on."""
    ragged = data.encode_prompts(tokenizer, [*problems[:14], *problems[-9:]], PROMPT)
    return [[1], [1, 300], *ragged, [token for prompt in ragged[:9] for token in prompt]]


@pytest.fixture(scope="module")
def sharp_folder(
    make_llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase, tmp_path_factory
) -> Path:
    """A model whose random weights are large, so that its completions differ from prompt to prompt."""
    folder = tmp_path_factory.mktemp("sharp")
    make_llama(len(tokenizer), seed=5, std=0.4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharp(sharp_folder: Path) -> LlamaForCausalLM:
    return load_model(sharp_folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def references(sharp_folder: Path, prompts: list[list[int]]) -> tuple[frozenset[int], list[Completion]]:
    """What generate writes for each prompt alone; EOS is a set of tokens that end some of them early."""
    model = LlamaForCausalLM.from_pretrained(sharp_folder, dtype=torch.float32).eval()

    def alone(prompt: list[int], eos: list[int] | None) -> list[int]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=eos,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    free = [alone(prompt, [419]) for prompt in prompts]
    eos = sorted({free[4][0], free[7][3], free[11][9], free[15][NEW_TOKENS - 1]})
    expected = []
    for index, prompt in enumerate(prompts):
        ids = alone(prompt, eos)
        ended = ids[-1] in eos
        expected.append(Completion(index, len(prompt), ids[:-1] if ended else ids, "eos" if ended else "length"))
    lengths = {len(one.token_ids) for one in expected if one.stop == "eos"}
    assert len(lengths) >= 4 and 0 in lengths and any(one.stop == "length" for one in expected)
    return frozenset(eos), expected


def decode(model: LlamaForCausalLM, prompts: list[list[int]], eos: frozenset[int], slots: int) -> list[Completion]:
    found = list(greedy_decode(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_ids=eos, slots=slots))
    return sorted(found, key=lambda completion: completion.index)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16, 100])
def test_completions_equal_generate_one_by_one(sharp, references, prompts: list[list[int]], slots: int) -> None:
    """Guards against padding, neighbours, positions or a slot's former content that change a completion."""
    eos, expected = references
    assert decode(sharp, prompts, eos, slots) == expected


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_and_neighbours_change_nothing(sharp, references, prompts: list[list[int]], seed: int) -> None:
    eos, expected = references
    order = random.Random(seed).sample(range(len(prompts)), 15)
    found = decode(sharp, [prompts[index] for index in order], eos, slots=4)
    assert [(one.token_ids, one.stop) for one in found] == [
        (expected[index].token_ids, expected[index].stop) for index in order
    ]


@pytest.mark.parametrize("prefill_tokens", [1, 100])
def test_prefill_budget_changes_nothing(
    sharp, references, prompts: list[list[int]], prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos, expected = references
    monkeypatch.setattr(generate, "PREFILL_TOKENS", prefill_tokens)
    assert decode(sharp, prompts, eos, slots=5) == expected


def test_one_new_token(sharp, references, prompts: list[list[int]]) -> None:
    """Guards against a decoding step too many: the first token comes from the prefill."""
    eos, expected = references
    found = list(greedy_decode(sharp, prompts[:5], max_new_tokens=1, eos_token_ids=eos, slots=2))
    for one in found:
        assert one.token_ids == expected[one.index].token_ids[:1]
        assert one.stop == ("eos" if not expected[one.index].token_ids else "length")


def test_each_prompt_has_a_limit_of_its_own(sharp, references, prompts: list[list[int]]) -> None:
    eos, expected = references
    limits = [1 + index % 7 for index in range(len(prompts))]
    found = list(greedy_decode(sharp, prompts, max_new_tokens=limits, eos_token_ids=eos, slots=3))
    assert {one.index: one.token_ids for one in found} == {
        one.index: one.token_ids[: limits[one.index]] for one in expected
    }


def test_no_prompts(sharp) -> None:
    assert list(greedy_decode(sharp, [], max_new_tokens=4, eos_token_ids=frozenset({2}), slots=2)) == []


def test_finished_completions_come_before_the_rest_is_done(sharp, references, prompts: list[list[int]]) -> None:
    """Guards against an evaluation that writes nothing before its end."""
    eos, expected = references
    first = next(greedy_decode(sharp, prompts, max_new_tokens=NEW_TOKENS, eos_token_ids=eos, slots=100))
    assert len(expected[first.index].token_ids) == min(len(one.token_ids) for one in expected)
