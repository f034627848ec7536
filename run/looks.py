"""What train.py can look at instead of training."""

from dataclasses import dataclass
from enum import Enum


class Look(Enum):
    """What to look at, instead of training."""

    PREFLIGHT = "preflight"


@dataclass(frozen=True)
class PlanFor:
    """What ``--plan`` is to plan for.

    Attributes:
        device_memory: of each device in GB, as GPUs are sold; None: the devices that are here.
        devices: how many train together.
    """

    device_memory: float | None
    devices: int
