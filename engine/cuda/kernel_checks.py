"""Whether the Triton kernels compute what PyTorch's operators do, where they are to run.

Compilers have made wrong kernels without a word (pytorch #180642). Each function returns the names
of what is wrong; if there are none, the kernels are right.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def wrong_small_kernels(kernels: ModuleType, device: torch.device) -> list[str]:
    """Of `engine.cuda.small_kernels`."""
    angles = torch.linspace(-1, 2, 12, device=device).view(3, 1, 4)
    cos, sin = angles, angles.flip(0)
    rope = cos.repeat(1, 1, 2), torch.cat([-sin, sin], dim=-1)
    states = torch.linspace(-3, 3, 3 * 4 * 8, device=device).view(3, 4, 8)
    tokens, (keys, values) = torch.tensor([4, 0, 3], device=device), states.new_zeros(2, 6, 1, 8)
    query = kernels.rotate_into(*rope, *states.split([2, 1, 1], dim=1), tokens, keys, values)
    first, second = states[:, :3].chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    both, weight = states.flatten(1), torch.linspace(-1, 1, 32, device=device)
    gate, up = both.chunk(2, dim=-1)
    pairs = {
        "query": (query, rotated[:, :2]),
        "key": (keys[tokens], rotated[:, 2:]),
        "value": (values[tokens], states[:, 3:]),
        "activation": (kernels.gated(both), F.silu(gate) * up),
        "norm": (kernels.rms_norm(both, weight, 0.1), F.rms_norm(both, (32,), weight, 0.1)),
    }
    rounding = {"rtol": 1e-4, "atol": 1e-5}
    return [name for name, pair in pairs.items() if not torch.allclose(*pair, **rounding)]


def wrong_attention(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kernel: ModuleType,
    device: torch.device,
) -> list[str]:
    """Of `engine.cuda.attention_kernel`, at a model's sizes: it is compiled for them.

    It reads 32 keys at a time; there are fewer, as many, and more. Between the sequences there is
    nothing but NaN.
    """
    starts, lengths = (90, 3, 10, 50), (70, 1, 32, 33)
    like = {"generator": torch.Generator(device).manual_seed(0), "dtype": dtype, "device": device}
    query = torch.randn(4, heads, head_dim, **like)
    cache = torch.full((2, 170, kv_heads, head_dim), torch.nan, dtype=dtype, device=device)
    pairs = zip(starts, lengths, strict=True)
    sequences = [slice(start, start + length) for start, length in pairs]
    for tokens in sequences:
        cache[:, tokens] = torch.randn(cache[:, tokens].shape, **like)
    places = torch.tensor([starts, lengths], dtype=torch.int32, device=device)
    found = kernel.attend(query, *cache, *places)
    for row, tokens in enumerate(sequences):
        # Query heads that share a key head become several queries of it.
        shared = query[row].unflatten(0, (kv_heads, -1)).double()
        both = cache[:, tokens].transpose(1, 2).double()
        exact = F.scaled_dot_product_attention(shared, *both).flatten(0, 1)
        # Rounding to either dtype is less than a third of this. And NaN is not less.
        if not (found[row] - exact).norm() < 0.01 * exact.norm():
            return ["attention"]
    return []


def wrong_norm_gradients(
    hidden_size: int, dtype: torch.dtype, kernel: ModuleType, device: torch.device
) -> list[str]:
    """Of `engine.cuda.norm_kernel`, for numbers of ``dtype``."""
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
    alone = kernel.norm_gradients(None, *inputs, True)
    added = kernel.norm_gradients(grad_total, *inputs, True)
    frozen, _ = kernel.norm_gradients(grad_total, *inputs, False)
    pairs = {
        "gradient": (alone[0], expected),
        "gradient of a sum": (added[0], expected + grad_total),
        "gradient beside frozen weights": (frozen, expected + grad_total),
        "gradient of the weight": (torch.stack([alone[1], added[1]]), expected_weight),
    }
    most = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    return [name for name, pair in pairs.items() if not _error(*pair) <= most]


def wrong_rounding(kernels: ModuleType, device: torch.device) -> list[str]:
    """Of `engine.cuda.fp8_kernels`: more rows and columns than a program has, and not as many."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(150, 304, generator=generator).to(device, torch.bfloat16)
    numbers[7] = 0
    factors = torch.rand(304, generator=generator).to(device)
    plain, scales = kernels.quantised(numbers)
    multiplied = kernels.quantised(numbers, factors)
    turned = kernels.transposed(numbers, scales.flatten())
    found = {
        "rounding": (plain, scales, numbers),
        "rounding of products": (*multiplied, numbers * factors),
        "transpose": (turned.T, scales, numbers),
    }
    # Half a step of a mantissa of 3 bits, and of the smallest numbers. Cutting off takes a step.
    return [
        name
        for name, (rounded, scale, exact) in found.items()
        if not (
            (rounded.float() * scale - exact).abs() <= 1.01 * (exact.abs() / 16 + scale / 1024)
        ).all()
    ]


def _error(found: Tensor, expected: Tensor) -> float:
    """The norm of their difference, relative to ``expected``'s."""
    return ((found - expected).norm() / expected.norm()).item()
