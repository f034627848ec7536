"""The KV cache on a CPU."""

import ctypes
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from engine.attention import PackedAttention
from engine.llama import Attend
from engine.packing import Batch

BLOCK = 32


def slot_bytes(model: LlamaForCausalLM, length: int) -> int:
    """The memory that a slot for sequences of ``length`` tokens takes."""
    config, dtype = model.config, _dtype(model)
    tokens = -(-length // BLOCK) * BLOCK
    return (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * head_dim_of(model)
        * tokens
        * dtype.itemsize
    )


def head_dim_of(model: LlamaForCausalLM) -> int:
    return model.model.layers[0].self_attn.head_dim


def _dtype(model: LlamaForCausalLM) -> torch.dtype:
    # On the CPU scores and sums are the cache's own arithmetic, for which bfloat16 is too coarse.
    return (
        model.dtype
        if model.device.type == "cuda"
        else torch.promote_types(model.dtype, torch.float32)
    )


class BagCache:
    """A cache in blocks of `BLOCK` positions, whose attention reads what each slot holds, and no gaps or neighbours.

    Scores and outputs of attention are weighted sums of rows: of the keys' components, weighted by
    the query, and of the values, weighted by the probabilities. For sequences of different lengths
    that is ``embedding_bag``, a bag being what belongs to one sum. So a layer's keys stand as
    ``[blocks, kv_heads, head_dim, BLOCK]``, the same component of the positions of a block side by
    side, and its values as ``[blocks, kv_heads, BLOCK, head_dim]``.

    A slot takes its blocks from a common stock as its sequence grows (PagedAttention,
    arXiv:2309.06180), those first that were given back last: so the memory in use stays dense, and
    only as much is taken from the system as the sequences ever held at the same time.
    """

    def __init__(self, model: LlamaForCausalLM, slots: int, length: int):
        """``length``: of the longest sequence."""
        config, head_dim = model.config, head_dim_of(model)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        capacity = -(-length // BLOCK)
        shape = (slots * capacity, config.num_key_value_heads)
        self.keys, self.values = (
            [
                empty_in_large_pages(*shape, *tail, dtype=_dtype(model))
                for _ in range(config.num_hidden_layers)
            ]
            for tail in ((head_dim, BLOCK), (BLOCK, head_dim))
        )
        self.stock = list(reversed(range(slots * capacity)))
        self.blocks = torch.zeros(slots, capacity, dtype=torch.long)  # of each slot, in order
        self.used = [0] * slots  # how many of them

    def release(self, slot: int) -> None:
        """Give back what ``slot`` holds."""
        self.stock += reversed(self.blocks[slot, : self.used[slot]].tolist())
        self.used[slot] = 0

    def _take(self, slot: int, count: int) -> list[int]:
        taken = [self.stock.pop() for _ in range(count)]
        self.blocks[slot, self.used[slot] : self.used[slot] + count] = torch.tensor(taken)
        self.used[slot] += count
        return taken

    def prefill(self, slots: Sequence[int], batch: Batch) -> Attend:
        """Attention of packed prompts, that keeps what it sees of them in ``slots``, which must be empty."""
        packed = PackedAttention(batch)
        taken, places = [], []
        for slot, length in zip(slots, batch.seqlens, strict=False):  # a filler may follow
            places.append(torch.arange(length) + len(taken) * BLOCK)
            taken += self._take(slot, -(-length // BLOCK))
        taken, places = torch.tensor(taken), torch.cat(places)

        def in_blocks(tensor: torch.Tensor) -> torch.Tensor:
            # zeros: the rest of a last block is multiplied by zero, and 0 * NaN is NaN.
            rows = tensor.new_zeros(len(taken) * BLOCK, *tensor.shape[1:], dtype=self.keys[0].dtype)
            return rows.index_copy_(0, places, tensor[: len(places)].to(rows.dtype)).unflatten(
                0, (-1, BLOCK)
            )

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            self.keys[layer][taken] = in_blocks(key).permute(0, 2, 3, 1)
            self.values[layer][taken] = in_blocks(value).transpose(1, 2)
            return packed(layer, query, key, value)

        return attend

    def step(self, slots: Sequence[int], lengths: Sequence[int]) -> Attend:
        """Attention of one new token in each of ``slots``, to all that the slot holds and to itself.

        Args:
            lengths: the tokens that each of them holds.
        """
        opened = [slot for slot, length in zip(slots, lengths, strict=True) if length % BLOCK == 0]
        taken = torch.tensor([self._take(slot, 1)[0] for slot in opened], dtype=torch.long)
        rows, positions = torch.tensor(slots), torch.tensor(lengths)
        blocks, places = self.blocks[rows, positions // BLOCK], positions % BLOCK
        bags = _Bags(self, rows, positions + 1)

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            keys, values = self.keys[layer], self.values[layer]
            if opened:  # see in_blocks
                keys.index_fill_(0, taken, 0)
                values.index_fill_(0, taken, 0)
            keys[blocks, :, :, places] = key.to(keys.dtype)
            values[blocks, :, places] = value.to(values.dtype)
            return bags.attend(query.to(keys.dtype), keys, values).to(query.dtype)

        return attend


class _Bags:
    """Which rows of a `BagCache` are summed up in one decoding step; the same for all layers.

    A strip is what a query head attends to of one slot: n slots in use with H heads make n * H.
    """

    def __init__(self, cache: BagCache, rows: torch.Tensor, lengths: torch.Tensor):
        _, kv_heads, head_dim, _ = cache.keys[0].shape
        heads, used = kv_heads * cache.groups, -(-lengths // BLOCK)  # used: blocks of each slot
        most = int(used.max())
        self.shape, self.scale = (len(rows), heads, most * BLOCK), head_dim**-0.5
        shape = len(rows), heads, most
        # Of n * H * most blocks those that exist, in order; the others are empty bags.
        exists = (torch.arange(most) < used[:, None])[:, None].expand(shape).flatten()
        self.existing = exists.nonzero()[:, 0]
        self.owners = self.existing // most
        kept = (
            cache.blocks[rows, :most][:, None] * kv_heads
            + torch.arange(heads)[:, None] // cache.groups
        )
        kept = kept.flatten()[self.existing]  # into [blocks * kv_heads]
        self.key_rows = (kept[:, None] * head_dim + torch.arange(head_dim)).flatten().int()
        self.value_rows = (kept[:, None] * BLOCK + torch.arange(BLOCK)).flatten().int()
        self.key_bags = ((exists.cumsum(0) - exists.long()) * head_dim).int()
        strips = used[:, None].expand(shape[:2]).flatten()
        self.value_bags = ((strips.cumsum(0) - strips) * BLOCK).int()
        hidden = torch.arange(most * BLOCK) >= lengths[:, None, None]  # [n, 1, most * BLOCK]
        self.mask = torch.zeros(hidden.shape, dtype=cache.keys[0].dtype).masked_fill_(
            hidden, -torch.inf
        )

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """``query`` is ``[n, H, head_dim]``, as is the result."""
        weights = query.flatten(0, 1).index_select(0, self.owners).flatten()
        scores = F.embedding_bag(
            self.key_rows,
            keys.view(-1, BLOCK),
            self.key_bags,
            mode="sum",
            per_sample_weights=weights,
        )
        scores = torch.add(self.mask, scores.view(self.shape), alpha=self.scale)
        probabilities = (
            torch.softmax(scores, -1).view(-1, BLOCK).index_select(0, self.existing).flatten()
        )
        output = F.embedding_bag(
            self.value_rows,
            values.view(-1, values.shape[-1]),
            self.value_bags,
            mode="sum",
            per_sample_weights=probabilities,
        )
        return output.view(query.shape)


# Of Linux' madvise(2), and the size of x86's large pages.
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 2 * 2**20


def empty_in_large_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty`` on the CPU, in pages of 2 MB where Linux has them, for memory that fills up bit by bit.

    The kernel hands out and zeroes each page when it is first written to, and a page of 4 KB takes it almost as long.
    """
    tensor = torch.empty(shape, dtype=dtype)
    madvise = (
        getattr(ctypes.CDLL(None), "madvise", None) if sys.platform.startswith("linux") else None
    )
    start, end = (
        -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE,
        tensor.data_ptr() + tensor.nbytes,
    )
    if madvise is not None and end - start >= _LARGE_PAGE:
        # An advice: where it is refused, all goes on as without it.
        madvise(
            ctypes.c_void_p(start),
            ctypes.c_size_t((end - start) // _LARGE_PAGE * _LARGE_PAGE),
            _MADV_HUGEPAGE,
        )
    return tensor
