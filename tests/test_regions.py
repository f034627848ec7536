"""Sequences share a GPU's cache without overlap, deadlock or influence on a completion."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import PROMPT, real_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import data
from engine.cuda.cache import StaticCache
from engine.cuda.graph import StaticStep
from engine.cuda.pipeline import PipelinedModel
from engine.cuda.regions import Regions
from engine.decoding import Completion, Queue, greedy_decode, sample_decode
from engine.device import cuda_kernels
from engine.llama import Llama
from engine.loading import load_tokenizer
from engine.memory import CACHE_SHARE, CachePlan, plan_slots
from engine.sampling import Choose
from grading.dataset import load_problems

VOCABULARY, NEW_TOKENS = 60, 16
GIB = 2**30
CUDA = cuda_kernels(torch.device("cpu"))  # what a GPU would use, but for graphs


# ---------------------------------------------------------------- the bookkeeping


def check(regions: Regions, lengths: dict[int, int]) -> None:
    """Each slot has tokens of its own, enough of them, and none are lost."""
    half, length = regions.half, regions.length
    whole = [slot for slot in lengths if not half or regions.starts[slot] in regions_of(regions)]
    parts = [(start, half) for start in regions.halves]
    parts += [(number * length, length) for number in regions.empty]
    parts += [(regions.starts[slot], length if slot in whole else half) for slot in lengths]
    parts.sort()
    assert parts[-1][0] + parts[-1][1] <= regions.count * length
    assert all(start + size <= later for (start, size), (later, _) in pairwise(parts))
    for slot, tokens in lengths.items():
        assert tokens <= (length if slot in whole else half)
    halves = sum(size == half for _, size in parts) if half else 0
    assert halves % 2 == 0 and len(parts) - halves // 2 == regions.count
    assert halves // 2 < regions.count


def regions_of(regions: Regions) -> set[int]:
    """The starts of regions that one sequence has to itself, by what the others do."""
    first = {number * regions.length for number in range(regions.count)}
    used = [*regions.halves, *regions.starts.values()]
    return {start for start in first if start + regions.half not in used}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 6), st.integers(1, 13), st.integers(1, 17))
def test_parts_never_overlap_and_somebody_can_always_go_on(
    seed: int, count: int, slots: int, length: int
) -> None:
    """Guards against tokens that two sequences share, tokens that are lost, and deadlock."""
    rng = random.Random(seed)
    regions = Regions(count, length, slots)
    regions.ended = rng.choice([0, 10**3])  # has it reason to expect short ones?
    lengths: dict[int, int] = {}  # tokens of the sequence in each slot
    ends: dict[int, int] = {}  # and how many it will have in the end
    for _ in range(60):
        free = [slot for slot in range(slots) if slot not in lengths]
        begun, end = sorted(rng.choices(range(1, length + 1), k=2))
        if free and regions.room(begun) and rng.random() < 0.7:
            slot = rng.choice(free)
            regions.take(slot, begun)
            lengths[slot], ends[slot] = begun, end
        elif not lengths:  # then whatever waits must be admitted
            assert regions.room(begun) and len(regions.empty) == count
        check(regions, lengths)
        gone_on = []
        for slot in rng.sample(sorted(lengths), len(lengths)):
            if lengths[slot] == ends[slot]:
                regions.release(slot)
                del lengths[slot]
            elif not regions.has_outgrown(slot, lengths[slot] + 1) or regions.grow(slot):
                lengths[slot] += 1
            else:
                continue
            gone_on.append(slot)
            check(regions, lengths)
        assert gone_on or not lengths


def test_who_has_the_region_alone_grows_where_it_is() -> None:
    """Guards against a copy, or a wait, where there is room beside the sequence."""
    regions = Regions(2, 10, 3)
    regions.take(0, 3)
    regions.take(1, 3)
    first, second = regions.starts[0], regions.starts[1]
    assert (first, second) == (0, 5)
    regions.take(2, 7)  # the other region
    assert not regions.has_outgrown(1, 5) and regions.has_outgrown(1, 6) and not regions.grow(1)
    regions.release(0)
    assert regions.grow(1) and regions.starts[1] == 0
    assert not regions.has_outgrown(1, 10)


def test_as_many_are_admitted_as_can_be_expected_to_go_on() -> None:
    """Guards against sequences that fill all halves and then wait for each other."""
    regions = Regions(100, 700, 200)
    for slot in range(100):
        assert regions.room(80) == 100 - slot
        regions.take(slot, 80)
    for slot in range(92):  # most end early, so more of them fit
        regions.release(slot)
        regions.take(slot, 80)
    assert 60 < regions.room(80) < 90
    for slot in range(100):  # then all turn out long
        assert regions.grow(slot) or slot > 90
    assert regions.room(80) == 0


# ---------------------------------------------------------------- completions


def attend_by_gather(query: Tensor, keys: Tensor, values: Tensor, *sequences: Any) -> Tensor:
    """See `engine.attention.attend_to_lengths`; on a CPU, from a copy of each sequence."""
    _, starts, lengths, longest = sequences
    offsets = torch.arange(longest)
    tokens = (starts[:-1, None] + offsets).clamp(max=len(keys) - 1)
    shared = query.unflatten(1, (keys.shape[1], -1))
    keys, values = (each[tokens].transpose(1, 2) for each in (keys, values))
    seen = (offsets < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(shared, keys, values, attn_mask=seen).flatten(1, 2)


@contextmanager
def flash_attention() -> Iterator[None]:
    """Decoding as with FlashAttention, in any dtype: sequences lie anywhere in the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.cuda.cache.is_for_flash_attention", lambda query: True)
        patch.setattr("engine.cuda.cache.attend_to_lengths", attend_by_gather)
        yield


