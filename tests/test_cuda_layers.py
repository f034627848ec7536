"""Layers of a GPU's decoding compute what others do, and leave the weights as they were."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine import llama
from engine.cuda.layers import fused_weights
from engine.decoding import greedy_decode
from engine.device import cuda_kernels
from engine.functions import LayerParts
from engine.llama import Llama
from engine.packing import IGNORE, Example, collate

CPU = torch.device("cpu")
DECODING = cuda_kernels(CPU).decoding_parts
SHAPES = [
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    {"head_dim": 12},
]


def of_layer(parts: LayerParts, model: Llama, rows: int) -> list[Tensor]:
    """Query, key, value and next hidden states of the last layer, for random inputs."""
    generator = torch.Generator().manual_seed(0)
    layer = model.blocks[-1].layer
    heads = model.config.num_attention_heads * model.head_dim
    hidden, attended = (
        torch.randn(rows, width, generator=generator, dtype=torch.float64)
        for width in (model.config.hidden_size, heads)
    )
    cos, sin = model.rotary(hidden, torch.arange(3, 3 + rows)[None])
    rope = parts.rope(cos[0, :, None], sin[0, :, None])
    states = parts.before_attention(layer, hidden, *rope)
    return [*states, parts.after_attention(layer, hidden, attended.unflatten(1, (-1, 4)))]


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_parts_of_a_layer_are_those_of_a_cpu(
    make_llama: Callable[..., LlamaForCausalLM], shape: dict[str, int]
) -> None:
    """Guards against a wrong order of heads, a forgotten bias or residual, and half a rotation."""
    with torch.inference_mode(False):
        model = Llama(make_llama(50, **shape).double())
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros, when new
                torch.nn.init.normal_(parameter)
    expected = of_layer(llama.DECODING, model, 5)
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(of_layer(DECODING, model, 5), expected, **exact)
    with fused_weights(model):
        torch.testing.assert_close(of_layer(DECODING, model, 5), expected, **exact)


def storages(model: Llama) -> dict[int, int]:
    """The bytes of each piece of memory that weights are in."""
    found = [parameter.untyped_storage() for parameter in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def test_fused_weights_are_no_second_copy(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Guards against 13 GB of a 7B model twice."""
    model = Llama(make_llama(50))
    before = storages(model)
    with fused_weights(model):
        fused = storages(model)
        attention = model.blocks[0].layer.self_attn
        assert attention.fused[0].data_ptr() == attention.q_proj.weight.data_ptr()
    assert sum(fused.values()) == sum(before.values()) and len(fused) == len(before) - 3 * 2
    assert sorted(storages(model).values()) == sorted(before.values())


@pytest.mark.parametrize("is_stopped", [False, True])
def test_weights_are_as_they_were_after_decoding(
    make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, is_stopped: bool
) -> None:
    """Guards against a checkpoint or a training that sees views, or tensors without gradients.

    Also where decoding is given up before its end.
    """
    model = Llama(make_llama(50), cuda_kernels(CPU))
    example = Example([1, 5, 7, 9, 2], [IGNORE, IGNORE, 7, 9, 2])

    def train() -> dict[str, Tensor]:
        model.train()(collate([example], model.kernels)).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return grads

    def saved(name: str) -> dict[str, bytes]:
        model.pretrained.save_pretrained(tmp_path / name)
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    parameters, grads, files = list(model.parameters()), train(), saved("before")
    memory = sorted(storages(model).values())
    prompts = [[1, 5 + n] for n in range(10)]
    decoding = greedy_decode(model, prompts, max_new_tokens=3, eos_token_ids=frozenset(), slots=4)
    next(decoding)
    assert model.blocks[0].layer.mlp.fused[0].shape == (2 * 48, 32)  # so it was used
    decoding.close() if is_stopped else list(decoding)
    assert not hasattr(model.blocks[0].layer.mlp, "fused")
    for old, new in zip(parameters, model.parameters(), strict=True):
        assert old is new and not new.is_inference() and new.requires_grad
    assert sorted(storages(model).values()) == memory
    assert saved("after") == files
    for name, grad in train().items():
        assert torch.equal(grad, grads[name])
