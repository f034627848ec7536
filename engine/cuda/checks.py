"""Checks what a script finds on a machine with a GPU, before it loads anything.

Without them, PyTorch computes on the CPU if it can't use the GPU, and fails in the middle of the
work if the GPU lacks something. Imported only by `engine.device`.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from run.errors import UserError, one_line

# The oldest driver that runs programs built with any CUDA of this major version:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {12: 525, 13: 580}
# Builds of the PyTorch that requirements.txt pins, by the oldest driver that runs them.
TORCH = "2.13.0"
BUILDS = {580: "cu130", 525: "cu126"}

ANOTHER_GPU = "choose another GPU with CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Card:
    """A GPU that PyTorch can use, with its compute capability, such as (9, 0)."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What a script finds on the machine that it starts on.

    Attributes:
        torch: PyTorch's version, such as ``2.13.0+cu130``.
        cuda: the CUDA version that this PyTorch is built with; None: it is not built for NVIDIA.
        rocm: the same for AMD.
        architectures: what this PyTorch has kernels for, such as ``sm_90`` or ``compute_90``.
        driver: the version of the NVIDIA driver, empty if unknown; None: no NVIDIA device.
        fault: why PyTorch can't use a GPU; None: it can.
        hides_gpus: whether the environment hides all GPUs from this process.
        visible: the value of CUDA_VISIBLE_DEVICES; None: not set.
        is_one_of_many: whether torchrun has started this process, with one GPU for each.
        local_rank: its number among those on this machine, and that of its GPU.
        cards: the GPUs that PyTorch can use.
    """

    torch: str
    cuda: str | None = None
    rocm: str | None = None
    architectures: tuple[str, ...] = ()
    driver: str | None = None
    fault: str | None = None
    hides_gpus: bool = False
    visible: str | None = None
    is_one_of_many: bool = False
    local_rank: int = 0
    cards: tuple[Card, ...] = ()


# ---------------------------------------------------------------- the facts


@cache
def find_machine() -> Machine:
    fault = find_fault()
    numbers = range(0 if fault else torch.cuda.device_count())
    cards = [torch.cuda.get_device_properties(number) for number in numbers]
    return Machine(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        rocm=torch.version.hip,
        architectures=tuple(torch.cuda.get_arch_list()),
        driver=find_driver(),
        fault=fault,
        hides_gpus=hides_gpus(os.environ),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        is_one_of_many="LOCAL_RANK" in os.environ,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        cards=tuple(Card(card.name, (card.major, card.minor)) for card in cards),
    )


def find_fault() -> str | None:
    """Why PyTorch can't use a GPU, in its own words; None if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same words
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return one_line(error)[:200]
    return "no CUDA GPUs are available"


def find_driver(root: Path = Path("/")) -> str | None:
    """The version of the NVIDIA driver; empty if it can't be told, None without an NVIDIA device.

    A container that no GPU was passed to has no device, though it can read the version.
    """
    in_windows = ("dev/dxg", "usr/lib/wsl/lib/libcuda.so.1")
    has_device_in_windows = all((root / file).exists() for file in in_windows)
    if not has_device_in_windows and not any(root.glob("dev/nvidia[0-9]*")):
        return None
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def hides_gpus(environment: Mapping[str, str]) -> bool:
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    return shown is not None and shown.partition(",")[0].strip() in ("", "-1")


# ---------------------------------------------------------------- the checks


