"""Packs sequences into micro-batches, each one row of tokens with one sequence after another.

Sequences are not padded to a common length. If a device is faster with a round number of tokens,
padding is added once, at the end of the row (`MicroBatch`).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from engine.device import Kernels
    from engine.ranks import Ranks

IGNORE = -100  # the label of a token that is not supervised, as in torch's cross_entropy


@dataclass(frozen=True)
class Example:
    """One sequence: BOS, prompt, answer, EOS.

    ``labels`` is as long as ``input_ids`` and is not shifted. A token that the model learns to
    write (the answer and EOS) is its own label; every other label is `IGNORE`. ``line`` is the line
    number of its row in the data set, for messages. ``classes`` is empty, or has the number of the
    class of each supervised token, so that their losses can be told apart.
    """

    input_ids: list[int]
    labels: list[int]
    line: int = field(default=0, compare=False)
    classes: list[int] = field(default_factory=list, compare=False)


class Batches(Protocol):
    """The rows of each optimizer step, by its number."""

    def __getitem__(self, step: int) -> Sequence[Example]: ...


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass: S sequences, T tokens in all.

    The last token of a training sequence is only ever a label, so it is not an input. Padding, if
    the device needs any, is one more sequence at the end, and the ``output_positions`` after N.

    Attributes:
        input_ids: ``[T]``.
        position_ids: ``[T]``, counted from 0 in each sequence.
        cu_seqlens: ``[S + 1]``, int32: where each sequence begins, and T at the end.
        seqlens: the S lengths as Python numbers, for code that must not wait for the device.
        output_positions: ``[M]``: the tokens whose hidden states are needed. In training the first
            N are those whose next token is supervised. For prompts it is the last token of each.
        labels: ``[N]``: the supervised next tokens; empty for prompts.
        num_labels: N.
        classes: ``[N]``: the class of each label; None if classes are not told apart.
        is_filler: whether it keeps a rank busy that has nothing left to compute while others have.
            Its loss and its gradients count as zero, and so do its labels.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    seqlens: tuple[int, ...]
    output_positions: torch.Tensor
    labels: torch.Tensor
    num_labels: int
    classes: torch.Tensor | None = None
    is_filler: bool = False

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]


def collate(examples: Sequence[Example], kernels: "Kernels") -> MicroBatch:
    """Concatenate ``examples`` into one `MicroBatch`, padded as ``kernels`` require."""
    output_positions: list[int] = []
    labels: list[int] = []
    start = 0
    for example in examples:
        for position, label in enumerate(example.labels[1:]):
            if label != IGNORE:
                output_positions.append(start + position)
                labels.append(label)
        start += len(example.input_ids) - 1
    sequences = [example.input_ids[:-1] for example in examples]
    classes = [number for example in examples for number in example.classes]
    padded = _concatenated(
        sequences, output_positions, labels, kernels.row_multiple, kernels.device
    )
    return replace(padded, classes=_on(kernels.device, classes)) if classes else padded


def collate_prompts(prompts: Sequence[list[int]], kernels: "Kernels") -> MicroBatch:
    """Concatenate ``prompts`` into one `MicroBatch` that asks for the last token of each."""
    ends: list[int] = []
    for prompt in prompts:
        ends.append(len(prompt) + (ends[-1] if ends else -1))
    return _concatenated(prompts, ends, [], kernels.prompt_row_multiple, kernels.device)


def _concatenated(
    sequences: Sequence[list[int]],
    output_positions: list[int],
    labels: list[int],
    multiple: int,
    device: torch.device,
) -> MicroBatch:
    if padding := -sum(map(len, sequences)) % multiple:
        sequences = [*sequences, [0] * padding]
    output_positions = output_positions + [0] * (-len(output_positions) % multiple)
    seqlens = tuple(map(len, sequences))
    borders = [0]
    for length in seqlens:
        borders.append(borders[-1] + length)
    return MicroBatch(
        _on(device, [token for sequence in sequences for token in sequence]),
        _on(device, [position for length in seqlens for position in range(length)]),
        _on(device, borders, torch.int32),
        seqlens,
        _on(device, output_positions),
        _on(device, labels),
        len(labels),
    )


def _on(device: torch.device, numbers: list[int], dtype: torch.dtype = torch.long) -> torch.Tensor:
    tensor = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # Copying from pinned memory does not wait for the device to finish its current work.
    return tensor.pin_memory().to(device, non_blocking=True)


def pack(
    examples: Sequence[Example],
    micro_batch_tokens: int,
    kernels: "Kernels",
    ranks: "Ranks | None" = None,
) -> list[MicroBatch]:
    """Distribute ``examples`` over few micro-batches of at most ``micro_batch_tokens`` tokens.

    There are as many as first-fit decreasing needs. They are about equally full, since a small one
    would leave a fast device waiting for the next operation. Padding does not count. A longer
    sequence gets a micro-batch of its own. The packing changes no result, since attention does not
    cross sequence boundaries and every supervised token weighs the same (see `engine.loss`).

    Args:
        ranks: the processes that share the micro-batches; None: this one has them all.

    Returns:
        Those of this rank, as many as every other one has.
    """
    mine = distribute(lengths_of(examples), micro_batch_tokens, ranks)
    filler = min(examples, key=lambda example: len(example.input_ids))
    return [
        collate([examples[index] for index in sorted(members)], kernels)
        if members
        else replace(collate([filler], kernels), num_labels=0, is_filler=True)
        for members in mine
    ]


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """How many tokens each example has as an input, which its last one is not."""
    return [len(example.input_ids) - 1 for example in examples]


def distribute(
    lengths: Sequence[int], micro_batch_tokens: int, ranks: "Ranks | None" = None
) -> list[list[int]]:
    """The indices of ``lengths`` in each micro-batch of `pack`, none of them in a filler."""
    bins = _first_fit(lengths, micro_batch_tokens)
    missing = -len(bins) % ranks.size if ranks else 0
    bins = _evenly(lengths, len(bins) + missing, micro_batch_tokens) or bins + [[]] * missing
    return _dealt(bins, lengths, ranks) if ranks else bins


class Packer:
    """Packs a run's batches, if `Kernels.packs_ahead` each while the device computes the last.

    The step after the last one is packed too, and thrown away.
    """

    def __init__(self, batches: Batches, ranks: "Ranks | None" = None):
        self._batches, self._ranks = batches, ranks
        self._step = self._micro_batch_tokens = 0
        self._ahead: tuple[Sequence[Example], int, list[MicroBatch]] = (), 0, []

    def batch(self, step: int) -> Sequence[Example]:
        """The rows of ``step``, after which `pack_ahead` packs those of the next."""
        self._step = step
        return self._batches[step]

    def pack(
        self, batch: Sequence[Example], micro_batch_tokens: int, kernels: "Kernels"
    ) -> list[MicroBatch]:
        """As the function `pack`."""
        self._micro_batch_tokens = micro_batch_tokens
        rows, limit, micro_batches = self._ahead
        if limit == micro_batch_tokens and rows == batch:
            return micro_batches
        return pack(batch, micro_batch_tokens, kernels, self._ranks)

    def pack_ahead(self, kernels: "Kernels") -> None:
        """Pack the next step's batch, with the limit of the last call of `pack`."""
        if kernels.packs_ahead and self._batches:
            rows, limit = self._batches[self._step + 1], self._micro_batch_tokens
            self._ahead = rows, limit, pack(rows, limit, kernels, self._ranks)


