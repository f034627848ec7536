"""8-bit moments: torchao's numbers, unbiased rounding, resuming to the bit, and honest counts."""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao
from conftest import PROMPT, die_and_resume, flags, gain, make_config, run_folder, seal
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import data
import plan
import train
from engine import adamw_8bit, loading, memory, packing
from engine.device import kernels_for
from engine.optimizer import build_optimizer, checkpoint_bytes, make_state, training_bytes
from engine.recipe import Recipe, state_bytes
from engine.shape import read_shape
from engine.state import pack_state, unpack_state
from engine.tokenizer import Tokenizer
from grading import dataset
from run import training_json
from run.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(train.__file__).parent
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# With and without 8 bits: 16 blocks, then too small, then no whole number of blocks.
SHAPES = (64, 64), (32,), (100, 50)


def eight_bit(
    parameters: list[torch.nn.Parameter],
    rate: float = 2e-5,
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    return build_optimizer(parameters, rate, betas, epsilon, decay, "adamw_8bit")


def random_weights(dtype: torch.dtype, shapes: tuple = SHAPES) -> list[torch.nn.Parameter]:
    """The same in each call."""
    random = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]


def steps(made: torch.optim.Optimizer, weights: list[torch.nn.Parameter], number: int) -> None:
    for _ in range(number):
        for weight in weights:
            weight.grad = weight.detach() * 0.1 + 1e-3
        made.step()


# ---------------------------------------------------------------- the step


def test_a_step_is_that_of_torchaos_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a decay, a correction or a scale of our own. Both run without a compiler."""
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ours, theirs = random_weights(torch.float32), random_weights(torch.float32)
    betas, epsilon = (0.8, 0.95), 1e-3  # none of them a default
    our = eight_bit(ours, 1e-2, 0.1, betas, epsilon)
    their = AdamW8bit(theirs, lr=1e-2, betas=betas, eps=epsilon, weight_decay=0.1)
    for _ in range(5):
        steps(our, ours, 1)
        steps(their, theirs, 1)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    state, expected = our.state[ours[0]], their.state[theirs[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        distance = (state[name].int() - expected[name].codes.int()).abs()
        assert distance.max() <= 1 and distance.float().mean() < 1e-4
        torch.testing.assert_close(state[f"{name}_scale"], expected[name].scale)


@DTYPES
def test_compiled_for_one_size_it_serves_all(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a graph per shape, each of which takes seconds to compile for a GPU."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_with = partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile_with)
    monkeypatch.setitem(adamw_8bit.PIECES, "cpu", 2**13)
    shapes = (64, 64), (128, 64), (35 * 256,)
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        weights = random_weights(dtype, shapes)
        made = adamw_8bit.AdamW8bit(weights, 1e-2, (0.9, 0.999), 1e-8, 0.1, compiled)
        steps(made, weights, 2)
        results.append([*weights, *(x for state in made.state.values() for x in state.values())])
    assert len(graphs) == 1
    assert all(map(torch.equal, *results))


def test_a_small_second_moment_falls_again() -> None:
    """Guards against moments of small weights in bfloat16, in which 0.1 % a step is nothing."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    made = eight_bit([weight])
    for gradient in (1.0, *[0.0] * 100):
        weight.grad = torch.full_like(weight, gradient)
        made.step()
    moment = made.state[weight]["exp_avg_sq"]
    torch.testing.assert_close(moment, torch.full((8,), 0.001 * 0.999**100))


# ---------------------------------------------------------------- stochastic rounding


def to_nearest(weight: torch.Tensor, exact: torch.Tensor) -> None:
    weight.copy_(exact)


