"""How a model is fine-tuned: all of its weights, or low-rank adapters beside them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from run.errors import UserError

FULL = "full"  # also the method of all checkpoints that were saved before there were others

# The packages that a method needs, with the versions of requirements.txt.
PACKAGES = {
    FULL: {},
    "lora": {"peft": "0.21.2"},
    "qlora": {"peft": "0.21.2", "bitsandbytes": "0.50.2"},
}


def check_packages(method: str) -> None:
    """Raises UserError if a package that ``method`` needs is not installed."""
    missing = [
        f"{name}=={version}"
        for name, version in PACKAGES[method].items()
        if sys.modules.get(name) is None and (name in sys.modules or find_spec(name) is None)
    ]
    if missing:
        packages = " ".join(missing)
        raise UserError(
            f"method {method}: needs {packages}, which {sys.executable} lacks: "
            f"pip install {packages}"
        )


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters (LoRA, arXiv:2106.09685), new ones or trained ones.

    Attributes:
        base: the name of the model that they adapt.
        dtype: the name of the dtype in which they are trained, with the base rounded to it.
        is_base_quantised: whether the base's linear layers are in 4 bits (QLoRA, arXiv:2305.14314).
        rank: of each product of two matrices.
        alpha, is_rank_stabilised: what the product is multiplied by: alpha / rank, or
            alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).
        dropout: the share of its inputs that is dropped in training.
        seed: of the weights of new ones.
        folder: the checkpoint with the weights of trained ones.
    """

    base: str
    dtype: str
    is_base_quantised: bool
    rank: int
    alpha: int
    is_rank_stabilised: bool
    dropout: float
    seed: int
    folder: Path | None


def adapter_of(settings: Mapping[str, Any], folder: Path | None = None) -> Adapter | None:
    """The adapters of a run with these ``settings``; None if it trains all weights.

    Args:
        folder: the checkpoint that has them; None for new ones.

    Raises:
        UserError: a package that they need is not installed.
    """
    method = settings.get("method", FULL)
    if method == FULL:
        return None
    check_packages(method)
    return Adapter(
        base=settings["model"],
        dtype=settings["dtype"],
        is_base_quantised=method == "qlora",
        rank=settings["lora_rank"],
        alpha=settings["lora_alpha"],
        is_rank_stabilised=settings["lora_rslora"],
        dropout=settings["lora_dropout"],
        seed=settings["seed"],
        folder=folder,
    )
