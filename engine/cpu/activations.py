"""The memory that attention on a CPU keeps for its backward pass."""

import torch


def kept_bytes(
    longest_kept: int, query_block: int, heads: int, head_dim: int, longest: int, dtype: torch.dtype
) -> int:
    """What `kernels.packed_attention` keeps of a token, with its output.

    Query, key, value (repeated for each head) and the output. `KeptAttention` adds probabilities:
    half as many as the longest sequence has keys, and half a block. Otherwise each sequence also
    has an output of its own, and a float32 logarithm per head.
    """
    states = 4 * heads * head_dim * dtype.itemsize
    if dtype in (torch.bfloat16, torch.float16) or longest > longest_kept:
        return states + heads * (head_dim * dtype.itemsize + 4)
    return states + heads * (longest + query_block) // 2 * dtype.itemsize
