"""Decoding in batches, with a KV cache and without padding.

The cache has a fixed number of slots. A problem's prompt is prefilled into a free slot, packed
with the others that come in at the same time; each step then writes one token in every slot in
use; a finished completion leaves its slot at once, and as soon as a few are free the next prompts
take them. Each sequence is attended to up to its own length only, so a completion does not depend
on its neighbours.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import LlamaForCausalLM

from engine import memory
from engine.cache import StaticCache
from engine.cpu.cache import BagCache, slot_bytes
from engine.cpu.onednn import packed_weights
from engine.cuda_graph import StaticStep
from engine.llama import forward
from engine.packing import IGNORE, Example, collate
from run.errors import UserError

if TYPE_CHECKING:
    from grading.calculator import ForcedResults


PREFILL_TOKENS = 8192  # most prompt tokens in one forward pass


PREFILL_ROWS = 16  # its rows are filled up to a multiple of this; see `data.ROWS`


# More slots than this gain nothing: the products of a step then take longer in proportion.
MOST_SLOTS = {"cpu": 128, "cuda": 256}


WORTH_PACKING = 8  # prompts from which on a copy of the weights pays; see `linear.packed_weights`


ARGMAX_PART = 128  # logits; see `argmax`


FIXED_SHAPES = {"cuda"}  # devices on which each step is one of all slots


# Prompts wait until one slot in so many is free, and are then read together: a pass over a few tokens costs more for
# each than one over many, and a slot that is idle for some steps costs next to nothing.
ADMITTED_SHARE = 16


# Of the free memory, what the cache may take: the rest is for the prompts' forward pass.
CACHE_SHARE = 0.8


@dataclass
class Completion:
    """What the model wrote for one prompt.

    Attributes:
        index: which prompt.
        prompt_length: in tokens.
        token_ids: the tokens written, without EOS.
        stop: ``eos`` or ``length`` (cut by max_new_tokens); empty while being written.
        forced: tokens that come next, whatever the model would write.
    """

    index: int
    prompt_length: int
    token_ids: list[int] = field(default_factory=list)
    stop: str = ""
    forced: deque[int] = field(default_factory=deque, repr=False, compare=False)


# choose(logits, completions) gives the next token of each of n completions, for logits [n, vocabulary].
Choose = Callable[[torch.Tensor, list[Completion]], list[int]]


def greedy_decode(
    model: LlamaForCausalLM,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | Sequence[int],
    eos_token_ids: frozenset[int],
    slots: int | None,
    calculator: "ForcedResults | None" = None,
) -> Iterator[Completion]:
    """Complete each prompt with the most probable token at every step.

    Args:
        prompts: token ids with BOS; none may be empty.
        max_new_tokens: after how many a completion is cut: one number, or one for each prompt.
        slots: how many are decoded at the same time; changes no completion. None: see `plan_slots`.
        calculator: writes the results of ``<<expression=`` in the model's place.

    Yields:
        Each prompt's `Completion` as soon as it is finished, in no particular order.

    Raises:
        UserError: the slots do not fit into the free memory.
    """

    def most_probable(logits: torch.Tensor, _: list[Completion]) -> list[int]:
        # float32 as in Transformers' generate: in bfloat16 ties would be broken differently.
        return argmax(logits.float()).tolist()

    return _decode(model, prompts, max_new_tokens, eos_token_ids, slots, most_probable, calculator)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """``logits.argmax(-1)`` of ``[n, vocabulary]``, the first of equal ones.

    On the CPU that reads one number after the other; a maximum of each part first takes a third of the time.
    """
    if logits.device.type != "cpu" or logits.shape[-1] % ARGMAX_PART:
        return logits.argmax(dim=-1)
    parts = logits.unflatten(-1, (-1, ARGMAX_PART))
    chosen = parts.amax(dim=-1).argmax(dim=-1)
    within = parts[torch.arange(len(chosen)), chosen].argmax(dim=-1)
    return chosen * ARGMAX_PART + within


def sample_decode(
    model: LlamaForCausalLM,
    prompts: Sequence[list[int]],
    seeds: Sequence[str],
    *,
    temperature: float,
    max_new_tokens: int | Sequence[int],
    eos_token_ids: frozenset[int],
    slots: int | None,
    calculator: "ForcedResults | None" = None,
) -> Iterator[Completion]:
    """Complete each prompt with tokens drawn from softmax(logits / temperature).

    One number is drawn for each token, from a stream of the completion's own: it depends on
    neither the neighbours nor on what was decoded before. Nor do the logits, in float32.

    Args:
        seeds: of each prompt's stream.
        The others: as in `greedy_decode`.
    """
    streams: dict[int, random.Random] = {}

    def drawn(logits: torch.Tensor, completions: list[Completion]) -> list[int]:
        numbers = []
        for one in completions:
            if one.index not in streams:
                streams[one.index] = random.Random(seeds[one.index])
            numbers.append(streams[one.index].random())
        # The inverse of the distribution function. float64: 32,000 additions in float32 would lose the small ones.
        logits = logits.double()
        logits = (
            logits - logits.amax(dim=-1, keepdim=True)
        ) / temperature  # no temperature makes infinities of them
        summed = logits.softmax(dim=-1).cumsum(dim=-1)
        wanted = (
            torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]
            * summed[:, -1:]
        )
        return (
            torch.searchsorted(summed, wanted, right=True)[:, 0]
            .clamp(max=logits.shape[-1] - 1)
            .tolist()
        )

    for completion in _decode(
        model, prompts, max_new_tokens, eos_token_ids, slots, drawn, calculator
    ):
        streams.pop(completion.index, None)
        yield completion


def plan_slots(model: LlamaForCausalLM, slots: int | None, length: int, prompts: int) -> int:
    """How many slots for sequences of ``length`` tokens to decode so many ``prompts`` in.

    Args:
        slots: the most, as the user set it; None: as many as pay. Of either no more than fit into
            the free memory: they change no completion, and here hours may lie behind us.

    Raises:
        UserError: not even one fits.
    """
    free, each = memory.free_bytes(model.device), slot_bytes(model, length)
    fit = int(CACHE_SHARE * free / each)
    most = min(prompts, MOST_SLOTS[model.device.type] if slots is None else slots)
    if not fit:
        raise UserError(
            f"decoding {length} tokens takes {each / 1e9:.2f} GB of cache, over {CACHE_SHARE:.0%} of the "
            f"{free / 1e9:.2f} GB of free memory: set a smaller max_new_tokens, or free some memory"
        )
    if slots is not None and fit < most:
        print(
            f"decode_slots {slots}: {fit} fit into the {free / 1e9:.2f} GB of free memory, and are used"
        )
    return min(most, fit)


@torch.inference_mode()
def _decode(
    model: LlamaForCausalLM,
    prompts: Sequence[list[int]],
    max_new_tokens: int | Sequence[int],
    eos_token_ids: frozenset[int],
    slots: int | None,
    choose: Choose,
    calculator: "ForcedResults | None",
) -> Iterator[Completion]:
    if not prompts:
        return
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    waiting = sorted(
        range(len(prompts)), key=lambda index: len(prompts[index])
    )  # pop() takes the longest first
    running: dict[int, Completion] = {}  # by slot

    def advance(chosen: Sequence[int], logits: torch.Tensor) -> list[Completion]:
        """Write one token in each of the ``chosen`` slots; those that are finished leave."""
        completions = [running[slot] for slot in chosen]
        for slot, completion, token_id in zip(
            chosen, completions, choose(logits, completions), strict=True
        ):
            is_forced = bool(completion.forced)
            if is_forced:
                token_id = completion.forced.popleft()
            elif token_id in eos_token_ids:
                completion.stop = "eos"
            if not completion.stop:
                completion.token_ids.append(token_id)
                if len(completion.token_ids) == limits[completion.index]:
                    completion.stop = "length"
                elif (
                    calculator
                    and not is_forced
                    and (forced := calculator.after(completion.token_ids))
                ):
                    completion.token_ids[-1] = forced[0]  # the newest token has not been read yet
                    completion.forced.extend(forced[1:])
            if completion.stop:
                del running[slot]
                decoder.leave(slot)
        return [completion for completion in completions if completion.stop]

    with packed_weights(model) if len(prompts) >= WORTH_PACKING else nullcontext():
        decoder = _Decoder(model, plan_slots(model, slots, longest, len(prompts)), longest)
        together = max(1, len(decoder.free) // ADMITTED_SHARE)
        while waiting or running:
            while waiting and len(decoder.free) >= (min(together, len(waiting)) if running else 1):
                admitted = _admit(waiting, prompts, decoder.free)
                running |= {
                    slot: Completion(index, len(prompts[index])) for slot, index in admitted.items()
                }
                logits = decoder.prefill(
                    list(admitted), [prompts[index] for index in admitted.values()]
                )
                yield from advance(list(admitted), logits)
            if running:
                chosen = _balanced(running)
                yield from advance(chosen, decoder.step({slot: running[slot] for slot in chosen}))


def _admit(waiting: list[int], prompts: Sequence[list[int]], free: list[int]) -> dict[int, int]:
    """Which prompts go into which free slots now."""
    admitted, tokens = {}, 0
    while waiting and free:
        length = len(prompts[waiting[-1]])
        if admitted and tokens + length > PREFILL_TOKENS:
            break
        admitted[free.pop()] = waiting.pop()
        tokens += length
    return admitted


def _balanced(running: dict[int, Completion]) -> list[int]:
    """The slots in use, in an order that gives each thread of the CPU as much to attend to."""
    by_length = sorted(
        running, key=lambda slot: running[slot].prompt_length + len(running[slot].token_ids)
    )
    threads = torch.get_num_threads()
    return [slot for first in range(threads) for slot in by_length[first::threads]]


class _Decoder:
    """The model with a cache: from prompts and newest tokens to the logits of the next ones.

    Attributes:
        free: slots that nothing runs in.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int, length: int):
        """``length``: of the longest sequence."""
        self.model = model
        self.free = list(reversed(range(slots)))
        if model.device.type in FIXED_SHAPES:
            self.cache = StaticCache(model, slots, length)
            self._static_step = StaticStep(model, self.cache)
        else:
            self.cache = BagCache(model, slots, length)
            self._static_step = None

    def leave(self, slot: int) -> None:
        """What runs in ``slot`` is finished."""
        self.free.append(slot)
        self.cache.release(slot)

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> torch.Tensor:
        """Read packed prompts into ``slots``; gives the logits ``[n, vocabulary]`` after each."""
        # The token to come is the one label of each; its value, here 0, is never looked at.
        examples = [Example([*prompt, 0], [*[IGNORE] * len(prompt), 0]) for prompt in prompts]
        batch = collate(examples, PREFILL_ROWS).to(self.model.device)
        attend = self.cache.prefill(slots, batch)
        hidden = forward(
            self.model, batch.input_ids[0], batch.position_ids[0], attend, batch.loss_positions
        )
        return self.model.lm_head(hidden[: len(prompts)])

    def step(self, running: dict[int, Completion]) -> torch.Tensor:
        """The logits ``[n, vocabulary]`` after the newest token of each of n completions, which goes into the cache."""
        # The newest token of each completion is not in the cache yet.
        lengths = [one.prompt_length + len(one.token_ids) - 1 for one in running.values()]
        newest = [one.token_ids[-1] for one in running.values()]
        if self._static_step is not None:
            return self._static_step(list(running), newest, lengths)
        attend = self.cache.step(list(running), lengths)
        return self.model.lm_head(
            forward(self.model, torch.tensor(newest), torch.tensor(lengths), attend)
        )
