"""LoRA and QLoRA: only adapters learn, their files are PEFT's, and the base stays as it is."""

import copy
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from conftest import PROMPT, Killed, flags, kill, make_config, run_folder, seal, step_that, tree
from safetensors.torch import load_file, save_file
from torch import nn, overrides
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import data
import engine
import evaluate
import merge
import perplexity
import train
from engine import llama, loading, memory, nf4, packing
from engine.compiling import compile_layers
from engine.cuda.layers import fused_weights
from engine.decoding import greedy_decode
from engine.device import cpu_kernels, cuda_kernels
from engine.footprint import activation_bytes
from engine.llama import Llama
from engine.loading import check_fits, load_model
from engine.lora import TARGETS, AdaptedLinear, _merged, inject, merge_adapters
from engine.nf4 import dequantised
from engine.optimizer import checkpoint_bytes
from engine.recipe import Recipe, Recomputation, Rows, gradient_bytes, state_bytes, weight_bytes
from engine.shape import read_shape
from engine.state import ThroughPageLocked, copied
from engine.tokenizer import Tokenizer
from grading.dataset import Problem
from run.checkpoint import save_checkpoint
from run.errors import UserError
from run.manifest import BEST, LAST
from run.method import Adapter, adapter_of
from run.shell import evaluation_command

