"""Prepares a model for training: sets how it computes, and compiles the operations."""

import math
import warnings
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from engine.device_errors import is_of_a_kernel
from engine.fused import FUSED, compiled, fused
from engine.llama import EAGER, Llama
from engine.packing import IGNORE, Example, collate
from engine.recipe import Recomputation
from engine.sharding import is_spread, norm_over_slices, slice_of
from engine.state import get_random_state, set_random_state
from run.errors import UserError, cause_of

# Of a compiled gradient, relative to one that is not compiled. Rounding to bfloat16 in other places
# causes about 0.02 in two blocks, 0.1 where attention is saturated; a gradient of zeros causes 1.
MOST_ERROR = 0.3
# The lengths of sequences, of which one token is only a label. In all a CPU pads them to 64 and 192
# tokens, of which 64 and 128 are wanted: no number of tokens is met once only.
FEW, MORE = (3,) * 5, (21, 140)
# Compiled for the size of a real micro-batch, a GPU's kernels use all of the GPU. An operation's
# second size is the one that counts, so all tokens of the few are wanted: that is one size.
MANY = (21, *[140] * 28)


class StoppedWithin(UserError):
    """A layer of a model that is spread over ranks was left halfway: it can't be computed again."""


def prepare(
    model: Llama, recomputation: Recomputation, wants_compiled: bool | None, fp8: bool = False
) -> None:
    """Set what is recomputed and how products are computed, and compile the layers.

    Args:
        wants_compiled: None: if compiled layers are faster on this device, and work here.
        fp8: compute the blocks' products in 8-bit floats (`engine.cuda.fp8`).

    Raises:
        UserError: torch.compile fails here, although ``wants_compiled``; or products in 8-bit
            floats do.
    """
    if fp8:
        model.kernels.use_fp8(model)
    model.recomputed_blocks = recomputation.blocks
    model.recomputes_parts = recomputation.parts
    if wants_compiled or (wants_compiled is None and model.kernels.compiles_layers):
        try:
            compile_layers(model)
        except UserError as error:
            if wants_compiled or isinstance(error, StoppedWithin):
                raise
            print(f"{error}; the layers are not compiled")


def compile_layers(model: Llama) -> None:
    """Compile the elementwise operations of each block, for training.

    Compilers have made wrong gradients without a word (pytorch #180642), so those of a small
    micro-batch are compared with the gradients without compilation.

    Raises:
        UserError: torch.compile fails here, usually because there is no C++ compiler, or it gives
            another gradient; of several ranks, on all of them.
        StoppedWithin: on one of several ranks, it fails where others wait for this one.
    """
    check_compiler(model)
    model.train()
    model.elementwise = EAGER
    lengths = MANY if model.kernels.compiles_layers else MORE
    random_state = get_random_state()
    expected = gradients(model, lengths)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on its own internals
            weight = model.norm.weight
            by_hand = model.kernels.norm_gradients(len(weight), weight.dtype)
            model.elementwise = fused(by_hand) if by_hand else FUSED
            gradients(model, FEW)
            set_random_state(random_state)  # for the same dropout
            check_gradients(gradients(model, lengths), expected)
    except Exception as error:  # the compiler's layers raise many types
        model.elementwise = EAGER
        if isinstance(error, UserError) or not is_of_a_kernel(error):
            raise
        kind = StoppedWithin if model.ranks.size > 1 else UserError
        raise kind(failure("here", cause_of(error))) from None


def check_compiler(model: Llama) -> None:
    """Raises UserError on all ranks if torch.compile fails on one, before they meet in a layer."""
    if model.ranks.size == 1:
        return
    fault = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            compiled(twice)(torch.ones(2, device=model.kernels.device))
    except Exception as error:  # as above
        if not is_of_a_kernel(error):
            raise
        fault = cause_of(error)
    for rank, of_rank in enumerate(model.ranks.gather(fault)):
        if of_rank:
            raise UserError(failure(f"on rank {rank}", of_rank))


def twice(tensor: Tensor) -> Tensor:
    return 2 * tensor


def failure(where: str, cause: str) -> str:
    return (
        f"compile: torch.compile fails {where} ({cause}): install a C++ compiler, or set compile "
        "false"
    )


def gradients(model: Llama, lengths: Sequence[int]) -> dict[str, Tensor]:
    """The gradients of sequences through the first two blocks, by the weights' names.

    All blocks are computed by the same graphs, and these two need little memory. The first one is
    recomputed. The second one also computes only wanted tokens, as a last block does. A model that
    is spread over ranks is computed as a whole, since FSDP must know all blocks from the start.
    """
    blocks, recomputed_blocks = model.blocks, model.recomputed_blocks
    examples, total = [], sum(lengths)
    for end in accumulate(lengths):
        first = end - lengths[len(examples)]
        ids = [model.embedding.num_embeddings * number // total for number in range(first, end)]
        half = len(ids) // 2
        examples.append(Example(ids, [IGNORE] * half + ids[half:]))
    try:
        model.blocks = blocks if is_spread(model.head.weight) else blocks[:2]
        model.recomputed_blocks = 1
        model(collate(examples, model.kernels)).backward()
        weights = model.pretrained.named_parameters()
        return {name: weight.grad for name, weight in weights if weight.grad is not None}
    finally:
        model.blocks, model.recomputed_blocks = blocks, recomputed_blocks
        model.zero_grad()


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises UserError if a gradient in ``found`` is missing or differs by more than rounding."""
    for name in expected:
        error = relative_error(found[name], expected[name]) if name in found else 1.0
        if not error <= MOST_ERROR:
            raise UserError(
                f"compile: the compiled gradient of {name} differs by {error:.0%} from the one "
                f"without compilation, more than the {MOST_ERROR:.0%} of rounding: set compile "
                f"false, or install another torch than {torch.__version__}"
            )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of their difference, relative to ``expected``'s; 0 where that is not finite."""
    norm, difference = (
        norm_over_slices(torch.linalg.vector_norm(slice_of(each), dtype=torch.float64), each).item()
        for each in (expected, found - expected)
    )
    if not difference or not math.isfinite(norm):  # no gradient at all, or a model beyond repair
        return 0.0
    return difference / norm if norm else math.inf
