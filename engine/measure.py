"""Loss and perplexity of a model over many examples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.packing import Example, pack
from engine.sharding import free_gathered
from run.progress_bar import ProgressBar

if TYPE_CHECKING:
    from engine.llama import Llama


@dataclass(frozen=True)
class Measurement:
    """Mean loss in nats over ``num_tokens`` supervised tokens, and its exponential."""

    loss: float
    perplexity: float
    num_tokens: int

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
    """exp of a mean loss in nats; infinity if it exceeds float64's range."""
    return math.exp(loss) if loss < 709 else math.inf


@torch.no_grad()
def measure(model: "Llama", examples: Sequence[Example], micro_batch_tokens: int) -> Measurement:
    """Loss and perplexity over ``examples``: all nats divided once by all supervised tokens.

    The result depends neither on ``micro_batch_tokens`` nor on the order of the examples. The
    model's train or eval mode is restored afterwards.
    """
    was_training = model.training
    model.eval()
    micro_batches = pack(examples, micro_batch_tokens, model.kernels, model.ranks)
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    with ProgressBar("loss", len(micro_batches), "micro-batch", leave=False) as bar:
        for micro_batch in micro_batches:
            nats += model(micro_batch)
            bar.update()
    free_gathered(model)
    model.train(was_training)
    num_tokens = model.ranks.total(micro_batch.num_labels for micro_batch in micro_batches)
    loss = model.ranks.sum(nats).item() / num_tokens
    return Measurement(loss, perplexity_of(loss), num_tokens)
