"""Batched decoding writes what generate writes alone; samples depend on their seed alone."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import data
from engine import device, llama, memory, strategy
from engine.cpu.kernels import BLOCK, PagedCache, most_probable
from engine.cuda.cache import StaticCache
from engine.decoding import Completion, Queue, greedy_decode, sample_decode
from engine.decoding import decode as decode_queue
from engine.device import cuda_kernels
from engine.llama import Llama
from engine.loading import load_model
from engine.memory import CACHE_SHARE, plan_slots
from engine.sampling import sampled
from engine.strategy import Decoder, Greedy, Sampling, complete, eos_token_ids
from engine.tokenizer import Tokenizer
from grading import dataset
from run.errors import UserError

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase, problems: list[dataset.Problem]) -> list[list[int]]:
    """Prompts of very different lengths, from BOS alone on."""
    ragged = data.encode_prompts(tokenizer, [*problems[:14], *problems[-9:]], PROMPT)
    return [[1], [1, 300], *ragged, [token for prompt in ragged[:9] for token in prompt]]


@pytest.fixture(scope="module")
def sharp_folder(
    make_llama: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory,
) -> Path:
    """A model whose random weights are large, so that each prompt has another completion."""
    folder = tmp_path_factory.mktemp("sharp")
    make_llama(len(tokenizer), seed=5, std=0.4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_sharp(sharp_folder: Path) -> Llama:
    return load_model(sharp_folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def references(
    sharp_folder: Path, prompts: list[list[int]]
) -> tuple[frozenset[int], list[Completion]]:
    """What generate writes for each prompt alone; several tokens are EOS and end some early."""
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
        expected.append(
            Completion(index, len(prompt), ids[:-1] if ended else ids, "eos" if ended else "length")
        )
    lengths = {len(one.token_ids) for one in expected if one.stop == "eos"}
    assert len(lengths) >= 4 and 0 in lengths and any(one.stop == "length" for one in expected)
    return frozenset(eos), expected


class DirtyCache(PagedCache):
    """With NaN in memory where another program may have left anything."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for tensor in (*self.keys, *self.values):
            tensor.fill_(torch.nan)


@pytest.fixture
def sharp(plain_sharp: Llama, request: pytest.FixtureRequest) -> Llama:
    """The model with the cache of a CPU, or of a GPU with its steps of fixed shapes."""
    kernels = plain_sharp.kernels
    if getattr(request, "param", "paged") == "static":
        kernels = cuda_kernels(torch.device("cpu"))
    else:
        kernels = replace(kernels, cache=DirtyCache)
    return Llama(plain_sharp.pretrained, kernels)


either_cache = pytest.mark.parametrize("sharp", ["paged", "static"], indirect=True)


def decode(
    model: Llama, prompts: list[list[int]], eos: frozenset[int], slots: int
) -> list[Completion]:
    found = list(
        greedy_decode(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_ids=eos, slots=slots)
    )
    return sorted(found, key=lambda completion: completion.index)


@either_cache
@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16, 100])
def test_completions_equal_generate_one_by_one(
    sharp, references, prompts: list[list[int]], slots: int
) -> None:
    """Guards against padding, neighbours or a slot's former content that change a completion."""
    eos, expected = references
    assert decode(sharp, prompts, eos, slots) == expected


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_and_neighbours_change_nothing(
    sharp, references, prompts: list[list[int]], seed: int
) -> None:
    eos, expected = references
    order = random.Random(seed).sample(range(len(prompts)), 15)
    found = decode(sharp, [prompts[index] for index in order], eos, slots=4)
    assert [(one.token_ids, one.stop) for one in found] == [
        (expected[index].token_ids, expected[index].stop) for index in order
    ]


