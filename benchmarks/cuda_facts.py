"""The step facts of cuda.py: how fast the device is, and whether its attention is correct."""

import os
import platform
import random
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F

# This benchmark's neighbours, which also put the repository on the path, and quiet Transformers.
from cuda_fp8 import measure_fp8_products
from cuda_work import Work, has_real_rows, random_llama, relative_error

# isort: split

import transformers
from torch import Tensor

from engine import attention
from engine.cuda.cache import StaticCache
from engine.device import kernels_for
from engine.packing import collate_prompts

# Rows of matrix products, from training's micro-batches down to the slots of decoding.
ROWS = (8192, 4096, 3072, 2048, 256, 144)
# Of Llama-2-7B's layers, alone and fused: input and output features.
FEATURES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 12288), (4096, 22016))
HEADS, HEAD_DIM = 32, 128
# Of our own attention kernel in decoding: numbers of stages and warps; the first is as it is.
VARIANTS = {"our own": (3, 1), "4 stages": (4, 1), "4 warps": (3, 4)}
DECODED_LENGTH = 708  # the longest test prompt with 512 new tokens


def measure_facts(work: Work) -> None:
    include = Path(sysconfig.get_paths()["include"])
    work.results.write(
        "versions",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        gcc=shutil.which("gcc"),
        python_h=(include / "Python.h").exists(),
        alloc_conf=os.environ.get("PYTORCH_ALLOC_CONF"),
        rows="GSM8K" if has_real_rows() else "random",
    )
    work.attempt("imports", import_the_product)
    work.attempt("device", describe_device)
    work.attempt("copy", measure_copy)
    work.attempt("product", measure_products)
    for rows in (64,) if work.is_dry else ROWS[:2]:
        for features in ((64, 64),) if work.is_dry else FEATURES[:3]:
            work.attempt("fp8 product", measure_fp8_products, rows, *features)
    work.attempt("attention", measure_attention)
    for slots in (4,) if work.is_dry else (1, 64, 256):
        work.attempt("attention in decoding", measure_attention_in_decoding, slots)


def import_the_product(work: Work) -> None:
    """Fails where a package is missing."""
    for name in ("train", "evaluate", "perplexity"):
        import_module(name)
    work.results.write("imports", complete=True)


def describe_device(work: Work) -> None:
    if work.device.type == "cpu":
        work.results.write("device", name="cpu")
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    processors = properties.multi_processor_count
    work.results.write(
        "device", name=properties.name, free_GiB=free, total_GiB=total, processors=processors
    )


def measure_copy(work: Work) -> None:
    size = 2**16 if work.is_dry else 2**30
    source, target = (torch.empty(size, dtype=torch.bfloat16, device=work.device) for _ in range(2))
    milliseconds = work.milliseconds(lambda: target.copy_(source))
    work.results.write("copy", TB_per_s=4 * size / milliseconds / 1e9)


def measure_products(work: Work) -> None:
    like = {"dtype": torch.bfloat16, "device": work.device}
    for rows in (64,) if work.is_dry else ROWS:
        for inputs, outputs in ((64, 64),) if work.is_dry else FEATURES:
            hidden = torch.randn(rows, inputs, **like)
            weight = torch.randn(outputs, inputs, **like) * 0.02
            milliseconds = work.milliseconds(partial(F.linear, hidden, weight))
            work.results.write(
                "product",
                rows=rows,
                inputs=inputs,
                outputs=outputs,
                us=milliseconds * 1e3,
                TFLOP_per_s=2 * rows * inputs * outputs / milliseconds / 1e9,
                weights_TB_per_s=2 * inputs * outputs / milliseconds / 1e9,
            )


