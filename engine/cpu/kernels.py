"""Attention on a CPU: over packed sequences, and from new tokens to a paged cache."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import attention_of_each, for_each_head
from engine.cpu.heap import empty_in_large_pages

if TYPE_CHECKING:
    from engine.llama import Attend, Llama
    from engine.packing import MicroBatch

QUERY_BLOCK = 64  # queries at a time
LONGEST_KEPT = 1024  # the longest sequence whose probabilities are worth keeping
BLOCK = 32  # positions in one block of the cache
ARGMAX_PART = 128  # logits per part; see `most_probable`


def packed_attention(
    micro_batch: "MicroBatch",
    dropout: float,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    longest_kept: int = LONGEST_KEPT,
    query_block: int = QUERY_BLOCK,
) -> Tensor:
    """See `engine.attention.packed_attention`, also for the shapes."""
    if query.shape[1] != key.shape[1]:
        key, value = for_each_head(query, key, value)
    seqlens = micro_batch.seqlens
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if is_half or dropout or max(seqlens) > longest_kept:
        return attention_of_each(seqlens, dropout, query, key, value)
    return KeptAttention.apply(query, key, value, seqlens, query_block)


class KeptAttention(torch.autograd.Function):
    """Attention that keeps its probabilities for the backward pass.

    ``scaled_dot_product_attention`` computes them twice, to avoid storing an n x n matrix for a
    sequence of n tokens. GSM8K's sequences are so short that these matrices are smaller than the
    other activations. Each block of queries uses only the keys up to its own end, so few masked
    scores are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seqlens: tuple[int, ...],
        query_block: int,
    ) -> Tensor:
        output = torch.empty_like(query)
        queries, keys, values, outputs = (_heads_first(t) for t in (query, key, value, output))
        longest = max(seqlens)
        future = query.new_full((longest, longest), -torch.inf).triu_(1)
        kept = []
        for start, first, end in _blocks(seqlens, query_block):
            rows, columns = slice(start + first, start + end), slice(start, start + end)
            scores = torch.baddbmm(
                future[first:end, :end],
                queries[:, rows],
                keys[:, columns].mT,
                alpha=query.shape[-1] ** -0.5,
            )
            probabilities = torch.softmax(scores, dim=-1, out=scores)
            outputs[:, rows] = torch.bmm(probabilities, values[:, columns])
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks = seqlens, query_block
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grads = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        queries, keys, values, grad_outputs = (_heads_first(t) for t in (query, key, value, grad))
        grad_queries, grad_keys, grad_values = (_heads_first(tensor) for tensor in grads)
        scale = query.shape[-1] ** -0.5
        for (start, first, end), probabilities in zip(_blocks(*ctx.blocks), kept, strict=True):
            rows, columns = slice(start + first, start + end), slice(start, start + end)
            grad_rows = grad_outputs[:, rows]
            grad_values[:, columns] += torch.bmm(probabilities.mT, grad_rows)
            grad_probabilities = torch.bmm(grad_rows, values[:, columns].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, query.dtype
            )
            grad_queries[:, rows] = torch.bmm(grad_scores.mul_(scale), keys[:, columns])
            grad_keys[:, columns] += torch.bmm(grad_scores.mT, queries[:, rows])
        return *grads, None, None


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)


def _blocks(seqlens: tuple[int, ...], query_block: int) -> Iterator[tuple[int, int, int]]:
    """The start of each sequence in the row, and the first and end of each block within it."""
    start = 0
    for length in seqlens:
        for first in range(0, length, query_block):
            yield start, first, min(first + query_block, length)
        start += length


