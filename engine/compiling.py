"""torch.compile for the parts of a layer where training does its elementwise operations."""

import warnings
from functools import cache

import torch

from engine.functions import LayerParts
from engine.llama import PLAIN, Llama
from engine.packing import IGNORE, Example, collate
from run.errors import UserError, cause_of


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

    Raises:
        UserError: torch.compile fails here, usually because there is no C++ compiler.
    """
    model.train()
    example = Example([0] * 8, [IGNORE] * 4 + [0] * 4)
    micro_batch = collate([example, example], model.kernels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on its own internals
            model.compiled_parts = compiled_parts()
            model(micro_batch).backward()
    except Exception as error:  # the compiler's layers raise many types
        raise UserError(
            f"compile true: torch.compile fails here ({cause_of(error)}): install a C++ compiler, "
            "or set compile false"
        ) from None
    model.zero_grad()
