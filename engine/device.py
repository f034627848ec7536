"""Which device computes, and what depends on it: the one door to `engine.cpu` and `engine.cuda`."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from engine import attention
from engine.cpu import activations, heap, kernels, onednn
from engine.cuda import checks
from engine.cuda.cache import StaticCache
from engine.cuda.fp8 import use_fp8
from engine.cuda.graph import StaticStep
from engine.cuda.kernels import decode_attention, fp8_kernels, norm_gradients, small_kernels
from engine.cuda.layers import decoding_parts, fused_weights
from engine.cuda.linear import replace_linear_layers
from engine.cuda.pipeline import PipelinedModel
from engine.functions import LayerParts, NormGradients


@dataclass(frozen=True)
class Kernels:
    """What depends on the kind of device.

    Attributes:
        device: where tensors live.
        row_multiple: the rows of matrix products in training and measuring are padded to a multiple
            of this, as `MicroBatch` describes. 1: no padding.
        prompt_row_multiple: the same for prompts that are read before decoding.
        attention: of packed sequences; see `engine.attention.packed_attention`.
        attention_bytes: what it keeps of a token for its backward pass, with its output; given the
            numbers of heads and of key heads, their size, the longest sequence, and the dtype.
        heap_bytes: what training takes beyond its tensors; see `engine.cpu.activations.heap_bytes`.
        product: ``left @ right`` of two matrices.
        add_product: ``total += left @ right``, in ``total``'s dtype.
        logits_at_once: the largest number of logits in memory at a time: few enough to need little
            memory, many enough for matrix products to run at nearly the device's full speed.
        frees_gradients: whether gradients are freed after a step instead of zeroed in place. On a
            CPU, new ones among the activations would fragment the heap.
        cache: the class of the KV cache.
        sequences_in: the most sequences of a model that the cache takes if this many of the longest
            fit.
        cached_model: the class that decodes with this cache; None: `engine.decoding.CachedModel`.
        static_step: the class of its decoding steps of fixed shape, to be replayed; None: it has
            no such steps.
        decoding_parts: how layers compute in decoding; None: see `engine.llama`.
        decode_attention: finds the attention kernel of the cache's steps, given a dtype, the
            numbers of heads and of key heads, and their size; None: it needs none of its own.
        most_slots: with more, the time of a decoding step grows nearly in proportion to them.
        most_probable: the token with the largest logit in each row of ``[n, vocabulary]``.
        slot_order: the order in which to compute the slots, given the length of each.
        packed_weights: a context for decoding, in which products of few rows are faster.
        replace_linear_layers: changes the linear layers of a newly loaded model, if necessary.
        use_fp8: lets a model's linear layers train with products in 8-bit floats.
        norm_gradients: (hidden size, dtype) to the backward pass of norms in compiled layers; None:
            compile it. See `engine.functions.NormGradients`.
        compiles_layers: whether training compiles the layers unless it is told not to.
        packs_ahead: whether a step is packed while the device still works on the one before.
    """

    device: torch.device
    row_multiple: int
    prompt_row_multiple: int
    attention: Callable[..., torch.Tensor]
    attention_bytes: Callable[[int, int, int, int, torch.dtype], int]
    heap_bytes: Callable[[torch.dtype, int, int, int], int]
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    add_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    logits_at_once: int
    frees_gradients: bool
    cache: type[Any]
    sequences_in: Callable[[Any, int], int]
    cached_model: type[Any] | None
    static_step: type[Any] | None
    decoding_parts: LayerParts | None
    decode_attention: Callable[[torch.dtype, int, int, int], Any] | None
    most_slots: int
    most_probable: Callable[[torch.Tensor], torch.Tensor]
    slot_order: Callable[[Mapping[int, int]], list[int]]
    packed_weights: Callable[[torch.nn.Module, int], AbstractContextManager[None]]
    replace_linear_layers: Callable[[torch.nn.Module], None]
    use_fp8: Callable[[Any], None]
    norm_gradients: Callable[[int, torch.dtype], NormGradients | None]
    compiles_layers: bool
    packs_ahead: bool


def pick_device(machine: checks.Machine | None = None) -> torch.device:
    """The first GPU, or the CPU if there is none; under torchrun, each process has its own GPU.

    Args:
        machine: None for this one.

    Raises:
        UserError: there is an NVIDIA GPU that this PyTorch can't use, or torchrun has started more
            processes than there are GPUs.
    """
    machine = machine or checks.find_machine()
    checks.check_usable(machine)
    if not machine.cards:
        return torch.device("cpu")
    if not machine.is_one_of_many:
        return torch.device("cuda")
    checks.check_enough(machine)
    return torch.device("cuda", machine.local_rank)


def prepare_process(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    machine: checks.Machine | None = None,
    fp8: bool = False,
) -> None:
    """Set up the process; called once by a script, before it loads a model.

    Raises:
        UserError: the device can't compute in ``dtype``, or products in 8-bit floats if ``fp8``.
    """
    if device.type == "cpu":
        heap.keep_freed_memory()
        return
    machine = machine or checks.find_machine()
    check_computes(device, dtype, fp8, machine)
    if line := checks.unused_cards(machine):
        print(line)


def check_computes(
    device: torch.device, dtype: torch.dtype, fp8: bool, machine: checks.Machine | None = None
) -> None:
    """Raises UserError if a GPU can't compute in ``dtype``, or products in 8-bit floats if so."""
    if device.type != "cpu":
        checks.check_card(machine or checks.find_machine(), dtype, fp8)


