"""Our linear layers equal PyTorch's own, with their gradients."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import data
from engine import device as devices
from engine import fused
from engine.cpu import onednn
from engine.cuda import linear
from engine.device import cpu_kernels
from engine.llama import EAGER, Llama
from engine.loading import load_model
from engine.lora import add_adapters
from engine.packing import MicroBatch, collate, pack
from grading import dataset
from run.method import Adapter

CPU = torch.device("cpu")


@pytest.fixture
def load(model_folder: Path) -> Callable[[bool], Llama]:
    """Loads the base model with or without oneDNN, whichever processor this is."""

    def load(with_onednn: bool) -> Llama:
        return load_model(model_folder, torch.float32, CPU, cpu_kernels(with_onednn))

    return load


class ShapesByOnednn(TorchDispatchMode):
    """Records the shapes of all products by oneDNN that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            self.calls.append((*args[0].shape, args[1].shape[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_products_equal_float64(rows: int) -> None:
    """Guards against an operand transposed once too often, and products in a lower precision."""
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
    load: Callable[[bool], Llama], tokenizer, problems: list[dataset.Problem]
) -> None:
    """Guards against a layer that is left out, or trains something else, on either processor."""
    gradients = []
    for fast in (True, False):
        model = load(fast)
        batch = collate(data.encode(tokenizer, problems[:6], PROMPT), model.kernels)
        fast_layers = sum(type(module) is onednn.Linear for module in model.modules())
        assert fast_layers == (1 + 7 * model.config.num_hidden_layers if fast else 0)
        model(batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_replaced_layers_are_saved_and_trained_as_those_before(
    load: Callable[[bool], Llama], tmp_path: Path
) -> None:
    """Guards against a replaced layer whose weight is a copy, has another name or another place."""
    fast, plain = load(True), load(False)
    names = [[name for name, _ in each.pretrained.named_parameters()] for each in (fast, plain)]
    assert names[0] == names[1]
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(list(fast.parameters())) == len(names[0])
    fast.pretrained.save_pretrained(tmp_path / "fast")
    plain.pretrained.save_pretrained(tmp_path / "plain")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fast", "plain")]
    assert saved[0] == saved[1]


def test_onednn_sees_few_shapes(
    load: Callable[[bool], Llama], tokenizer, problems: list[dataset.Problem]
) -> None:
    """Guards against memory that grows with each number of tokens: oneDNN never frees a shape."""
    model = load(True)
    config = model.config
    of_the_model = {size for parameter in model.parameters() for size in parameter.shape}
    with ShapesByOnednn() as products:
        for count in range(1, 12):
            examples = data.encode(tokenizer, problems[:count], PROMPT)
            model(collate(examples, model.kernels)).backward()
    assert len(products.calls) == 11 * (3 * (7 * config.num_hidden_layers + 1))
    sizes = {size for shape in products.calls for size in shape}
    assert all(size in of_the_model or size % onednn.ROWS == 0 for size in sizes)
    layer = model.pretrained.model.layers[0].mlp.up_proj
    with ShapesByOnednn() as products:
        for rows in (onednn.ROWS + 1, onednn.ROWS - 1):
            layer(torch.randn(rows, config.hidden_size, requires_grad=True)).sum().backward()
    assert len(products.calls) == 3  # the shorter one's: there can't be many like it


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_is_added_in_the_dtype_of_its_total(dtype: torch.dtype, fast: bool) -> None:
    """Guards against rows that are left out, and a total rounded to the factors' dtype."""
    torch.manual_seed(0)
    left, right = torch.randn(6, 10, dtype=dtype).T, torch.randn(6, 4, dtype=dtype)
    total = torch.randn(10, 4, dtype=torch.promote_types(dtype, torch.float32))
    expected = total.double() + (left.double() @ right.double()).to(dtype)
    add_product = onednn.add_product if fast else devices.add_product
    add_product(total, left, right, added_rows=3)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("room", [10**9, 0])
def test_products_with_what_follows_them(load: Callable[[bool], Llama], room: int) -> None:
    model = load(True)
    layer = model.pretrained.model.layers[0].mlp.gate_proj
    hidden, other = torch.randn(7, layer.in_features), torch.randn(7, layer.out_features)
    with torch.inference_mode(), onednn.packed_weights(model, room):
        plain = (hidden.double() @ layer.weight.double().T).float()
        assert (layer.packed is not None) == bool(room)
        for found, expected in (
            (layer.times(hidden, other), plain * other),
            (layer.plus(hidden, other), plain + other),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_weights_change_no_product_and_do_not_stay(load: Callable[[bool], Llama]) -> None:
    """Guards against a copy of the weights that trains on, or outlives an error."""
    model = load(True)
    layers = [module for module in model.modules() if type(module) is onednn.Linear]
    layer = layers[0]
    inputs = {rows: torch.randn(rows, layer.in_features) for rows in (1, 7, 64)}
    with torch.no_grad():
        plain = {rows: layer(hidden) for rows, hidden in inputs.items()}
        with pytest.raises(KeyboardInterrupt), onednn.packed_weights(model, 10**9):
            assert len(layers) == 1 + 7 * model.config.num_hidden_layers
            assert all(each.packed is not None for each in layers)
            for rows, hidden in inputs.items():
                torch.testing.assert_close(layer(hidden), plain[rows], rtol=1e-5, atol=1e-6)
            with torch.enable_grad():
                found = torch.autograd.grad(layer(inputs[64]).sum(), layer.weight)[0]
            expected = inputs[64].sum(0).expand_as(found)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            weight = layer.weight.clone()
            layer.weight.zero_()  # it is the copy that is read
            torch.testing.assert_close(layer(inputs[7]), plain[7], rtol=1e-5, atol=1e-6)
            layer.weight.copy_(weight)
            raise KeyboardInterrupt
        assert all(each.packed is None for each in layers)
        torch.testing.assert_close(layer(inputs[7]), plain[7], rtol=0, atol=0)


def test_a_model_on_another_device_keeps_its_own_layers(model_folder: Path) -> None:
    """Guards against layers on a GPU whose class depends on the processor next to it."""
    meta = torch.device("meta")
    for kernels, kind in (
        (devices.cuda_kernels(meta), linear.Linear),
        (cpu_kernels(with_onednn=True), onednn.Linear),
    ):
        model = load_model(model_folder, torch.float32, kernels.device, kernels).pretrained
        assert type(model.lm_head) is type(model.model.layers[0].mlp.up_proj) is kind


# ---------------------------------------------------------------- gradients added by the product


class CountOperators(TorchDispatchMode):
    """Counts the operators that run under it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def pair(pretrained: LlamaForCausalLM) -> tuple[Llama, Llama]:
    """The same model with PyTorch's linear layers, and with those that add their gradients."""
    kernels = cpu_kernels(with_onednn=False)
    plain = Llama(copy.deepcopy(pretrained), kernels).train()
    linear.replace_linear_layers(pretrained)
    return plain, Llama(pretrained, kernels).train()


@pytest.fixture
def batches(tokenizer, problems: list[dataset.Problem]) -> list[MicroBatch]:
    rows = data.encode(tokenizer, problems[:12], PROMPT)
    return pack(rows, 400, cpu_kernels(with_onednn=False))


SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "tied head", "biases"])
@pytest.mark.parametrize("frozen", ["", "k_proj", "down_proj"])
def test_products_that_add_give_the_same_gradients(
    make_llama, tokenizer, batches: list[MicroBatch], shape: dict, recomputed: int, frozen: str
) -> None:
    """Guards against a gradient added twice, to the wrong weight, or not at all."""
    plain, adding = pair(make_llama(len(tokenizer), **shape).double())
    assert len(batches) > 2
    for model in (plain, adding):
        model.recomputed_blocks = recomputed
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name)
        for batch in batches:
            model(batch).backward()
    pairs = zip(adding.named_parameters(), plain.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        assert (ours.grad is None) == (theirs.grad is None) == bool(frozen and frozen in name)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def test_the_sum_of_gradients_is_rounded_once(make_llama, tokenizer, batches) -> None:
    """In bfloat16 the error does not grow over that of separate sums."""
    pretrained = make_llama(len(tokenizer)).bfloat16()
    exact = Llama(copy.deepcopy(pretrained).double()).train()
    plain, adding = pair(pretrained)
    for model in (exact, plain, adding):
        for batch in batches * 3:
            model(batch).backward()
    errors = [
        sum(
            (ours.grad.double() - theirs.grad).square().sum()
            for (name, ours), theirs in zip(
                model.named_parameters(), exact.parameters(), strict=True
            )
            if "proj" in name
        )
        for model in (adding, plain)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("recomputed", [0, 2])
def test_no_gradient_is_made_only_to_be_added_and_no_product_is_repeated(
    make_llama, tokenizer, batches: list[MicroBatch], recomputed: int
) -> None:
    """Guards against recomputing a block's last product, whose result nobody needs."""
    counts = []
    for model in pair(make_llama(len(tokenizer))):
        model.recomputed_blocks = recomputed
        model(batches[0]).backward()
        with CountOperators() as operators:
            model(batches[1]).backward()
        counts.append(operators.calls)
    plain, adding = counts
    linears = 7 * len(model.blocks)
    assert adding["addmm_"] - plain["addmm_"] == linears
    assert plain["mm"] - adding["mm"] == linears
    assert plain["add_"] - adding["add_"] == linears


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("frozen", ["", "k_proj", "proj", "norm"])
def test_compiled_norms_pass_on_the_gradients_of_all_their_products(
    make_llama,
    tokenizer,
    batches: list[MicroBatch],
    monkeypatch: pytest.MonkeyPatch,
    recomputed: int,
    frozen: str,
) -> None:
    """Guards against a product that is left out, also where others are frozen, and extra sums."""
    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    fused.compiled.cache_clear()
    plain, adding = pair(make_llama(len(tokenizer)).double())
    counts = []
    for model in (plain, adding):
        model.recomputed_blocks, model.elementwise = recomputed, fused.FUSED
        for name, weight in model.named_parameters():
            weight.requires_grad_(not frozen or frozen not in name)
        for batch in batches[:-1]:
            model(batch).backward()
        with CountOperators() as operators:
            model(batches[-1]).backward()
        counts.append(operators.calls)
    fused.compiled.cache_clear()
    found, expected = (dict(model.named_parameters()) for model in (adding, plain))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].grad, weight.grad, rtol=0, atol=1e-10)
    of_weights = sum(weight.grad is not None and "proj" in name for name, weight in found.items())
    assert counts[1]["addmm_"] - counts[0]["addmm_"] == of_weights
    added = [calls["add_"] + calls["add"] for calls in counts]
    assert added[0] - added[1] == of_weights


@pytest.mark.parametrize("dropout", [0.0, 0.3])  # with it, they read what autograd derives
@pytest.mark.parametrize("recomputed", [0, 2])
def test_adapters_read_the_same_norms(
    make_llama, tokenizer, batches: list[MicroBatch], monkeypatch, recomputed: int, dropout: float
) -> None:
    """Guards against an adapter's share of a norm's gradient that is lost, or added twice."""
    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    fused.compiled.cache_clear()
    gradients = []
    for adding, elementwise in ((False, EAGER), (True, fused.FUSED)):
        model = Llama(make_llama(len(tokenizer)).double(), cpu_kernels(with_onednn=False)).train()
        add_adapters(model, Adapter("", "float64", False, 4, 8, False, dropout, 0, None))
        if adding:
            linear.replace_linear_layers(model.pretrained)
        torch.manual_seed(0)
        for weight in model.trained:  # or nothing would reach the norms through the adapters
            torch.nn.init.normal_(weight, std=0.05)
        model.recomputed_blocks, model.elementwise = recomputed, elementwise
        torch.manual_seed(1)  # for the same dropout
        for batch in batches:
            model(batch).backward()
        gradients.append([weight.grad for weight in model.trained])
    fused.compiled.cache_clear()
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("adds", [(True, True), (True, False), (False, True), (False, False)])
def test_a_norms_gradient_is_whole_whoever_reads_it(
    monkeypatch: pytest.MonkeyPatch, adds: tuple[bool, bool]
) -> None:
    """Guards against what other layers gave, and what an earlier backward pass has left."""
    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    fused.compiled.cache_clear()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 4).double() for _ in adds]
    ours = [linear.Linear.like(one) if add else one for one, add in zip(layers, adds, strict=True)]
    hidden, weight = torch.randn(9, 8).double().requires_grad_(), torch.ones(8).double()
    normed = torch.nn.functional.rms_norm(hidden, [8], weight, 1e-6)
    sum(layer(normed).square().sum() for layer in layers).backward()
    expected, hidden.grad = hidden.grad, None
    normed, _ = fused.Norm.apply(fused.norm_gradients, hidden, weight, 1e-6)
    loss = sum(layer(normed).square().sum() for layer in ours)
    for _ in range(2):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-12)
        hidden.grad = None
    fused.compiled.cache_clear()


