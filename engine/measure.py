"""Loss and perplexity of a model over many examples."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.packing import Example, pack
from engine.sharding import free_gathered
from run.progress_bar import ProgressBar

if TYPE_CHECKING:
    from engine.llama import Llama


@dataclass(frozen=True)
class Measurement:
    """Mean loss in nats over ``num_tokens`` supervised tokens, and its exponential.

    Attributes:
        by_class: the same of each class of these tokens, by name. Their nats and their tokens add
            up to those of the whole.
    """

    loss: float
    perplexity: float
    num_tokens: int
    by_class: Mapping[str, "Measurement"] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"loss {self.loss:#.8g}, perplexity {self.perplexity:#.8g}"


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step.

    Attributes:
        nats, num_labels: the loss summed over the batch's supervised tokens, and their number.
        grad_norm: the gradient norm before clipping.
        micro_batch_tokens: the limit with which the step fit into memory.
    """

    nats: float
    num_labels: int
    grad_norm: float
    micro_batch_tokens: int

    @property
    def loss(self) -> float:
        return self.nats / self.num_labels

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats; infinity if it exceeds float64's range, and NaN of NaN."""
    return math.inf if loss >= 709 else math.exp(loss)


@torch.no_grad()
def measure(
    model: "Llama",
    examples: Sequence[Example],
    micro_batch_tokens: int,
    classes: Sequence[str] = (),
) -> Measurement:
    """Loss and perplexity over ``examples``: all nats divided once by all supervised tokens.

    The result depends neither on ``micro_batch_tokens`` nor on the order of the examples. The
    model's train or eval mode is restored afterwards.

    Args:
        classes: the names of the classes, by their numbers, if ``examples`` have classes.
    """
    was_training = model.training
    model.eval()
    micro_batches = pack(examples, micro_batch_tokens, model.kernels, model.ranks)
    nats = torch.zeros(1 + len(classes), dtype=torch.float64, device=model.device)
    with ProgressBar("loss", len(micro_batches), "micro-batch", leave=False) as bar:
        for micro_batch in micro_batches:
            _add_losses(nats, model(micro_batch), micro_batch.classes)
            bar.update()
    free_gathered(model)
    model.train(was_training)
    num_tokens = model.ranks.total(micro_batch.num_labels for micro_batch in micro_batches)
    whole, *parts = model.ranks.sum(nats).tolist()
    count = Counter(number for example in examples for number in example.classes)
    by_class = {
        name: _measurement(part, count[number])
        for number, (name, part) in enumerate(zip(classes, parts, strict=True))
        if count[number]
    }
    return _measurement(whole, num_tokens, by_class)


def _add_losses(nats: Tensor, losses: Tensor, classes: Tensor | None) -> None:
    """Add what a micro-batch gives to the ``nats`` of the whole and of each class, ``[1 + C]``."""
    if classes is None:
        nats[0] += losses
        return
    nats[0] += losses[0]
    for number in range(len(nats) - 1):
        # Not an index_add_, whose order of additions differs from run to run on a GPU.
        nats[1 + number] += torch.where(classes == number, losses[1:], 0).sum()


def _measurement(
    nats: float, num_tokens: int, by_class: Mapping[str, Measurement] | None = None
) -> Measurement:
    loss = nats / num_tokens
    return Measurement(loss, perplexity_of(loss), num_tokens, by_class or {})