class PagedCache:
    """A KV cache in blocks of `BLOCK` positions. Attention reads only the blocks that are in use.

    Both steps of attention are weighted sums of rows: scores sum the keys' components, weighted by
    the query, and outputs sum the values, weighted by the probabilities. ``embedding_bag`` computes
    such sums for bags of rows of any size, hence for sequences of different lengths. For it, keys
    are ``[blocks, kv_heads, head_dim, BLOCK]``, with the same component of a block's positions
    adjacent, and values are ``[blocks, kv_heads, BLOCK, head_dim]``.

    A slot takes blocks from a common stock as its sequence grows (PagedAttention,
    arXiv:2309.06180), the most recently returned first. This keeps the used memory dense, and the
    system provides only as much as the sequences ever fill at the same time.
    """

    def __init__(self, model: "Llama", slots: int, length: int):
        """``length`` is that of the longest sequence."""
        config, dtype = model.config, self.dtype_for(model)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        capacity = math.ceil(length / BLOCK)
        shape = (slots * capacity, config.num_key_value_heads)
        layers = range(config.num_hidden_layers)
        self.keys, self.values = (
            [empty_in_large_pages(*shape, *block, dtype=dtype) for _ in layers]
            for block in ((model.head_dim, BLOCK), (BLOCK, model.head_dim))
        )
        self.stock = list(reversed(range(slots * capacity)))
        self.blocks = torch.zeros(slots, capacity, dtype=torch.long)  # of each slot, in order
        self.used = [0] * slots  # how many of these blocks

    @staticmethod
    def dtype_for(model: "Llama") -> torch.dtype:
        """float32 or better, since the cache computes scores and sums in its own dtype."""
        return torch.promote_types(model.dtype, torch.float32)

    @staticmethod
    def slot_bytes(model: "Llama", length: int) -> int:
        """The memory needed for one slot, for sequences of ``length`` tokens."""
        config, positions = model.config, math.ceil(length / BLOCK) * BLOCK
        heads = config.num_hidden_layers * config.num_key_value_heads
        return 2 * heads * model.head_dim * positions * PagedCache.dtype_for(model).itemsize

    def release(self, slot: int) -> None:
        """Return the blocks of ``slot``."""
        self.stock += reversed(self.blocks[slot, : self.used[slot]].tolist())
        self.used[slot] = 0

    def _take(self, slot: int, count: int) -> list[int]:
        taken = [self.stock.pop() for _ in range(count)]
        self.blocks[slot, self.used[slot] : self.used[slot] + count] = torch.tensor(taken)
        self.used[slot] += count
        return taken

    def prefill(self, slots: Sequence[int], prompts: "MicroBatch") -> "Attend":
        """Attention of packed prompts; their keys and values go into ``slots``, which are empty."""
        taken: list[int] = []
        places = []
        for slot, length in zip(slots, prompts.seqlens, strict=False):  # padding may follow
            places.append(torch.arange(length) + len(taken) * BLOCK)
            taken += self._take(slot, math.ceil(length / BLOCK))
        attention = partial(packed_attention, prompts, 0.0)
        return partial(self._prefill_layer, torch.tensor(taken), torch.cat(places), attention)

    def _prefill_layer(
        self,
        blocks: Tensor,
        places: Tensor,
        attention: "Attend",
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        self.keys[layer][blocks] = self._in_blocks(key, blocks, places).permute(0, 2, 3, 1)
        self.values[layer][blocks] = self._in_blocks(value, blocks, places).transpose(1, 2)
        return attention(layer, query, key, value)

    def _in_blocks(self, tensor: Tensor, blocks: Tensor, places: Tensor) -> Tensor:
        # Zeros, since the unused end of a last block is multiplied by zero, and 0 * NaN is NaN.
        shape, dtype = (len(blocks) * BLOCK, *tensor.shape[1:]), self.keys[0].dtype
        rows = tensor.new_zeros(shape, dtype=dtype)
        return rows.index_copy_(0, places, tensor[: len(places)].to(dtype)).unflatten(
            0, (-1, BLOCK)
        )

    def step(self, slots: Sequence[int], lengths: Sequence[int]) -> "Attend":
        """Attention of one new token in each of ``slots``, to its earlier tokens and to itself.

        Args:
            lengths: the number of earlier tokens in each slot.
        """
        full = [slot for slot, length in zip(slots, lengths, strict=True) if length % BLOCK == 0]
        opened = torch.tensor([self._take(slot, 1)[0] for slot in full], dtype=torch.long)
        rows, positions = torch.tensor(slots), torch.tensor(lengths)
        blocks, places = self.blocks[rows, positions // BLOCK], positions % BLOCK
        bags = _Bags(self, rows, positions + 1)
        return partial(self._step_layer, opened, blocks, places, bags)

    def _step_layer(
        self,
        opened: Tensor,
        blocks: Tensor,
        places: Tensor,
        bags: "_Bags",
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        if len(opened):  # zeroed for the reason in _in_blocks
            keys.index_fill_(0, opened, 0)
            values.index_fill_(0, opened, 0)
        keys[blocks, :, :, places] = key.to(keys.dtype)
        values[blocks, :, places] = value.to(values.dtype)
        return bags.attend(query.to(keys.dtype), keys, values).to(query.dtype)


class _Bags:
    """Which rows of a `PagedCache` one decoding step sums; the same for all layers.

    A strip is what one query head reads in one slot, so n slots with H heads have n * H strips.
    """

    def __init__(self, cache: PagedCache, rows: Tensor, lengths: Tensor):
        _, kv_heads, head_dim, _ = cache.keys[0].shape
        heads = kv_heads * cache.groups
        used = -(-lengths // BLOCK)  # blocks of each slot, rounded up
        most = int(used.max())
        self.shape, self.scale = (len(rows), heads, most * BLOCK), head_dim**-0.5
        shape = len(rows), heads, most
        # The blocks, of n * H * most, that exist, in order. The others are empty bags.
        exists = (torch.arange(most) < used[:, None])[:, None].expand(shape).flatten()
        self.existing = exists.nonzero()[:, 0]
        self.owners = self.existing // most
        kv_head = torch.arange(heads)[:, None] // cache.groups
        kept = cache.blocks[rows, :most][:, None] * kv_heads + kv_head
        kept = kept.flatten()[self.existing]  # into [blocks * kv_heads]
        self.key_rows = (kept[:, None] * head_dim + torch.arange(head_dim)).flatten().int()
        self.value_rows = (kept[:, None] * BLOCK + torch.arange(BLOCK)).flatten().int()
        self.key_bags = ((exists.cumsum(0) - exists.long()) * head_dim).int()
        strips = used[:, None].expand(shape[:2]).flatten()
        self.value_bags = ((strips.cumsum(0) - strips) * BLOCK).int()
        hidden = torch.arange(most * BLOCK) >= lengths[:, None, None]  # [n, 1, most * BLOCK]
        mask = torch.zeros(hidden.shape, dtype=cache.keys[0].dtype)
        self.mask = mask.masked_fill_(hidden, -torch.inf)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``query`` is ``[n, H, head_dim]``, as is the result."""
        sums = partial(F.embedding_bag, mode="sum")
        weights = query.flatten(0, 1).index_select(0, self.owners).flatten()
        scores = sums(
            self.key_rows, keys.view(-1, BLOCK), self.key_bags, per_sample_weights=weights
        )
        scores = torch.add(self.mask, scores.view(self.shape), alpha=self.scale)
        probabilities = torch.softmax(scores, -1).view(-1, BLOCK)
        weights = probabilities.index_select(0, self.existing).flatten()
        rows = values.view(-1, values.shape[-1])
        output = sums(self.value_rows, rows, self.value_bags, per_sample_weights=weights)
        return output.view(query.shape)


def most_probable(logits: Tensor) -> Tensor:
    """As `engine.device.most_probable`.

    PyTorch's argmax is not vectorised. Taking the maximum of each part first needs a third of the
    time.
    """
    logits = logits.float()
    if logits.shape[-1] % ARGMAX_PART:
        return logits.argmax(dim=-1)
    parts = logits.unflatten(-1, (-1, ARGMAX_PART))
    chosen = parts.amax(dim=-1).argmax(dim=-1)
    within = parts[torch.arange(len(chosen)), chosen].argmax(dim=-1)
    return chosen * ARGMAX_PART + within


def slot_order(lengths: Mapping[int, int]) -> list[int]:
    """The slots in an order that gives every thread about the same amount of work."""
    by_length = sorted(lengths, key=lambda slot: lengths[slot])
    threads = torch.get_num_threads()
    return [slot for first in range(threads) for slot in by_length[first::threads]]
