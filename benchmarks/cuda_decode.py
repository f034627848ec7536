"""The step decode of cuda.py: completions of a random Llama-2-7B, single steps and kernels."""

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from unittest import mock

import torch
import torch.nn.functional as F

# This benchmark's neighbour, which also puts the repository on the path.
from cuda_work import LLAMA_2_7B, Work, prompts_of, random_llama_2_7b, read_rows

from engine.cuda import kernels, layers
from engine.cuda.cache import StaticCache
from engine.cuda.graph import StaticStep
from engine.cuda.pipeline import FEW_ROWS, ROWS
from engine.cuda.transfers import OWN, Row
from engine.decoding import greedy_decode
from engine.llama import Llama
from engine.memory import CachePlan, free_bytes, plan_slots


def measure_decoding(work: Work) -> None:
    """Every test prompt is completed with as many tokens as its answer has."""
    examples = read_rows("test", 12 if work.is_dry else None)
    prompts = prompts_of(examples)
    most = 8 if work.is_dry else 1024
    lengths = [
        min(most, len(example.input_ids) - len(prompt))
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    model = random_llama_2_7b(work).eval()
    longest_prompt = max(map(len, prompts))
    pairs = zip(prompts, lengths, strict=True)
    longest = max(len(prompt) + length for prompt, length in pairs)
    plan = plan_slots(model, None, longest_prompt + 512, len(prompts))  # as evaluate.py plans
    fitting = plan_slots(model, None, longest, len(prompts))  # as it could if it knew the lengths
    for rows in (4,) if work.is_dry else (FEW_ROWS, 256, 8192):
        work.attempt("small kernels", measure_small_kernels, rows)
    few = min(16, len(prompts))
    work.attempt("decoding", decode, model, "warm-up", prompts[:few], lengths[:few], few)
    work.attempt("decoding", decode, model, "planned slots", prompts, lengths, plan.slots)
    work.attempt("profile", profile_decoding, model, prompts[: plan.slots])
    for rows in sorted({min(rows, plan.slots) for rows in (1, *ROWS, plan.slots)}, reverse=True):
        for is_fused in (True, False):
            work.attempt("decoding step", measure_decoding_step, model, plan, rows, is_fused)
    if fitting.slots > plan.slots:
        work.attempt("decoding", decode, model, "fitting slots", prompts, lengths, fitting.slots)
    work.attempt("decoding again", decode_twice, model, prompts, 8 if work.is_dry else 512)


def decode(
    work: Work,
    model: Llama,
    name: str,
    prompts: list[list[int]],
    lengths: list[int],
    slots: int,
) -> None:
    work.reset_peak()
    started = time.perf_counter()
    tokens = count_tokens(model, prompts, lengths, slots)
    seconds = time.perf_counter() - started
    work.results.write(
        "decoding",
        how=name,
        problems=len(prompts),
        slots=slots,
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        **work.peak_gib(),
    )


def decode_twice(work: Work, model: Llama, prompts: list[list[int]], most: int) -> None:
    """Without freeing memory in between, as train.py decodes after several epochs.

    The second cache is planned within what PyTorch's allocator keeps of the first.
    """
    work.reset_peak()
    # The cache is as large as for evaluate.py, but only a few tokens of each completion are
    # computed, since memory is allocated at the start. The one long completion is given up.
    lengths = [min(most, 4)] * len(prompts)
    lengths[max(range(len(prompts)), key=lambda index: len(prompts[index]))] = most
    counts = []
    for _ in range(2):
        completions = greedy_decode(
            model, prompts, max_new_tokens=lengths, eos_token_ids=frozenset(), slots=None
        )
        counts.append(len(list(islice(completions, len(prompts) - 1))))
        completions.close()
    work.results.write("decoding again", completions=counts, **work.peak_gib())


def count_tokens(
    model: Llama, prompts: list[list[int]], lengths: int | list[int], slots: int
) -> int:
    """Decode, with no token that ends a completion before its length."""
    completions = greedy_decode(
        model, prompts, max_new_tokens=lengths, eos_token_ids=frozenset(), slots=slots
    )
    return sum(len(completion.token_ids) for completion in completions)


@torch.inference_mode()
def measure_small_kernels(work: Work, rows: int) -> None:
    """The kernels between a layer's products: their error, and the rate of what they must move.

    In a dry run there are none.
    """
    small = kernels.small_kernels(work.device.type)
    if small is None:
        work.results.write("small kernels", rows=rows, kernel=None)
        return
    heads, columns = LLAMA_2_7B["num_attention_heads"], LLAMA_2_7B["intermediate_size"]
    head_dim = LLAMA_2_7B["hidden_size"] // heads
    torch.manual_seed(0)
    like = {"dtype": torch.bfloat16, "device": work.device}
    angles = torch.randn(rows, 1, head_dim // 2, **like).repeat(1, 1, 2)
    rope = layers._rope(angles.cos(), angles.sin())
    states = torch.randn(rows, 3 * heads, head_dim, **like).split(heads, dim=1)
    keys, values = torch.zeros(2, 2 * rows, heads, head_dim, **like)
    tokens = torch.randperm(2 * rows, device=work.device)[:rows]
    both = torch.randn(rows, 2 * columns, **like)
    hidden, weight = torch.randn(rows + 1, heads * head_dim, **like).split([rows, 1])
    weight = weight[0]
    measured = {
        "rotate_into": (
            partial(small.rotate_into, *rope, *states, tokens, keys, values),
            layers._rotated(*(each.double() for each in (states[0], *rope))),
            2 * 3 * states[0].numel(),
        ),
        "gated": (
            partial(small.gated, both),
            layers._gated(both.double()),
            3 * both.numel() // 2,
        ),
    }
    for name, norm in (("rms_norm", small.rms_norm), ("PyTorch's rms_norm", torch_norm)):
        run = partial(norm, hidden, weight, 1e-5)
        measured[name] = run, torch_norm(hidden.double(), weight.double(), 1e-5), 2 * hidden.numel()
    for name, (run, exact, numbers) in measured.items():
        error = ((run().double() - exact).norm() / exact.norm()).item()
        milliseconds = work.milliseconds_in_graph(run)
        work.results.write(
            "small kernels",
            rows=rows,
            kernel=name,
            relative_error=error,
            us=milliseconds * 1e3,
            TB_per_s=2 * numbers / milliseconds / 1e9,
        )


def torch_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


@torch.inference_mode()
def measure_decoding_step(
    work: Work, model: Llama, plan: CachePlan, rows: int, is_fused: bool
) -> None:
    """One token in every row, with caches as full as in the middle of a completion.

    Args:
        is_fused: whether small operations are fused; not so, for what that saves.
    """
    position = plan.length // 4
    parts = layers.decoding_parts(lambda: None)
    unfused = mock.patch.object(model, "kernels", replace(model.kernels, decoding_parts=parts))
    with nullcontext() if is_fused else unfused:
        milliseconds = milliseconds_of_step(work, model, plan, rows, position)
    weights = sum(weight.nbytes for weight in model.parameters())
    weights -= model.pretrained.get_input_embeddings().weight.nbytes
    read = StaticCache.slot_bytes(model, 1) * (position + 1) * rows
    work.results.write(
        "decoding step",
        slots=plan.slots,
        regions=plan.regions,
        rows=rows,
        position=position,
        fused=is_fused and kernels.small_kernels(work.device.type) is not None,
        ms=milliseconds,
        tokens_per_s=rows / milliseconds * 1e3,
        TB_per_s=(weights + read) / milliseconds / 1e9,
    )


def milliseconds_of_step(
    work: Work, model: Llama, plan: CachePlan, rows: int, position: int
) -> float:
    with model.kernels.packed_weights(model, free_bytes(model.device)):
        cache = StaticCache(model, plan.slots, plan.length, plan.regions)
        for slot in range(rows):
            cache.regions.take(slot, 1)
        newest = torch.zeros(plan.slots + 1, dtype=torch.long, device=model.device)
        choose = partial(most_probable, model)
        step = StaticStep(model, cache, rows, newest, choose, None)
        one_each = [Row(OWN, position, cache.regions.starts[slot], slot) for slot in range(rows)]
        step(one_each, [0.0] * rows)
        # Of the device alone: in decoding, the host prepares a step while the device computes.
        return work.milliseconds(step._graph.replay if step._graph else step._run)


def most_probable(model: Llama, logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return model.kernels.most_probable(logits)


def profile_decoding(work: Work, model: Llama, prompts: list[list[int]]) -> None:
    work.profile("decode", lambda: count_tokens(model, prompts, 12, len(prompts)))
