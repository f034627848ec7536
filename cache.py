"""The KV cache in decoding: what the sequences in its slots have seen, and attention to it.

A slot has room for the longest sequence and holds one at a time; a finished one leaves nothing to
clear away, since nothing beyond a sequence's own length is ever read into a result. `BagCache` is
the CPU's, `StaticCache` the one for CUDA, whose kernels want fixed shapes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import LlamaForCausalLM

from attention import PackedAttention
from data import Batch
from model import Attend

BLOCK = 32


def slot_bytes(model: LlamaForCausalLM, length: int) -> int:
    """The memory that a slot for sequences of ``length`` tokens takes."""
    config, dtype = model.config, _dtype(model)
    tokens = -(-length // BLOCK) * BLOCK
    return 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(model) * tokens * dtype.itemsize


def _head_dim(model: LlamaForCausalLM) -> int:
    return model.model.layers[0].self_attn.head_dim


def _dtype(model: LlamaForCausalLM) -> torch.dtype:
    # On the CPU scores and sums are the cache's own arithmetic, for which bfloat16 is too coarse.
    return model.dtype if model.device.type == "cuda" else torch.promote_types(model.dtype, torch.float32)


def _places(slots: Sequence[int], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot and position of each token of packed prompts, without the filler behind the last."""
    lengths = torch.tensor(batch.seqlens[: len(slots)])
    rows = torch.tensor(slots).repeat_interleave(lengths)
    return rows.to(batch.input_ids.device), batch.position_ids[0, : len(rows)]


