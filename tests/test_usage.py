"""The share of a device's peak, and the memory, that a run logs."""

import mmap
import resource
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from engine import usage
from engine.recipe import Recipe, Rows
from engine.roofline import card_named
from engine.shape import read_shape
from engine.usage import memory_bytes, usage_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("cpu", None),
    ],
)
def test_a_card_is_known_by_its_whole_name(name: str, card: str | None) -> None:
    """Guards against an A100 that is taken for an A10, at 2.5 times its share."""
    found = card_named(name)
    assert (found and found.name) == card


@pytest.mark.parametrize("method", ["full", "lora"])
def test_mfu_counts_what_a_step_multiplies(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """By PyTorch's counter, on Transformers' own passes over one row of which all is supervised."""
    length = 40
    model = LlamaForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    shape = read_shape(model_folder, torch.float32)
    # Which multiplies the later tokens, too, that causal attention leaves out.
    attention = 3 * shape.layers * 4 * shape.heads * shape.head_dim * length**2
    per_step = counter.get_total_flops() - attention / 2
    if method == "lora":  # whose frozen weights have no gradient
        per_step *= 2 / 3

    monkeypatch.setattr(usage, "kind", lambda device: "NVIDIA H100 80GB HBM3")
    recipe = Recipe(method=method, rank=1, devices=4)
    found = usage_of(shape, recipe, Rows(length, length + 1, 1.0, 8), CPU)
    # Half a step of such a row a second, whose tokens are counted with the last, a label only.
    share = found.at((length + 1) / 2)["train/mfu"]
    assert share == pytest.approx(per_step / 2 / (4 * 989e12), rel=1e-12, abs=0)


def test_an_unknown_peak_has_no_share(model_folder: Path) -> None:
    shape = read_shape(model_folder, torch.float32)
    numbers = usage_of(shape, Recipe(), Rows(10, 11, 0.5, 8), CPU).at(1000.0)
    assert numbers.keys() == {"train/memory_gib"}


def test_memory_is_what_the_process_takes() -> None:
    """Guards against pages for bytes, and against a peak where the present is meant."""
    before = memory_bytes(CPU)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 50e6 < before <= most * 1.1
    with mmap.mmap(
        -1, 2**26
    ) as ballast:  # which is given back at once, whatever the allocator keeps
        ballast.write(b"x" * len(ballast))
        during = memory_bytes(CPU)
        assert during - before > 0.9 * len(ballast)
    assert memory_bytes(CPU) < during - 2**25
