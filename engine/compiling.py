"""torch.compile for the parts of a layer where training does its elementwise operations."""

import math
import warnings
from functools import cache

import torch

from engine.functions import LayerParts
from engine.llama import PLAIN, Llama
from engine.packing import IGNORE, Example, collate
from engine.state import get_random_state, set_random_state
from run.errors import UserError, cause_of

# Of a compiled gradient, relative to one that is not compiled. Rounding to bfloat16 in other places
# causes about 0.02 in two blocks, 0.1 where attention is saturated; a gradient of zeros causes 1.
MOST_ERROR = 0.3


@cache
def compiled_parts() -> LayerParts:
    """Attention is left out: its kernels are already fast, and its sequence lengths always vary."""
    # With dynamic=True one graph serves any number of tokens. It also serves every layer, since the
    # layer's weights are inputs of the graph.
    parts = PLAIN.before_attention, PLAIN.after_attention
    compiled = (torch.compile(part, dynamic=True, fullgraph=True) for part in parts)
    return LayerParts(PLAIN.rope, *compiled)


def compile_layers(model: Llama) -> None:
    """Compile the parts of each layer before and after its attention, for training.

    Compilers have made wrong gradients without a word (pytorch #180642), so those of a small
    micro-batch are compared with the gradients without compilation.

    Raises:
        UserError: torch.compile fails here, usually because there is no C++ compiler, or it gives
            another gradient.
    """
    model.train()
    random_state = get_random_state()
    expected = gradients(model)
    set_random_state(random_state)  # for the same dropout
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on its own internals
            model.compiled_parts = compiled_parts()
            found = gradients(model)
    except Exception as error:  # the compiler's layers raise many types
        raise UserError(
            f"compile true: torch.compile fails here ({cause_of(error)}): install a C++ compiler, "
            "or set compile false"
        ) from None
    for name in expected:
        error = relative_error(found[name], expected[name]) if name in found else 1.0
        if not error <= MOST_ERROR:
            raise UserError(
                f"compile true: the compiled gradient of {name} differs by {error:.0%} from the "
                f"one without compilation, more than the {MOST_ERROR:.0%} of rounding: set compile "
                f"false, or install another torch than {torch.__version__}"
            )


def gradients(model: Llama) -> dict[str, torch.Tensor]:
    """The gradients of two sequences through the first two blocks, by the weights' names.

    All blocks are computed by the same graphs, and these two need little memory: the second one
    also computes only wanted tokens, as a last block does.
    """
    blocks = model.blocks
    # 139 tokens, or 192 with a CPU's padding: the compiler takes equal sizes for the same size, and
    # no model has as many features or as many of them in a head.
    ids = [model.embedding.num_embeddings * number // 141 for number in range(141)]
    examples = [Example(ids[:71], [IGNORE] * 35 + ids[35:71]), Example(ids[71:], ids[71:])]
    try:
        model.blocks = blocks[:2]
        model(collate(examples, model.kernels)).backward()
        weights = model.pretrained.named_parameters()
        return {name: weight.grad for name, weight in weights if weight.grad is not None}
    finally:
        model.blocks = blocks
        model.zero_grad()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of their difference, relative to ``expected``'s; 0 where that is not finite."""
    norm = torch.linalg.vector_norm(expected, dtype=torch.float64).item()
    difference = torch.linalg.vector_norm(found - expected, dtype=torch.float64).item()
    if not difference or not math.isfinite(norm):  # no gradient at all, or a model beyond repair
        return 0.0
    return difference / norm if norm else math.inf
