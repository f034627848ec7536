"""The KV cache for decoding on a GPU, and attention to it.

Nothing beyond a sequence's length affects a result. CPUs use `engine.cpu.kernels.PagedCache`
instead.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import attend_to_lengths, is_for_flash_attention, packed_attention
from engine.cuda.regions import Regions
from engine.cuda.transfers import to_device

if TYPE_CHECKING:
    from engine.llama import Attend, Llama
    from engine.packing import MicroBatch

# Rotates query and key, and writes key and value to the given tokens of the cache in one kernel:
# see `engine.cuda.small_kernels.rotate_into`, whose first two arguments are bound.
RotateInto = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class StaticCache:
    """A cache whose decoding step has fixed shapes, so that a CUDA graph can replay it.

    A step has a number of rows, each of which writes one token of one slot's sequence. A row that
    is left over writes to a token of the cache that belongs to nobody.

    FlashAttention, like our own kernel, reads a sequence wherever it lies, so two short ones can
    share a region. What computes attention otherwise, such as in float32, needs one sequence in
    each to read the cache without a copy.

    The attention of `prefill` and of `step` takes query, key and value. It also takes what rotates
    them first and writes them, if that has not been done.

    Attributes:
        regions: which tokens belong to each slot.
        keys, values: ``[tokens, kv_heads, head_dim]`` for each layer.
        nobodys: the token of the cache for rows that are left over.
    """

    def __init__(self, model: "Llama", slots: int, length: int, regions: int | None = None):
        """
        Args:
            length: of the longest sequence.
            regions: how many sequences of this length fit into the cache; None: one for each slot.
        """
        config = model.config
        self.slots, self.length = slots, length
        self._is_flash = _is_for_flash_attention(model)
        sizes = config.num_attention_heads, config.num_key_value_heads, model.head_dim
        choose = model.kernels.decode_attention if self._is_flash else None
        self._kernel = choose(model.dtype, *sizes) if choose else None
        count = slots if regions is None else regions
        self.regions = Regions(count, length, slots if self._is_flash else min(slots, count))
        self.nobodys = count * length
        # Zeros, since masked entries must still be finite: 0 * NaN is NaN.
        self._all = torch.zeros(
            (
                config.num_hidden_layers,
                2,
                self.nobodys + 1,
                config.num_key_value_heads,
                model.head_dim,
            ),
            dtype=model.dtype,
            device=model.device,
        )
        self.keys, self.values = ([layer[which] for layer in self._all] for which in range(2))
        # For attend_to_lengths, where there is no kernel: one new token in each row.
        self._new = torch.arange(slots + 1, device=model.device, dtype=torch.int32)

    @staticmethod
    def slot_bytes(model: "Llama", length: int) -> int:
        """The memory of one region, for a sequence of ``length`` tokens."""
        heads = model.config.num_hidden_layers * model.config.num_key_value_heads
        return 2 * heads * model.head_dim * length * model.dtype.itemsize

    @staticmethod
    def sequences_in(model: "Llama", regions: int) -> int:
        """The most sequences that ``regions`` have room for at the same time."""
        # Two in each but the last, as `Regions` explains.
        return 2 * regions - 1 if _is_for_flash_attention(model) else regions

    def release(self, slot: int) -> None:
        """Free the place of ``slot``; the next sequence there overwrites it."""
        self.regions.release(slot)

    def start_with_room(self, slot: int, position: int) -> int | None:
        """The first token of ``slot``, moved if necessary so that there is room at ``position``.

        Returns:
            None if there is no such place at the moment.
        """
        regions = self.regions
        if regions.has_outgrown(slot, position + 1):
            old = regions.starts[slot]
            if not regions.grow(slot):
                return None
            self._move(old, regions.starts[slot])
        return regions.starts[slot]

    def _move(self, old: int, new: int) -> None:
        if new != old:
            half = self.regions.half
            self._all[:, :, new : new + half] = self._all[:, :, old : old + half]

    def prefill(self, slots: Sequence[int], prompts: "MicroBatch") -> "Attend":
        """Attention of packed prompts; their keys and values go to the places of ``slots``."""
        lengths = torch.tensor(prompts.seqlens[: len(slots)])
        starts = torch.tensor([self.regions.starts[slot] for slot in slots])
        starts = to_device(starts.repeat_interleave(lengths), self._new.device)
        tokens = starts + prompts.position_ids[: len(starts)]  # without the padding at the end
        attention = partial(packed_attention, prompts, 0.0)
        return partial(self._prefill_layer, tokens, attention)

    def _prefill_layer(
        self,
        tokens: Tensor,
        attention: "Attend",
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotate_into: RotateInto | None = None,
    ) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        if rotate_into:
            query = rotate_into(query, key, value, tokens, keys, values)
            key = keys[tokens]
        else:
            keys[tokens], values[tokens] = key[: len(tokens)], value[: len(tokens)]
        return attention(layer, query, key, value)

    def step(self, positions: Tensor, starts: Tensor) -> "Attend":
        """Attention of one new token in every row, to its sequence's earlier tokens and to itself.

        Args:
            positions: ``[rows]``, of the new tokens in their sequences. Neither this nor the next
                is ever read on the host, which would wait for the device.
            starts: ``[rows]``, the first token of each sequence in the cache.
        """
        if self._is_flash:
            # The operator wants one more start, and makes no use of it.
            borders = torch.cat([starts, starts[:1]]).int(), (positions + 1).int()
            attend = partial(self._attend_to_lengths, *borders)
        else:
            # Rows that are left over have a region beyond the last, of which nothing is computed.
            # A region without a row is computed for the first one, and not used.
            count, device = self.regions.count, positions.device
            regions = starts // self.length
            rows = torch.zeros(count + 1, dtype=torch.long, device=device)
            rows = rows.index_copy_(0, regions, torch.arange(len(starts), device=device))[:count]
            seen = torch.arange(self.length, device=device) <= positions[rows][:, None]
            regions = regions.clamp_(max=count - 1)
            attend = partial(self._attend_to_seen, seen[:, None, None], rows, regions)
        return partial(self._step_layer, starts + positions, attend)

    def _step_layer(
        self,
        tokens: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotate_into: RotateInto | None = None,
    ) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        if rotate_into:
            query = rotate_into(query, key, value, tokens, keys, values)
        else:
            keys[tokens], values[tokens] = key, value
        return attend(query, keys, values)

    def _attend_to_lengths(
        self, starts: Tensor, lengths: Tensor, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Reads only what there is of each sequence."""
        if self._kernel:
            return self._kernel.attend(query, keys, values, starts, lengths)
        new = self._new[: len(starts)]
        return attend_to_lengths(query, keys, values, new, starts, lengths, self.length)

    def _attend_to_seen(
        self,
        seen: Tensor,
        rows: Tensor,
        regions: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Reads all regions where they are, masked by ``seen``, ``[regions, 1, 1, length]``.

        Args:
            rows: the row of each region.
            regions: the region of each row.
        """
        # Query heads that share a key head become several queries of that head, so that keys and
        # values need not be copied for each.
        shared = query.unflatten(1, (keys.shape[1], -1))[rows]
        keys, values = (
            each[: self.nobodys].unflatten(0, (-1, self.length)).transpose(1, 2)
            for each in (keys, values)
        )
        output = F.scaled_dot_product_attention(shared, keys, values, attn_mask=seen)
        return output.flatten(1, 2)[regions]


def _is_for_flash_attention(model: "Llama") -> bool:
    shape = 0, model.config.num_attention_heads, model.head_dim
    return is_for_flash_attention(torch.empty(shape, dtype=model.dtype, device=model.device))
