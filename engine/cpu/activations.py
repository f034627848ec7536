"""The memory that attention on a CPU keeps for its backward pass."""

import torch

from engine.attention import kept_bytes_of_each


def kept_bytes(
    longest_kept: int,
    query_block: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    longest: int,
    dtype: torch.dtype,
) -> int:
    """What `kernels.packed_attention` keeps of a token, with its output.

    `KeptAttention` keeps query, key and value (repeated for each head), the output, and of the
    longest sequence half as many probabilities as it has keys, and half a block.
    """
    if dtype in (torch.bfloat16, torch.float16) or longest > longest_kept:
        return kept_bytes_of_each(heads, head_dim, dtype)
    return heads * (4 * head_dim + (longest + query_block) // 2) * dtype.itemsize
