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

PREFILL_TOKENS = 8192  # most prompt tokens in one forward pass


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

    ``keys`` and ``values`` are ``[layers, slots, kv_heads, capacity, head_dim]``. The slots in
    use are always the first ones: `keep` moves the last ones into the gaps.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int, capacity: int):
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, capacity, head_dim)
        # zeros, not empty: what a mask hides must still be finite, since 0 * NaN is NaN.
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self._first_slot = 0
        self._prompt_lengths: tuple[int, ...] = ()
        self._positions = torch.empty(0)
        self._mask = torch.empty(0)

    def expect_prompts(self, first_slot: int, lengths: tuple[int, ...]) -> None:
        """Say into which slots the next forward pass's packed prompts go."""
        self._first_slot, self._prompt_lengths = first_slot, lengths

    def write_prompts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep ``[1, kv_heads, T, head_dim]`` of packed prompts, each in its slot."""
        for cache, packed in ((self.keys, key), (self.values, value)):
            for offset, sequence in enumerate(packed[0].split(self._prompt_lengths, dim=1)):
                cache[layer, self._first_slot + offset, :, : sequence.shape[1]] = sequence

    def expect_tokens(self, lengths: torch.Tensor, longest: int) -> None:
        """Say how many tokens each slot in use holds (``[slots in use]``) before the next forward pass."""
        self._positions = lengths
        past = torch.arange(longest + 1, device=lengths.device)
        self._mask = (past <= lengths[:, None])[:, None, None, :]  # [slots in use, 1, 1, longest + 1]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Keep the new token's key and value, and attend to everything its slot holds.

        All are ``[slots in use, (kv_)heads, 1, head_dim]``, and so is the result.
        """
        used = query.shape[0]
        rows = torch.arange(used, device=query.device)
        self.keys[layer][rows, :, self._positions] = key[:, :, 0]
        self.values[layer][rows, :, self._positions] = value[:, :, 0]
        length = self._mask.shape[-1]
        return F.scaled_dot_product_attention(
            query,
            self.keys[layer, :used, :, :length],
            self.values[layer, :used, :, :length],
            attn_mask=self._mask,
            scale=scaling,
            enable_gqa=True,
        )

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


@torch.inference_mode()
def greedy_decode(
    model: LlamaForCausalLM,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    slots: int,
) -> Iterator[Completion]:
    """Complete each prompt with the most probable token at every step.

    Args:
        prompts: token ids with BOS; none may be empty.
        slots: how many are decoded at the same time; changes no completion.

    Yields:
        Each prompt's `Completion` as soon as it is finished, in no particular order.
    """
    if not prompts:
        return
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # pop() takes the longest first
    slots = min(slots, len(prompts))
    cache = KVCache(model, slots, max(map(len, prompts)) + max_new_tokens)
    running: list[Completion] = []

    def record(completions: list[Completion], token_ids: list[int]) -> None:
        for completion, token_id in zip(completions, token_ids, strict=True):
            if token_id in eos_token_ids:
                completion.stop = "eos"
                continue
            completion.token_ids.append(token_id)
            if len(completion.token_ids) == max_new_tokens:
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
    seqlens = tuple(map(len, prompts))
    cache.expect_prompts(first_slot, seqlens)
    ends = torch.tensor(seqlens, device=model.device).cumsum(0)
    hidden = model.model(
        input_ids=torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device),
        position_ids=torch.tensor([[p for length in seqlens for p in range(length)]], device=model.device),
        use_cache=False,
        seqlens=seqlens,
        cu_seqlens=F.pad(ends, (1, 0)).int(),
        kv_cache=cache,
    ).last_hidden_state
    return _most_probable(model, hidden[0, ends - 1])


def _decode_one_token(model: LlamaForCausalLM, cache: KVCache, running: list[Completion]) -> list[int]:
    # The newest token of each completion is not in the cache yet.
    lengths = [one.prompt_length + len(one.token_ids) - 1 for one in running]
    positions = torch.tensor(lengths, device=model.device)
    cache.expect_tokens(positions, max(lengths))
    hidden = model.model(
        input_ids=torch.tensor([[one.token_ids[-1]] for one in running], device=model.device),
        position_ids=positions[:, None],
        use_cache=False,
        kv_cache=cache,
    ).last_hidden_state
    return _most_probable(model, hidden[:, 0])


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
