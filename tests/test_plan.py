"""The plan: what it counts, what it chooses, what it keeps when a run resumes, what it prints."""

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Outcome, flags, kill, Killed, run_folder, step_that, with_model
from transformers import LlamaConfig, LlamaForCausalLM

import plan
import train
from engine import memory
from engine.device import cpu_kernels, cuda_kernels
from engine.footprint import (
    Recipe,
    Recomputation,
    Rows,
    footprint,
    gradient_bytes,
    state_bytes,
    weight_bytes,
)
from engine.optimizer import build_optimizer, make_state
from engine.plan import GIB, Device, Plan, Wishes, choose, saved_plan
from engine.roofline import CARDS, card_named, card_of_size, communicated_bytes, expected_step
from engine.shape import ModelShape
from run.config import KEYS
from run.manifest import BEST, LAST
from run.training_json import read_description

GPU, CPU = cuda_kernels(torch.device("cuda")), cpu_kernels(with_onednn=False)
ROWS = Rows(tokens=201.4, longest=577, supervised=0.648, batch_size=128)
LLAMA_2_7B = ModelShape(
    LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    torch.bfloat16,
)


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        {"head_dim": 16, "num_hidden_layers": 3},
    ],
)
def test_weights_gradients_and_states_are_counted_to_the_byte(
    make_llama: Callable[..., LlamaForCausalLM], dtype: torch.dtype, settings: dict
) -> None:
    """Guards against a bias, a norm or a tied head that the formulas forget."""
    model = make_llama(50, **settings).to(dtype)
    shape, recipe = ModelShape(model.config, dtype), Recipe()
    weights = list(model.parameters())
    optimizer = build_optimizer(weights, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    make_state(optimizer)
    states = [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    assert weight_bytes(shape, recipe) == sum(weight.nbytes for weight in weights)
    assert gradient_bytes(shape, recipe) == sum(weight.nbytes for weight in weights)
    assert state_bytes(shape, recipe) == sum(tensor.nbytes for tensor in states)


def test_the_published_sizes_of_llama_2_7b() -> None:
    """Guards against formulas that hold for tiny models only, and against NF4 of the head."""
    assert LLAMA_2_7B.parameters == 6_738_415_616
    full, small = Recipe(), Recipe(optimizer="adamw_8bit")
    assert state_bytes(LLAMA_2_7B, full) == 6 * LLAMA_2_7B.parameters
    assert state_bytes(LLAMA_2_7B, small) / LLAMA_2_7B.parameters == pytest.approx(2.03, abs=0.01)
    lora, qlora = Recipe("lora", rank=64), Recipe("qlora", rank=64)
    adapters = 2 * 159_907_840  # as PEFT counts them, in bfloat16
    assert weight_bytes(LLAMA_2_7B, lora) == 2 * LLAMA_2_7B.parameters + adapters
    assert gradient_bytes(LLAMA_2_7B, lora) == adapters
    outside = 2 * LLAMA_2_7B.other_parameters + 2 * 2 * 4096 * 32
    nf4 = 32 * LLAMA_2_7B.block_products * 0.515869
    assert weight_bytes(LLAMA_2_7B, qlora) == pytest.approx(nf4 + outside + adapters, rel=1e-5)


def test_the_peak_that_was_counted_on_meta_tensors_of_llama_2_7b() -> None:
    """Guards against a formula that is right for tiny shapes only.

    A storage tracker over meta tensors counted 72.2 GiB for 3,072 tokens of GSM8K without, and
    65.96 GiB for 8,192 with full recomputation.
    """
    for tokens, blocks, counted in ((3072, 0, 72.2), (4032, 0, 74.9), (8192, 32, 65.96)):
        job = LLAMA_2_7B, Recipe(), GPU, ROWS, tokens, Recomputation(blocks, True)
        assert footprint(*job).total / GIB == pytest.approx(counted, rel=0.01)


def test_devices_share_weights_gradients_and_states() -> None:
    """Guards against sharing activations, and against gathered weights that are not counted."""
    alone, shared = (
        footprint(LLAMA_2_7B, Recipe(devices=n), GPU, ROWS, 2048, Recomputation(0, True))
        for n in (1, 8)
    )
    for part in ("weights", "gradients", "states"):
        assert getattr(shared, part) == pytest.approx(getattr(alone, part) / 8, abs=1)
    assert (shared.activations, shared.head) == (alone.activations, alone.head)
    assert alone.gathered == 0
    block, outside = LLAMA_2_7B.block_parameters, LLAMA_2_7B.other_parameters
    assert shared.gathered == block * (2 * 2 + 2 + 4) + outside * (2 + 4)
    at_end = Recipe(devices=8, reduces_each=False)
    whole = footprint(LLAMA_2_7B, at_end, GPU, ROWS, 2048, Recomputation(0, True)).gathered
    assert whole - shared.gathered == 4 * LLAMA_2_7B.parameters


# ---------------------------------------------------------------- choosing


def choices(kernels, recipe: Recipe = Recipe(), wishes: Wishes = Wishes()) -> list[Plan]:
    """The plan for each GiB of memory up to 160."""
    devices = [Device("", size * GIB, recipe.devices) for size in range(1, 161)]
    return [choose(LLAMA_2_7B, recipe, kernels, ROWS, device, wishes) for device in devices]


@pytest.mark.parametrize("kernels", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("wishes", [Wishes(), Wishes(4096)], ids=["free", "4096"])
def test_more_memory_never_recomputes_more(kernels, method: str, wishes: Wishes) -> None:
    """And whatever fits is chosen: guards against an order that skips a fitting choice."""
    found = choices(kernels, Recipe(method, rank=64), wishes)
    work = [(one.recomputed_blocks, one.recomputes_parts) for one in found]
    assert work == sorted(work, reverse=True)
    assert {32, 0} <= {blocks for blocks, _ in work} and len(set(work)) > 20
    assert work[-1] == (0, kernels is CPU)
    same_work = zip(found, found[1:], strict=False)
    for less, more in same_work:
        if less.recomputation == more.recomputation:
            assert less.micro_batch_tokens <= more.micro_batch_tokens
    for size, one in enumerate(found, start=1):
        room = 0.97 * size * GIB
        assert one.needed <= room or one == replace(found[0], needed=one.needed)
    if wishes.micro_batch_tokens:
        assert {one.micro_batch_tokens for one in found} == {4096}


def test_levels_come_in_the_order_of_what_they_cost() -> None:
    """Few layers before many, whole layers only below the micro-batch that keeps a GPU busy."""
    found = choices(GPU)
    for one in found:
        if one.recomputed_blocks == 32 or one.needed > 0.97 * 160 * GIB:
            continue
        assert one.micro_batch_tokens >= 2048
        if one.recomputed_blocks:
            assert one.micro_batch_tokens < 2048 + 256 * 20
    kept = [one for one in found if not one.recomputes_parts]
    assert kept and {one.micro_batch_tokens for one in kept} == {8192}
    smallest = found[0]
    assert (smallest.micro_batch_tokens, smallest.recomputed_blocks) == (768, 32)


@pytest.mark.parametrize(("wish", "blocks"), [(True, 32), (False, 0)])
def test_a_wish_is_kept(wish: bool, blocks: int) -> None:
    found = choices(GPU, wishes=Wishes(None, wish, False))
    assert {one.recomputed_blocks for one in found} == {blocks}
    assert {one.compiles for one in found} == {False}
    assert len({one.micro_batch_tokens for one in found}) > 3


def test_a_cpu_with_enough_memory_has_the_micro_batches_it_always_had() -> None:
    """Guards against slower training, and other bits, on a CPU."""
    plan = choose(LLAMA_2_7B, Recipe(), CPU, ROWS, Device("cpu", 10**13), Wishes())
    assert (plan.micro_batch_tokens, plan.recomputed_blocks, plan.recomputes_parts) == (
        8192,
        0,
        True,
    )


def test_a_saved_plan_is_only_for_its_device_and_wishes() -> None:
    device, wishes = Device("NVIDIA H100", 80 * GIB, 2), Wishes()
    made = choose(LLAMA_2_7B, Recipe(devices=2), GPU, ROWS, device, wishes)
    record = vars(made)
    assert saved_plan(record, replace(device, free=GIB), wishes) == made
    assert saved_plan(record, replace(device, name="NVIDIA H200"), wishes) is None
    assert saved_plan(record, replace(device, count=3), wishes) is None
    assert saved_plan(record, device, Wishes(compile=True)) is None
    assert saved_plan(None, device, wishes) is None
    assert saved_plan({"other": 1}, device, wishes) is None
