"""The memory that training on a CPU takes beyond what every device has to keep."""

import torch

from engine.attention import kept_bytes_of_each

# oneDNN generates two kernels for a bfloat16 product of another shape, each into a buffer of 256 KB
# (its MAX_CODE_SIZE), and keeps those of the last 1024 shapes (ONEDNN_PRIMITIVE_CACHE_CAPACITY).
# Nearly all of a buffer is resident, since it lies where tensors were.
KERNEL_BYTES, KERNELS_OF_PRODUCT, MOST_PRODUCTS = 258_376, 2, 1024


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


def heap_bytes(dtype: torch.dtype, loss: int, backward: int, products: int) -> int:
    """What glibc's heap takes beyond the tensors (measured by benchmarks/plan.py).

    In float32, it rarely finds room for a backward pass in what the loss has left. In bfloat16, the
    kernels that oneDNN keeps come to lie there as well, and split it: the loss of the next micro-
    batch finds no room of its size, and takes new memory, as do copies of its operands.

    Args:
        loss, backward: bytes of the tensors that the loss, and the backward pass of a block, need
            for a moment.
        products: how many matrix products of different shapes there are.
    """
    if dtype != torch.bfloat16:
        return min(loss, backward)
    kernels = KERNELS_OF_PRODUCT * min(products, MOST_PRODUCTS)
    return loss * 3 // 2 + backward + kernels * KERNEL_BYTES