def kernels_for(device: torch.device) -> Kernels:
    return cuda_kernels(device) if device.type == "cuda" else cpu_kernels(onednn.is_faster_here())


def cuda_kernels(device: torch.device) -> Kernels:
    return Kernels(
        device=device,
        row_multiple=1,
        prompt_row_multiple=1,
        attention=attention.packed_attention,
        attention_bytes=attention.kept_bytes,
        heap_bytes=lambda *_: 0,
        product=torch.matmul,
        add_product=add_product,
        logits_at_once=2**26,
        frees_gradients=True,
        cache=StaticCache,
        sequences_in=StaticCache.sequences_in,
        cached_model=PipelinedModel,
        static_step=StaticStep,
        decoding_parts=decoding_parts(partial(small_kernels, device.type)),
        decode_attention=partial(decode_attention, device.type),
        most_slots=512,
        most_probable=most_probable,
        slot_order=list,
        packed_weights=lambda model, free_bytes: fused_weights(model),
        replace_linear_layers=replace_linear_layers,
        use_fp8=partial(use_fp8, partial(fp8_kernels, device.type)),
        norm_gradients=partial(norm_gradients, device.type),
        compiles_layers=True,
        packs_ahead=True,
    )


def cpu_kernels(with_onednn: bool) -> Kernels:
    """``with_onednn``: compute float32 products by `engine.cpu.onednn`, not by PyTorch's choice."""
    return Kernels(
        device=torch.device("cpu"),
        row_multiple=64,
        prompt_row_multiple=16,
        attention=kernels.packed_attention,
        attention_bytes=partial(activations.kept_bytes, kernels.LONGEST_KEPT, kernels.QUERY_BLOCK),
        heap_bytes=activations.heap_bytes,
        product=onednn.product if with_onednn else torch.matmul,
        add_product=onednn.add_product if with_onednn else add_product,
        # oneDNN copies its operands, and is just as fast with half as many logits.
        logits_at_once=2**23 if with_onednn else 2**24,
        frees_gradients=False,
        cache=kernels.PagedCache,
        sequences_in=lambda model, regions: regions,
        cached_model=None,
        static_step=None,
        decoding_parts=None,
        decode_attention=None,
        most_slots=128,
        most_probable=kernels.most_probable,
        slot_order=kernels.slot_order,
        packed_weights=onednn.packed_weights,
        replace_linear_layers=onednn.replace_linear_layers if with_onednn else lambda model: None,
        use_fp8=partial(use_fp8, lambda: None),
        norm_gradients=lambda size, dtype: None,
        compiles_layers=False,
        packs_ahead=False,
    )


def add_product(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    added_rows: int = 4096,
) -> None:
    """``total += left @ right`` in ``total``'s dtype, a few rows of the product at a time."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for start in range(0, len(left), added_rows):
        end = start + added_rows
        total[start:end] += left[start:end] @ right


def most_probable(logits: torch.Tensor) -> torch.Tensor:
    """The first one in a tie, as in Transformers' generate.

    The conversion to float32 is generate's too. It is exact, so it does not break ties.
    """
    return logits.float().argmax(dim=-1)