NOT_AHEAD = Packer(())  # for a step on its own


def _first_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of ``lengths``, longest first, each in the first bin whose sum stays within ``most``.

    A length above ``most`` has a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        length = lengths[index]
        fit = next((number for number, free in enumerate(room) if free >= length), len(bins))
        if fit == len(bins):
            bins.append([])
            room.append(most)
        bins[fit].append(index)
        room[fit] -= length
    return bins


def _evenly(lengths: Sequence[int], count: int, most: int) -> list[list[int]] | None:
    """`_first_fit` in ``count`` bins, each length in the emptiest; None if one does not fit there.

    The largest sum is at most 4/3 of the smallest possible (Graham 1969, "Bounds on multiprocessing
    timing anomalies").
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]  # a heap
    for index in _longest_first(lengths):
        total, number = filled[0]
        if total and total + lengths[index] > most:
            return None
        bins[number].append(index)
        heapq.heapreplace(filled, (total + lengths[index], number))
    return bins


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _dealt(bins: list[list[int]], lengths: Sequence[int], ranks: "Ranks") -> list[list[int]]:
    """This rank's part of ``bins``, a multiple of the ranks in number.

    Ranks meet in every layer of every micro-batch, so those that they compute at the same time are
    of nearly the same size. The largest ones go to each rank in turn.
    """
    if ranks.size == 1:
        return bins
    ordered = sorted(bins, key=lambda members: -sum(lengths[index] for index in members))
    rounds = [ordered[start : start + ranks.size] for start in range(0, len(bins), ranks.size)]
    return [each[(ranks.rank + turn) % ranks.size] for turn, each in enumerate(rounds)]