@either_cache
@pytest.mark.parametrize("room", [0, 1, 2, BLOCK - 1])
def test_a_completion_that_fills_the_cache(
    sharp, references, prompts: list[list[int]], room: int
) -> None:
    """Guards against a slot's last position, around a block's boundary, being lost or overrun."""
    _, expected = references
    number = next(
        index
        for index, one in enumerate(expected)
        if one.stop == "length" and one.prompt_length > 40
    )
    limit = -len(prompts[number]) % BLOCK + BLOCK - room
    found = list(
        greedy_decode(
            sharp, [prompts[number]], max_new_tokens=limit, eos_token_ids=frozenset(), slots=1
        )
    )
    ids = torch.tensor([prompts[number]])
    alone = sharp.pretrained.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=[419],
    )
    assert found[0].token_ids == alone[0, ids.shape[1] :].tolist() and found[0].stop == "length"


@pytest.mark.parametrize("prefill_tokens", [1, 100])
def test_prefill_budget_changes_nothing(
    sharp,
    references,
    prompts: list[list[int]],
    prefill_tokens: int,
) -> None:
    eos, expected = references
    queue = Queue(prompts, NEW_TOKENS, prefill_tokens=prefill_tokens)
    found = decode_queue(sharp, queue, None, eos, slots=5)
    assert sorted(found, key=lambda completion: completion.index) == expected


