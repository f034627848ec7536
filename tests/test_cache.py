"""Attention of a decoding step equals attention to each sequence alone, in either cache."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from engine.cpu.kernels import BLOCK, PagedCache
from engine.cuda.cache import StaticCache
from engine.llama import Llama
from engine.packing import collate_prompts

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 8, 3 * BLOCK
SLOTS, PROMPTS = [5, 0, 3, 1], [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3]
ROWS = [4, 0, 5, 2]  # of a step, for these slots
STEPS = 4


def random_tensor(
    generator: torch.Generator, dtype: torch.dtype, rows: int, heads: int
) -> torch.Tensor:
    return torch.randn(rows, heads, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)


def exactly(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one query ``[H, D]`` to ``[length, kv_heads, D]``, in float64."""
    keys, values = (
        each.double().repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1)
        for each in (keys, values)
    )
    return F.scaled_dot_product_attention(query.double()[:, None], keys, values)[:, 0]


@pytest.mark.parametrize("kind", ["paged", "static"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
def test_steps_attend_to_all_of_their_own_sequence_and_nothing_else(
    make_llama: Callable[..., LlamaForCausalLM], kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Guards against gaps, neighbours and former content that are read, and missed blocks."""
    generator = torch.Generator().manual_seed(0)
    shape = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    model = Llama(make_llama(50, **shape).to(dtype))
    cache = (PagedCache if kind == "paged" else StaticCache)(model, 6, LENGTH)
    for tensor in (*cache.keys, *cache.values):  # what another sequence left there
        tensor.fill_(torch.nan if kind == "paged" else 1e4)

    def rows(heads: int, count: int) -> torch.Tensor:
        return random_tensor(generator, dtype, count, heads)

    batch = collate_prompts([[7] * length for length in PROMPTS], model.kernels)
    total = batch.num_tokens
    query, key, value = rows(HEADS, total), rows(KV_HEADS, total), rows(KV_HEADS, total)
    seen = [
        list(pair)
        for pair in zip(
            key[: sum(PROMPTS)].split(PROMPTS), value[: sum(PROMPTS)].split(PROMPTS), strict=True
        )
    ]
    if kind == "static":
        for slot, length in zip(SLOTS, PROMPTS, strict=True):
            cache.regions.take(slot, length)
    attend = cache.prefill(SLOTS, batch)
    outputs = [attend(layer, query, key, value) for layer in range(2)]
    assert torch.equal(*outputs)
    last = [sum(PROMPTS[: number + 1]) - 1 for number in range(len(PROMPTS))]
    for number, row in enumerate(last):
        expected = exactly(query[row], *seen[number])
        torch.testing.assert_close(
            outputs[0][row].double(), expected, rtol=tolerance, atol=tolerance
        )
    for step in range(STEPS):
        lengths = [length + step for length in PROMPTS]
        query, key, value = rows(HEADS, 4), rows(KV_HEADS, 4), rows(KV_HEADS, 4)
        if kind == "paged":
            attend = cache.step(SLOTS, lengths)
            found = [attend(layer, query, key, value) for layer in range(2)]
        else:  # in four of six rows; the others are left over
            positions, starts = torch.zeros(6, dtype=torch.long), torch.full((6,), cache.nobodys)
            positions[ROWS] = torch.tensor(lengths)
            starts[ROWS] = torch.tensor([cache.regions.starts[slot] for slot in SLOTS])
            attend, everywhere = (
                cache.step(positions, starts),
                [rows(heads, 6) for heads in (HEADS, KV_HEADS, KV_HEADS)],
            )
            for all_rows, own in zip(everywhere, (query, key, value), strict=True):
                all_rows[ROWS] = own
            found = [attend(layer, *everywhere)[ROWS] for layer in range(2)]
        assert torch.equal(*found)
        for number in range(len(SLOTS)):
            seen[number] = [
                torch.cat([old, new[number, None]])
                for old, new in zip(seen[number], (key, value), strict=True)
            ]
            expected = exactly(query[number], *seen[number])
            torch.testing.assert_close(
                found[0][number].double(), expected, rtol=tolerance, atol=tolerance
            )


def test_blocks_are_used_again_and_stay_dense(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Guards against blocks that are lost or shared, and NaN left by those who held them."""
    generator = torch.Generator().manual_seed(0)
    shape = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    model = Llama(make_llama(50, **shape).double())
    cache = PagedCache(model, 8, LENGTH)
    stock = sorted(cache.stock)

    def rows(heads: int, count: int) -> torch.Tensor:
        return random_tensor(generator, torch.float64, count, heads)

    def read(
        slots: list[int], lengths: list[int], poisoned: bool = False
    ) -> dict[int, list[torch.Tensor]]:
        batch = collate_prompts([[7] * length for length in lengths], model.kernels)
        key, value = rows(KV_HEADS, batch.num_tokens), rows(KV_HEADS, batch.num_tokens)
        if poisoned:
            key, value = key * torch.nan, value * torch.nan
        cache.prefill(slots, batch)(0, rows(HEADS, batch.num_tokens), key, value)
        parts = zip(
            key[: sum(lengths)].split(lengths), value[: sum(lengths)].split(lengths), strict=True
        )
        return {slot: list(part) for slot, part in zip(slots, parts, strict=True)}

    seen = read([0, 1], [BLOCK + 5, 3])
    for number in range(12):
        read([2, 3], [2 * BLOCK + number, 9], poisoned=True)
        cache.release(3)
        seen |= read([4], [1 + 2 * number])
        slots = [4, 0, 1]
        query, key, value = rows(HEADS, 3), rows(KV_HEADS, 3), rows(KV_HEADS, 3)
        found = cache.step(slots, [len(seen[slot][0]) for slot in slots])(0, query, key, value)
        for row, slot in enumerate(slots):
            new = key[row, None], value[row, None]
            seen[slot] = [torch.cat(pair) for pair in zip(seen[slot], new, strict=True)]
            torch.testing.assert_close(
                found[row], exactly(query[row], *seen[slot]), rtol=1e-12, atol=1e-12
            )
        held = [
            block for slot in range(8) for block in cache.blocks[slot, : cache.used[slot]].tolist()
        ]
        assert sorted(held + cache.stock) == stock
        # Two of slot 0, one of slot 1, three of slot 2, one of slots 3 and 4. A step opened none
        # beyond these.
        assert max(held) < 8
        cache.release(2)
        cache.release(4)
    cache.release(0)
    cache.release(1)
    assert sorted(cache.stock) == stock
