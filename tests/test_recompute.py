"""What the plan counts is what autograd keeps, and what is recomputed changes no bit."""

import copy
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import PROMPT, flags, with_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

import data
import train
from engine import packing
from engine.device import cpu_kernels, cuda_kernels
from engine.footprint import activation_bytes, block_bytes
from engine.llama import Llama
from engine.recipe import Recipe, Recomputation, Rows
from engine.shape import ModelShape
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
    for parts in (True, False):
        for model in models:
            model.recomputes_parts = parts
        one, three = (measured_bytes(model, length, 3) for model in models)
        shape = ModelShape(models[0].config, dtype)
        counted = 3 * length * block_bytes(shape, KERNELS, length, parts=parts)
        assert counted == pytest.approx((three - one) / 2, rel=1e-4)


def test_the_memory_of_a_block_of_llama_2_7b() -> None:
    """Guards against a formula that holds for tiny models only: 91 KiB a token, without heads'."""
    config = LlamaForCausalLM.config_class(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    )
    shape, kernels = ModelShape(config, torch.bfloat16), cuda_kernels(torch.device("meta"))
    logarithms_and_factors = 32 * 4 + 2 * 4
    assert block_bytes(shape, kernels, 500, parts=True) == 91 * 1024 + logarithms_and_factors
    kept = block_bytes(shape, kernels, 500, parts=False) - block_bytes(
        shape, kernels, 500, parts=True
    )
    assert kept == (2 * 4096 + 11008) * 2


needs_small_products = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="a CPU multiplies 8-bit floats as such since torch 2.13"
)


@pytest.mark.parametrize("vocab_size", [50, 4000])
@pytest.mark.parametrize(
    ("dtype", "fp8"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        pytest.param(torch.bfloat16, True, marks=needs_small_products),
    ],
)
@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("parts", [True, False])
def test_the_peak_of_a_micro_batch_is_what_is_counted(
    make_llama: Callable[..., LlamaForCausalLM],
    vocab_size: int,
    dtype: torch.dtype,
    fp8: bool,
    number: int,
    parts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against an activation, a moment of the loss or a backward pass that is left out."""
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
    kernels = replace(KERNELS, logits_at_once=2**19)
    model = Llama(make_llama(vocab_size, **shape).to(dtype), kernels).train()
    model.recomputed_blocks, model.recomputes_parts = number, parts
    if fp8:
        monkeypatch.setattr("engine.cuda.fp8.NUMBERS_AT_ONCE", 2**13)
        kernels.use_fp8(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    labels = [packing.IGNORE] * 32 + [1] * 97  # of which the first is no label of a token
    batch = packing.collate([packing.Example([1] * 129, labels)] * 8, kernels)
    with LiveBytes(model) as live:
        model(batch).backward()
    rows = Rows(128, 129, batch.num_labels / batch.num_tokens, 8)
    job = ModelShape(model.config, dtype), Recipe(fp8=fp8), kernels, rows
    kept, *beyond = activation_bytes(*job, batch.num_tokens, Recomputation(number, parts))
    # Buffers of products, and tensors of one number a token, are left out.
    assert kept + max(beyond) == pytest.approx(live.most, rel=0.04)


class LiveBytes(TorchDispatchMode):
    """The most bytes of all tensors at a time, but for a model's weights and their gradients."""

    def __init__(self, model: Llama):
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0
        for weight in model.parameters():
            for tensor in (weight, weight.grad):
                self.live[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), named: Any = None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return result


def test_how_many_blocks_are_recomputed_changes_no_bit(
    make_llama: Callable[..., LlamaForCausalLM],
    tokenizer: Tokenizer,
    problems: list[dataset.Problem],
) -> None:
    """Guards against blocks other than the first ones, and against a block that is left out."""
    pretrained = make_llama(len(tokenizer), num_hidden_layers=3)
    batch = packing.collate(data.encode(tokenizer, problems[:6], PROMPT), KERNELS)
    expected: list[Tensor] = []
    for number, parts in itertools.product(range(4), (True, False)):
        model = Llama(copy.deepcopy(pretrained), KERNELS).train()
        model.recomputed_blocks, model.recomputes_parts = number, parts
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
    found: list[tuple[int, bool]] = []
    outcome = call(
        train,
        *flags(settings | {"gradient_checkpointing": setting, "epochs": "1"}),
        step=with_model(
            lambda model: found.append((model.recomputed_blocks, model.recomputes_parts))
        ),
    )
    assert outcome.code == 0 and found == [(number, True)]
    assert ("plan: micro_batch_tokens 256, no layer is" in outcome.out) == (setting == "null")
