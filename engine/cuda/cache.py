"""The KV cache for decoding on a GPU, and attention to it.

A slot holds one sequence at a time, and nothing beyond that sequence's length affects a result.
CPUs use `engine.cpu.kernels.PagedCache` instead.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from engine.attention import attend_to_lengths, is_for_flash_attention, packed_attention

if TYPE_CHECKING:
    from engine.llama import Attend, Llama
    from engine.packing import MicroBatch


class StaticCache:
    """A cache whose decoding step has fixed shapes, so that a CUDA graph can replay it.

    ``keys`` and ``values`` are ``[slots, length, kv_heads, head_dim]`` for each layer. Every step
    covers all slots. An idle slot attends to a single dummy token.
    """

    def __init__(self, model: "Llama", slots: int, length: int):
        """``length`` is that of the longest sequence."""
        config = model.config
        shape = (slots, length, config.num_key_value_heads, model.head_dim)
        # Zeros, since masked entries must still be finite: 0 * NaN is NaN.
        self.keys, self.values = (
            [
                torch.zeros(shape, dtype=model.dtype, device=model.device)
                for _ in range(config.num_hidden_layers)
            ]
            for _ in range(2)
        )
        self.slots = torch.arange(slots, device=model.device)
        # For attend_to_lengths: one new token per slot, and where the slots begin.
        self.new = torch.arange(slots + 1, device=model.device, dtype=torch.int32)
        self.starts = self.new * length

    @staticmethod
    def slot_bytes(model: "Llama", length: int) -> int:
        """The memory needed for one slot, for sequences of ``length`` tokens."""
        heads = model.config.num_hidden_layers * model.config.num_key_value_heads
        return 2 * heads * model.head_dim * length * model.dtype.itemsize

    def release(self, slot: int) -> None:
        """Nothing to do: the next sequence overwrites the slot."""

    def prefill(self, slots: Sequence[int], prompts: "MicroBatch") -> "Attend":
        """Attention of packed prompts; their keys and values go into ``slots``."""
        lengths = torch.tensor(prompts.seqlens[: len(slots)])
        rows = torch.tensor(slots).repeat_interleave(lengths).to(self.slots.device)
        positions = prompts.position_ids[: len(rows)]  # without the padding at the end
        attention = partial(packed_attention, prompts, 0.0)
        return partial(self._prefill_layer, rows, positions, attention)

    def _prefill_layer(
        self,
        rows: torch.Tensor,
        positions: torch.Tensor,
        attention: "Attend",
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        self.keys[layer][rows, positions] = key[: len(rows)]
        self.values[layer][rows, positions] = value[: len(rows)]
        return attention(layer, query, key, value)

    def step(self, positions: torch.Tensor) -> "Attend":
        """Attention of one new token in every slot, to the slot's earlier tokens and to itself.

        Args:
            positions: ``[slots]``, of the new tokens. They are never read on the host, which
                would wait for the device.
        """
        keys = self.keys[0]
        if is_for_flash_attention(keys):
            lengths = (positions + 1).int()
            return partial(self._step_layer, positions, self._attend_to_lengths, lengths)
        seen = torch.arange(keys.shape[1], device=positions.device) <= positions[:, None]
        return partial(self._step_layer, positions, self._attend_to_seen, seen[:, None, None])

    def _step_layer(
        self,
        positions: torch.Tensor,
        attend: "Attend",
        seen: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys[self.slots, positions] = key
        values[self.slots, positions] = value
        return attend(seen, query, keys, values)

    def _attend_to_lengths(
        self, lengths: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Reads only the occupied part of each slot."""
        flat = keys.flatten(0, 1), values.flatten(0, 1)
        return attend_to_lengths(query, *flat, self.new, self.starts, lengths, keys.shape[1])

    def _attend_to_seen(
        self, seen: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Reads entire slots, masked by ``seen``, ``[slots, 1, 1, length]``."""
        # Query heads that share a key head become several queries of that head, so that keys and
        # values need not be copied.
        shared = query.unflatten(1, (keys.shape[2], -1))
        output = F.scaled_dot_product_attention(
            shared, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen
        )
        return output.flatten(1, 2)