CPU = torch.device("cpu")
KERNELS = cpu_kernels(with_onednn=False)
ROOT = Path(train.__file__).parent
NEW = Adapter("base", "float32", False, 4, 8, False, 0.0, 0, None)
EXACT = {"rtol": 0, "atol": 1e-10}
# PEFT's own use of a name that Transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def shaken(model: Llama) -> Llama:
    """Gives the adapters weights that do something: ``up`` begins with zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.trained:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def examples(tokenizer: Tokenizer, problems: list[Problem]) -> list[packing.Example]:
    return data.encode(tokenizer, problems[:9], PROMPT)


@pytest.fixture
def adapted(settings: dict[str, str], wide_folder: Path, how: str) -> dict[str, str]:
    """Flags of a run of adapters."""
    settings |= {"method": how, "model": str(wide_folder), "lora_rank": "4", "epochs": "1"}
    settings |= {"lora_dropout": "0.2", "checkpoint_steps": "3"}
    return settings


# Most tests below read the same two finished runs, of 7 steps each.
@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, wide_folder: Path, data_folder: Path
) -> dict[str, dict[str, str]]:
    found = {}
    before = tree(wide_folder)
    for how in ("lora", "qlora"):
        found[how] = {
            "model": str(wide_folder),
            "dataset": str(data_folder),
            "output_dir": str(tmp_path_factory.mktemp(how)),
            "run_name": "run",
            "method": how,
            "lora_rank": "4",
            "lora_rslora": "true",
            "max_length": "256",
            "validation_size": "17",
            "epochs": "1",
            "batch_size": "4",
            "micro_batch_tokens": "256",
            "learning_rate": "1e-2",
            "dtype": "float32",
            "max_new_tokens": "8",
            "wandb_mode": "disabled",
        }
        train.main(make_config(found[how]), report=lambda *_: None)
    assert tree(wide_folder) == before
    return found


@pytest.fixture(params=["lora", "qlora"])
def how(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def best(runs: dict[str, dict[str, str]], how: str) -> Path:
    return run_folder(runs[how]) / BEST


# ---------------------------------------------------------------- gradients


def gradients(model: Llama, examples: list[packing.Example]) -> dict[str, torch.Tensor]:
    train.accumulate_gradients(model.train(), packing.pack(examples, 300, model.kernels), None)
    weights = model.pretrained.named_parameters()
    return {name: weight.grad for name, weight in weights if weight.grad is not None}


def peft_gradients(
    folder: Path, adapter: Adapter, ours: Llama, examples: list[packing.Example]
) -> dict[str, torch.Tensor]:
    """By plain autograd through Transformers' and PEFT's own layers, one row at a time."""
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.is_rank_stabilised,
        target_modules=list(TARGETS),
    )
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, ours.stored.state_dict())
    labels = sum(len(row.labels) - row.labels.count(packing.IGNORE) for row in examples)
    for row in examples:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1].double()
        loss = nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
        (loss / labels).backward()
    return {name: weight.grad for name, weight in base.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("device", ["CPU", "AMD's CPU", "GPU"])
@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_gradients_are_those_of_peft(
    model64: Llama,
    model_folder: Path,
    examples: list[packing.Example],
    recomputed: int,
    device: str,
) -> None:
    """Guards against a wrong scale, a lost path to the input, and activations that are not saved.

    Also where the first block is recomputed, whose input has no gradient.
    """
    adapter = replace(NEW, dtype="float64", is_rank_stabilised=recomputed == 1)
    kernels = cpu_kernels(with_onednn=device == "AMD's CPU")
    if device == "GPU":
        kernels = replace(kernels, replace_linear_layers=cuda_kernels(CPU).replace_linear_layers)
    ours = shaken(load_model(model_folder, torch.float64, CPU, kernels, adapter))
    ours.recomputed_blocks = recomputed
    if device == "GPU":
        assert type(ours.stored.layers[0].base_layer) is type(ours.head) is not nn.Linear
    expected = peft_gradients(model_folder, adapter, ours, examples)
    found = gradients(ours, examples)
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 2
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


def test_only_adapters_get_gradients(wide_folder: Path, examples: list[packing.Example], how: str):
    """Guards against a base that learns, and products for gradients that nobody wants."""
    shapes = []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        shapes.append((left.shape[0], right.shape[1]))
        return left @ right

    kernels = replace(KERNELS, product=product, add_product=lambda *_: 1 / 0)
    adapter = replace(NEW, is_base_quantised=how == "qlora")
    model = shaken(load_model(wide_folder, torch.float32, CPU, kernels, adapter))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    found = gradients(model, examples)
    trained = {name for name, weight in model.pretrained.named_parameters() if "lora_" in name}
    assert found.keys() == trained and all(grad.abs().max() > 0 for grad in found.values())
    assert tuple(model.head.weight.shape) not in shapes and shapes
    torch.optim.SGD(model.trained, lr=1.0).step()
    changed = {name for name, weight in model.named_parameters() if (weight != before[name]).any()}
    assert changed == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(changed) == len(trained)


def test_a_base_in_4_bits_computes_with_what_it_dequantises_to(
    wide_folder: Path, examples: list[packing.Example]
) -> None:
    """Guards against another number in the product than in the merge, and a lost gradient.

    bitsandbytes' own layer loses it after a forward pass in eval mode, on processors with bfloat16.
    """
    adapter = replace(NEW, is_base_quantised=True)
    model = shaken(load_model(wide_folder, torch.float32, CPU, KERNELS, adapter))
    plain = load_model(wide_folder, torch.float32, CPU, KERNELS, NEW)
    for weight, other in zip(plain.trained, model.trained, strict=True):
        weight.data.copy_(other.data)
    layers = zip(model.stored.layers, plain.stored.layers, strict=True)
    for layer, other in layers:
        packed = layer.base_layer.weight
        assert packed.dtype == torch.uint8 and packed.numel() == other.base_layer.weight.numel() / 2
        dequantised = merged_weight(layer) - layer.scale * layer.up.weight @ layer.down.weight
        errors = (dequantised - other.base_layer.weight).abs()
        assert errors.max() > 0 and (errors <= largest_errors(other.base_layer.weight)).all()
        other.base_layer.weight.data.copy_(dequantised)
    micro_batch = packing.collate(examples, KERNELS)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(micro_batch), plain.eval()(micro_batch))
    found, expected = gradients(model, examples), gradients(plain, examples)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(list(found.values()), list(expected.values()), rtol=1e-5, atol=1e-6)


def largest_errors(weight: torch.Tensor) -> torch.Tensor:
    """Of each number in NF4 with scales in 8 bits (arXiv:2305.14314), if the nearest is chosen."""
    blocks = weight.detach().view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    of_levels = (blocks / scales).unsqueeze(-1).sub(levels).abs().amin(-1) * scales
    # The 8 bits have what a scale differs from their mean by, in steps of at most 0.0141 of the
    # largest difference. 1e-6: the adapter was added to the weight and is subtracted from it.
    of_scales = 0.0141 / 2 * (scales - scales.mean()).abs().max()
    return (of_levels + of_scales + 1e-6).view_as(weight)


def merged_weight(layer: AdaptedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return _merged(layer, dtype).weight.detach()


def test_rows_that_are_no_whole_blocks_are_refused_on_a_cpu(model_folder: Path) -> None:
    """Guards against bitsandbytes' wrong numbers for them, which it gives without a word."""
    with pytest.raises(UserError, match=r"not a multiple of 64.*: set method lora"):
        load_model(model_folder, torch.float32, CPU, None, replace(NEW, is_base_quantised=True))