class Insisting:
    """A calculator with tokens of its own in the place of some; it never gives two in a row."""

    def __init__(self, most: int):
        self.most = most

    def after(self, token_ids: list[int]) -> list[int]:
        return [7, 9, 11][: self.most] if token_ids[-1] % 5 == 0 else []


@pytest.fixture(scope="module")
def plain(make_llama: Callable[..., LlamaForCausalLM]) -> Llama:
    return Llama(make_llama(VOCABULARY, seed=3, std=0.4))


def completions(
    model: Llama, prompts: list[list[int]], seeds: list[str] | None = None, **limits
) -> list[Completion]:
    """Greedy ones, or samples where ``seeds`` are given."""
    limits["eos_token_ids"] = frozenset({2, 17, 31})
    if seeds:
        found = sample_decode(model, prompts, seeds, temperature=1.0, **limits)
    else:
        found = greedy_decode(model, prompts, **limits)
    return sorted(found, key=lambda completion: completion.index)


def with_regions(plain: Llama, count: int, small: int) -> tuple[Llama, dict[str, int]]:
    """The model with a cache of ``count`` regions, and what happened in it."""
    seen = {"moves": 0, "pauses": 0, "sizes": set()}

    class RecordedCache(StaticCache):
        def start_with_room(self, slot: int, position: int) -> int | None:
            start = super().start_with_room(slot, position)
            seen["pauses"] += start is None
            return start

        def _move(self, old: int, new: int) -> None:
            seen["moves"] += old != new
            super()._move(old, new)

    class RecordedStep(StaticStep):
        def __init__(self, model, cache, rows, *rest):
            seen["sizes"].add(rows)
            super().__init__(model, cache, rows, *rest)

    class Tight(PipelinedModel):
        def __init__(self, model: Llama, plan: CachePlan, choose: Choose | None):
            self.rows = small, 2 * small
            super().__init__(model, replace(plan, regions=min(plan.regions, count)), choose)

    kernels = replace(
        plain.kernels, cache=RecordedCache, cached_model=Tight, static_step=RecordedStep
    )
    return Llama(plain.pretrained, kernels), seen


