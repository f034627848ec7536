"""The loss function that training, validation and perplexity.py share."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.device import Kernels


ROUND_ROWS = 64  # a chunk has a multiple of this many rows, at which products run best


class LinearCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy in one operation, summed over tokens and computed in chunks.

    The logits exist for one chunk at a time, and the gradients are computed along with the loss.
    This takes three matrix products per chunk, without recomputation, and no logits are kept for
    the backward pass (as in Liger Kernel, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        with_gradients: bool,
        kernels: "Kernels",
        with_losses: bool = False,
    ) -> Tensor:
        """The summed negative log-likelihood of ``labels``, in nats, as a float64 scalar.

        Args:
            hidden: ``[M, H]``; the last M - N rows are padding, without loss and gradient.
            weight: ``[V, H]``, of the head.
            labels: ``[N]``.
            with_gradients: an argument, since grad mode is always off in here, and
                ``ctx.needs_input_grad`` is true even under ``no_grad``.
            with_losses: without gradients, return ``[1 + N]``: the sum, and then each token's own.
        """
        exact = torch.promote_types(hidden.dtype, torch.float32)
        nats = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        grad_weight, every_loss = None, []
        is_trained = ctx.needs_input_grad[1]
        rows = max(1, kernels.logits_at_once // weight.shape[0] // ROUND_ROWS) * ROUND_ROWS
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], labels[start : start + rows, None]
            # The log-sum-exp of bfloat16 logits would be off in the third digit.
            every_logit = kernels.product(chunk, weight.T).to(exact)
            logits = every_logit[: len(target)]
            largest, of_target = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            # In place, which halves the memory, so that twice as many rows fit into a chunk.
            probabilities = torch.softmax(logits, dim=-1, out=logits)
            # log-sum-exp = largest logit - log of its probability, which saves a pass over logits.
            # On a CPU, softmax adds up the vocabulary term by term, and loses small ones. The sum
            # of the probabilities, which is added up pairwise, shows how much was lost.
            of_largest = probabilities.amax(dim=-1, keepdim=True)
            total = probabilities.sum(dim=-1, keepdim=True)
            losses = (largest - of_target) + (total / of_largest).log()
            # In float64, since a float32 sum over thousands of tokens is off in the sixth digit.
            nats += losses.sum(dtype=torch.float64)
            if not with_gradients:
                every_loss.append(losses[:, 0].double())
                continue
            probabilities.scatter_add_(1, target, torch.full_like(largest, -1))
            every_logit[len(target) :] = 0
            grad_logits = every_logit.to(hidden.dtype)
            del every_logit, logits, probabilities
            grad_hidden[start : start + rows] = kernels.product(grad_logits, weight)
            if not is_trained:
                continue
            if grad_weight is None:
                grad_weight = kernels.product(grad_logits.T, chunk).to(exact)
            else:
                kernels.add_product(grad_weight, grad_logits.T, chunk)
            del grad_logits  # before the next chunk's logits
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return torch.cat([nats[None], *every_loss]) if with_losses else nats

    @staticmethod
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss can be differentiated once: its gradients are used up")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # they are scaled in place, so a second call would scale them again
        # As a row of one number: a GPU would round a number without dimensions to the gradient's
        # dtype, in bfloat16 by up to 0.4 %.
        factor = grad_nats.to(torch.promote_types(grad_hidden.dtype, torch.float32)).view(1)
        if grad_weight is not None:  # None: no supervised token, or a head that is not trained
            grad_weight = grad_weight.mul_(factor).to(ctx.weight_dtype)
        return grad_hidden.mul_(factor), grad_weight, None, None, None, None
