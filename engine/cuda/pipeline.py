"""Decoding on a GPU with the host one pass behind.

While the device computes a pass, the host reads the tokens of the pass before. A step therefore
starts from tokens that the device has chosen itself. The host may find out later that a token ended
its completion, or was replaced by a calculator's. Then what the next pass computed from it is
ignored, and if the completion goes on, its step is repeated with the right token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engine.cuda.transfers import OWN, Arrival, Row, to_device
from engine.packing import collate_prompts

if TYPE_CHECKING:
    from engine.decoding import Completion
    from engine.llama import Llama
    from engine.memory import CachePlan
    from engine.sampling import Choose

# The rows of steps, beside those of all slots. When only a few sequences are left, a smaller step
# saves the arithmetic and attention of the other rows. Up to the fewest, the time of a step is that
# of reading the weights.
FEW_ROWS = 64
ROWS = (FEW_ROWS, 128, 256)


@dataclass(frozen=True)
class Expected:
    """The token that a pass computes for one slot.

    Attributes:
        completion: whose token it is.
        length: the tokens of the sequence that it follows.
        read: the last of these, if the host knew it; else `OWN`.
    """

    completion: "Completion"
    length: int
    read: int


@dataclass(frozen=True)
class Pass:
    """A prefill or decoding step whose tokens the host has not read yet; ``expected`` by slot."""

    expected: dict[int, Expected]
    chosen: Arrival


class PipelinedModel:
    """As `engine.decoding.CachedModel`, but its methods return the tokens of the pass before."""

    rows = ROWS

    def __init__(self, model: "Llama", plan: "CachePlan", choose: "Choose | None"):
        """``choose``: None for the most probable token."""
        self.model, most_probable = model, model.kernels.most_probable
        self.choose = choose or (lambda logits, _: most_probable(logits))
        self.cache = model.kernels.cache(model, plan.slots, plan.length, plan.regions)
        self.regions = self.cache.regions
        self._newest = to_device([0] * (plan.slots + 1), model.device)
        sizes = {min(size, plan.slots) for size in (*self.rows, plan.regions, plan.slots)}
        self._sizes = sorted(sizes)
        self._steps: dict[int, Any] = {}  # by size, made when first needed
        is_cuda = model.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if is_cuda else None
        self._in_flight: Pass | None = None
        self._read: dict[int, int] = {}  # the last token of each slot that the host has read

    def prefill(
        self, prompts: dict[int, list[int]], running: dict[int, "Completion"]
    ) -> dict[int, int]:
        """Read packed ``prompts`` into slots; returns the tokens of the pass before, by slot."""
        packed = collate_prompts(list(prompts.values()), self.model.kernels)
        attend = self.cache.prefill(list(prompts), packed)
        inputs = packed.input_ids, packed.position_ids, attend, packed.output_positions
        logits = self.model.next_logits(*inputs, count=len(prompts))
        numbers = [running[slot].number(0) for slot in prompts]
        device = self.model.device
        chosen = self.choose(logits, to_device(numbers, device, torch.float64))
        self._newest[to_device(list(prompts), device)] = chosen
        expected = {slot: Expected(running[slot], len(prompts[slot]), OWN) for slot in prompts}
        return self._tokens_before(Pass(expected, Arrival(chosen)), running)

    def decode_one_token(self, running: dict[int, "Completion"]) -> dict[int, int]:
        """Read the newest token of each completion into the cache.

        A completion for which there is no room at the moment is left out.

        Returns:
            The tokens of the pass before, by slot.
        """
        rows, numbers, expected = [], [], {}
        for slot, one in running.items():
            token, position = self._next_to_read(slot, one)
            start = self.cache.start_with_room(slot, position)
            if start is not None:
                rows.append(Row(token, position, start, slot))
                numbers.append(one.number(position + 1 - one.prompt_length))
                expected[slot] = Expected(one, position + 1, token)
        if not rows:
            return self._tokens_before(None, running)
        step = self._step(len(rows))
        step(rows, numbers)
        return self._tokens_before(Pass(expected, Arrival(step.chosen[: len(rows)])), running)

    def _next_to_read(self, slot: int, one: "Completion") -> tuple[int, int]:
        """The token that follows what the device has read of this completion, and its position."""
        length = one.prompt_length + len(one.token_ids)
        if self._in_flight and self._is_right(slot, self._in_flight.expected.get(slot), one):
            return (one.forced[0] if one.forced else OWN), length
        return one.token_ids[-1], length - 1

    def _is_right(self, slot: int, expected: Expected | None, one: "Completion | None") -> bool:
        """Whether the token that a pass computes is the next one of ``one``."""
        if expected is None or expected.completion is not one:
            return False
        if not one.token_ids:  # its prompt is being read
            return True
        read = self._read[slot] if expected.read == OWN else expected.read
        length = one.prompt_length + len(one.token_ids)
        return (expected.length, read) == (length, one.token_ids[-1])

    def _tokens_before(
        self, launched: Pass | None, running: dict[int, "Completion"]
    ) -> dict[int, int]:
        """The tokens of the pass before ``launched``, but for those of no use."""
        finished, self._in_flight = self._in_flight, launched
        if finished is None:
            return {}
        tokens = dict(zip(finished.expected, finished.chosen.wait(), strict=True))
        expected = finished.expected.items()
        right = [slot for slot, each in expected if self._is_right(slot, each, running.get(slot))]
        self._read |= tokens
        return {slot: tokens[slot] for slot in right}

    def _step(self, rows: int) -> Any:
        size = next(size for size in self._sizes if size >= rows)
        if size not in self._steps:
            make = self.model.kernels.static_step
            inputs = self.cache, size, self._newest, self.choose, self._pool
            self._steps[size] = make(self.model, *inputs)
        return self._steps[size]
