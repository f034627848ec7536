"""Products in 8-bit floats: what they compute, what does not depend on them, and their kernels."""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
import torch
from conftest import PROMPT, flags, run_folder, seal, step_that
from test_device import WORKING
from test_plan import GPU, LLAMA_2_7B, ROWS
from test_recompute import LiveBytes, needs_small_products
from torch import Tensor
from transformers import LlamaForCausalLM
from triton_kernels import check_on_cpu, compiled_for_h100, load

import data
import perplexity
import plan
import train
from engine import cuda
from engine.compiling import check_gradients, compile_layers, prepare
from engine.cuda import checks, fp8
from engine.cuda.checks import Card
from engine.cuda.fp8 import E4M3, Fp8Linear, check_product, quantised, transposed
from engine.cuda.kernel_checks import wrong_rounding
from engine.cuda.kernels import fp8_kernels
from engine.cuda.linear import Linear
from engine.device import cpu_kernels, cuda_kernels, prepare_process
from engine.footprint import activation_bytes
from engine.llama import Llama
from engine.loading import load_model
from engine.measure import measure
from engine.optimizer import build_optimizer
from engine.packing import IGNORE, Example, Packer, collate, pack
from engine.plan import GIB, Device, Wishes, choose, saved_plan
from engine.ranks import job
from engine.recipe import Recipe, Recomputation, Rows
from engine.roofline import FP8_PRODUCTS, PASSES, PRODUCTS, card_named, expected_step
from engine.shape import ModelShape
from engine.sharding import shard
from engine.tokenizer import Tokenizer
from grading.dataset import Problem
from run.errors import UserError
from run.manifest import BEST, LAST, PREVIOUS
from run.method import Adapter
from run.training_json import read_description

CPU = torch.device("cpu")
KERNELS = cpu_kernels(with_onednn=False)
FILE = Path(cuda.__file__).with_name("fp8_kernels.py")
HALF_A_STEP = 2**-4  # of a mantissa of 3 bits, relative to the number
BFLOAT16 = 2**-8


@pytest.fixture(scope="module")
def examples(tokenizer: Tokenizer, problems: list[Problem]) -> list[Example]:
    return data.encode(tokenizer, problems[:24], PROMPT)


@pytest.fixture
def llama(model_folder: Path) -> Llama:
    return load_model(model_folder, torch.bfloat16, CPU, KERNELS).train()


def in_fp8(model: Llama) -> Llama:
    model = copy.deepcopy(model)
    model.kernels.use_fp8(model)
    return model


def gradients(model: Llama, examples: list[Example], tokens: int = 10**6) -> dict[str, Tensor]:
    model.zero_grad()
    train.accumulate_gradients(model, pack(examples, tokens, model.kernels), None)
    weights = model.pretrained.named_parameters()
    return {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(error(found[name], expected[name]) for name in expected)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16)


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_rounding_keeps_all_but_the_last_bits_of_each_number(size: float) -> None:
    """Guards against a wrong or missing scale, overflow, and gradients that vanish for their size.

    A row of zeros stays one, and factors multiply before the scales are chosen.
    """
    numbers = drawn(40, 96).mul(size)
    numbers[3] = 0
    factors = torch.linspace(0.1, 30, 96)
    for given in (None, factors):
        rounded, scales = quantised(numbers, given)
        exact = numbers.double() * (1 if given is None else given.double())
        assert rounded.dtype == E4M3 and scales.shape == (40, 1)
        assert rounded.float().abs().amax(-1)[exact.any(-1)].eq(fp8.LARGEST).all()
        errors = (rounded.double() * scales - exact).abs()
        # Of the smallest numbers, it is half of the smallest step.
        assert (errors <= exact.abs() * HALF_A_STEP + scales * 2**-10 * 1.01).all()
        assert not rounded[3].float().any()


def test_a_row_is_rounded_as_if_it_were_alone() -> None:
    """Guards against a scale that depends on the tokens beside it, as one of a whole tensor does.

    It is the number of a token that makes a loss depend on how a step is split.
    """
    numbers = drawn(40, 96)
    numbers[7] *= 1000
    rounded, scales = quantised(numbers)
    for row in range(40):
        alone, scale = quantised(numbers[row : row + 1])
        assert torch.equal(alone.float(), rounded[row : row + 1].float())
        assert scale == scales[row]


