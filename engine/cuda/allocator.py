"""How PyTorch allocates the memory of a GPU."""

import os
from collections.abc import MutableMapping

# The older name is also read, and may be what a user has set.
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let blocks of memory grow instead of allocating others; before CUDA is initialised.

    Micro-batches differ in size from step to step, and each would leave gaps in which the next ones
    do not fit. What a user has set is left as it is.
    """
    if not any(name in environment for name in NAMES):
        environment[NAMES[0]] = "expandable_segments:True"