@pytest.mark.parametrize("is_flash", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    limits=st.lists(st.integers(1, NEW_TOKENS), min_size=9, max_size=9),
    slots=st.integers(1, 9),
    count=st.integers(1, 5),
    small=st.integers(1, 4),
    forced=st.integers(0, 3),
    is_sampled=st.booleans(),
)
def test_a_completion_is_that_of_its_prompt_alone(
    plain: Llama,
    is_flash: bool,
    lengths: list[int],
    limits: list[int],
    slots: int,
    count: int,
    small: int,
    forced: int,
    is_sampled: bool,
) -> None:
    """Guards against anything of regions, moves, pauses, steps of few rows, and the host's lag."""
    prompts = [[(7 * n + 3 * k) % VOCABULARY for k in range(n)] for n in lengths]
    limits = limits[: len(prompts)]
    calculator = Insisting(forced) if forced else None
    seeds = [f"{index}" for index in range(len(prompts))] if is_sampled else None
    expected = [
        completions(
            plain,
            prompts[index : index + 1],
            seeds and seeds[index : index + 1],
            max_new_tokens=limits[index],
            slots=1,
            calculator=calculator,
        )[0]
        for index in range(len(prompts))
    ]
    model, _ = with_regions(plain, count, small)
    settings = {"max_new_tokens": limits, "slots": slots, "calculator": calculator}
    with flash_attention() if is_flash else nullcontext():
        found = completions(model, prompts, seeds, **settings)
    assert [(one.token_ids, one.stop) for one in found] == [
        (one.token_ids, one.stop) for one in expected
    ]


def test_moves_pauses_and_small_steps_do_happen(plain: Llama) -> None:
    """Guards against a property that holds because nothing is ever moved."""
    prompts = [[5 + n, 3, n] for n in range(50)]
    # The last are read first, and end early; so more of the long ones are admitted than fit.
    limits = [14 + n % 3 if n < 14 else 2 + n % 3 for n in range(50)]
    model, seen = with_regions(plain, 4, 2)
    with flash_attention():
        found = completions(model, prompts, max_new_tokens=limits, slots=8)
    expected = completions(plain, prompts, max_new_tokens=limits, slots=1)
    assert found == expected
    assert seen["moves"] > 2 and seen["pauses"] > 2 and seen["sizes"] == {2, 4, 8}