def check_usable(machine: Machine) -> None:
    """Raises UserError if there is an NVIDIA device, and PyTorch would compute on the CPU."""
    if machine.driver is None or machine.fault is None or machine.hides_gpus:
        return
    release = int(machine.driver.partition(".")[0] or 0)
    driver = f"driver {machine.driver or 'of unknown version'}"
    needed = OLDEST_DRIVER.get(int((machine.cuda or "0").partition(".")[0]), 0)
    if machine.cuda is None:
        fault = f"torch {machine.torch} is not built for CUDA, but here is an NVIDIA device"
        cures = [builds_for(release)]
    elif 0 < release < needed:
        fault = f"torch {machine.torch} (CUDA {machine.cuda}) needs driver {needed} or newer"
        cures = [f"update the driver to {needed} or newer", builds_for(release)]
    else:
        fault = f"torch {machine.torch} can't use the NVIDIA device: {machine.fault}"
        cures = ["see whether nvidia-smi works, and whether a container was given its GPUs"]
    cures = [*dict.fromkeys(cures), "set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"]
    raise UserError(f"NVIDIA {driver}: {fault}: {', or '.join(cures)}")


def builds_for(release: int) -> str:
    """How to get a PyTorch that runs with this release of the driver; 0: unknown."""
    for oldest, build in BUILDS.items():
        if not release or release >= oldest:
            index = f"https://download.pytorch.org/whl/{build}"
            # With its suffix, since pip would keep another build of the same version.
            return f"pip install torch=={TORCH}+{build} --index-url {index}"
    return f"update the driver to {max(BUILDS)} or newer"


def check_enough(machine: Machine) -> None:
    """Raises UserError if this process, one of several, has no card of its own."""
    if machine.local_rank >= len(machine.cards):
        raise UserError(
            f"torchrun: process {machine.local_rank} of this machine finds {len(machine.cards)} "
            f"GPUs: start as many as there are, with --nproc_per_node {len(machine.cards)}"
        )


def check_card(machine: Machine, dtype: torch.dtype, fp8: bool = False) -> None:
    """Raises UserError if this process's card can't compute in ``dtype``, or in ``fp8`` too."""
    card = machine.cards[machine.local_rank]
    number = ".".join(map(str, card.capability))
    if machine.cuda and not has_kernels(machine.architectures, card.capability):
        raise UserError(
            f"{card.name} has compute capability {number}, and torch {machine.torch} has kernels "
            f"only for {', '.join(machine.architectures)}: install a build of torch that has them "
            f"(https://pytorch.org/get-started/locally), or {ANOTHER_GPU}"
        )
    if dtype != torch.bfloat16:
        return
    if machine.rocm:
        raise UserError(
            f"dtype bfloat16: decoding needs attention kernels that PyTorch lacks for AMD (ROCm "
            f"{machine.rocm}): set dtype float32, or take an NVIDIA GPU"
        )
    if card.capability < (8, 0):
        raise UserError(
            f"dtype bfloat16: {card.name} has compute capability {number}, and bfloat16 needs 8.0 "
            f"or higher: set dtype float32, or {ANOTHER_GPU}"
        )
    if fp8 and card.capability < (8, 9):
        raise UserError(
            f"fp8 true: {card.name} has compute capability {number}, and products in 8-bit floats "
            f"need 8.9 or higher: set fp8 false, or {ANOTHER_GPU}"
        )


def has_kernels(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether machine code for the capability, or code to compile for it, is in ``architectures``.

    Machine code runs on later minor versions of its major version, ``compute_`` code on anything
    later, and code for an ``a`` or ``f`` variant is taken to run on nothing else.
    """
    if not architectures:  # not recorded in this build
        return True
    for name in architectures:
        kind, major, minor, variant = re.fullmatch(r"(\w+)_(\d+)(\d)(\w?)", name).groups()
        version = int(major), int(minor)
        is_same_major = version[0] == capability[0]
        if version == capability or (
            not variant and version <= capability and (kind == "compute" or is_same_major)
        ):
            return True
    return False


def unused_cards(machine: Machine) -> str | None:
    """One line about GPUs that remain unused; None if there are none."""
    if len(machine.cards) < 2 or machine.is_one_of_many:
        return None
    _, _, others = (machine.visible or "").partition(",")
    second = others.partition(",")[0].strip() or "1"
    return (
        f"{len(machine.cards)} GPUs are visible, and one is used: cuda:0, {machine.cards[0].name}; "
        f"CUDA_VISIBLE_DEVICES={second} would choose the next"
    )
