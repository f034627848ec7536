"""What host and device tell each other in decoding, without either waiting for the other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

OWN = -1  # read the token that the device itself has chosen for this slot last


class Row(NamedTuple):
    """What one row of a step reads: a token (or `OWN`), where it is in its sequence, and whose."""

    token: int
    position: int
    start: int  # of the sequence, in the cache
    slot: int


def to_device(
    numbers: Sequence[Any] | torch.Tensor, device: torch.device, dtype: torch.dtype = torch.long
) -> torch.Tensor:
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # Copying from pinned memory does not wait for the device to finish its current work.
    return tensor.pin_memory().to(device, non_blocking=True)


class Arrival:
    """What ``numbers`` are when the device gets here, to be read on the host later."""

    def __init__(self, numbers: torch.Tensor):
        is_cuda = numbers.device.type == "cuda"
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=is_cuda)
        self._numbers.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event() if is_cuda else None
        if self._copied:
            self._copied.record()

    def wait(self) -> list[int]:
        """Waits for the device to get there, and no further."""
        if self._copied:
            self._copied.synchronize()
        return self._numbers.tolist()
