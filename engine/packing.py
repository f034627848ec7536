"""Sequences packed into micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

IGNORE = -100  # the label of a token that is not supervised, as in torch's cross_entropy


@dataclass(frozen=True)
class Example:
    """One sequence: BOS, prompt, answer, EOS.

    ``labels`` has the length of ``input_ids`` and is not shifted: a token that the model learns
    to write (answer and EOS) is its own label, every other label is -100; ``line`` is its `Problem`'s.
    """

    input_ids: list[int]
    labels: list[int]
    line: int = field(default=0, compare=False)


# Matrix products have a multiple of this many rows: they run best so, and a library that keeps
# something for every shape it has seen, as oneDNN does, sees few.
ROWS = 64


@dataclass(frozen=True)
class Batch:
    """A micro-batch: sequences one behind the other, none padded, S of them with T tokens in all.

    The last token of each sequence is a label and no input: nothing comes after it. Up to
    `ROWS` - 1 tokens that mean nothing fill up T to a multiple; they are the last sequence.

    Attributes:
        input_ids: ``[1, T]``.
        position_ids: ``[1, T]``, counted from 0 in each sequence.
        cu_seqlens: ``[S + 1]``, int32: where each sequence begins, and T at the end.
        seqlens: the S lengths as Python numbers, for code that must not wait for the device.
        loss_positions: ``[M]``: where in T the hidden states stand whose next token is supervised;
            behind these N, others that fill up M to a multiple of `ROWS`.
        labels: ``[N]``: these next tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    seqlens: tuple[int, ...]
    loss_positions: torch.Tensor
    labels: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_labels(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type != "cuda":
                return tensor.to(device)
            return tensor.pin_memory().to(
                device, non_blocking=True
            )  # pinned: the copy does not wait for the device

        return Batch(
            move(self.input_ids),
            move(self.position_ids),
            move(self.cu_seqlens),
            self.seqlens,
            move(self.loss_positions),
            move(self.labels),
        )


def collate(examples: Sequence[Example], rows: int = ROWS) -> Batch:
    """Concatenate ``examples`` into one `Batch`, filled up to a multiple of ``rows`` (where `Batch` says `ROWS`)."""
    if filler := -sum(len(example.input_ids) - 1 for example in examples) % rows:
        examples = [*examples, Example([0] * (filler + 1), [IGNORE] * (filler + 1))]
    input_ids, position_ids, borders, loss_positions, labels = [], [], [0], [], []
    for example in examples:
        for position, label in enumerate(example.labels[1:]):
            if label != IGNORE:
                loss_positions.append(borders[-1] + position)
                labels.append(label)
        input_ids += example.input_ids[:-1]
        position_ids += range(len(example.input_ids) - 1)
        borders.append(len(input_ids))
    loss_positions += [0] * (-len(labels) % rows)
    return Batch(
        torch.tensor([input_ids]),
        torch.tensor([position_ids]),
        torch.tensor(borders, dtype=torch.int32),
        tuple(len(example.input_ids) - 1 for example in examples),
        torch.tensor(loss_positions, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
    )


def pack(examples: Sequence[Example], micro_batch_tokens: int) -> list[Batch]:
    """Distribute ``examples`` over few micro-batches of at most ``micro_batch_tokens``: first-fit decreasing.

    What fills up a micro-batch does not count. A sequence that is longer than that has a
    micro-batch of its own. Which sequences share one changes no result: attention does not cross
    their borders, and each supervised token weighs the same (see `perplexity.summed_loss`).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids)):
        length = len(examples[index].input_ids) - 1
        fit = next((number for number, free in enumerate(room) if free >= length), len(bins))
        if fit == len(bins):
            bins.append([])
            room.append(micro_batch_tokens)
        bins[fit].append(index)
        room[fit] -= length
    return [collate([examples[index] for index in sorted(members)]) for members in bins]
