"""Batched decoding with a KV cache, without padding sequences to a common length.

The cache has a fixed number of slots. A prompt is prefilled into a free slot, packed together with
other prompts that are admitted at the same time. Each decoding step then writes one token in every
slot in use. A finished completion frees its slot immediately, and once a few slots are free, the
next prompts are admitted. Attention never reads past the end of a sequence, so a completion does
not depend on its neighbours.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from engine.memory import CachePlan, free_bytes, plan_slots
from engine.packing import collate_prompts
from engine.sampling import Choose, sampled

if TYPE_CHECKING:
    from engine.cuda.regions import Regions
    from engine.llama import Llama

PREFILL_TOKENS = 8192  # most prompt tokens in one forward pass
# Prompts wait until 1 in 16 slots is free, and are then read together. A pass over few tokens costs
# more per token than one over many, while a slot that idles for a few steps costs little.
ADMITTED_SHARE = 16
WORTH_PACKING = 8  # with this many prompts or more, a second copy of the weights pays off


class Calculator(Protocol):
    """Writes tokens in the model's place."""

    def after(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens to write in place of the newest one and after it; empty: keep the newest."""


@dataclass
class Completion:
    """What the model wrote for one prompt.

    Attributes:
        index: of its prompt.
        prompt_length: in tokens.
        token_ids: the tokens written, without EOS.
        stop: ``eos`` or ``length`` (cut by max_new_tokens); empty while being written.
        forced: tokens to write next, whatever the model would choose.
        stream: the random numbers for sampling its tokens; None in greedy decoding.
        numbers: those drawn so far, one for each token.
    """

    index: int
    prompt_length: int
    token_ids: list[int] = field(default_factory=list)
    stop: str = ""
    forced: deque[int] = field(default_factory=deque, repr=False, compare=False)
    stream: random.Random | None = field(default=None, repr=False, compare=False)
    numbers: list[float] = field(default_factory=list, repr=False, compare=False)

    def number(self, index: int) -> float:
        """The random number for the token at ``index``, at which a step may be repeated."""
        while self.stream and len(self.numbers) <= index:
            self.numbers.append(self.stream.random())
        return self.numbers[index] if self.stream else 0.0

    def append(
        self,
        token_id: int,
        limit: int,
        eos_token_ids: frozenset[int],
        calculator: Calculator | None,
    ) -> None:
        """Append ``token_id``, the model's choice, or the next forced token in its place."""
        is_forced = bool(self.forced)
        if is_forced:
            token_id = self.forced.popleft()
        elif token_id in eos_token_ids:
            self.stop = "eos"
            return
        self.token_ids.append(token_id)
        if len(self.token_ids) == limit:
            self.stop = "length"
        elif calculator and not is_forced and (forced := calculator.after(self.token_ids)):
            self.token_ids[-1] = forced[0]  # the newest token has not been read yet
            self.forced.extend(forced[1:])


def greedy_decode(
    model: "Llama",
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | Sequence[int],
    eos_token_ids: frozenset[int],
    slots: int | None,
    calculator: Calculator | None = None,
    arrived: Callable[[], list[Completion]] = list,
) -> Iterator[Completion]:
    """Complete each prompt with the most probable token at every step.

    Args:
        prompts: token ids with BOS; none may be empty.
        max_new_tokens: the length at which a completion is cut: one number, or one per prompt.
        slots: how many to decode at the same time; changes no completion. None: see `plan_slots`.
        calculator: writes the results of ``<<expression=`` in the model's place.
        arrived: called at every step; the completions that it returns are yielded with our own.

    Yields:
        Each prompt's `Completion` as soon as it is finished, in no particular order.

    Raises:
        UserError: the slots do not fit into the free memory.
    """
    queue = Queue(prompts, max_new_tokens)
    return decode(model, queue, None, eos_token_ids, slots, calculator, arrived)


def sample_decode(
    model: "Llama",
    prompts: Sequence[list[int]],
    seeds: Sequence[str],
    *,
    temperature: float,
    max_new_tokens: int | Sequence[int],
    eos_token_ids: frozenset[int],
    slots: int | None,
    calculator: Calculator | None = None,
    arrived: Callable[[], list[Completion]] = list,
) -> Iterator[Completion]:
    """Complete each prompt with tokens sampled from softmax(logits / temperature).

    Each completion has its own stream of random numbers, one per token, so a sample does not depend
    on its batch or on earlier samples. In float32, neither do the logits.

    Args:
        seeds: one for each prompt's stream.
        The others: as in `greedy_decode`.
    """
    queue, choose = Queue(prompts, max_new_tokens, seeds), partial(sampled, temperature)
    return decode(model, queue, choose, eos_token_ids, slots, calculator, arrived)


class Queue:
    """Prompts on their way through slots: the waiting ones, and the completions being written.

    Attributes:
        free: slots that are not in use.
        running: the completion in each slot in use.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int | Sequence[int],
        seeds: Sequence[str] | None = None,
        *,
        prefill_tokens: int = PREFILL_TOKENS,
        admitted_share: int = ADMITTED_SHARE,
    ):
        """``prefill_tokens`` and ``admitted_share`` affect only the speed, not the completions."""
        is_one = isinstance(max_new_tokens, int)
        self.limits = [max_new_tokens] * len(prompts) if is_one else list(max_new_tokens)
        self.prompts, self.seeds = prompts, seeds
        self.prefill_tokens, self.admitted_share = prefill_tokens, admitted_share
        # pop() takes the longest first.
        self.waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        self.running: dict[int, Completion] = {}
        self.free: list[int] = []
        self.together = 1
        self.regions: Regions | None = None

    @property
    def longest(self) -> int:
        """The largest number of tokens that a prompt and its completion can have."""
        pairs = zip(self.prompts, self.limits, strict=True)
        return max(len(prompt) + limit for prompt, limit in pairs)

    def open(self, slots: int, regions: "Regions | None" = None) -> None:
        """``regions``: where sequences lie in the cache; None: there is room in every free slot."""
        self.free = list(reversed(range(slots)))
        self.together = max(1, slots // self.admitted_share)
        self.regions = regions

    def is_worth_a_prefill(self) -> bool:
        """Whether there is enough room for a prefill to be worth its cost."""
        if not self.waiting:
            return False
        room = len(self.free)
        if self.regions:
            room = min(room, self.regions.room(len(self.prompts[self.waiting[-1]])))
        return room >= min(self.together if self.running else 1, len(self.waiting))

    def admit(self) -> dict[int, list[int]]:
        """Put waiting prompts into free slots, as many as fit into one prefill."""
        admitted: dict[int, list[int]] = {}
        tokens = 0
        while self.waiting and self.free:
            prompt = self.prompts[self.waiting[-1]]
            has_room = not self.regions or self.regions.room(len(prompt))
            if not has_room or (admitted and tokens + len(prompt) > self.prefill_tokens):
                break
            index, slot = self.waiting.pop(), self.free.pop()
            if self.regions:
                self.regions.take(slot, len(prompt))
            stream = None if self.seeds is None else random.Random(self.seeds[index])
            self.running[slot] = Completion(index, len(prompt), stream=stream)
            admitted[slot] = prompt
            tokens += len(prompt)
        return admitted

    def leave(self, slot: int) -> Completion:
        self.free.append(slot)
        return self.running.pop(slot)


@torch.inference_mode()
def decode(
    model: "Llama",
    queue: Queue,
    choose: Choose | None,
    eos_token_ids: frozenset[int],
    slots: int | None,
    calculator: Calculator | None = None,
    arrived: Callable[[], list[Completion]] = list,
) -> Iterator[Completion]:
    """Complete the prompts of ``queue``; see `greedy_decode` for the arguments and the results.

    Args:
        choose: None for the most probable token at every step.
    """
    if not queue.prompts:
        return
    model.eval()
    room = free_bytes(model.device) if len(queue.prompts) >= WORTH_PACKING else 0
    with model.kernels.packed_weights(model, room) if room else nullcontext():
        plan = plan_slots(model, slots, queue.longest, len(queue.prompts))
        cached = (model.kernels.cached_model or CachedModel)(model, plan, choose)
        queue.open(plan.slots, cached.regions)
        while queue.waiting or queue.running:
            # 1. Read waiting prompts, if enough slots are free; else write one token in each slot.
            if queue.is_worth_a_prefill():
                tokens = cached.prefill(queue.admit(), queue.running)
            else:
                tokens = cached.decode_one_token(queue.running)
            # 2. Append the tokens known by now, and free the slots of finished completions.
            finished = arrived()
            for slot, token in tokens.items():
                one = queue.running[slot]
                one.append(token, queue.limits[one.index], eos_token_ids, calculator)
                if one.stop:
                    finished.append(queue.leave(slot))
                    cached.cache.release(slot)
            yield from finished


class CachedModel:
    """The model with its KV cache: takes prompts or newest tokens, returns the next ones.

    A GPU uses `engine.cuda.pipeline.PipelinedModel` instead.
    """

    regions = None  # every slot has room for the longest sequence

    def __init__(self, model: "Llama", plan: CachePlan, choose: Choose | None):
        self.model, self.choose = model, choose
        self.cache = model.kernels.cache(model, plan.slots, plan.length)

    def prefill(
        self, prompts: dict[int, list[int]], running: dict[int, Completion]
    ) -> dict[int, int]:
        """Read packed ``prompts`` into slots; returns the first token of each slot's completion."""
        packed = collate_prompts(list(prompts.values()), self.model.kernels)
        attend = self.cache.prefill(list(prompts), packed)
        inputs = packed.input_ids, packed.position_ids, attend, packed.output_positions
        logits = self.model.next_logits(*inputs, count=len(prompts))
        most_probable = self.model.kernels.most_probable
        tokens = self._sampled(logits, running, prompts) if self.choose else most_probable(logits)
        return dict(zip(prompts, tokens.tolist(), strict=True))

    def decode_one_token(self, running: dict[int, Completion]) -> dict[int, int]:
        """Read the newest token of each completion into the cache; returns each slot's next one."""
        lengths = {slot: one.prompt_length + len(one.token_ids) for slot, one in running.items()}
        slots = self.model.kernels.slot_order(lengths)
        newest = [running[slot].token_ids[-1] for slot in slots]
        positions = [lengths[slot] - 1 for slot in slots]
        attend = self.cache.step(slots, positions)
        logits = self.model.next_logits(torch.tensor(newest), torch.tensor(positions), attend)
        most_probable = self.model.kernels.most_probable
        tokens = self._sampled(logits, running, slots) if self.choose else most_probable(logits)
        return dict(zip(slots, tokens.tolist(), strict=True))

    def _sampled(
        self, logits: Tensor, running: dict[int, Completion], slots: Iterable[int]
    ) -> Tensor:
        numbers = [running[slot].number(len(running[slot].token_ids)) for slot in slots]
        return self.choose(logits, torch.tensor(numbers, dtype=torch.float64))