def test_a_transpose_has_the_same_numbers() -> None:
    """Guards against a backward pass through another weight than the forward pass had."""
    numbers = drawn(48, 96)
    rounded, scales = quantised(numbers)
    turned = transposed(numbers, scales.flatten())
    assert turned.is_contiguous() and torch.equal(turned.T.float(), rounded.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """Guards against a fault that training would not see, since rounding made a number of it."""
    numbers = drawn(4, 32)
    numbers[2, 5] = bad
    layer = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    found = Fp8Linear.like(layer)(numbers.requires_grad_())
    assert found.isfinite().all(-1).tolist() == [True, True, False, True]


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_computes_with_the_rounded_numbers_and_keeps_the_weights_gradient(
    has_bias: bool,
) -> None:
    """Guards against scales of the wrong side, a lost bias, and rounding where there is to be none.

    The reference multiplies what `quantised` returns in float64. The gradient of the weight is
    that of `Linear`, to the bit, over several micro-batches.
    """
    layer = torch.nn.Linear(96, 48, bias=has_bias, dtype=torch.bfloat16)
    layer.weight.data[5] *= 50  # so that the rows' scales differ
    plain, rounded = Linear.like(copy.deepcopy(layer)), Fp8Linear.like(copy.deepcopy(layer))
    for seed in range(3):
        grad = drawn(20, 48, seed=seed + 10)
        inputs = [drawn(20, 96, seed=seed).requires_grad_() for _ in range(2)]
        output = rounded(inputs[0])
        output.backward(grad)
        plain(inputs[1]).backward(grad)
        weight, scales = (each.double() for each in quantised(layer.weight))
        tokens, token_scales = (each.double() for each in quantised(inputs[0].detach()))
        expected = (tokens * token_scales) @ (weight * scales).T
        if has_bias:
            expected += layer.bias
        assert error(output, expected) < BFLOAT16
        turned, turned_scales = (each.double() for each in quantised(grad, scales.flatten()))
        assert error(inputs[0].grad, (turned * turned_scales) @ weight) < BFLOAT16
        assert 0.005 < error(inputs[0].grad, inputs[1].grad) < 0.05
    for (name, found), expected in zip(rounded.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name


def test_where_nothing_is_trained_a_layer_is_as_any_other() -> None:
    """Guards against a validation loss of other numbers than the checkpoint's."""
    layer = torch.nn.Linear(32, 16, dtype=torch.bfloat16)
    rounded = Fp8Linear.like(layer)
    hidden = drawn(5, 32)
    with torch.no_grad():
        assert torch.equal(rounded(hidden), layer(hidden))
    assert torch.equal(rounded(drawn(2, 5, 32)), layer(drawn(2, 5, 32)))  # Transformers' own pass
    assert not torch.equal(rounded(hidden), layer(hidden))
    assert torch.equal(rounded.eval()(hidden), layer(hidden))


# ---------------------------------------------------------------- a model


def test_a_model_in_fp8_has_nearly_its_gradient_and_exactly_its_validation_loss(
    llama: Llama, examples: list[Example]
) -> None:
    """Guards against a layer that is left out, or a head that is not, and an evaluation in FP8."""
    rounded = in_fp8(llama)
    layers = [name for name, one in rounded.pretrained.named_modules() if type(one) is Fp8Linear]
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    found, expected = gradients(rounded, examples), gradients(llama, examples)
    assert 0.01 < largest_error(found, expected) < 0.15
    assert measure(rounded, examples, 512) == measure(llama, examples, 512)


def test_a_gradient_does_not_depend_on_the_micro_batches(
    llama: Llama, examples: list[Example]
) -> None:
    """Guards against scales of a whole tensor, which change with the rows that lie beside a row.

    One outlier shows it: a token whose numbers are large. Only the order of additions differs.
    """
    weight = llama.embedding.weight
    weight.data[examples[0].input_ids[0]] *= 64
    rounded = in_fp8(llama)
    whole, split = (gradients(rounded, examples, tokens) for tokens in (10**6, 256))
    plain = [gradients(llama, examples, tokens) for tokens in (10**6, 256)]
    assert largest_error(split, whole) < 2 * largest_error(*plain) < 0.03


@pytest.mark.parametrize(("recomputed", "parts"), [(2, True), (1, False), (0, True)])
def test_recomputed_layers_give_the_same_bits(
    llama: Llama, examples: list[Example], recomputed: int, parts: bool
) -> None:
    """Guards against a forward pass that rounds otherwise when it is repeated."""
    rounded = in_fp8(llama)
    rounded.recomputes_parts = False
    expected = gradients(rounded, examples, 512)
    rounded.recomputed_blocks, rounded.recomputes_parts = recomputed, parts
    found = gradients(rounded, examples, 512)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_of_a_gpu_are_replaced_and_compiled_ones_agree(
    llama: Llama, model_folder: Path, examples: list[Example]
) -> None:
    """Guards against FP8 that only a CPU's layers have, and none beside compiled operations."""
    kernels = replace(KERNELS, replace_linear_layers=cuda_kernels(CPU).replace_linear_layers)
    model = in_fp8(load_model(model_folder, torch.bfloat16, CPU, kernels))
    assert type(model.head) is Linear
    assert type(model.blocks[0].layer.mlp.down_proj) is Fp8Linear
    expected = gradients(in_fp8(llama), examples)
    compile_layers(model)
    found = gradients(model.train(), examples)
    check_gradients(found, expected)
    assert largest_error(found, gradients(llama, examples)) > 0.01


def test_adapters_train_beside_a_base_in_fp8(
    model_folder: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against adapters that are rounded, a base that is not, and gradients of the base."""
    monkeypatch.setattr(fp8, "add_gradient_of_weight", lambda *_: pytest.fail("nobody wants it"))
    adapter = Adapter("base", "bfloat16", False, 16, 32, False, 0.0, 0, None)
    model = load_model(model_folder, torch.bfloat16, CPU, KERNELS, adapter).train()
    for layer in model.stored.layers:
        layer.up.weight.data.copy_(drawn(*layer.up.weight.shape) / 50)
    rounded = in_fp8(model)
    for layer in rounded.stored.layers:
        assert type(layer.base_layer) is Fp8Linear
        assert type(layer.up) is type(layer.down) is not Fp8Linear
    calls, multiply = [], fp8.scaled_product

    def counted(*given: Tensor) -> Tensor:
        calls.append(given)
        return multiply(*given)

    monkeypatch.setattr(fp8, "scaled_product", counted)
    found, expected = gradients(rounded, examples), gradients(model, examples)
    assert all("lora_" in name for name in found)
    assert 0.01 < largest_error(found, expected) < 0.15
    # Of all 14 layers, the first three need no gradient of their input.
    assert len(calls) == 14 + 11


def train_in_fp8(model_folder: Path, rows: list[Example], file: Path | None) -> list[float]:
    """Two steps by all processes of a job: the losses and norms, and what validation finds."""
    with job(CPU) as here:
        model = load_model(model_folder, torch.bfloat16, CPU, KERNELS, ranks=here)
        shard(model, None, True)
        prepare(model, Recomputation(1, True), False, fp8=True)
        assert sum(type(one) is Fp8Linear for one in model.modules()) == 2 * 7
        optimizer = build_optimizer(model.trained, 1e-3, (0.9, 0.999), 1e-8, 0.0)
        packer, numbers = Packer(data.Batches(rows, 12, seed=0), here), []
        for step in range(2):
            batch = packer.batch(step)
            result = train.train_step(model, optimizer, batch, 1e-3, 300, 1.0, packer)
            numbers += [result.loss, result.grad_norm]
        numbers.append(measure(model, rows[:5], 300).loss)
        if file and here.is_main:
            torch.save(numbers, file)
        return numbers


def test_several_processes_train_in_fp8_as_one_does(
    tmp_path: Path, model_folder: Path, examples: list[Example]
) -> None:
    """Guards against layers that FSDP no longer knows, and slices of weights that are rounded."""
    jobs.run(2, tmp_path, train_in_fp8, model_folder, examples, tmp_path / "found")
    found = torch.load(tmp_path / "found", weights_only=True)
    # bfloat16 rounds sums in another order by up to 4e-4 here. Without FP8 it would be 1.4e-2.
    assert found == pytest.approx(train_in_fp8(model_folder, examples, None), rel=2e-3)


# ---------------------------------------------------------------- a run


def test_a_run_in_fp8_learns_resumes_to_the_same_bits_and_is_no_other(
    call: Callable[..., Any], settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a setting that does nothing, and a run that goes on in another arithmetic."""
    settings |= {"dtype": "bfloat16", "fp8": "true", "epochs": "1"}
    whole, cut = settings | {"run_name": "whole"}, settings | {"run_name": "cut"}
    assert "in bfloat16 with products in FP8" in call(train, *flags(whole)).out
    plain = settings | {"run_name": "plain", "fp8": "false"}
    prepared = []
    monkeypatch.setattr(train, "prepare_process", lambda *_, fp8: prepared.append(fp8))
    assert call(train, *flags(plain)).code == 0
    with pytest.raises(KeyboardInterrupt):
        train.main(train.read_arguments(flags(cut))[0], step=step_that(raise_interrupt, at=4))
    changed = call(train, *flags(cut | {"fp8": "false"}))
    changed.assert_user_error("fp8 was true and is false")
    assert call(train, *flags(cut)).code == 0
    plans = [read_description(run_folder(one) / LAST)["plan"] for one in (whole, cut, plain)]
    assert [one["recipe"]["fp8"] for one in plans] == [True, True, False]
    files = [run_folder(one) / LAST / "model.safetensors" for one in (whole, cut, plain)]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2] and prepared[:2] == [False, True]
    for found in ({"dtype": "float32"}, {}):  # evaluation has no such products
        best = str(run_folder(whole) / BEST)
        assert call(perplexity, "--ckpt", best, *flags(found)).code == 0


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_from_before_there_was_fp8_goes_on_without_it(
    call: Callable[..., Any], stopped: Path, settings: dict[str, str]
) -> None:
    """Guards against a run whose arithmetic changes in the middle."""
    for name in (LAST, PREVIOUS):
        file = stopped / name / "training.json"
        description = json.loads(file.read_text())
        del description["settings"]["fp8"], description["plan"]["recipe"]["fp8"]
        file.write_text(json.dumps(description))
        seal(stopped / name)
    rounded = settings | {"fp8": "true", "dtype": "bfloat16"}
    call(train, *flags(rounded)).assert_user_error("fp8 was false and is true")
    outcome = call(train, *flags(settings))
    assert outcome.code == 0 and "last at step 8 of 14" in outcome.out, outcome.err


# ---------------------------------------------------------------- its plan


def test_a_plan_from_before_there_was_fp8_is_kept_without_it() -> None:
    device, recipe = Device("NVIDIA H100", 80 * GIB), Recipe()
    made = choose(LLAMA_2_7B, recipe, GPU, ROWS, device, Wishes())
    record = json.loads(json.dumps(asdict(made)))
    assert not record["recipe"].pop("fp8")
    assert saved_plan(record, recipe, device, Wishes()).needed == made.needed
    assert saved_plan(record, replace(recipe, fp8=True), device, Wishes()) is None


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_plan_expects_two_products_of_each_layer_to_be_faster(method: str) -> None:
    """Guards against a gain that a card without such products would not have, and a free one.

    Rounding reads 2 bytes of a number and writes 1: of each input, of each gradient of an output,
    and in each micro-batch of each weight, once for each product.
    """

    def seconds(name: str, recipe: Recipe, blocks: int) -> float:
        how = 8192, Recomputation(blocks, False), True
        return expected_step(LLAMA_2_7B, recipe, ROWS, card_named(name), *how).seconds

    card, plain = card_named("H100"), Recipe(method, rank=64)
    rounded = replace(plain, fp8=True)
    sides, weights = LLAMA_2_7B.products.values(), LLAMA_2_7B.block_products
    tokens = ROWS.tokens * ROWS.batch_size
    for blocks in (0, 32):
        before, after = (seconds("H100", recipe, blocks) for recipe in (plain, rounded))
        passes = 2 * 32 + blocks  # of which those of recomputed blocks leave the last product out
        flops = 2 * tokens * (passes * weights - blocks * 4096 * 11008)
        spared = 1 / (card.flops * PRODUCTS) - 1 / (card.fp8_flops * FP8_PRODUCTS)
        numbers = tokens * sum((32 + blocks) * inputs + 32 * outputs for inputs, outputs in sides)
        numbers -= tokens * blocks * 11008
        numbers += math.ceil(tokens / 8192) * (passes * weights - blocks * 4096 * 11008)
        added = 3 * numbers / (card.bandwidth * PASSES)
        assert before - after == pytest.approx(flops * spared - added)
        assert seconds("A100", rounded, blocks) > seconds("A100", plain, blocks)


@needs_small_products
@pytest.mark.parametrize("parts", [True, False])
def test_the_peak_of_few_tokens_is_what_is_counted(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    """Guards against rounded weights that are not counted, beside which few tokens are small."""
    monkeypatch.setattr(fp8, "NUMBERS_AT_ONCE", 2**10)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    model = in_fp8(Llama(make_llama(50, **shape).bfloat16(), KERNELS).train())
    model.recomputes_parts = parts
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    batch = collate([Example([1] * 65, [IGNORE] * 2 + [1] * 63)], KERNELS)
    with LiveBytes(model) as live:
        model(batch).backward()
    rows = Rows(64, 65, batch.num_labels / batch.num_tokens, 1)
    recipes, how = (Recipe(fp8=True), Recipe()), Recomputation(0, parts)
    size = ModelShape(model.config, torch.bfloat16)
    (kept, *beyond), (_, *without) = (
        activation_bytes(size, recipe, KERNELS, rows, batch.num_tokens, how) for recipe in recipes
    )
    assert max(beyond) > 1.2 * max(without)
    assert kept + max(beyond) == pytest.approx(live.most, rel=0.04)


def test_a_plan_for_a_card_without_such_products_is_refused(
    call: Callable[..., Any], settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(WORKING, cards=(Card("NVIDIA A10G", (8, 6)),))
    monkeypatch.setattr(plan, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(checks, "find_machine", lambda: machine)
    typed = flags(settings | {"fp8": "true", "dtype": "bfloat16"})
    outcome = call(train, "--plan", *typed)
    outcome.assert_user_error("fp8 true: NVIDIA A10G has compute capability 8.6", "set fp8 false")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_the_plan_proposes_can_be_typed(
    call: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    """Guards against a cure that is refused in turn, and is expected to be faster than it is."""
    LLAMA_2_7B.config.save_pretrained(tmp_path)
    card = "--plan", "--model", str(tmp_path), "--device_memory", "24"
    lines = call(train, *card, "--fp8", "true", "--method", method).out.splitlines()
    proposed = [line.split("  (")[0].split() for line in lines if " --method qlora" in line]
    assert proposed and all("--fp8" in words for words in proposed)
    for speed, *words in proposed:
        assert f"expected at best: {speed} tokens a second" in call(train, *card, *words).out


# ---------------------------------------------------------------- where it can't be


@pytest.mark.parametrize(
    ("card", "fragment"),
    [
        (Card("NVIDIA A100-SXM4-80GB", (8, 0)), "80GB has compute capability 8.0, and pr"),
        (Card("NVIDIA RTX A6000", (8, 6)), "products in 8-bit floats need 8.9 or higher: set fp8"),
        (Card("NVIDIA GeForce RTX 4090", (8, 9)), None),
        (Card("NVIDIA H100 80GB HBM3", (9, 0)), None),
    ],
)
def test_a_card_without_such_products_is_refused_before_anything_is_loaded(
    card: Card, fragment: str | None
) -> None:
    machine = replace(WORKING, cards=(card,))
    check = partial(prepare_process, torch.device("cuda"), torch.bfloat16, machine)
    check(fp8=False)
    if fragment is None:
        return check(fp8=True)
    with pytest.raises(UserError, match=fragment):
        check(fp8=True)


@pytest.mark.parametrize(
    ("others", "fragment"),
    [
        ({"dtype": "float32"}, "fp8: true is not for dtype float32: set fp8 false, or another dty"),
        ({"dtype": "bfloat16", "method": "qlora"}, "fp8: true is not for method qlora"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    call: Callable[..., Any], settings: dict[str, str], others: dict[str, str], fragment: str
) -> None:
    call(train, *flags(settings | {"fp8": "true"} | others)).assert_user_error(fragment)


def test_sizes_that_such_products_do_not_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"40 inputs and 32 outputs.*multiples of 16: set fp8 fal"):
        check_product(32, 40, CPU)
    check_product(32, 48, CPU)


@pytest.mark.parametrize(
    ("fault", "fragment"),
    [
        (
            RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"),
            r"fail here \(.*NOT_SUPPORTED\): set fp8 fal",
        ),
        (2.0, r"32 inputs and 16 outputs differs by 10[01]% .* the 6% of rounding: set fp8 f"),
        (math.nan, r"differs by nan% .* the 6% of"),
    ],
)
def test_products_that_fail_or_are_wrong_are_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, fault: Any, fragment: str
) -> None:
    """Guards against cards whose products cuBLAS lacks (pytorch #192707), or gets wrong."""
    multiply = fp8.scaled_product

    def scaled_product(*inputs: Any) -> Tensor:
        if isinstance(fault, Exception):
            raise fault
        return multiply(*inputs) * fault

    monkeypatch.setattr(fp8, "scaled_product", scaled_product)
    with pytest.raises(UserError, match=fragment):
        check_product(16, 32, CPU)


@pytest.mark.parametrize(("factor", "differs"), [(3.0, "(198|199|20[0-9])%"), (math.nan, "nan%")])
def test_gradients_that_are_wrong_are_refused_too(
    monkeypatch: pytest.MonkeyPatch, factor: float, differs: str
) -> None:
    """Guards against a check of the forward pass alone."""
    factors, multiply = iter([1, factor]), fp8.scaled_product
    monkeypatch.setattr(fp8, "scaled_product", lambda *given: multiply(*given) * next(factors))
    with pytest.raises(UserError, match=f"differs by {differs}"):
        check_product(16, 32, CPU)


def cut_off(numbers: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `quantised`, but each number becomes the next one towards zero."""
    exact = numbers.float() if factors is None else numbers * factors
    scales = quantised(numbers, factors)[1]
    rounded = (exact / scales).to(E4M3)
    too_large = rounded.float().abs() > (exact / scales).abs()
    return (rounded.view(torch.uint8) - too_large.to(torch.uint8)).view(E4M3), scales


def test_numbers_that_are_cut_off_are_refused() -> None:
    """Guards against outputs that are a twelfth too small, all of them."""
    rounding = fp8.Rounding(cut_off, lambda one, scales: cut_off(one)[0].T.contiguous())
    with pytest.raises(UserError, match=r"differs by [89]%"):
        check_product(64, 512, CPU, rounding)
    check_product(64, 512, CPU)


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_device_that_fails_is_not_taken_for_one_without_such_products(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(fp8, "scaled_product", fail)
    with pytest.raises(type(fault)):
        check_product(16, 32, CPU)


# ---------------------------------------------------------------- its kernels


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (130, 80), (128, 64), (37, 304)])
def test_the_kernels_round_as_pytorch_does(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    """Guards against rows or columns that are left out, or that lie apart in memory.

    Of numbers that need no rounding, which Triton's interpreter gets wrong.
    """
    kernels = load(FILE, monkeypatch, True)
    exact = drawn(rows, columns).mul(100).clamp(-fp8.LARGEST, fp8.LARGEST).to(E4M3).bfloat16()
    exact[:, 5] = fp8.LARGEST
    numbers = exact * 2.0 ** torch.arange(rows).remainder(9).sub(5)[:, None].bfloat16()
    factors = 2.0 ** torch.arange(columns).remainder(3)
    # Of a gradient that was sliced, each row lies apart from the next one.
    apart = torch.cat([numbers, numbers], -1)[:, :columns]
    for given in ((numbers,), (apart,), ((numbers / factors).bfloat16(), factors)):
        rounded, scales = kernels.quantised(*given)
        assert torch.equal(rounded.bfloat16(), exact)
        assert torch.equal(scales, quantised(*given)[1])
    turned = kernels.transposed(numbers, scales.flatten())
    assert turned.is_contiguous() and torch.equal(turned.T.bfloat16(), exact)


@pytest.mark.parametrize("columns", [4096, 11008])
@pytest.mark.parametrize("has_factors", [True, False])
def test_rounding_reads_16_bytes_at_a_time_and_keeps_a_row_in_registers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: int, has_factors: bool
) -> None:
    """Guards against the second reading of each number that torch.compile would make."""
    kernels = load(FILE, monkeypatch, False)
    block = 2 ** (columns - 1).bit_length()
    constants = {
        "columns": columns,
        "block": block,
        "largest": fp8.LARGEST,
        "smallest": fp8.SMALLEST,
    }
    types = {"rounded": "*fp8e4nv", "scales": "*fp32"}
    if has_factors:
        types["factors"] = "*fp32"
    else:
        constants["factors"] = None
    code, said = compiled_for_h100(
        kernels._quantise,
        types,
        constants,
        tmp_path,
        num_warps=kernels.warps(block),
        **kernels.ROUNDED,
    )
    assert "0 bytes spill stores" in said
    loads = re.findall(r"ld\.global[.\w]*", code)
    numbers = block // (32 * kernels.warps(block))  # that a thread has
    assert loads.count("ld.global.v4.b32") == len(loads)
    assert len(loads) == numbers // 8 + (numbers // 4 if has_factors else 0)
    assert "cvt.rn.satfinite.e4m3x2" in code


def test_a_transpose_is_written_16_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guards against single bytes, of which each takes as long as 32 adjacent ones."""
    kernels = load(FILE, monkeypatch, False)
    constants = {"rows": 4096, "columns": 4096}
    constants |= {"block_rows": kernels.ROWS, "block_columns": kernels.COLUMNS}
    types = {"rounded": "*fp8e4nv", "scales": "*fp32"}
    code, said = compiled_for_h100(
        kernels._transpose, types, constants, tmp_path, **kernels.ROUNDED
    )
    assert "0 bytes spill stores" in said
    assert set(re.findall(r"st\.global[.\w]*", code)) == {"st.global.v4.b32"}


@pytest.fixture
def undecided() -> Iterator[None]:
    """As in a new process, which has not asked yet."""
    fp8_kernels.cache_clear()
    yield
    fp8_kernels.cache_clear()


def test_where_the_kernels_do_not_run_pytorch_rounds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, undecided: None
) -> None:
    """Guards against a run that ends for want of a C compiler, or is slow in silence."""

    def fail() -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr("engine.cuda.kernels._import_fp8_kernels", fail)
    assert fp8_kernels("cpu") is None and capsys.readouterr().out == ""
    assert fp8_kernels("cuda") is None and fp8_kernels("cuda") is None
    out = capsys.readouterr().out
    assert "fp8: " in out and "No module named 'triton'" in out and out.count("\n") == 1


def without_factors(numbers: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return quantised(numbers)


def with_larger_scales(*given: Any) -> tuple[Tensor, Tensor]:
    rounded, scales = quantised(*given)
    return rounded, scales * 1.2


def of_other_rows(numbers: Tensor, scales: Tensor) -> Tensor:
    return transposed(numbers.flip(0), scales.flip(0))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"quantised": without_factors}, ["rounding of products"]),
        ({"quantised": with_larger_scales}, ["rounding", "rounding of products"]),
        ({"transposed": of_other_rows}, ["transpose"]),
        ({"quantised": cut_off}, ["rounding", "rounding of products"]),
    ],
)
def test_wrong_rounding_is_found_before_it_is_used(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    undecided: None,
    changes: dict[str, Any],
    wrong: list[str],
) -> None:
    """Guards against a run that trains on the numbers of a compiler's fault."""
    kernels = SimpleNamespace(**{"quantised": quantised, "transposed": transposed} | changes)
    monkeypatch.setattr("engine.cuda.kernels._import_fp8_kernels", lambda: kernels)
    check_on_cpu(monkeypatch, wrong_rounding)
    assert fp8_kernels("cuda") is (None if wrong else kernels)
    out = capsys.readouterr().out
    assert out.count("\n") == bool(wrong) and ", ".join(wrong) in out


def test_a_gpus_layers_round_by_the_kernels(llama: Llama, examples: list[Example]) -> None:
    """Guards against kernels that are found and never called."""
    calls = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (calls.append(function.__name__), function(*given))[1]

    kernels = SimpleNamespace(quantised=counted(quantised), transposed=counted(transposed))
    rounded = copy.deepcopy(llama)
    fp8.use_fp8(lambda: kernels, rounded)
    calls.clear()
    gradients(rounded, examples[:3])
    layers = 2 * 7
    assert calls.count("quantised") == 3 * layers and calls.count("transposed") == layers
