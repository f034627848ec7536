"""The shape of a model, from its config.json alone."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from engine.refusals import check_config
from run.errors import UserError, cause_of

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class ModelShape:
    """What there is to count of a Llama in ``dtype``, without any weight."""

    config: LlamaConfig
    dtype: torch.dtype

    @property
    def size(self) -> str:
        """Such as ``6.74 billion parameters`` or ``134.5 million parameters``."""
        number = self.parameters
        for unit, word, digits in ((1e9, "billion", 2), (1e6, "million", 1)):
            if number >= unit:
                return f"{number / unit:.{digits}f} {word} parameters"
        return f"{number:,} parameters"

    @cached_property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @cached_property
    def hidden(self) -> int:
        return self.config.hidden_size

    @cached_property
    def intermediate(self) -> int:
        return self.config.intermediate_size

    @cached_property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @cached_property
    def kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @cached_property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.hidden // self.heads

    @cached_property
    def products(self) -> dict[str, tuple[int, int]]:
        """The inputs and outputs of each linear layer of a block."""
        hidden, intermediate = self.hidden, self.intermediate
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }

    @cached_property
    def block_products(self) -> int:
        """The weights of a block's linear layers."""
        return sum(inputs * outputs for inputs, outputs in self.products.values())

    @cached_property
    def block_parameters(self) -> int:
        """Those, with the block's norms and biases."""
        config, biases = self.config, 0
        for name, (_, outputs) in self.products.items():
            is_mlp = name in ("gate_proj", "up_proj", "down_proj")
            biases += outputs * bool(config.mlp_bias if is_mlp else config.attention_bias)
        return self.block_products + biases + 2 * self.hidden

    @cached_property
    def head_parameters(self) -> int:
        return self.config.vocab_size * self.hidden

    @cached_property
    def other_parameters(self) -> int:
        """What lies outside the blocks: embedding, last norm, and the head unless it is tied."""
        tables = 1 if self.config.tie_word_embeddings else 2
        return tables * self.head_parameters + self.hidden

    @cached_property
    def parameters(self) -> int:
        return self.layers * self.block_parameters + self.other_parameters

    @cached_property
    def largest(self) -> int:
        """The parameters of the largest tensor."""
        return max(self.head_parameters, *(a * b for a, b in self.products.values()))


def read_shape(folder: Path, dtype: torch.dtype) -> ModelShape:
    """The shape that config.json in ``folder`` describes.

    Raises:
        UserError: it does not describe a Llama that can be trained.
    """
    check_config(folder)
    return ModelShape(read_config(folder), dtype)


def read_config(folder: Path) -> LlamaConfig:
    """Raises UserError if config.json in ``folder`` can't be read as a Llama's."""
    try:
        config = LlamaConfig.from_pretrained(folder)
        if not getattr(config, "quantization_config", True):
            del config.quantization_config  # it is empty
        for name in SIZES:
            if (size := getattr(config, name, None)) is not None and size < 1:
                raise ValueError(f"{name} is {size}")
        # For its `generate`. One that it names may not be installed, and the rest uses our own.
        config._attn_implementation = "sdpa"
    except Exception as error:  # Transformers and its validation raise many types
        raise not_a_llama(folder, error) from None
    return config


def not_a_llama(folder: Path, error: Any) -> UserError:
    return UserError(
        f"model {folder}: its config.json does not describe a Llama ({cause_of(error)}): "
        "correct that setting, or use the config.json that belongs to its weights"
    )
