"""Products by oneDNN equal PyTorch's own, with their gradients."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import PROMPT
from transformers import LlamaForCausalLM

import data
from engine import packing
from engine.cpu import onednn
from engine.loading import load_model
from engine.loss import summed_loss
from grading import dataset


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_products_equal_float64(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Guards against an operand that is transposed once too often, and products in a lower precision."""
    monkeypatch.setattr(onednn, "ONEDNN", True)
    torch.manual_seed(0)
    layer = onednn.Linear(24, 40, bias=False)
    exact = copy.deepcopy(layer).double()
    hidden, upstream = torch.randn(rows, 24, requires_grad=True), torch.randn(rows, 40)
    exact_hidden = hidden.detach().double().requires_grad_()
    found, expected = layer(hidden), exact(exact_hidden)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found, [hidden, layer.weight], upstream)
    theirs = torch.autograd.grad(expected, [exact_hidden, exact.weight], upstream.double())
    torch.testing.assert_close([grad.double() for grad in ours], list(theirs), rtol=1e-5, atol=1e-5)


def test_a_model_with_fast_products_has_the_gradients_of_one_without(
    model: LlamaForCausalLM,
    tokenizer,
    problems: list[dataset.Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a layer that is left out, or that trains something else, on either kind of processor."""
    batch = packing.collate(data.encode(tokenizer, problems[:6], PROMPT))
    gradients = []
    for fast in (True, False):
        monkeypatch.setattr(onednn, "ONEDNN", fast)
        each = copy.deepcopy(model)
        for module in each.modules():
            if isinstance(module, torch.nn.Linear):
                module.__class__ = torch.nn.Linear
        onednn.use_fast_products(each)
        fast_layers = sum(type(module) is onednn.Linear for module in each.modules())
        assert fast_layers == (1 + 7 * model.config.num_hidden_layers if fast else 0)
        summed_loss(each, batch).backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_onednn_sees_few_shapes(
    model: LlamaForCausalLM,
    tokenizer,
    problems: list[dataset.Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against memory that grows with every new number of tokens: what oneDNN keeps for a shape, it keeps."""
    monkeypatch.setattr(onednn, "ONEDNN", True)
    onednn.use_fast_products(model)
    original, shapes, calls = onednn._onednn, set(), []

    def recorded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        shapes.add((*left.shape, right.shape[1]))
        calls.append(left)
        return original(left, right)

    monkeypatch.setattr(onednn, "_onednn", recorded)
    config = model.config
    of_the_model = {size for parameter in model.parameters() for size in parameter.shape}
    for count in range(1, 12):
        summed_loss(
            model, packing.collate(data.encode(tokenizer, problems[:count], PROMPT))
        ).backward()
    assert len(calls) == 11 * (3 * (7 * config.num_hidden_layers + 1))
    assert all(
        size in of_the_model or size % packing.ROWS == 0 for shape in shapes for size in shape
    )
    calls.clear()
    layer = model.model.layers[0].mlp.up_proj
    for rows in (packing.ROWS + 1, packing.ROWS - 1):
        layer(torch.randn(rows, config.hidden_size, requires_grad=True)).sum().backward()
    assert len(calls) == 3  # the shorter one's: there can't be many like it


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_is_added_in_the_dtype_of_its_total(
    dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against rows that are left out, and against a total that is rounded to the factors' dtype."""
    monkeypatch.setattr(onednn, "ONEDNN", fast)
    monkeypatch.setattr(onednn, "ADDED_ROWS", 3)
    torch.manual_seed(0)
    left, right = torch.randn(6, 10, dtype=dtype).T, torch.randn(6, 4, dtype=dtype)
    total = torch.randn(10, 4, dtype=torch.promote_types(dtype, torch.float32))
    expected = total.double() + (left.double() @ right.double()).to(dtype)
    onednn.add_product(total, left, right)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_products_with_what_follows_them(
    model: LlamaForCausalLM, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "ONEDNN", packed)
    onednn.use_fast_products(model)
    layer = model.model.layers[0].mlp.gate_proj
    hidden, other = torch.randn(7, layer.in_features), torch.randn(7, layer.out_features)
    with torch.inference_mode(), onednn.packed_weights(model):
        plain = (hidden.double() @ layer.weight.double().T).float()
        assert (getattr(layer, "packed", None) is not None) == packed
        for found, expected in (
            (onednn.product_times(layer, hidden, other), plain * other),
            (onednn.product_plus(layer, hidden, other), plain + other),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_weights_change_no_product_and_do_not_stay(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a copy of the weights that trains on, or outlives an error."""
    monkeypatch.setattr(onednn, "ONEDNN", True)
    onednn.use_fast_products(model)
    layers = [module for module in model.modules() if type(module) is onednn.Linear]
    layer = layers[0]
    inputs = {rows: torch.randn(rows, layer.in_features) for rows in (1, 7, 64)}
    with torch.no_grad():
        plain = {rows: layer(hidden) for rows, hidden in inputs.items()}
        with pytest.raises(KeyboardInterrupt), onednn.packed_weights(model):
            assert len(layers) == 1 + 7 * model.config.num_hidden_layers and all(
                each.packed is not None for each in layers
            )
            for rows, hidden in inputs.items():
                torch.testing.assert_close(layer(hidden), plain[rows], rtol=1e-5, atol=1e-6)
            with torch.enable_grad():
                found = torch.autograd.grad(layer(inputs[64]).sum(), layer.weight)[0]
            torch.testing.assert_close(
                found, inputs[64].sum(0).expand_as(found), rtol=1e-5, atol=1e-5
            )
            weight = layer.weight.clone()
            layer.weight.zero_()
            torch.testing.assert_close(
                layer(inputs[7]), plain[7], rtol=1e-5, atol=1e-6
            )  # it is the copy that is read
            layer.weight.copy_(weight)
            raise KeyboardInterrupt
        assert all(each.packed is None for each in layers)
        torch.testing.assert_close(layer(inputs[7]), plain[7], rtol=0, atol=0)


def test_a_model_on_another_device_keeps_its_own_layers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against layers on a GPU whose class depends on the processor beside it."""
    monkeypatch.setattr(onednn, "ONEDNN", True)
    for device, kind in (("meta", torch.nn.Linear), ("cpu", onednn.Linear)):
        model = load_model(model_folder, torch.float32, torch.device(device))
        assert type(model.lm_head) is type(model.model.layers[0].mlp.up_proj) is kind
