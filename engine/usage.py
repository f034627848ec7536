"""How much of a device a run uses: the share of its peak (MFU), and its memory."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.memory import kind
from engine.plan import GIB
from engine.recipe import Recipe, Rows
from engine.roofline import card_named, useful_flops
from engine.shape import ModelShape


@dataclass(frozen=True)
class Usage:
    """What a run on ``device`` uses, if each token of a row takes ``flops_per_token``.

    Attributes:
        flops_per_token: without recomputation (`engine.roofline.Step.flops`).
        peak: of all devices of the run together, in dense bfloat16 products a second by their data
            sheet, whatever the run computes in; None if it is not known.
    """

    device: torch.device
    flops_per_token: float
    peak: float | None

    def at(self, tokens_per_second: float) -> dict[str, float]:
        """The numbers to log at this speed.

        ``train/mfu`` is the model FLOPs utilization of PaLM (arXiv:2204.02311, appendix B): useful
        operations a second as a share of the peak. It is left out if the peak is not known.
        """
        numbers = {"train/memory_gib": memory_bytes(self.device) / GIB}
        if self.peak is not None:
            numbers["train/mfu"] = tokens_per_second * self.flops_per_token / self.peak
        return numbers


def usage_of(shape: ModelShape, recipe: Recipe, rows: Rows, device: torch.device) -> Usage:
    """The usage of a run of ``recipe`` on ``rows``, on devices of the kind of ``device``."""
    card = card_named(kind(device))
    # A row's last token is only a label, but counts in the tokens a second.
    per_token = useful_flops(shape, recipe, rows) * rows.tokens / (rows.tokens + 1)
    return Usage(device, per_token, card and card.flops * recipe.devices)


def memory_bytes(device: torch.device) -> int:
    """Of a GPU, the most that tensors have taken so far; of a CPU, what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # not Linux: the most so far, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