def test_a_hook_sees_each_gradient(make_llama, tokenizer, batches: list[MicroBatch]) -> None:
    """Guards against hooks, as of sharding, that would see only the first micro-batch."""
    seen = []
    for model in pair(make_llama(len(tokenizer)).double()):
        norms: list[Tensor] = []
        mlp = model.blocks[0].layer.mlp
        mlp.gate_proj.weight.register_hook(lambda grad, norms=norms: norms.append(grad.norm()))
        mlp.up_proj.weight.register_post_accumulate_grad_hook(
            lambda weight, norms=norms: norms.append(weight.grad.norm())
        )
        for batch in batches:
            model(batch).backward()
        seen.append(norms)
    torch.testing.assert_close(*seen, rtol=1e-10, atol=0)
    assert len(seen[0]) == 2 * len(batches)


def test_without_gradients_the_layer_is_pytorchs() -> None:
    layer = linear.Linear.like(torch.nn.Linear(5, 3))
    hidden = torch.randn(2, 4, 5, requires_grad=True)
    expected = torch.nn.functional.linear(hidden, layer.weight, layer.bias)
    assert torch.equal(layer(hidden), expected)
    with torch.inference_mode():
        assert torch.equal(layer(hidden[0]), expected[0])
    layer(hidden[0].detach()).sum().backward()  # an input without gradient
    assert layer.weight.grad is not None
