"""The one loss function of training, validation and perplexity.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from engine import packing
from engine.cpu.onednn import ONEDNN, add_product, product
from engine.llama import forward_packed
from run.progress_bar import ProgressBar

# Most logits that exist at a time: few enough to need little memory, many enough that the matrix
# products run near the machine's rate. oneDNN, which copies operands, is as fast with half as many.
CHUNK_ELEMENTS = {"cpu": 2**23 if ONEDNN else 2**24, "cuda": 2**26}


def summed_loss(model: LlamaForCausalLM, batch: packing.Batch) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all supervised tokens of a micro-batch, in nats.

    A sum, not a mean: divided by the number of supervised tokens of all micro-batches of a step
    it gives gradients that do not depend on how the step was cut up, since every supervised
    token weighs the same. (The mean of micro-batch means does not: transformers #34191.)

    The head runs on the supervised positions only; see `LinearCrossEntropy`.

    Returns:
        A scalar in float64; each token's own loss is computed in float32 or better.
    """
    answers = forward_packed(model, batch, batch.loss_positions)
    return LinearCrossEntropy.apply(
        answers, model.lm_head.weight, batch.labels, torch.is_grad_enabled()
    )


class LinearCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy in one, summed over tokens, in chunks.

    The logits exist for one chunk at a time, and the gradients are computed while they are
    there: three matrix products a chunk, none of them twice, and no logits kept for the backward
    pass (as in Liger Kernel, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        with_gradients: bool,
    ) -> torch.Tensor:
        """``hidden`` is ``[M, H]``, ``weight`` ``[V, H]``, ``labels`` ``[N]``; returns nats in float64.

        The last M - N rows of ``hidden`` have no label, no loss and no gradient.

        ``with_gradients`` must be said: in here grad mode is always off, and ``ctx.needs_input_grad``
        is true under ``no_grad`` as well.
        """
        exact = torch.promote_types(hidden.dtype, torch.float32)
        nats = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        grad_weight = None
        rows = (
            max(1, CHUNK_ELEMENTS[hidden.device.type] // weight.shape[0] // packing.ROWS)
            * packing.ROWS
        )
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], labels[start : start + rows, None]
            # The log-sum-exp of bfloat16 logits would be off in the third digit.
            every_logit = product(chunk, weight.T).to(exact)
            logits = every_logit[: len(target)]
            if not with_gradients:
                nats += F.cross_entropy(logits, target[:, 0], reduction="none").sum(
                    dtype=torch.float64
                )
                continue
            largest, of_target = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            # In place: half the memory, so that twice the rows fit into a chunk.
            probabilities = torch.softmax(logits, dim=-1, out=logits)
            # log-sum-exp = largest logit - log of its probability: one pass less over the logits.
            log_sum_exp = largest - probabilities.amax(dim=-1, keepdim=True).log()
            # Added up in float64: a float32 sum over thousands of tokens is off in the sixth digit.
            nats += (log_sum_exp - of_target).sum(dtype=torch.float64)
            probabilities.scatter_add_(1, target, torch.full_like(largest, -1))
            every_logit[len(target) :] = 0
            grad_logits = every_logit.to(hidden.dtype)
            del every_logit, logits, probabilities
            grad_hidden[start : start + rows] = product(grad_logits, weight)
            if grad_weight is None:
                grad_weight = product(grad_logits.T, chunk).to(exact)
            else:
                add_product(grad_weight, grad_logits.T, chunk)
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, grad_nats: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss are used up: it can be differentiated once"
            )
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # scaled in place: a second time would scale them twice
        if grad_weight is None:  # no supervised token
            return grad_hidden, None, None, None
        return (
            grad_hidden.mul_(grad_nats),
            grad_weight.mul_(grad_nats).to(ctx.weight_dtype),
            None,
            None,
        )


@dataclass(frozen=True)
class Measurement:
    """Mean loss in nats over ``num_tokens`` supervised tokens, and its exponential."""

    loss: float
    perplexity: float
    num_tokens: int

    def __str__(self) -> str:
        return f"loss {self.loss:#.8g}, perplexity {self.perplexity:#.8g}"


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats; infinity where float64 ends."""
    return math.exp(loss) if loss < 709 else math.inf


@torch.no_grad()
def measure(
    model: LlamaForCausalLM,
    examples: Sequence[packing.Example],
    micro_batch_tokens: int,
    device: torch.device,
) -> Measurement:
    """Loss and perplexity over ``examples``: all nats divided once by all supervised tokens.

    The result does not depend on ``micro_batch_tokens`` nor on the order of the examples. The
    model's train or eval mode is as before afterwards.
    """
    was_training = model.training
    model.eval()
    batches = packing.pack(examples, micro_batch_tokens)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    with ProgressBar("loss", len(batches), "batch", leave=False) as bar:
        for batch in batches:
            nats += summed_loss(model, batch.to(device))
            bar.update()
    model.train(was_training)
    num_tokens = sum(batch.num_labels for batch in batches)
    loss = nats.item() / num_tokens
    return Measurement(loss, perplexity_of(loss), num_tokens)
