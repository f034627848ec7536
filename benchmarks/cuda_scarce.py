"""What the product makes of too little memory: a part of the step small of cuda.py."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import islice
from typing import Any
from unittest import mock

import torch

# This benchmark's neighbour, which also puts the repository on the path.
from cuda_work import Work, gradients_on_host, tokens_of, worst_error
from torch import Tensor

import train
from engine import memory
from engine.decoding import greedy_decode
from engine.llama import Llama
from engine.measure import StepResult
from engine.packing import Example, MicroBatch

# For the cache of fewer slots than there are prompts, whose longest completion has LENGTH tokens.
# A fifth of it is left for the prompts' forward pass and for the graphs, whose segments are large.
FREE_BYTES = 2**30
LENGTH = 4000

# ---------------------------------------------------------------- less memory


@contextmanager
def limited(most: int) -> Iterator[None]:
    """PyTorch's allocator takes no more than ``most`` bytes of the device."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(most / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def filled(free: int) -> Iterator[None]:
    """The device has no more than ``free`` bytes left, beside what the allocator has already."""
    surplus = max(0, torch.cuda.mem_get_info()[0] - free)
    sizes = [*[2**30] * (surplus // 2**30), surplus % 2**30]
    taken = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    try:
        yield
    finally:
        taken.clear()
        memory.release()


@contextmanager
def failing(model: Llama, most_tokens: int) -> Iterator[None]:
    """On a CPU: a micro-batch of more than ``most_tokens`` tokens does not fit."""
    hook = model.register_forward_hook(partial(fail_above, most_tokens))
    try:
        yield
    finally:
        hook.remove()


def fail_above(most: int, model: Llama, inputs: tuple[MicroBatch], loss: Tensor) -> None:
    if inputs[0].num_tokens > most:
        raise torch.OutOfMemoryError("CUDA out of memory")


# ---------------------------------------------------------------- a step that is healed


class Recorder:
    """In the place of an optimizer: keeps the gradients of a step in host memory."""

    def __init__(self, model: Llama):
        self.model = model
        self.param_groups: list[dict[str, Any]] = []
        self.gradients: dict[str, Tensor] = {}

    def step(self) -> None:
        self.gradients = gradients_on_host(self.model)

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad()


def make_step(
    work: Work, model: Llama, rows: list[Example], micro_batch_tokens: int
) -> tuple[StepResult, dict[str, Tensor]]:
    work.release()  # or the allocator could serve the step from what it has kept
    recorder = Recorder(model)
    result = train.train_step(model, recorder, rows, 0.0, micro_batch_tokens, None)
    return result, recorder.gradients


def measure_healing(work: Work, model: Llama, rows: list[Example], how: str) -> None:
    """A step whose rows do not fit into memory together, but in several micro-batches.

    The steps with ample memory come first. They also load the kernels, which takes memory.
    """
    whole, peaks = tokens_of(rows), []
    for micro_batch_tokens in (whole, whole // 2):
        work.reset_peak()
        make_step(work, model, rows, micro_batch_tokens)
        peaks.append(0 if work.is_dry else torch.cuda.max_memory_allocated())
    most = sum(peaks) // 2  # between what these two need
    work.release()
    with less_memory("injected" if work.is_dry else how, model, most, whole * 3 // 4):
        healed, found = make_step(work, model, rows, whole)
    again = healed.micro_batch_tokens
    if again == whole:
        raise RuntimeError(f"the step did not run out of memory, with {most} bytes for {peaks}")
    ample, expected = make_step(work, model, rows, again)
    _, together = make_step(work, model, rows, whole)
    work.results.write(
        "healing",
        dtype=model.dtype,
        how=how,
        needed_GiB=[peak / 2**30 for peak in peaks],
        allowed_GiB=most / 2**30,
        micro_batch_tokens=[whole, again],
        halved=round(math.log2(whole / again)),
        same_loss=healed.nats == ample.nats,
        same_gradients=all(torch.equal(found[name], expected[name]) for name in expected),
        relative_error=worst_error(found, expected)[0],
        relative_difference_from_one_micro_batch=worst_error(found, together)[0],
    )


def less_memory(
    how: str, model: Llama, most: int, most_tokens: int
) -> AbstractContextManager[None]:
    if how == "injected":
        return failing(model, most_tokens)
    return limited(most) if how == "limited" else filled(most - torch.cuda.memory_reserved())


# ---------------------------------------------------------------- fewer slots


def measure_fewer_slots(
    work: Work, model: Llama, prompts: list[list[int]], new_tokens: int
) -> None:
    """Completions where memory has room for some of the slots, against those with room for all.

    A small model's cache is large where one completion may be long. That one is not awaited.
    """
    long = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    length = len(prompts[long]) + 8 * new_tokens if work.is_dry else LENGTH
    limits = [new_tokens] * len(prompts)
    limits[long] = length - len(prompts[long])
    each = model.kernels.cache.slot_bytes(model, length)
    free = int(3.5 * each / memory.CACHE_SHARE) if work.is_dry else FREE_BYTES
    expected = all_but_one(model, prompts, limits)
    work.release()
    shortage = mock.patch.object(memory, "free_bytes", lambda device: free)
    with shortage if work.is_dry else filled(free):
        plan = memory.plan_slots(model, None, length, len(prompts))
        found = all_but_one(model, prompts, limits)
    if plan.slots == len(prompts):
        raise RuntimeError(f"{free} bytes have room for all {len(prompts)} slots")
    work.results.write(
        "fewer slots",
        dtype=model.dtype,
        slots=[len(prompts), plan.slots],
        regions=plan.regions,
        of=len(expected),
        same=sum(found.get(index) == expected[index] for index in expected),
    )


def all_but_one(model: Llama, prompts: list[list[int]], limits: list[int]) -> dict[int, list[int]]:
    decoded = greedy_decode(
        model, prompts, max_new_tokens=limits, eos_token_ids=frozenset(), slots=None
    )
    found = {one.index: one.token_ids for one in islice(decoded, len(prompts) - 1)}
    decoded.close()
    return found