class BagCache:
    """A cache whose attention reads what each slot holds, and neither gaps nor neighbours.

    Scores and outputs of attention are weighted sums of rows: of the keys' components, weighted by
    the query, and of the values, weighted by the probabilities. For sequences of different lengths
    that is ``embedding_bag``, a bag being what belongs to one sum. So a layer's keys stand as
    ``[slots, kv_heads, blocks, head_dim, BLOCK]``, the same component of the positions of a block
    side by side, and its values as ``[slots, kv_heads, blocks, BLOCK, head_dim]``.

    The memory of a slot is taken from the system as it fills up.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int, length: int):
        """``length``: of the longest sequence."""
        config, self.head_dim = model.config, _head_dim(model)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        shape = (slots, config.num_key_value_heads, -(-length // BLOCK))
        self.keys, self.values = (
            [torch.empty(*shape, *tail, dtype=_dtype(model)) for _ in range(config.num_hidden_layers)]
            for tail in ((self.head_dim, BLOCK), (BLOCK, self.head_dim))
        )

    def prefill(self, slots: Sequence[int], batch: Batch) -> Attend:
        """Attention of packed prompts, that keeps what it sees of them in ``slots``."""
        packed = PackedAttention(batch)
        rows, positions = _places(slots, batch)
        ends = torch.tensor([length - 1 for length in batch.seqlens[: len(slots)]])
        last_blocks = torch.tensor(slots), ends // BLOCK

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            self._clear(layer, *last_blocks)
            self._write(layer, rows, positions, key[: len(rows)], value[: len(rows)])
            return packed(layer, query, key, value)

        return attend

    def step(self, slots: Sequence[int], lengths: Sequence[int]) -> Attend:
        """Attention of one new token in each of ``slots``, to all that the slot holds and to itself.

        Args:
            lengths: the tokens that each of them holds.
        """
        rows, positions = torch.tensor(slots), torch.tensor(lengths)
        opened = positions % BLOCK == 0  # here a block begins
        new_blocks = rows[opened], positions[opened] // BLOCK
        bags = _Bags(self, rows, positions + 1)

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if len(new_blocks[0]):
                self._clear(layer, *new_blocks)
            self._write(layer, rows, positions, key, value)
            return bags.attend(query.to(self.keys[layer].dtype), self.keys[layer], self.values[layer]).to(query.dtype)

        return attend

    def _clear(self, layer: int, rows: torch.Tensor, blocks: torch.Tensor) -> None:
        # The rest of a sequence's last block is multiplied by zero, and 0 * NaN is NaN. Scores of such keys are hidden.
        self.values[layer][rows, :, blocks] = 0

    def _write(
        self, layer: int, rows: torch.Tensor, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        blocks, places = positions // BLOCK, positions % BLOCK
        self.keys[layer][rows, :, blocks, :, places] = key.to(self.keys[layer].dtype)
        self.values[layer][rows, :, blocks, places] = value.to(self.values[layer].dtype)


class _Bags:
    """Which rows of a `BagCache` are summed up in one decoding step; the same for all layers.

    A strip is what a query head attends to of one slot: n slots in use with H heads make n * H.
    """

    def __init__(self, cache: BagCache, rows: torch.Tensor, lengths: torch.Tensor):
        _, kv_heads, capacity, self.head_dim, _ = cache.keys[0].shape
        heads, used = kv_heads * cache.groups, -(-lengths // BLOCK)  # used: blocks of each slot
        most = int(used.max())
        self.shape = len(rows), heads, most * BLOCK
        strips = rows[:, None] * kv_heads + torch.arange(heads) // cache.groups  # [n, H], into [slots * kv_heads]
        used = used[:, None].expand(strips.shape).flatten()
        # Of n * H * most blocks those that exist, in order; the others are empty bags.
        self.existing = (torch.arange(most) < used[:, None]).flatten().nonzero()[:, 0]
        self.owners = self.existing // most
        blocks = strips.flatten()[self.owners] * capacity + self.existing % most
        self.key_rows = (blocks[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten().int()
        self.value_rows = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten().int()
        exists = torch.zeros(len(used) * most, dtype=torch.long).index_fill_(0, self.existing, 1)
        self.key_bags = ((exists.cumsum(0) - exists) * self.head_dim).int()
        self.value_bags = ((used.cumsum(0) - used) * BLOCK).int()
        self.hidden = torch.arange(most * BLOCK) >= lengths[:, None, None]  # [n, 1, most * BLOCK]

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """``query`` is ``[n, H, head_dim]``, as is the result."""
        weights = (query * self.head_dim**-0.5).flatten(0, 1).index_select(0, self.owners).flatten()
        scores = F.embedding_bag(
            self.key_rows, keys.view(-1, BLOCK), self.key_bags, mode="sum", per_sample_weights=weights
        )
        scores = scores.view(self.shape).masked_fill_(self.hidden, -torch.inf)
        probabilities = torch.softmax(scores, -1).view(-1, BLOCK).index_select(0, self.existing).flatten()
        output = F.embedding_bag(
            self.value_rows,
            values.view(-1, self.head_dim),
            self.value_bags,
            mode="sum",
            per_sample_weights=probabilities,
        )
        return output.view(query.shape)


class StaticCache:
    """A cache whose decoding step has fixed shapes, so that a CUDA graph can replay it.

    ``keys`` and ``values`` hold ``[slots, length, kv_heads, head_dim]`` for each layer. Every step is
    one of all slots: an idle one attends to a single token that means nothing.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int, length: int):
        """``length``: of the longest sequence."""
        config = model.config
        shape = (slots, length, config.num_key_value_heads, _head_dim(model))
        # zeros: what a mask hides must still be finite, since 0 * NaN is NaN.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(config.num_hidden_layers)]
            for _ in range(2)
        )
        self.slots = torch.arange(slots, device=model.device)
        # The borders of one new token a slot, and of the slots themselves, for varlen_attn.
        self.new = torch.arange(slots + 1, device=model.device, dtype=torch.int32)
        self.borders = self.new * length

    def prefill(self, slots: Sequence[int], batch: Batch) -> Attend:
        """Attention of packed prompts, that keeps what it sees of them in ``slots``."""
        packed = PackedAttention(batch)
        rows, positions = _places(slots, batch)

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
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
            None if by_length else (torch.arange(length, device=positions.device) <= positions[:, None])[:, None, None]
        )

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
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
