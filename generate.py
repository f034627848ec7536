"""Greedy decoding in batches, with a KV cache and without padding.

The cache has a fixed number of slots. A problem's prompt is prefilled into a free slot, packed
with the others that come in at the same time; each step then writes one token in every slot in
use; a finished completion leaves its slot at once and the next prompt takes it. Each row of the
cache is attended to up to its own length only, so a completion does not depend on its neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from attention import PackedAttention
from data import IGNORE, Batch, Example, collate
from model import Attend, forward

PREFILL_TOKENS = 8192  # most prompt tokens in one forward pass
GROWTH = 64  # tokens by which the cache grows
GROUP = 16  # slots on the CPU that are attended together, up to the longest of them


@dataclass
class Completion:
    """What the model wrote for one prompt.

    Attributes:
        index: which prompt.
        prompt_length: in tokens.
        token_ids: the tokens written, without EOS.
        stop: ``eos`` or ``length`` (cut by max_new_tokens); empty while being written.
    """

    index: int
    prompt_length: int
    token_ids: list[int] = field(default_factory=list)
    stop: str = ""


class KVCache:
    """Keys and values of all layers for a fixed number of sequences.

    ``keys`` and ``values`` hold ``[slots, kv_heads, capacity, head_dim]`` for each layer. The slots
    in use are always the first ones: `move` copies the last ones into the gaps.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int):
        config = model.config
        shape = (slots, config.num_key_value_heads, 0, model.model.layers[0].self_attn.head_dim)
        self.keys, self.values = (
            [torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(config.num_hidden_layers)]
            for _ in range(2)
        )

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens in each slot: no more than are needed, since gaps cost time and memory."""
        missing = length - self.keys[0].shape[2]
        if missing > 0:
            growth = -(-missing // GROWTH) * GROWTH
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    # zeros, not empty: what a mask hides must still be finite, since 0 * NaN is NaN.
                    tensors[layer] = F.pad(tensor, (0, 0, 0, growth))

    def prefill(self, slots: range, batch: Batch) -> Attend:
        """Attention of packed prompts, that keeps what it sees of them in ``slots``."""
        packed = PackedAttention(batch)

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            for cache, seen in ((self.keys, key), (self.values, value)):
                for slot, sequence in zip(slots, seen.split(batch.seqlens), strict=False):  # without the filler
                    cache[layer][slot, :, : len(sequence)] = sequence.transpose(0, 1)
            return packed(layer, query, key, value)

        return attend

    def step(self, lengths: list[int]) -> Attend:
        """Attention of one new token in each slot in use, to all that its slot holds and to itself.

        Args:
            lengths: of each slot in use, the tokens that it holds.
        """
        self.reserve(max(lengths) + 1)
        device, dtype = self.keys[0].device, self.keys[0].dtype
        rows, places = torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
        together = len(lengths) if device.type == "cuda" else GROUP
        groups = []
        for first in range(0, len(lengths), together):
            slots = slice(first, first + together)
            longest = max(lengths[slots]) + 1
            hidden = torch.arange(longest, device=device) > places[slots, None]
            # As numbers, once a step: attention would make them of a boolean mask in every layer.
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            groups.append((slots, longest, mask[:, None, None, :]))  # [slots, 1, 1, longest]

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, places] = key
            values[rows, :, places] = value
            outputs = [
                F.scaled_dot_product_attention(
                    query[slots, :, None],
                    keys[: len(rows)][slots, :, :longest],
                    values[: len(rows)][slots, :, :longest],
                    attn_mask=mask,
                    enable_gqa=query.shape[1] != key.shape[1],
                )[:, :, 0]
                for slots, longest, mask in groups
            ]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attend

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]


@torch.inference_mode()
def greedy_decode(
    model: LlamaForCausalLM,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | Sequence[int],
    eos_token_ids: frozenset[int],
    slots: int,
) -> Iterator[Completion]:
    """Complete each prompt with the most probable token at every step.

    Args:
        prompts: token ids with BOS; none may be empty.
        max_new_tokens: after how many a completion is cut: one number, or one for each prompt.
        slots: how many are decoded at the same time; changes no completion.

    Yields:
        Each prompt's `Completion` as soon as it is finished, in no particular order.
    """
    if not prompts:
        return
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # pop() takes the longest first
    slots = min(slots, len(prompts))
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    cache = KVCache(model, slots)
    running: list[Completion] = []

    def record(completions: list[Completion], token_ids: list[int]) -> None:
        for completion, token_id in zip(completions, token_ids, strict=True):
            if token_id in eos_token_ids:
                completion.stop = "eos"
                continue
            completion.token_ids.append(token_id)
            if len(completion.token_ids) == limits[completion.index]:
                completion.stop = "length"

    while waiting or running:
        while waiting and len(running) < slots:
            admitted = _admit(waiting, prompts, slots - len(running))
            record(admitted, _prefill(model, cache, [prompts[new.index] for new in admitted], len(running)))
            running += admitted
            yield from _leave(running, cache)
        if running:
            record(running, _decode_one_token(model, cache, running))
            yield from _leave(running, cache)


def _admit(waiting: list[int], prompts: Sequence[list[int]], free: int) -> list[Completion]:
    admitted, tokens = [], 0
    while waiting and len(admitted) < free:
        length = len(prompts[waiting[-1]])
        if admitted and tokens + length > PREFILL_TOKENS:
            break
        admitted.append(Completion(waiting.pop(), length))
        tokens += length
    return admitted


def _prefill(model: LlamaForCausalLM, cache: KVCache, prompts: list[list[int]], first_slot: int) -> list[int]:
    """Read packed prompts into the slots from ``first_slot`` on; returns the first token after each."""
    # The token to come is the one label of each; its value, here 0, is never looked at.
    examples = [Example([*prompt, 0], [*[IGNORE] * len(prompt), 0]) for prompt in prompts]
    batch = collate(examples).to(model.device)
    cache.reserve(max(map(len, prompts)))
    attend = cache.prefill(range(first_slot, first_slot + len(prompts)), batch)
    hidden = forward(model, batch.input_ids[0], batch.position_ids[0], attend, batch.loss_positions)
    return _most_probable(model, hidden)[: len(prompts)]


def _decode_one_token(model: LlamaForCausalLM, cache: KVCache, running: list[Completion]) -> list[int]:
    # The newest token of each completion is not in the cache yet.
    lengths = [one.prompt_length + len(one.token_ids) - 1 for one in running]
    positions = torch.tensor(lengths, device=model.device)
    newest = torch.tensor([one.token_ids[-1] for one in running], device=model.device)
    return _most_probable(model, forward(model, newest, positions, cache.step(lengths)))


def _most_probable(model: LlamaForCausalLM, hidden: torch.Tensor) -> list[int]:
    # float32 as in Transformers' generate: in bfloat16 ties would be broken differently.
    return model.lm_head(hidden).float().argmax(dim=-1).tolist()


def _leave(running: list[Completion], cache: KVCache) -> list[Completion]:
    """Take the finished completions out of ``running`` and close the gaps they leave in the cache."""
    finished = [completion for completion in running if completion.stop]
    for slot in reversed(range(len(running))):
        if running[slot].stop:
            last = len(running) - 1
            if slot != last:
                cache.move(last, slot)
                running[slot] = running[last]
            running.pop()
    return finished