def test_rounding_is_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of many weights moves as in float32, within five standard errors. Rounded to
    nearest, none moves."""

    def moved(size: int, number: int) -> tuple[torch.Tensor, float]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        made = eight_bit([weight])
        for _ in range(number):
            weight.grad = torch.ones_like(weight)
            made.step()
        mean = weight.detach().double().mean().item()
        # Each step moves a weight by 2**-8, half the distance above 1, with this probability.
        share = 2e-5 * 2**8
        error = 2**-8 * (number * share * (1 - share) / size) ** 0.5
        return weight.detach(), abs(mean - (1 - number * 2e-5)) / error

    for size in (2**17, 2**17 + 1):  # with moments of 8 bits, and of float32
        weight, errors = moved(size, 10)
        assert errors < 5
        assert {1.0, 1 - 2**-8} <= set(weight.unique().tolist())
    monkeypatch.setattr(adamw_8bit, "write", to_nearest)
    weight, errors = moved(2**17, 10)
    assert errors > 50 and (weight == 1).all()


def test_a_weight_without_an_update_keeps_every_bit() -> None:
    weights = random_weights(torch.bfloat16)
    before = [weight.detach().clone() for weight in weights]
    made = eight_bit(weights, rate=1.0)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    made.step()
    assert all(map(torch.equal, weights, before))


def test_the_loss_falls_as_with_float32_states(
    wide_folder: Path,
    tokenizer: Tokenizer,
    problems: list[dataset.Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 2e-5, at least 95 % of float32's gain. Rounded to nearest, hardly any."""
    examples = data.encode(tokenizer, problems[:3], PROMPT)
    micro_batches = packing.pack(examples, 1024, kernels_for(CPU))

    def falls(dtype: torch.dtype, name: str) -> float:
        torch.manual_seed(0)
        model = loading.load_model(wide_folder, dtype, CPU)
        made = build_optimizer(model.parameters(), 2e-5, (0.9, 0.999), 1e-8, 0.0, name)
        return gain(model, made, micro_batches, 15)

    expected = falls(torch.float32, "adamw")
    for dtype in (torch.float32, torch.bfloat16):
        assert falls(dtype, "adamw_8bit") == pytest.approx(expected, rel=0.05)
    monkeypatch.setattr(adamw_8bit, "write", to_nearest)
    assert falls(torch.bfloat16, "adamw_8bit") < 0.1 * expected


# ---------------------------------------------------------------- its state


