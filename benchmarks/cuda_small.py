"""The step small of cuda.py: a small model's gradients and completions against a CPU's."""

import time
from collections.abc import Callable

import torch

# This benchmark's neighbours, of which one also puts the repository on the path.
from cuda_scarce import measure_fewer_slots, measure_healing
from cuda_work import (
    TINY,
    Work,
    gradients_on_host,
    prompts_of,
    random_llama,
    read_rows,
    tokens_of,
    worst_error,
)
from torch import Tensor

import train
from engine.compiling import compile_layers
from engine.decoding import greedy_decode
from engine.llama import Llama
from engine.loading import load_model
from engine.packing import Example, collate, pack

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def measure_small_model(work: Work) -> None:
    cpu, folder = torch.device("cpu"), work.scratch / "model"
    shape = TINY if work.is_dry else SMALL
    random_llama(cpu, torch.float32, shape).pretrained.save_pretrained(folder)
    rows = read_rows("train", 2 if work.is_dry else 12)
    exact = gradients(load_model(folder, torch.float64, cpu).train(), rows)
    dtypes = (torch.float32,) if work.is_dry else (torch.float32, torch.bfloat16)
    variants: dict[str, Callable[[Llama], None]] = {
        "plain": lambda model: None,
        "recomputed": recompute_activations,
        "compiled": compile_layers,
    }
    for dtype in dtypes:
        for name, prepare in variants.items():
            model = load_model(folder, dtype, work.device).train()
            work.attempt("gradients", compare_gradients, model, name, prepare, rows, exact)
        model = load_model(folder, dtype, work.device).train()
        work.attempt("accumulation", compare_accumulation, model, "plain", rows, exact)
    for name, prepare in {"fp8": use_fp8, "fp8, compiled": use_fp8_and_compile}.items():
        model = load_model(folder, torch.bfloat16, work.device).train()
        work.attempt("gradients", compare_gradients, model, name, prepare, rows, exact)
    model = load_model(folder, torch.bfloat16, work.device).train()
    use_fp8(model)
    work.attempt("accumulation", compare_accumulation, model, "fp8", rows, exact)
    prompts = prompts_of(read_rows("test", 6 if work.is_dry else 40))
    new_tokens = 4 if work.is_dry else 24
    model = load_model(folder, torch.float32, cpu)
    expected = completions(model, prompts, new_tokens, len(prompts))
    for dtype in dtypes:
        model = load_model(folder, dtype, work.device)
        work.attempt("completions", compare_completions, model, prompts, new_tokens, expected)
    rows = read_rows("train", 3 if work.is_dry else 128)
    prompts = prompts_of(read_rows("test", 6 if work.is_dry else 192))
    for how in ("limited", "filled"):
        for dtype in dtypes:
            model = load_model(folder, dtype, work.device)
            work.attempt("healing", measure_healing, model, rows, how)
    for dtype in dtypes:
        model = load_model(folder, dtype, work.device)
        work.attempt("fewer slots", measure_fewer_slots, model, prompts, new_tokens)


def recompute_activations(model: Llama) -> None:
    model.recomputed_blocks = len(model.blocks)


def use_fp8(model: Llama) -> None:
    model.kernels.use_fp8(model)


def use_fp8_and_compile(model: Llama) -> None:
    use_fp8(model)
    compile_layers(model)


# ---------------------------------------------------------------- gradients


def gradients(model: Llama, rows: list[Example]) -> tuple[float, dict[str, Tensor]]:
    """The summed loss of ``rows``, and the gradient of each weight in float64."""
    loss = model(collate(rows, model.kernels))
    loss.backward()
    return loss.item(), gradients_on_host(model)


def compare_gradients(
    work: Work,
    model: Llama,
    name: str,
    prepare: Callable[[Llama], None],
    rows: list[Example],
    exact: tuple[float, dict[str, Tensor]],
) -> None:
    started = time.perf_counter()
    prepare(model)
    loss, found = gradients(model, rows)
    error, worst = worst_error(found, exact[1])
    work.results.write(
        "gradients",
        dtype=model.dtype,
        how=name,
        loss=loss,
        exact_loss=exact[0],
        worst_weight=worst,
        relative_error=error,
        seconds=time.perf_counter() - started,
    )


def compare_accumulation(
    work: Work, model: Llama, how: str, rows: list[Example], exact: tuple[float, dict[str, Tensor]]
) -> None:
    """A batch in one micro-batch, and each of its rows in one of its own."""
    counts, losses, found = [], [], []
    for tokens in (tokens_of(rows), 1):
        micro_batches = pack(rows, tokens, model.kernels)
        nats, num_labels, _ = train.accumulate_gradients(model, micro_batches, None)
        counts.append(len(micro_batches))
        losses.append(nats)
        means = gradients_on_host(model)
        found.append({name: mean * num_labels for name, mean in means.items()})
        model.zero_grad()
    work.results.write(
        "accumulation",
        dtype=model.dtype,
        how=how,
        micro_batches=counts,
        losses=losses,
        exact_loss=exact[0],
        relative_errors=[worst_error(each, exact[1])[0] for each in found],
        relative_difference=worst_error(found[1], found[0])[0],
    )


# ---------------------------------------------------------------- completions


def completions(
    model: Llama, prompts: list[list[int]], new_tokens: int, slots: int
) -> dict[int, list[int]]:
    stops, settings = frozenset({2}), {"max_new_tokens": new_tokens, "slots": slots}
    decoded = greedy_decode(model, prompts, eos_token_ids=stops, **settings)
    return {one.index: one.token_ids for one in decoded}


def compare_completions(
    work: Work,
    model: Llama,
    prompts: list[list[int]],
    new_tokens: int,
    expected: dict[int, list[int]],
) -> None:
    together = completions(model, prompts, new_tokens, len(prompts))
    in_turn = completions(model, prompts, new_tokens, 3 if work.is_dry else 7)
    alone = completions(model, prompts[: 2 if work.is_dry else 8], new_tokens, 1)
    work.results.write(
        "completions",
        dtype=model.dtype,
        of=len(prompts),
        same_as_float32_on_cpu=sum(together[index] == expected[index] for index in expected),
        same_in_fewer_slots=sum(together[index] == in_turn[index] for index in expected),
        of_alone=len(alone),
        same_alone=sum(together[index] == alone[index] for index in alone),
    )
