"""Attention of a decoding step equals attention to each sequence alone, in either cache."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from cache import BLOCK, BagCache, StaticCache
from data import IGNORE, Example, collate

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 8, 3 * BLOCK
SLOTS, PROMPTS = [5, 0, 3, 1], [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3]
STEPS = 4


def random_tensor(generator: torch.Generator, dtype: torch.dtype, rows: int, heads: int) -> torch.Tensor:
    return torch.randn(rows, heads, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)


def exactly(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one query ``[H, D]`` to ``[length, kv_heads, D]``, in float64."""
    keys, values = (each.double().repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for each in (keys, values))
    return F.scaled_dot_product_attention(query.double()[:, None], keys, values)[:, 0]


@pytest.mark.parametrize("kind", ["bags", "static"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)]
)
def test_steps_attend_to_all_of_their_own_sequence_and_nothing_else(
    make_llama: Callable[..., LlamaForCausalLM], kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Guards against gaps, neighbours and former content that are read, and borders of blocks that are missed."""
    generator = torch.Generator().manual_seed(0)
    model = make_llama(50, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS).to(dtype)
    cache = (BagCache if kind == "bags" else StaticCache)(model, 6, LENGTH)
    for tensor in (*cache.keys, *cache.values):  # what another sequence left there
        tensor.fill_(torch.nan if kind == "bags" else 1e4)

    def rows(heads: int, count: int) -> torch.Tensor:
        return random_tensor(generator, dtype, count, heads)

    batch = collate([Example([7] * (length + 1), [IGNORE] * length + [7]) for length in PROMPTS])
    total = batch.num_tokens
    query, key, value = rows(HEADS, total), rows(KV_HEADS, total), rows(KV_HEADS, total)
    seen = [
        list(pair)
        for pair in zip(key[: sum(PROMPTS)].split(PROMPTS), value[: sum(PROMPTS)].split(PROMPTS), strict=True)
    ]
    attend = cache.prefill(SLOTS, batch)
    outputs = [attend(layer, query, key, value) for layer in range(2)]
    assert torch.equal(*outputs)
    last = [sum(PROMPTS[: number + 1]) - 1 for number in range(len(PROMPTS))]
    for number, row in enumerate(last):
        expected = exactly(query[row], *seen[number])
        torch.testing.assert_close(outputs[0][row].double(), expected, rtol=tolerance, atol=tolerance)
    for step in range(STEPS):
        lengths = [length + step for length in PROMPTS]
        query, key, value = rows(HEADS, 4), rows(KV_HEADS, 4), rows(KV_HEADS, 4)
        if kind == "bags":
            attend = cache.step(SLOTS, lengths)
            found = [attend(layer, query, key, value) for layer in range(2)]
        else:  # of all slots, the idle ones at position 0
            positions = torch.zeros(6, dtype=torch.long)
            positions[SLOTS] = torch.tensor(lengths)
            attend, everywhere = cache.step(positions), [rows(heads, 6) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            for all_rows, own in zip(everywhere, (query, key, value), strict=True):
                all_rows[SLOTS] = own
            found = [attend(layer, *everywhere)[SLOTS] for layer in range(2)]
        assert torch.equal(*found)
        for number in range(len(SLOTS)):
            seen[number] = [
                torch.cat([old, new[number, None]]) for old, new in zip(seen[number], (key, value), strict=True)
            ]
            expected = exactly(query[number], *seen[number])
            torch.testing.assert_close(found[0][number].double(), expected, rtol=tolerance, atol=tolerance)