def measure_attention(work: Work) -> None:
    """A micro-batch's attention and its gradients: the error, the time, the same bits twice?"""
    rng = random.Random(0)
    shape = (2, 16) if work.is_dry else (HEADS, HEAD_DIM)
    lengths = [rng.randint(60, 420) for _ in range(3 if work.is_dry else 34)]
    kernels = kernels_for(work.device)
    micro_batch = collate_prompts([[0] * length for length in lengths], kernels)
    attend = partial(kernels.attention, micro_batch, 0.0, 0)
    torch.manual_seed(0)
    tokens = micro_batch.num_tokens
    like = {"dtype": torch.bfloat16, "device": work.device}
    *inputs, grad = (torch.randn(tokens, *shape, **like) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs), inputs, grad)

    output = attend(*inputs)
    found = output.detach(), *torch.autograd.grad(output, inputs, grad)
    work.results.write(
        "attention",
        tokens=tokens,
        worst_relative_error=attention_error(lengths[:6], inputs, grad, found),
        forward_ms=work.milliseconds(lambda: attend(*inputs).detach()),
        forward_and_backward_ms=work.milliseconds(backward),
    )
    plain = mock.patch.object(attention, "deterministic_algorithms", nullcontext)
    for is_deterministic in (True, False):
        with nullcontext() if is_deterministic else plain:  # for what determinism costs
            first, *others = (backward() for _ in range(8))
            same = [all(torch.equal(one[i], first[i]) for one in others) for i in range(3)]
            work.results.write(
                "repeated attention",
                deterministic=is_deterministic,
                same_gradients_of_query_key_value=same,
                forward_and_backward_ms=work.milliseconds(backward),
            )


def attention_error(
    lengths: list[int], inputs: list[Tensor], grad: Tensor, found: tuple[Tensor, ...]
) -> float:
    """The worst relative error of output and gradients in the first sequences, by float64."""
    worst, start = 0.0, 0
    for length in lengths:
        tokens = slice(start, start + length)
        exact = [one[tokens].detach().double().transpose(0, 1).requires_grad_() for one in inputs]
        output = F.scaled_dot_product_attention(*(one[None] for one in exact), is_causal=True)[0]
        grads = torch.autograd.grad(output, exact, grad[tokens].double().transpose(0, 1))
        for ours, theirs in zip(found, (output, *grads), strict=True):
            worst = max(worst, relative_error(ours[tokens], theirs.transpose(0, 1)))
        start += length
    return worst


@torch.inference_mode()
def measure_attention_in_decoding(work: Work, slots: int) -> None:
    """One new token in each of ``slots``, in one layer: by our own kernel, and by PyTorch's."""
    heads, head_dim = (2, 16) if work.is_dry else (HEADS, HEAD_DIM)
    shape = {
        "hidden_size": heads * head_dim,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
    }
    model = random_llama(work.device, torch.bfloat16, shape)
    cache = StaticCache(model, slots, DECODED_LENGTH)
    both = cache.keys[0], cache.values[0]
    for tensor in both:
        tensor.normal_()
    positions = torch.randint(60, 330, (slots,), device=work.device)
    query = torch.randn(slots, heads, head_dim, dtype=torch.bfloat16, device=work.device)
    starts = torch.arange(slots, device=work.device) * DECODED_LENGTH
    size = 2 * 2 * heads * head_dim * int((positions + 1).sum())
    measured = {"PyTorch's": None}
    if cache._kernel:
        measured |= {name: cache._kernel for name in VARIANTS}
    for name, kernel in measured.items():
        cache._kernel = kernel
        _, attend = cache.step(positions, starts).args  # without the writing of new keys
        one = slice(slots // 2, slots // 2 + 1)
        _, attend_alone = cache.step(positions[one], starts[one]).args
        with variant(kernel, name) if kernel else nullcontext():
            output = attend(query, *both)
            alone = attend_alone(query[one], *both)
            milliseconds = work.milliseconds_in_graph(partial(attend, query, *both))
        work.results.write(
            "attention in decoding",
            slots=slots,
            kernel=name,
            worst_relative_error=error_in_decoding(cache, positions.tolist(), query, output),
            same_bits_alone=torch.equal(alone, output[one]),
            us=milliseconds * 1e3,
            TB_per_s=size / milliseconds / 1e9,
        )


@contextmanager
def variant(kernel: ModuleType, name: str) -> Iterator[None]:
    """With other numbers of stages and warps than its own, for what these are worth."""
    stages, warps = VARIANTS[name]
    options = mock.patch.dict(kernel.OPTIONS, num_stages=stages)
    with options, mock.patch.object(kernel, "warps", lambda block_dim: warps):
        yield


def error_in_decoding(
    cache: StaticCache, positions: list[int], query: Tensor, output: Tensor
) -> float:
    """The worst relative error in up to 16 slots, by float64."""
    worst = 0.0
    for slot in range(0, len(positions), max(1, len(positions) // 16)):
        start = slot * DECODED_LENGTH
        seen = slice(start, start + positions[slot] + 1)
        exact = F.scaled_dot_product_attention(
            query[slot].double()[:, None],
            *(one[0][seen].double().transpose(0, 1) for one in (cache.keys, cache.values)),
        )
        worst = max(worst, relative_error(output[slot], exact[:, 0]))
    return worst
