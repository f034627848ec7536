"""The backward pass of norms in a GPU's training, by a kernel that reads its inputs once."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from engine.functions import NormGradients
from run.errors import cause_of

EPSILON = 1e-6


@cache
def norm_gradients(kind: str, hidden_size: int, dtype: torch.dtype) -> NormGradients | None:
    """`engine.cuda.norm_kernel.norm_gradients`; None where a compiled one is to take its place.

    That is so on other kinds of device, and on a GPU where the kernel does not run or makes
    mistakes, which a line says.
    """
    if kind != "cuda":
        return None
    try:
        kernel = _import_kernel().norm_gradients
        wrong = wrong_results(kernel, hidden_size, dtype, torch.device(kind))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # Triton and its compilers raise many types
        _say_slower(f"does not run here ({cause_of(error)})")
        return None
    if wrong:
        _say_slower(f"computes another {', '.join(wrong)} than PyTorch {torch.__version__}")
    return None if wrong else kernel


def _say_slower(fault: str) -> None:
    print(f"training: the norms' fused kernel {fault}; torch.compile makes slower ones instead")


def _import_kernel() -> ModuleType:
    """Raises ImportError where there is no Triton."""
    from engine.cuda import norm_kernel

    return norm_kernel


def wrong_results(
    kernel: NormGradients, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """What ``kernel`` computes otherwise than PyTorch's operators, for numbers of ``dtype``.

    Compilers have made wrong kernels without a word (pytorch #180642).
    """
    generator, shape = torch.Generator().manual_seed(0), (37, hidden_size)
    drawn = torch.randn(4, *shape, generator=generator).to(device, dtype)
    grad_total, grad, total, weight = *drawn[:3], drawn[3, 0]
    exact, exact_weight = (each.double().requires_grad_() for each in (total, weight))
    with torch.enable_grad():
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPSILON)
        normed = exact * scale * exact_weight
    expected, expected_weight = torch.autograd.grad(normed, (exact, exact_weight), grad.double())
    scale = scale.detach().to(torch.promote_types(dtype, torch.float32))
    inputs = grad, total, weight, scale
    alone, added = kernel(None, *inputs, True), kernel(grad_total, *inputs, True)
    frozen, _ = kernel(grad_total, *inputs, False)
    pairs = {
        "gradient": (alone[0], expected),
        "gradient of a sum": (added[0], expected + grad_total),
        "gradient beside frozen weights": (frozen, expected + grad_total),
        "gradient of the weight": (torch.stack([alone[1], added[1]]), expected_weight),
    }
    most = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    return [name for name, pair in pairs.items() if not _error(*pair) <= most]


def _error(found: Tensor, expected: Tensor) -> float:
    """The norm of their difference, relative to ``expected``'s."""
    return ((found - expected).norm() / expected.norm()).item()
