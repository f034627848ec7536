"""The KV cache in decoding: what the sequences in its slots have seen, and attention to it.

A slot holds one sequence at a time, and nothing beyond its own length is ever read into a result.
`BagCache` is the CPU's, in blocks that a slot takes as it fills up; `StaticCache` is the one for
CUDA, whose kernels want fixed shapes: its slots have room for the longest sequence from the start.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import LlamaForCausalLM

from engine.attention import PackedAttention
from engine.cpu.cache import head_dim_of
from engine.llama import Attend
from engine.packing import Batch


class StaticCache:
    """A cache whose decoding step has fixed shapes, so that a CUDA graph can replay it.

    ``keys`` and ``values`` hold ``[slots, length, kv_heads, head_dim]`` for each layer. Every step is
    one of all slots: an idle one attends to a single token that means nothing.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int, length: int):
        """``length``: of the longest sequence."""
        config = model.config
        shape = (slots, length, config.num_key_value_heads, head_dim_of(model))
        # zeros: what a mask hides must still be finite, since 0 * NaN is NaN.
        self.keys, self.values = (
            [
                torch.zeros(shape, dtype=model.dtype, device=model.device)
                for _ in range(config.num_hidden_layers)
            ]
            for _ in range(2)
        )
        self.slots = torch.arange(slots, device=model.device)
        # The borders of one new token a slot, and of the slots themselves, for varlen_attn.
        self.new = torch.arange(slots + 1, device=model.device, dtype=torch.int32)
        self.borders = self.new * length

    def release(self, slot: int) -> None:
        """What ``slot`` holds is no longer needed; here nothing is to be done."""

    def prefill(self, slots: Sequence[int], batch: Batch) -> Attend:
        """Attention of packed prompts, that keeps what it sees of them in ``slots``."""
        packed = PackedAttention(batch)
        rows = (
            torch.tensor(slots)
            .repeat_interleave(torch.tensor(batch.seqlens[: len(slots)]))
            .to(self.slots.device)
        )
        positions = batch.position_ids[0, : len(rows)]  # without the filler behind the last

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            self.keys[layer][rows, positions] = key[: len(rows)]
            self.values[layer][rows, positions] = value[: len(rows)]
            return packed(layer, query, key, value)

        return attend

    def step(self, positions: torch.Tensor) -> Attend:
        """Attention of one new token in every slot, to all that the slot holds and to itself.

        Args:
            positions: ``[slots]``, of the new token in each; nothing here waits for its values.
        """
        lengths = (positions + 1).int()
        length = self.keys[0].shape[1]
        by_length = self.keys[0].is_cuda and self.keys[0].dtype in (torch.bfloat16, torch.float16)
        seen = (
            None
            if by_length
            else (torch.arange(length, device=positions.device) <= positions[:, None])[
                :, None, None
            ]
        )

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[self.slots, positions] = key
            values[self.slots, positions] = value
            if by_length:  # reads no more of each slot than it holds
                return varlen.varlen_attn(
                    query,
                    keys.flatten(0, 1),
                    values.flatten(0, 1),
                    self.new,
                    self.borders,
                    1,
                    length,
                    enable_gqa=query.shape[1] != key.shape[1],
                    seqused_k=lengths,
                )
            # The query heads that share a key head stand where several queries would: nothing is copied for them.
            shared = query.unflatten(1, (key.shape[1], -1))
            output = F.scaled_dot_product_attention(
                shared, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen
            )
            return output.flatten(1, 2)

        return attend
