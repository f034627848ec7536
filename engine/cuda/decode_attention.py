"""Which kernel computes the attention of a decoding step on a GPU: our own where it runs."""

from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from engine.attention import for_each_head
from engine.cuda import layers


def decode_attention(
    kind: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> ModuleType | None:
    """`engine.cuda.attention_kernel`; None where `attend_to_lengths` computes the same.

    That is so without `layers.small_kernels`, and where this one does not run or makes
    mistakes, which a line says.
    """
    # Triton or a compiler that is missing has been told already.
    return layers.small_kernels(kind) and _decode_attention(kind, dtype, heads, kv_heads, head_dim)


@cache
def _decode_attention(kind: str, *sizes: Any) -> ModuleType | None:
    if kind != "cuda":
        return None
    return layers.usable(kind, _import_kernel, partial(wrong_attention, *sizes))


def _import_kernel() -> ModuleType:
    """Raises ImportError where there is no Triton."""
    from engine.cuda import attention_kernel

    return attention_kernel


def wrong_attention(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kernel: ModuleType,
    device: torch.device,
) -> list[str]:
    """What ``kernel`` computes otherwise than PyTorch, at a model's sizes: it is compiled for them.

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
        one = query[row, None].double()
        all_heads = one, *for_each_head(one, *cache[:, tokens].double())
        exact = F.scaled_dot_product_attention(*(each.transpose(0, 1) for each in all_heads))[:, 0]
        # Rounding to either dtype is less than a third of this. And NaN is not less.
        if not (found[row] - exact).norm() < 0.01 * exact.norm():
            return ["attention"]
    return []
