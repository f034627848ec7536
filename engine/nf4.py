"""Linear layers in 4 bits (NF4, QLoRA, arXiv:2305.14314), by bitsandbytes.

Import this module only where it is used, since bitsandbytes is an optional package.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import bitsandbytes
import torch
from torch import Tensor, nn

from run.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BLOCK = 64  # weights that share a scale; bitsandbytes' default, as in the paper


def quantise(model: "LlamaForCausalLM", folder: Path, device: torch.device) -> None:
    """Replace the linear layers of all blocks by layers in 4 bits on ``device``, one at a time.

    Args:
        folder: that of the model, for errors.

    Raises:
        UserError: bitsandbytes can't compute with some layer on this device. On a CPU, version
            0.50.2 silently mixes up the scales of a weight whose rows are not multiples of a block.
    """
    layers = [
        (parent, name, layer)
        for parent in model.model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    width = next((layer.in_features for *_, layer in layers if layer.in_features % BLOCK), None)
    if width and device.type == "cpu":
        raise UserError(
            f"model {folder}: has linear layers of {width} inputs, not a multiple of {BLOCK}, with "
            "which bitsandbytes can't compute in 4 bits on a CPU: set method lora"
        )
    while layers:  # each is freed before the next
        parent, name, layer = layers.pop()
        setattr(parent, name, _quantised(layer, device))


def _quantised(linear: nn.Linear, device: torch.device) -> nn.Linear:
    """``linear`` in 4 bits, with its scales in 8 bits (double quantisation)."""
    with torch.device("meta"):
        layer = bitsandbytes.nn.LinearNF4(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
        )
    weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", module=layer
    )
    layer.weight, layer.bias = weight.to(device), linear.bias
    # Its kernel for processors with bfloat16 computes in bfloat16 whatever the dtype, and leaves
    # the weight in a layout through which no gradient passes.
    layer.support_avx512bf16_for_cpu = False
    return layer.train(linear.training)


def dequantised(weight: bitsandbytes.nn.Params4bit) -> Tensor:
    """The numbers with which a layer computes, ``[out_features, in_features]``."""
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