@DTYPES
def test_a_resumed_run_repeats_every_draw(
    settings: dict[str, str], wide_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Guards against codes, scales, the count of steps or random draws that are lost.

    Killed in step 3 of 3 and resumed from the save of step 2.
    """
    settings |= {
        "model": str(wide_folder),
        "optimizer": "adamw_8bit",
        "dtype": str(dtype).removeprefix("torch."),
        "epochs": "1",
        "validation_size": "31",  # leaves 3 steps
        "checkpoint_steps": "1",
        "weight_decay": "0.1",
    }
    whole = settings | {"run_name": "whole"}
    train.main(make_config(whole))
    assert die_and_resume(settings, at=3) == 2
    ours, theirs = (run_folder(each) / "last" for each in (settings, whole))
    for name in ("model.safetensors", "state-00001.safetensors"):
        one, other = load_file(ours / name), load_file(theirs / name)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key
    assert {tensor.dtype for tensor in one.values()} == {torch.uint8, torch.float32}
    assert training_json.read_description(ours)["versions"]["torchao"] == torchao.__version__

    # Nor is it resumed with the other optimizer, or as if it had always had it.
    for change, saved in (("adamw", None), ("adamw_8bit", "removed")):
        if saved:
            file = ours / "training.json"
            description = json.loads(file.read_text())
            del description["settings"]["optimizer"]  # as in a run of an older version
            file.write_text(json.dumps(description))
            seal(ours)
        with pytest.raises(UserError, match=r"optimizer was 'adamw.*' and is 'adamw"):
            train.main(make_config(settings | {"optimizer": change}))


def test_a_step_that_was_repeated_for_lack_of_memory_draws_the_same(
    wide_folder: Path, tokenizer: Tokenizer, problems: list[dataset.Problem]
) -> None:
    """Guards against draws that depend on whether memory ran out."""
    batch = data.encode(tokenizer, problems[:4], PROMPT)
    results = []
    for fails in (False, True):
        torch.manual_seed(1)
        model = loading.load_model(wide_folder, torch.bfloat16, CPU)
        made = eight_bit(list(model.parameters()))
        forward = model.forward

        def fail(micro_batch: packing.MicroBatch, forward: Callable = forward) -> torch.Tensor:
            if micro_batch.input_ids.numel() > 300:
                torch.rand(5)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(micro_batch)

        if fails:
            model.forward = fail
        result = train.train_step(model, made, batch, 1e-3, 512 if fails else 256, 1.0)
        assert result.micro_batch_tokens == 256
        results.append([weight.detach().clone() for weight in model.parameters()])
    assert all(map(torch.equal, *results))


@DTYPES
def test_its_bytes_are_counted(
    wide_folder: Path, dtype: torch.dtype, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    """Guards against scales, or moments in float32, that a check of memory or disk forgets."""
    weights = [*make_llama(420, hidden_size=64, intermediate_size=128).to(dtype).parameters()]
    made = eight_bit(weights)
    make_state(made)
    tensors, _ = pack_state(made, {})
    held = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("optimizer."))
    assert checkpoint_bytes(weights, "adamw_8bit") == (sum(w.nbytes for w in weights), held)
    expected = {torch.float32: 10.03125, torch.bfloat16: 6.03125}[dtype]
    assert training_bytes(dtype, "adamw_8bit") == expected
    # The plan takes the few small weights, whose moments are float32, for large ones.
    planned = state_bytes(read_shape(wide_folder, dtype), Recipe(optimizer="adamw_8bit"))
    small = sum(weight.numel() for weight in weights if weight.numel() < 4096)
    assert held - planned == small * 8 - math.ceil(small * 2.03125)


@DTYPES
def test_a_state_made_before_the_first_step_changes_no_bit(dtype: torch.dtype) -> None:
    results = []
    for early in (False, True):
        torch.manual_seed(0)
        weights = random_weights(dtype)
        made = eight_bit(weights)
        if early:
            make_state(made)
        kept = [id(tensor) for state in made.state.values() for tensor in state.values()]
        steps(made, weights, 3)
        now = [tensor for state in made.state.values() for tensor in state.values()]
        assert not early or [*map(id, now)] == kept
        results.append([*weights, *now])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("shape", [(64, 128), (128, 32), (33,)])
def test_the_state_of_another_model_is_an_error(name: str, shape: tuple[int, ...]) -> None:
    """Guards against a first step that fails, or that takes some other weight's moments."""
    weights = random_weights(torch.bfloat16)
    make = partial(build_optimizer, learning_rate=1e-3, betas=(0.9, 0.999), epsilon=1e-8)
    made = make(weights, weight_decay=0.0, name=name)
    steps(made, weights, 1)
    tensors, state = pack_state(made, {})
    number = 1 if len(shape) == 1 else 0
    others = random_weights(torch.bfloat16)
    others[number] = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    other = make(others, weight_decay=0.0, name=name)
    with pytest.raises(ValueError, match="is not that of a weight of"):
        unpack_state(lambda: tensors, state, other)


@pytest.mark.parametrize("change", [lambda scale: scale[1:], lambda scale: scale.double()])
def test_a_state_of_other_blocks_is_an_error(change: Callable[..., torch.Tensor]) -> None:
    """Guards against codes that are read with the scales of other blocks."""
    weights = random_weights(torch.bfloat16)
    made = eight_bit(weights)
    steps(made, weights, 1)
    tensors, state = pack_state(made, {})
    tensors["optimizer.0.exp_avg_scale"] = change(tensors["optimizer.0.exp_avg_scale"])
    with pytest.raises(ValueError, match="state 0 is not that of a weight of"):
        unpack_state(lambda: tensors, state, eight_bit(weights))


# ---------------------------------------------------------------- what it needs


def test_without_torchao_one_line_says_so_before_anything_is_loaded(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setattr(loading, "fetch", lambda *_: pytest.fail("fetched"))
    outcome = call(train, *flags(settings | {"optimizer": "adamw_8bit"}))
    outcome.assert_user_error(
        "optimizer adamw_8bit needs torchao", "pip install torchao==", "or set optimizer adamw"
    )
    monkeypatch.undo()
    assert f"torchao=={adamw_8bit.TORCHAO}\n" in (ROOT / "requirements.txt").read_text()


def test_only_a_gpus_step_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a compiler that a CPU would need, and a crash where a GPU lacks one."""
    asked: list[Any] = []

    def step(device: torch.device, dtype: torch.dtype) -> None:
        asked.append((device.type, dtype))
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(adamw_8bit, "try_step", step)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            eight_bit([torch.nn.Parameter(torch.empty(2, dtype=torch.bfloat16, device=device))])
    assert asked == [("cuda", torch.bfloat16)]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "using PyTorch's operations" in out and "C compiler" in out


def test_a_model_that_is_too_large_for_adamw_is_offered_it(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    LlamaConfig(num_hidden_layers=32, hidden_size=4096).save_pretrained(tmp_path / "llama-2-7b")
    settings |= {"model": str(tmp_path / "llama-2-7b"), "dtype": "bfloat16"}
    monkeypatch.setattr(memory, "total_bytes", lambda device: 48 * 2**30)
    outcome = call(train, *flags(settings))
    outcome.assert_user_error("optimizer states 37.7", "--optimizer adamw_8bit, or")
    plan.check_trains(make_config(settings | {"optimizer": "adamw_8bit"}), None)
