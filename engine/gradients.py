"""The norm of all gradients, and their clipping."""

from collections.abc import Iterable

import torch

from engine.sharding import norm_over_slices, slice_of


def clipping(
    parameters: Iterable[torch.nn.Parameter], max_norm: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the gradients, and the factor with which it is at most ``max_norm``.

    Both in float32 or wider. The factor is 1 for gradients that need no clipping, and for
    ``max_norm`` None; otherwise it is that of `torch.nn.utils.clip_grad_norm_`, to the bit.
    """
    norm = gradient_norm(parameters)
    if max_norm is None:
        return norm, torch.ones_like(norm)
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale(parameters: Iterable[torch.nn.Parameter], factor: float) -> None:
    """Multiply the gradients by ``factor``; by 1, they are not touched.

    With a factor in a GPU's memory, PyTorch rounds it to the gradients' dtype (bfloat16: 8 bits),
    and needs four times as long.
    """
    gradients = [slice_of(each.grad) for each in parameters if each.grad is not None]
    if factor != 1 and gradients:
        torch._foreach_mul_(gradients, factor)


@torch.no_grad()
def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients, in float32 or wider.

    `torch.nn.utils.get_total_norm` computes it in the gradients' dtype: in bfloat16 with 8 bits.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for gradient in map(slice_of, gradients)
    ]
    return norm_over_slices(torch.linalg.vector_norm(torch.stack(norms)), gradients[0])
