"""Whether the attention kernel of decoding computes what PyTorch does, where it is to run."""

from types import ModuleType

import torch
import torch.nn.functional as F


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
        # Query heads that share a key head become several queries of it.
        shared = query[row].unflatten(0, (kv_heads, -1)).double()
        both = cache[:, tokens].transpose(1, 2).double()
        exact = F.scaled_dot_product_attention(shared, *both).flatten(0, 1)
        # Rounding to either dtype is less than a third of this. And NaN is not less.
        if not (found[row] - exact).norm() < 0.01 * exact.norm():
            return ["attention"]
    return []
