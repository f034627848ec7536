"""Products by oneDNN equal PyTorch's own, with their gradients."""

import copy

import pytest
import torch
from conftest import PROMPT
from transformers import LlamaForCausalLM

import data
import linear
from perplexity import summed_loss


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_products_equal_float64(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Guards against an operand that is transposed once too often, and products in a lower precision."""
    monkeypatch.setattr(linear, "ONEDNN", True)
    torch.manual_seed(0)
    layer = linear.Linear(24, 40, bias=False)
    exact = copy.deepcopy(layer).double()
    hidden, upstream = torch.randn(rows, 24, requires_grad=True), torch.randn(rows, 40)
    exact_hidden = hidden.detach().double().requires_grad_()
    found, expected = layer(hidden), exact(exact_hidden)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found, [hidden, layer.weight], upstream)
    theirs = torch.autograd.grad(expected, [exact_hidden, exact.weight], upstream.double())
    torch.testing.assert_close([grad.double() for grad in ours], list(theirs), rtol=1e-5, atol=1e-5)


def test_a_model_with_fast_products_has_the_gradients_of_one_without(
    model: LlamaForCausalLM, tokenizer, problems: list[data.Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a layer that is left out, or that trains something else, on either kind of processor."""
    batch = data.collate(data.encode(tokenizer, problems[:6], PROMPT))
    gradients = []
    for fast in (True, False):
        monkeypatch.setattr(linear, "ONEDNN", fast)
        each = copy.deepcopy(model)
        for module in each.modules():
            if isinstance(module, torch.nn.Linear):
                module.__class__ = torch.nn.Linear
        linear.use_fast_products(each)
        fast_layers = sum(type(module) is linear.Linear for module in each.modules())
        assert fast_layers == (1 + 7 * model.config.num_hidden_layers if fast else 0)
        summed_loss(each, batch).backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