def test_prompts_are_read_together(plain_sharp: Llama, prompts: list[list[int]]) -> None:
    """Guards against a pass over the weights for each prompt, and slots that wait in vain.

    Limits make one completion end after the other, in steps of one token.
    """
    passes: list[tuple[int, int]] = []
    idle: list[tuple[int, int]] = []
    limits = [1 + 7 * index % 23 for index in range(41)]
    queue = Queue([prompts[1]] * 41, limits, admitted_share=4)

    class Recorded(PagedCache):
        def prefill(self, slots, packed):
            passes.append((len(slots), len(queue.free)))
            return super().prefill(slots, packed)

        def step(self, slots, lengths):
            idle.append((len(queue.free), 41 - sum(size for size, _ in passes)))
            return super().step(slots, lengths)

    model = Llama(plain_sharp.pretrained, replace(plain_sharp.kernels, cache=Recorded))
    found = decode_queue(model, queue, None, frozenset(), slots=16)
    assert len(list(found)) == 41
    sizes = [size for size, _ in passes]
    assert sizes[0] == 16 and sum(sizes) == 41
    assert all(size >= 4 for size in sizes[:-1])  # a quarter of the slots, or what is left
    assert len(sizes) <= 1 + -(-25 // 4)
    assert all(left == 0 for _, left in passes[:-1])  # who is free takes one
    assert all(free < min(4, waiting) for free, waiting in idle if waiting)


def test_one_new_token(sharp, references, prompts: list[list[int]]) -> None:
    """Guards against a decoding step too many: the first token comes from the prefill."""
    eos, expected = references
    found = list(greedy_decode(sharp, prompts[:5], max_new_tokens=1, eos_token_ids=eos, slots=2))
    assert sorted(one.index for one in found) == [*range(5)]
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
    assert (
        list(greedy_decode(sharp, [], max_new_tokens=4, eos_token_ids=frozenset({2}), slots=2))
        == []
    )


def test_finished_completions_come_before_the_rest_is_done(
    sharp, references, prompts: list[list[int]]
) -> None:
    """Guards against an evaluation that writes nothing before its end."""
    eos, expected = references
    first = next(
        greedy_decode(sharp, prompts, max_new_tokens=NEW_TOKENS, eos_token_ids=eos, slots=100)
    )
    assert len(expected[first.index].token_ids) == min(len(one.token_ids) for one in expected)


class Insisting:
    """A calculator that has three tokens of its own in the place of the third and behind it.

    It would say so again of the second of them: what is forced must not be asked about.
    """

    def after(self, token_ids: list[int]) -> list[int]:
        return [5, 6, 7] if len(token_ids) == 3 or token_ids[-2:] == [5, 6] else []


@either_cache
@pytest.mark.parametrize("limit", [3, 4, NEW_TOKENS])
def test_forced_tokens_take_the_place_of_the_newest(
    sharp, prompts: list[list[int]], limit: int
) -> None:
    """Guards against a forced token that is shown and not read, and one beyond max_new_tokens."""
    limits = {"max_new_tokens": limit, "eos_token_ids": frozenset()}
    plain = {one.index: one.token_ids for one in greedy_decode(sharp, prompts, slots=4, **limits)}
    found = {
        one.index: one
        for one in greedy_decode(sharp, prompts, slots=4, calculator=Insisting(), **limits)
    }
    for index, prompt in enumerate(prompts):
        if limit == 3:  # nothing would follow
            assert found[index].token_ids == plain[index]
            continue
        begun = [*plain[index][:2], 5, 6, 7]
        rest = limit - len(begun)
        if rest > 0:
            after = greedy_decode(
                sharp, [prompt + begun], slots=1, max_new_tokens=rest, eos_token_ids=frozenset()
            )
            begun += next(after).token_ids
        assert found[index].token_ids == begun[:limit] and found[index].stop == "length"


def test_argmax_is_the_first_of_the_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (5, 128, 384, 1000):
        for values in (2, 7, 10**6):
            logits = torch.randint(values, (50, size), generator=generator).float()
            first = [row.index(max(row)) for row in logits.tolist()]
            assert most_probable(logits).tolist() == first
            assert device.most_probable(logits).tolist() == first


# ---------------------------------------------------------------- samples


def samples(
    model: Llama, prompts: list[list[int]], seeds: list[str], **settings
) -> list[list[int]]:
    settings = {
        "temperature": 1.0,
        "max_new_tokens": NEW_TOKENS,
        "eos_token_ids": frozenset({2}),
        "slots": 4,
    } | settings
    found = sample_decode(model, prompts, seeds, **settings)
    return [one.token_ids for one in sorted(found, key=lambda completion: completion.index)]


@either_cache
def test_samples_hang_on_their_seed_alone(sharp, prompts: list[list[int]]) -> None:
    """Guards against random numbers shared by the slots, or used up by earlier samples."""
    seeds = [f"{index}" for index in range(len(prompts))]
    expected = samples(sharp, prompts, seeds, slots=1)
    assert samples(sharp, prompts, seeds, slots=7) == expected
    order = random.Random(0).sample(range(len(prompts)), 9)
    again = samples(
        sharp, [prompts[index] for index in order], [seeds[index] for index in order], slots=3
    )
    assert again == [expected[index] for index in order]
    assert samples(sharp, prompts, [f"other {seed}" for seed in seeds]) != expected


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures(
    sharp, references, prompts: list[list[int]], temperature: float
) -> None:
    """Guards against infinities, and draws from NaN."""
    eos, expected = references
    found = samples(sharp, prompts[:4], list("abcd"), temperature=temperature, eos_token_ids=eos)
    if temperature < 1:
        assert found == [one.token_ids for one in expected[:4]]
    else:
        assert len({tuple(ids) for ids in found}) == 4


def test_samples_have_the_probabilities_of_the_model(sharp, prompts: list[list[int]]) -> None:
    """Guards against a temperature that multiplies, and an off-by-one in the inverse."""
    prompt, count, temperature = prompts[3], 4000, 2.5
    drawn = samples(
        sharp,
        [prompt] * count,
        [f"{n}" for n in range(count)],
        temperature=temperature,
        max_new_tokens=1,
        slots=100,
    )
    with torch.no_grad():
        logits = sharp.pretrained(torch.tensor([prompt])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    found = torch.zeros_like(expected)
    for ids in drawn:
        found[ids[0] if ids else 2] += 1 / count
    spread = (expected * (1 - expected) / count).sqrt()
    assert (found - expected).abs().max() < 5 * spread.max() and (
        (found - expected) / spread
    ).square().mean() < 1.5


def test_a_low_temperature_is_greedy(sharp, references, prompts: list[list[int]]) -> None:
    eos, expected = references
    found = samples(sharp, prompts, ["x"] * len(prompts), temperature=1e-4, eos_token_ids=eos)
    assert found == [one.token_ids for one in expected]


# ---------------------------------------------------------------- memory


def test_slots_are_planned_from_the_free_memory(sharp: Llama, capsys) -> None:
    """Guards against a cache that runs out of memory in the middle of an evaluation."""
    each = PagedCache.slot_bytes(sharp, 100)
    # Keys and values, layers, heads, head_dim, full blocks, float32.
    assert each == 2 * 2 * 2 * 8 * 128 * 4
    built = PagedCache(sharp, 3, 100)
    assert sum(tensor.nbytes for tensor in (*built.keys, *built.values)) == 3 * each

    def plan(room: float, slots: int | None, prompts: int) -> int:
        free = int(room * each / CACHE_SHARE) + 1
        return plan_slots(sharp, slots, 100, prompts, free).slots

    assert [plan(9.5, None, prompts) for prompts in (4, 9, 1000)] == [4, 9, 9]
    assert plan(9.5, 9, 1000) == 9 and plan(9.5, 50, 7) == 7
    assert capsys.readouterr().out == ""
    assert plan(9.5, 10, 1000) == 9
    assert capsys.readouterr().out.startswith("decode_slots 10: only 9 fit into the ")
    assert plan(1000, None, 10**6) == sharp.kernels.most_slots and plan(1000, 500, 600) == 500
    for slots in (None, 1):
        with pytest.raises(UserError, match="a smaller max_new_tokens"):
            plan(0.5, slots, 1000)


def test_slots_of_the_static_cache_are_as_large_as_planned(sharp: Llama) -> None:
    """Guards against a plan for one cache and the memory of the other."""
    built = StaticCache(sharp, 3, 100)
    held = sum(tensor.nbytes for tensor in (*built.keys, *built.values))
    # One token more, which is nobody's.
    assert held == 3 * StaticCache.slot_bytes(sharp, 100) + StaticCache.slot_bytes(sharp, 1)


def test_free_memory(tmp_path: Path) -> None:
    """Guards against a container's limit that is overlooked."""
    cpu = torch.device("cpu")
    assert 2**20 < memory.free_bytes(cpu, tmp_path) < 2**50
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text(
        "anon 500\ninactive_file 200\nactive_file 30\n"
    )  # files can go
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(cpu, tmp_path) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.free_bytes(cpu, tmp_path) == 4230


# ---------------------------------------------------------------- sampling


def test_a_token_without_probability_is_never_sampled() -> None:
    """Guards against the ends of the distribution function, where rounding could reach one."""
    random_logits = torch.randn(500, 999, generator=torch.Generator().manual_seed(3))
    never = torch.full((500, 500), -torch.inf)
    logits = torch.cat([never, random_logits, never], dim=1)
    for number in (0.0, 1 - 2**-53):
        tokens = sampled(1.0, logits, torch.full((500,), number, dtype=torch.float64))
        assert ((tokens >= 500) & (tokens < 1499)).all()


def test_sampling_follows_the_temperature() -> None:
    """Guards against a temperature that multiplies, and a small one that gives NaN."""
    logits = torch.tensor([1.0, 3.0, 2.0]).repeat(10_000, 1)
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for temperature in (0.5, 1.0, 2.0):
        shares = sampled(temperature, logits, numbers).bincount(minlength=3) / 10_000
        expected = (logits[0] / temperature).softmax(dim=0)
        torch.testing.assert_close(shares, expected, rtol=0, atol=2e-4)
    assert (sampled(1e-310, logits, numbers) == 1).all()


def test_the_longest_sequence_is_that_of_its_own_limit() -> None:
    """Guards against a cache that is too short for a short prompt with a high limit."""
    assert Queue([[1] * 5, [1] * 2], [1, 10]).longest == 12
    assert Queue([[1] * 5, [1] * 2], [8, 10]).longest == 13


def test_a_prefill_has_no_more_tokens_than_it_may() -> None:
    """Guards against prompts that do not fit into memory together."""
    queue = Queue([[1] * 4] * 5 + [[1] * 30], 1, prefill_tokens=10)
    queue.open(8)
    admitted = [[*map(len, queue.admit().values())] for _ in range(4)]
    assert admitted == [[30], [4, 4], [4, 4], [4]]  # one that is longer is read alone


def test_completions_are_in_the_order_of_their_prompts_and_end_with_every_eos(
    plain_sharp: Llama,
    references,
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a sample beside another problem, and one that goes on after its end."""
    eos = frozenset({2, *references[0]})
    config = plain_sharp.pretrained.generation_config
    for listed, ends in ((None, {2}), (5, {2, 5}), (sorted(references[0]), eos)):
        monkeypatch.setattr(config, "eos_token_id", listed)
        assert eos_token_ids(plain_sharp, tokenizer) == ends
    expected = decode(plain_sharp, prompts, eos, 2)
    limits = {"max_new_tokens": NEW_TOKENS, "eos_token_ids": eos, "slots": 2}
    assert [one.index for one in greedy_decode(plain_sharp, prompts, **limits)] != [
        one.index for one in expected
    ]
    assert complete(plain_sharp, tokenizer, NEW_TOKENS, 2, prompts) == [
        (tokenizer.decode(one.token_ids), one.stop) for one in expected
    ]


def test_a_question_is_decoded_by_its_text_and_within_the_limits(plain_sharp: Llama) -> None:
    """Guards against samples that depend on the other rows, and slots that were set in vain."""
    asked: list[Any] = []

    def look(model: Llama, *words: Any, **limits: Any) -> list[Completion]:
        asked.append((model, *words, limits))
        return []

    ends = frozenset({2})
    decoder = Decoder(plain_sharp, None, ["a", "b"], [[1], [1, 5]], 4, ends, slots=3, decode=look)
    how = Sampling(0.7, 0)
    decoder.completions([(1, 6), (0, 6)], how)
    limits = {"max_new_tokens": 4, "eos_token_ids": ends, "slots": 3, "arrived": list}
    assert asked == [(plain_sharp, [[1, 5], [1]], how, ["6/b", "6/a"], limits)]


def test_a_calculator_is_used_however_tokens_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against scores that claim a calculator, or a temperature, that was not used."""
    calculator, used = object(), []
    for name in ("greedy_decode", "sample_decode"):
        monkeypatch.setattr(strategy, name, lambda *words, **how: used.append((words, how)))
    for how in (Greedy(calculator), Sampling(0.5, 7, calculator)):
        strategy.decode(None, [[1]], how, ["0/a"], slots=3)
    with_it = {"calculator": calculator, "slots": 3}
    sampled_so = (None, [[1]], ["7/0/a"]), with_it | {"temperature": 0.5}
    assert used == [((None, [[1]]), with_it), sampled_so]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_in_decoding_is_that_of_training(dtype: torch.dtype) -> None:
    """Guards against an epsilon that is left out, which large hidden states would not reveal, and
    against one that is computed in 8 bits."""
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight)
    hidden = torch.randn(7, 96).to(dtype) / 300  # as an embedding's: a square is about epsilon
    with torch.no_grad():
        found = llama._norm_in_decoding(hidden, norm)
        exact = norm(hidden)
    torch.testing.assert_close(found, exact, rtol=2e-6 * (dtype == torch.float32), atol=0)


def test_a_model_in_training_is_decoded_without_dropout(sharp: Llama) -> None:
    """Guards against samples after an epoch, and an exact match, with dropout."""
    training: list[bool] = []

    def choose(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        training.append(sharp.training)
        # All of their bits: one that is rounded to 1 would be beyond every token.
        assert numbers.dtype == torch.float64
        return logits.argmax(dim=-1)

    sharp.train()
    list(decode_queue(sharp, Queue([[1, 5]], 2, ["seed"]), choose, frozenset(), slots=1))
    assert training == [False, False]