def test_without_flash_attention_the_cache_is_read_where_it_is(
    plain: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a copy of the whole cache in every step, and regions that two sequences share.

    Also in small steps, and with fewer regions than slots.
    """
    caches: list[StaticCache] = []
    read: list[Tensor] = []
    attention = F.scaled_dot_product_attention

    class Noted(StaticCache):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            caches.append(self)

    def noted(query, key, value, attn_mask=None, **settings) -> Tensor:
        read.extend((key, value) if attn_mask is not None else ())
        return attention(query, key, value, attn_mask=attn_mask, **settings)

    model, seen = with_regions(plain, 4, 2)
    model.kernels = replace(model.kernels, cache=Noted)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    prompts = [[5 + n, 3, n] for n in range(9)]
    found = completions(model, prompts, max_new_tokens=[14] + [3] * 8, slots=8)
    assert len(found) == 9 and seen["sizes"] == {2, 4}
    (cache,) = caches
    assert cache.regions.half == 0 and cache.regions.count == 4
    layers = [each.data_ptr() for each in (*cache.keys, *cache.values)]
    assert {each.data_ptr() for each in read} == set(layers)


def test_the_next_step_starts_before_the_tokens_of_the_last_are_read(plain: Llama) -> None:
    """Guards against a device that waits for the host, and a step read twice or too late."""
    order: list[str] = []

    class Recorded(StaticStep):
        def __call__(self, rows, numbers) -> None:
            order.append("step")
            super().__call__(rows, numbers)

    class Watched(PipelinedModel):
        def _tokens_before(self, launched, running):
            if self._in_flight:
                order.append("read")
            return super()._tokens_before(launched, running)

    kernels = replace(plain.kernels, cache=StaticCache, cached_model=Watched, static_step=Recorded)
    model = Llama(plain.pretrained, kernels)
    found = greedy_decode(
        model, [[1, 5], [1, 6]], max_new_tokens=4, eos_token_ids=frozenset(), slots=2
    )
    assert [len(one.token_ids) for one in found] == [4, 4]
    # The prefill gives the first token. The last step turns out to be one too many.
    assert order == ["step", "read"] * 4


# ---------------------------------------------------------------- Llama-2-7B


@pytest.fixture(scope="module")
def llama_2_7b() -> Llama:
    """Without values. Its device is not CUDA, so it is decoded without FlashAttention."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000)).to(torch.bfloat16)
    kernels = replace(cuda_kernels(torch.device("cuda")), device=torch.device("meta"))
    return Llama(model, kernels)


def test_two_sequences_share_a_region_beside_llama_2_7b_on_80_gb(llama_2_7b: Llama) -> None:
    """Guards against memory for the longest sequence in every slot."""
    length = 196 + 512  # GSM8K's longest test prompt, and max_new_tokens
    token = 2 * 32 * 32 * 128 * 2  # keys and values, layers, heads, head_dim, bytes
    assert token == GIB // 2048 and StaticCache.slot_bytes(llama_2_7b, length) == length * token
    with flash_attention():
        plan = plan_slots(llama_2_7b, None, length, 1319, free=65 * GIB)
        assert plan.regions == int(CACHE_SHARE * 65 * 2048 / length) == 150
        assert plan.slots == 2 * 150 - 1
        cache = StaticCache(llama_2_7b, plan.slots, length, plan.regions)
        held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
        assert held == (150 * length + 1) * token <= CACHE_SHARE * 65 * GIB
        # More than 512 are hardly faster; on 192 GB each of them has a region.
        assert plan_slots(llama_2_7b, None, length, 1319, free=125 * GIB).slots == 512
        assert plan_slots(llama_2_7b, None, length, 1319, free=225 * GIB).regions == 512
        small = plan_slots(llama_2_7b, None, length, 1319, free=10 * GIB)
        assert (small.slots, small.regions) == (45, 23)


def test_without_flash_attention_each_slot_has_a_region(llama_2_7b: Llama) -> None:
    """Guards against slots for which there is never a place."""
    plan = plan_slots(llama_2_7b, None, 708, 1319, free=65 * GIB)
    assert (plan.slots, plan.regions) == (150, 150)


def test_gsm8k_fills_256_slots_of_150_regions(llama_2_7b: Llama) -> None:
    """Guards against slots that there is memory for on paper, and pauses in an ordinary run."""
    problems = load_problems(real_folder("GSM8K_DIR"), "test")
    examples = data.encode(load_tokenizer(real_folder("TOKENIZER_DIR")), problems, PROMPT)
    prompts = [example.labels.count(-100) for example in examples]
    answers = [len(one.labels) - prompt for one, prompt in zip(examples, prompts, strict=True)]
    assert max(prompts) == 196
    steps, most, pauses = schedule(prompts, answers, Regions(150, 708, 256), 256)
    assert most == 256 and pauses == 0 and steps < 930  # with a region for each slot: 865
    fewer, *_ = schedule(prompts, answers, Regions(144, 708, 144), 144)
    assert fewer > 1400
    # Of a model that never stops, no more are decoded at a time than can go on.
    endless = [512] * len(prompts)
    alone, _, _ = schedule(prompts, endless, Regions(150, 708, 150), 150)
    assert schedule(prompts, endless, Regions(150, 708, 256), 256) == (alone, 150, 0)


def schedule(
    prompts: list[int], answers: list[int], regions: Regions, slots: int
) -> tuple[int, int, int]:
    """Steps, most sequences in one, and pauses of decoding answers of known lengths."""
    queue = Queue([[0] * length for length in prompts], 512)
    queue.open(slots, regions)
    steps = most = pauses = 0
    while queue.waiting or queue.running:
        if queue.is_worth_a_prefill():
            read = queue.admit()
        else:
            lengths = {
                slot: one.prompt_length + len(one.token_ids) for slot, one in queue.running.items()
            }
            read = [
                slot
                for slot, length in lengths.items()
                if not regions.has_outgrown(slot, length) or regions.grow(slot)
            ]
            steps, most = steps + 1, max(most, len(read))
            pauses += len(queue.running) - len(read)
        for slot in read:
            one = queue.running[slot]
            one.token_ids.append(0)
            if len(one.token_ids) == answers[one.index]:
                queue.leave(slot)
                regions.release(slot)
    return steps, most, pauses
