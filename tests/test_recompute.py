"""As few blocks are recomputed as memory demands, and how many changes no bit."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import PROMPT, flags, with_model
from torch import Tensor
from transformers import LlamaForCausalLM

import data
import train
from engine import packing
from engine.device import cpu_kernels, cuda_kernels
from engine.llama import Llama
from engine.recompute import block_bytes, choose_recomputed, fewest_recomputed
from engine.tokenizer import Tokenizer
from grading import dataset

KERNELS = replace(cpu_kernels(with_onednn=False), row_multiple=1)


def measured_bytes(model: Llama, length: int, sequences: int) -> int:
    """What all blocks and everything around them keep for the backward pass."""
    rows = [packing.Example([1] * (length + 1), [1] * (length + 1))] * sequences
    batch = packing.collate(rows, KERNELS)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    attend = partial(KERNELS.attention, batch, 0.0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.train().hidden_states(batch.input_ids, batch.position_ids, attend)
    assert output.requires_grad  # the graph, and so every kept tensor, is still alive
    return sum(kept.values())


@pytest.mark.parametrize(
    ("dtype", "length", "shape"),
    [
        (torch.float32, 192, {}),
        (torch.float32, 128, {"num_key_value_heads": 4}),
        (torch.float32, 1088, {"max_position_embeddings": 2048}),
        (torch.bfloat16, 192, {"hidden_size": 64, "intermediate_size": 160}),
        (torch.float64, 64, {"hidden_size": 64, "num_attention_heads": 2}),
    ],
)
def test_the_memory_of_a_block_is_what_autograd_keeps(
    make_llama: Callable[..., LlamaForCausalLM], dtype: torch.dtype, length: int, shape: dict
) -> None:
    """Guards against a tensor that the formula forgets, counts twice, or has another dtype."""
    models = [
        Llama(make_llama(50, num_hidden_layers=layers, **shape).to(dtype), KERNELS)
        for layers in (1, 3)
    ]
    one, three = (measured_bytes(model, length, 3) for model in models)
    assert block_bytes(models[0], 3 * length, length) == pytest.approx((three - one) / 2, rel=0.02)


def test_the_memory_of_a_block_of_llama_2_7b() -> None:
    """Guards against a formula that holds for tiny models only: 91 KiB a token, without heads'."""
    with torch.device("meta"):
        config = LlamaForCausalLM.config_class(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
        )
        pretrained = LlamaForCausalLM(config).to(torch.bfloat16)
    model = Llama(pretrained, cuda_kernels(torch.device("meta")))
    logarithms_and_factors = 32 * 4 + 2 * 4
    assert block_bytes(model, 1, 500) == 91 * 1024 + logarithms_and_factors


def test_no_more_blocks_are_recomputed_than_memory_demands() -> None:
    blocks, block, inputs = 32, 91, 8

    def needed(recomputed: int) -> int:
        return recomputed * inputs + (blocks - recomputed) * block

    numbers = [fewest_recomputed(blocks, room, block, inputs) for room in range(-100, 3000)]
    assert set(numbers) == set(range(blocks + 1))
    for room, number in enumerate(numbers, start=-100):
        assert needed(number) <= room or number == blocks
        assert number == 0 or needed(number - 1) > room


def test_the_choice_goes_from_none_to_all(model: Llama, capsys) -> None:
    """Guards against a rule that ignores what is still to come, such as optimizer states."""
    numbers = [choose_recomputed(model, 512, 200, free) for free in (0, 10**12)]
    assert numbers == [2, 0]
    assert "gradient_checkpointing: 2 of 2 layers are recomputed" in capsys.readouterr().out
    model.kernels = replace(model.kernels, logits_at_once=100)
    fits = next(free for free in range(0, 10**8, 1000) if not choose_recomputed(model, 8, 8, free))
    weights = sum(weight.nbytes for weight in model.parameters())
    # On a CPU: weights, gradients and two moments; the head's gradient and its chunk; two blocks,
    # and twice one of them for its backward pass.
    needed = 4 * weights + model.head.weight.nbytes + 100 * 12 + 4 * block_bytes(model, 8, 8)
    assert 0.97 * fits == pytest.approx(needed, abs=1000)


def test_how_many_blocks_are_recomputed_changes_no_bit(
    make_llama: Callable[..., LlamaForCausalLM],
    tokenizer: Tokenizer,
    problems: list[dataset.Problem],
) -> None:
    """Guards against blocks other than the first ones, and against a block that is left out."""
    pretrained = make_llama(len(tokenizer), num_hidden_layers=3)
    batch = packing.collate(data.encode(tokenizer, problems[:6], PROMPT), KERNELS)
    expected: list[Tensor] = []
    for number in range(4):
        model = Llama(copy.deepcopy(pretrained), KERNELS).train()
        model.recomputed_blocks = number
        calls = [0, 0, 0]
        for layer, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(count, calls, layer))
        loss = model(batch)
        loss.backward()
        assert calls == [2] * number + [1] * (3 - number)
        found = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
        expected = expected or found
        assert all(map(torch.equal, found, expected))


def count(calls: list[int], layer: int, *_: Any) -> None:
    calls[layer] += 1


@pytest.mark.parametrize(("setting", "number"), [("true", 2), ("false", 0), ("null", 0)])
def test_the_setting_chooses(call, settings: dict[str, str], setting: str, number: int) -> None:
    """Guards against a setting that does nothing."""
    found: list[int] = []
    outcome = call(
        train,
        *flags(settings | {"gradient_checkpointing": setting, "epochs": "1"}),
        step=with_model(lambda model: found.append(model.recomputed_blocks)),
    )
    assert outcome.code == 0 and found == [number]
    assert ("layers are recomputed" in outcome.out) == (setting == "null")