def test_rows_that_are_no_whole_blocks_are_for_a_gpu(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, devices = make_llama(420), []
    monkeypatch.setattr(nf4, "_quantised", lambda layer, device: devices.append(device) or layer)
    nf4.quantise(model, Path(), torch.device("cuda"))
    assert devices == [torch.device("cuda")] * 14


def test_a_layer_in_4_bits_keeps_its_bias(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Guards against a base without its biases, whose loss is that of another model."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "attention_bias": True, "mlp_bias": True}
    model = make_llama(420, **sizes)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.o_proj.bias)
        nn.init.normal_(layer.mlp.down_proj.bias)
    ends = [(layer.self_attn.o_proj.bias, layer.mlp.down_proj.bias) for layer in model.model.layers]
    nf4.quantise(model, Path(), CPU)
    hidden = torch.zeros(3, 64)
    for layer, (bias, other) in zip(model.model.layers, ends, strict=True):
        assert torch.equal(layer.self_attn.o_proj(hidden), bias.expand(3, 64))
        assert torch.equal(layer.mlp.down_proj(hidden), other.expand(3, 64))


def test_new_adapters_repeat_and_draw_nothing_else(
    wide_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a run that does not repeat, and a dropout that depends on the method; and
    against one of several GPUs that begins anew each time their adapters are gathered to decode."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    seeds_of_gpus: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds_of_gpus.append)
    one = load_model(wide_folder, torch.float32, CPU, None, replace(NEW, seed=1))
    assert torch.rand(1) == expected and seeds_of_gpus == []
    other, same = (
        load_model(wide_folder, torch.float32, CPU, None, replace(NEW, seed=seed))
        for seed in (2, 1)
    )
    pairs = zip(one.trained, other.trained, same.trained, strict=True)
    assert all(torch.equal(a, c) and (torch.equal(a, b) == (not a.any())) for a, b, c in pairs)


def test_adapters_have_the_dtype_of_the_model(wide_folder: Path, how: str) -> None:
    """Guards against products in float32 in bfloat16, and positions that are rounded to it."""
    adapter = replace(NEW, is_base_quantised=how == "qlora")
    model = load_model(wide_folder, torch.bfloat16, CPU, None, adapter)
    assert {weight.dtype for weight in model.trained} == {torch.bfloat16}
    assert model.rotary.inv_freq.dtype == torch.float32


def test_a_base_in_another_dtype_is_the_one_that_was_trained_with(wide_folder: Path) -> None:
    """Guards against an evaluation in float32 of other weights than those of a bfloat16 run."""
    adapter = replace(NEW, dtype="bfloat16")
    found = load_model(wide_folder, torch.float32, CPU, None, adapter).head.weight
    plain = load_model(wide_folder, torch.float32, CPU).head.weight
    assert torch.equal(found, plain.bfloat16().float()) and not torch.equal(found, plain)
    assert found.dtype == torch.float32  # which `equal` does not compare


def test_dropout_is_recomputed_as_it_was(
    wide_folder: Path, examples: list[packing.Example]
) -> None:
    """Guards against a gradient of other dropped inputs than those of the forward pass."""
    model = load_model(wide_folder, torch.float64, CPU, KERNELS, replace(NEW, dropout=0.5))
    shaken(model)
    found = []
    for model.recomputed_blocks in (0, 2):
        torch.manual_seed(0)
        found.append(copy.deepcopy(gradients(model, examples)))
        model.zero_grad()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_adapters_drop_the_share_of_their_inputs_that_is_set(wide_folder: Path) -> None:
    """Guards against a lora_dropout that is recorded and does nothing, and one in evaluation."""
    model = load_model(wide_folder, torch.float64, CPU, KERNELS, replace(NEW, dropout=0.25))
    layer = next(one for one in model.pretrained.modules() if isinstance(one, AdaptedLinear))
    inputs: list[torch.Tensor] = []
    layer.down.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    ones = torch.ones(500, layer.in_features, dtype=torch.float64)
    torch.manual_seed(0)
    for model_mode in (model.train, model.eval):
        model_mode()
        layer(ones)
    in_training, in_evaluation = inputs
    assert in_training.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (in_training == 0).double().mean() == pytest.approx(0.25, abs=0.008)
    assert torch.equal(in_evaluation, ones)


def test_compiled_layers_are_compared_by_what_is_trained(
    wide_folder: Path, examples: list[packing.Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a comparison that asks frozen weights for gradients."""
    model = shaken(load_model(wide_folder, torch.float32, CPU, KERNELS, replace(NEW, dropout=0.1)))
    monkeypatch.setattr("engine.compiling.FUSED", llama.EAGER)
    compile_layers(model)
    wrong = replace(llama.EAGER, swiglu=lambda gate, up: gate * up)
    monkeypatch.setattr("engine.compiling.FUSED", wrong)
    with pytest.raises(UserError, match="lora_"):
        compile_layers(model)


# ---------------------------------------------------------------- memory


def test_memory_counts_gradients_and_states_of_adapters_only(wide_folder: Path) -> None:
    """Guards against the memory of full fine-tuning, and against none for the adapters."""
    full = load_model(wide_folder, torch.bfloat16, CPU, KERNELS)
    model = load_model(wide_folder, torch.bfloat16, CPU, KERNELS, replace(NEW, dtype="bfloat16"))
    numbers = sum(weight.numel() for weight in model.trained)
    shapes = [weight.shape for name, weight in full.named_parameters() if "_proj" in name]
    assert numbers == 4 * sum(map(sum, shapes))
    assert checkpoint_bytes(model.trained) == (2 * numbers, 6 * numbers)
    shape, lora = read_shape(wide_folder, torch.bfloat16), Recipe("lora", rank=4)
    assert weight_bytes(shape, lora) == sum(weight.nbytes for weight in model.parameters())
    assert gradient_bytes(shape, lora) == 2 * numbers
    assert state_bytes(shape, lora) == 6 * numbers
    micro_batch = Rows(10, 10, 0.5, 1), 10, Recomputation(0, True)
    counted = [
        activation_bytes(shape, recipe, KERNELS, *micro_batch) for recipe in (Recipe(), lora)
    ]
    assert counted[1][0] - counted[0][0] == 10 * shape.layers * 7 * 4 * 2
    assert counted[0][1] - counted[1][1] == 4 * full.head.weight.numel()


def test_a_model_that_exceeds_the_device_is_refused_by_what_is_loaded(wide_folder: Path) -> None:
    """Guards against QLoRA refused where only LoRA does not fit, and the other way round."""
    full = load_model(wide_folder, torch.bfloat16, CPU, KERNELS)
    linears = sum(layer.weight.numel() for layer in full.modules() if type(layer) is nn.Linear)
    linears -= full.head.weight.numel()
    whole = sum(weight.numel() for weight in full.parameters())
    shapes = [weight.shape for name, weight in full.named_parameters() if "_proj" in name]
    adapters = 4 * sum(map(sum, shapes)) * 2
    lora = replace(NEW, base=str(wide_folder), dtype="bfloat16")
    qlora = replace(lora, is_base_quantised=True)
    bits = (whole - linears) * 2 + math.ceil(linears * (0.5 + 1 / 64 + 1 / 4096))
    for adapter, frozen in ((lora, 2 * whole), (qlora, bits)):
        exactly = frozen + adapters
        check_fits("any", torch.bfloat16, adapter, exactly)
        with pytest.raises(UserError, match="over the"):
            check_fits("any", torch.bfloat16, adapter, exactly - 1)


# ---------------------------------------------------------------- checkpoints


def test_a_resumed_run_equals_the_uninterrupted_one(call, adapted: dict[str, str]) -> None:
    """Guards against adapters that begin anew, and dropout or moments that are lost."""
    assert call(train, *flags(adapted)).code == 0
    expected = tree(run_folder(adapted) / LAST)
    adapted["run_name"] = "killed"
    with pytest.raises(Killed):
        call(train, *flags(adapted), step=step_that(kill, at=5))
    assert call(train, *flags(adapted)).code == 0
    found = tree(run_folder(adapted) / LAST)
    same = [name for name in expected if name.startswith(("adapter", "state"))]
    assert len(same) == 3 and all(found[name] == expected[name] for name in same)
    files = {path.name for path in (run_folder(adapted) / BEST).iterdir()}
    assert "adapter_model.safetensors" in files and not [f for f in files if f.startswith("model")]


@pytest.mark.parametrize("how", ["lora"])
def test_a_copy_beside_training_has_only_the_adapters(call, adapted: dict[str, str]) -> None:
    """Guards against 13 GB of frozen weights in host memory at each save."""
    copies = []

    def copy_to_host(_: Any, tensors: dict[str, torch.Tensor], *__: Any) -> dict[str, torch.Tensor]:
        copies.append(set(tensors))
        return copied(tensors)

    assert call(train, *flags(adapted), copy=copy_to_host).code == 0
    weights = [names for names in copies if any("proj" in name for name in names)]
    assert weights and all(len(names) == 2 * 7 * 2 for names in weights)
    saved = load_file(run_folder(adapted) / BEST / "adapter_model.safetensors")
    assert saved.keys() == weights[0]


def test_peft_loads_the_adapter(runs: dict[str, dict[str, str]], wide_folder: Path) -> None:
    """Guards against names, a scale or a file that only this program reads."""
    best = run_folder(runs["lora"]) / BEST
    adapter = replace(NEW, is_rank_stabilised=True, alpha=16, folder=best)
    ours = load_model(wide_folder, torch.float32, CPU, None, adapter)
    base = AutoModelForCausalLM.from_pretrained(wide_folder)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        plain = base(ids).logits.clone()
        theirs = peft.PeftModel.from_pretrained(base, best)(ids).logits
        torch.testing.assert_close(ours.pretrained(ids).logits, theirs)
    assert (theirs - plain).abs().max() > 0.1
    config = json.loads((best / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == runs["lora"]["model"]
    assert config["target_modules"] == sorted(TARGETS) and config["inference_mode"] is True


def predictions(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return sorted((row["id"], row["completion"]) for row in map(json.loads, lines))


def test_merged_and_unmerged_write_the_same_completions(
    call,
    best: Path,
    tmp_path: Path,
    runs: dict[str, dict[str, str]],
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a merge into other weights, with another scale, or rounded on the way.

    And against one that a GPU saves slowly.
    """

    def save(*arguments: Any) -> None:
        modes.extend(map(type, overrides._get_current_function_mode_stack()))
        save_checkpoint(*arguments)

    modes: list[type] = []
    monkeypatch.setattr(merge, "save_checkpoint", save)
    output = tmp_path / "merged"
    outcome = call(merge, "--ckpt", str(best), "--output", str(output))
    assert outcome.out.endswith(f"merged: {output}; next: {evaluation_command(output)}\n")
    assert ThroughPageLocked in modes
    assert outcome.code == 0 and not [n for n in tree(output) if n.startswith("adapter")]
    found = {}
    for name, folder in (("unmerged", best), ("merged", output)):
        results = tmp_path / name
        words = ["--ckpt", str(folder), "--output", str(results), "--max_new_tokens", "24"]
        assert call(evaluate, *words).code == 0
        found[name] = predictions(results)
    assert found["merged"] == found["unmerged"]
    assert len({completion for _, completion in found["merged"]}) > 1
    record = json.loads((output / "training.json").read_text())
    assert record["merged"]["base"]["model"] == runs[how]["model"] and "base" not in record
    assert load_file(output / "model.safetensors").keys() == {
        name for name, _ in LlamaForCausalLM.from_pretrained(output).named_parameters()
    }


def test_merged_and_unmerged_have_the_same_loss_in_bfloat16(
    wide_folder: Path, best: Path, examples: list[packing.Example], how: str
) -> None:
    """Guards against a delta that is rounded before it is added: within 0.03 % of the loss."""
    adapter = replace(NEW, is_base_quantised=how == "qlora", dtype="bfloat16", folder=best)
    adapter = replace(adapter, is_rank_stabilised=True, alpha=16)
    model = load_model(wide_folder, torch.bfloat16, CPU, KERNELS, adapter)
    micro_batch = packing.collate(examples, KERNELS)
    layer = model.stored.layers[-1]
    with torch.no_grad():
        delta = layer.up.weight.float() @ layer.down.weight.float() * layer.scale
        weight = layer.base_layer.weight
        weight = dequantised(weight) if how == "qlora" else weight
        once = merged_weight(layer, torch.bfloat16) == (weight.float() + delta).bfloat16()
        assert once.float().mean() > 0.999  # all but near-ties
        unmerged = model(micro_batch)
        merged = Llama(merge_adapters(model, torch.bfloat16), KERNELS).eval()(micro_batch)
        base = load_model(wide_folder, torch.bfloat16, CPU, KERNELS)(micro_batch)
    assert abs(merged / unmerged - 1) < 3e-4 < 0.1 < abs(base / unmerged - 1)


def test_a_bias_of_the_base_is_merged_along(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Guards against a merged model whose biases are what happened to be in memory."""
    pretrained = make_llama(50, attention_bias=True, mlp_bias=True)
    layers = inject(pretrained, NEW, torch.float32).layers
    hidden = torch.randn(3, 7, layers[0].in_features)
    with torch.no_grad():
        for weight in pretrained.parameters():
            weight.normal_()
        for layer in layers[:2]:
            torch.testing.assert_close(_merged(layer, torch.float32)(hidden), layer(hidden))


@pytest.mark.parametrize("change", [{"more": torch.zeros(1)}, None], ids=["more", "less"])
def test_an_adapter_with_other_weights_is_refused(
    runs: dict[str, dict[str, str]], wide_folder: Path, tmp_path: Path, change: dict | None
) -> None:
    """Guards against weights of a layer that this model does not have, left out in silence."""
    file = "adapter_model.safetensors"
    weights = load_file(run_folder(runs["lora"]) / BEST / file)
    weights = weights | change if change else dict(list(weights.items())[1:])
    save_file(weights, tmp_path / file)
    adapter = replace(NEW, is_rank_stabilised=True, alpha=16, folder=tmp_path)
    with pytest.raises(UserError, match="is not in both of the file and the model"):
        load_model(wide_folder, torch.float32, CPU, None, adapter)


def test_a_merge_overwrites_nothing_and_needs_an_adapter(
    call, runs: dict[str, dict[str, str]], wide_folder: Path, tmp_path: Path
) -> None:
    best = run_folder(runs["lora"]) / BEST
    call(merge, "--ckpt", str(best), "--output", str(tmp_path)).assert_user_error(
        f"{tmp_path}: exists already: name another folder with --output"
    )
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        call(merge, "--ckpt", str(best), "--output", str(tmp_path / name)).assert_user_error(
            f"{tmp_path / name}: exists already"
        )
        (tmp_path / name).unlink()
    inside, before = str(best / "merged"), tree(best.parent)
    call(merge, "--ckpt", str(best), "--output", inside).assert_user_error("is in a checkpoint")
    assert tree(best.parent) == before
    output = str(tmp_path / "merged")
    call(merge, "--ckpt", str(wide_folder), "--output", output).assert_user_error(
        f"{wide_folder}: contains no adapter of this program"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_merge_records_what_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the state of a training, which it has not, and the name of a home."""
    monkeypatch.setenv("HOME", "/nowhere/me")
    made = {"step": 7, "base": {"model": "b"}}
    source = SimpleNamespace(path="/nowhere/me/last", description=made | {"state": {"ranks": 1}})
    merged = {"adapter": "~/last", "weights": "w", "base": {"model": "b"}}
    assert merge.description(source, "w") == {"step": 7, "merged": merged}


def test_a_merge_is_not_done_by_many(
    call, runs: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against several processes that write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="type it without torchrun"):
        merge.main(*merge.read_arguments(["--ckpt", "best", "--output", str(tmp_path / "merged")]))


# ---------------------------------------------------------------- the base


def test_a_gpu_finds_the_base_from_any_folder_and_names_a_forgotten_method(
    call,
    runs: dict[str, dict[str, str]],
    wide_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a check of memory, which a CPU leaves out, that looks for the typed name."""
    monkeypatch.setattr(memory, "total_bytes", lambda device: 2**40)
    monkeypatch.chdir(tmp_path)
    settings = runs["lora"] | {"output_dir": str(tmp_path)}
    shutil.copytree(run_folder(runs["lora"]), run_folder(settings))
    # Typed as in the folder in which the run began.
    call(train, *flags(settings | {"model": wide_folder.name})).assert_user_error("finished")
    forgotten = {name: value for name, value in settings.items() if "lora" not in name}
    call(train, *flags(forgotten | {"method": "full"})).assert_user_error("method was 'lora'")


def test_another_base_is_refused_and_a_moved_one_is_named(
    call,
    runs: dict[str, dict[str, str]],
    wide_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against adapters on weights that they were not trained on."""
    shutil.copytree(run_folder(runs["lora"]), tmp_path / "run")
    moved, changed = tmp_path / "moved", tmp_path / "changed"
    for folder in (moved, changed):
        shutil.copytree(wide_folder, folder)
    file = changed / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    best, last = tmp_path / "run" / BEST, tmp_path / "run" / LAST
    expected = call(perplexity, "--ckpt", str(best), "--limit", "4").out.splitlines()[-2:]
    for folder in (best, last):
        description = json.loads((folder / "training.json").read_text())
        for where in (description["base"], description["settings"]):
            where["model"] = str(tmp_path / "gone")
        description["tokenizer"]["other_ids"] = True  # of which each script is to tell
        (folder / "training.json").write_text(json.dumps(description))
        seal(folder)
    words = ["--ckpt", str(best), "--limit", "4"]
    for script, more in ((perplexity, []), (evaluate, []), (merge, ["--output", "merged"])):
        use = words[:2] if script is merge else words
        call(script, *use, *more).assert_user_error(
            str(best), f"its base model {tmp_path / 'gone'} is not there any more", "--model DIR"
        )
        call(script, *use, *more, "--model", str(changed)).assert_user_error(
            f"{best}: was trained on other weights than those of model {tmp_path / 'gone'} now"
        )
    outcome = call(perplexity, *words, "--model", str(moved))
    assert outcome.code == 0 and outcome.out.splitlines()[-2:] == expected
    settings = runs["lora"] | {"output_dir": str(tmp_path), "epochs": "1"}
    call(train, *flags(settings | {"model": str(changed)})).assert_user_error("other weights")
    call(train, *flags(settings | {"model": str(tmp_path / "gone")})).assert_user_error(
        f"{last}: its base model {tmp_path / 'gone'} is not there any more", "--model DIR"
    )
    call(train, *flags(settings | {"model": str(moved)})).assert_user_error("this run is finished")
    for file in moved.glob("tokenizer*"):  # the adapter has its own
        file.unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--ckpt", str(best), "--model", str(moved), "--output"]
    monkeypatch.setattr(memory, "total_bytes", lambda device: 1)
    call(merge, *words, str(tmp_path / "large")).assert_user_error("GB of the device")
    monkeypatch.setattr(memory, "total_bytes", lambda device: 2**40)
    outcome = call(merge, *words, "~/merged", "--dtype", "bfloat16")
    assert outcome.code == 0, outcome.err
    assert f"model {best}: was trained by an older version" in outcome.out
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}

    def replaced(*arguments: Any) -> Any:
        with (best / "training.json").open("a") as file:
            file.write("\n")
        seal(best)
        return load_model(*arguments)

    monkeypatch.setattr(merge, "load_model", replaced)
    call(merge, *words, str(tmp_path / "late")).assert_user_error(
        "training has just saved another one"
    )


def test_an_adapter_is_no_base(call, runs: dict[str, dict[str, str]], tmp_path: Path) -> None:
    best = run_folder(runs["lora"]) / BEST
    settings = runs["lora"] | {"output_dir": str(tmp_path), "model": str(best)}
    call(train, *flags(settings)).assert_user_error("contains a PEFT adapter", "merge.py")


# ---------------------------------------------------------------- settings and packages


@pytest.mark.parametrize(
    ("name", "how"), [("peft", "lora"), ("peft", "qlora"), ("bitsandbytes", "qlora")]
)
def test_a_package_that_is_absent_is_named_with_its_version(
    call,
    settings: dict[str, str],
    runs: dict[str, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: str,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: 1 / 0)
    [pin] = re.findall(rf"^{name}==\S+$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    call(train, *flags(settings | {"method": how})).assert_user_error(
        f"method {how}: needs {pin}, which", f"pip install {pin}"
    )
    call(perplexity, "--ckpt", str(run_folder(runs[how]) / BEST)).assert_user_error(pin)


def test_an_adapter_has_the_settings_of_its_run() -> None:
    settings = {"method": "qlora", "model": "base", "dtype": "bfloat16", "lora_rank": 4}
    settings |= {"lora_alpha": 8, "lora_rslora": True, "lora_dropout": 0.25, "seed": 7}
    assert adapter_of(settings) == Adapter("base", "bfloat16", True, 4, 8, True, 0.25, 7, None)


def test_full_fine_tuning_needs_no_package_of_adapters(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file is imported, tests/test_layers.py looks."""
    for name in ("peft", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("lora", "nf4"):
        monkeypatch.delitem(sys.modules, f"engine.{name}")
        monkeypatch.delattr(engine, name)
    assert call(train, *flags(settings | {"epochs": "1"})).code == 0
    assert call(perplexity, "--ckpt", str(run_folder(settings) / BEST)).code == 0


def test_settings_that_do_nothing_are_refused(
    call, settings: dict[str, str], runs: dict[str, dict[str, str]]
) -> None:
    call(train, *flags(settings), "--lora_rank", "8").assert_user_error(
        "lora_rank: has no effect with method full: leave it out, or set method lora or qlora"
    )
    best = str(run_folder(runs["lora"]) / BEST)
    call(evaluate, "--ckpt", best, "--lora_rank", "8").assert_user_error(
        f"--lora_rank 8: {best} was trained with lora_rank 4: leave it out"
    )
    call(perplexity, "--ckpt", best, "--method", "qlora").assert_user_error(
        "was trained with method lora"
    )


def test_a_run_from_before_there_were_methods_trains_all_weights(
    call, settings: dict[str, str], stopped: Path
) -> None:
    """Guards against its last, which has no method, taken for an adapter's."""
    for name in (LAST, "previous"):
        file = stopped / name / "training.json"
        description = json.loads(file.read_text())
        for key in [key for key in description["settings"] if key.startswith(("method", "lora_"))]:
            del description["settings"][key]
        file.write_text(json.dumps(description))
        seal(stopped / name)
    call(train, *flags(settings), "--method", "lora").assert_user_error(
        "cannot resume with these changes: method was 'full' and is 'lora'"
    )
    call(evaluate, "--ckpt", str(stopped / LAST), "--method", "lora").assert_user_error(
        f"--method lora: {stopped / LAST} was trained with method full: leave it out"
    )
    assert call(train, *flags(settings)).code == 0


# ---------------------------------------------------------------- decoding on a GPU


@pytest.mark.parametrize("parts", [None, cuda_kernels(CPU).decoding_parts])
def test_decoding_sees_the_adapters(
    wide_folder: Path, how: str, parts: Any, examples: list[packing.Example]
) -> None:
    """Guards against fused or packed weights that leave the adapters out."""
    adapter = replace(NEW, is_base_quantised=how == "qlora")
    kernels = replace(cpu_kernels(with_onednn=True), decoding_parts=parts)
    if parts:
        kernels = replace(kernels, packed_weights=cuda_kernels(CPU).packed_weights)
    model = shaken(load_model(wide_folder, torch.float32, CPU, kernels, adapter))
    prompts = [row.input_ids[:12] for row in examples]
    decoding = greedy_decode(model, prompts, max_new_tokens=12, eos_token_ids=frozenset(), slots=4)
    found = {one.index: one.token_ids for one in decoding}
    ids = model.pretrained.generate(
        torch.tensor([prompts[0]]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert ids[0, 12:].tolist() == found[0]
    for layer in model.stored.layers:
        layer.up.weight.data.zero_()
    decoding = greedy_decode(model, prompts, max_new_tokens=12, eos_token_ids=frozenset(), slots=4)
    assert {one.index: one.token_ids for one in decoding} != found
    with fused_weights(model):
        assert hasattr(model.blocks[0].layer.mlp, "fused") == (how == "lora")
