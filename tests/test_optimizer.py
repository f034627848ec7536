"""Updates in bfloat16 do what float32's do; the gradient norm; the learning rate of each step."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from conftest import PROMPT, gain
from transformers import LlamaConfig

import data
from engine import packing, recipe
from engine.device import kernels_for
from engine.gradients import clipping, scale
from engine.loading import load_model
from engine.optimizer import Schedule, build_optimizer, make_state, state_bytes
from engine.shape import ModelShape
from engine.state import pack_state, unpack_state
from engine.tokenizer import Tokenizer
from grading import dataset
from run.config import Config

CPU = torch.device("cpu")
SETTINGS = {"betas": (0.9, 0.999), "weight_decay": 0.0}


def ours(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(parameters, learning_rate=2e-5, epsilon=1e-8, **SETTINGS)


def rounded_to_nearest(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-5, eps=1e-8, **SETTINGS)


def test_bfloat16_updates_do_not_stall() -> None:
    """Guards against plain rounding: at 2e-5 a weight of 1 would never move, as bfloat16 there has
    steps of 2**-7."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = ours([weight])
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(
        weight.float(), torch.full((8,), 1 - 1000 * 2e-5), rtol=0, atol=2**-9
    )


def after_steps(weight_decay: float, dtype: torch.dtype, *numbers: int) -> torch.Tensor:
    """Weights after so many steps on random gradients, saved and restored between them."""
    random = torch.Generator().manual_seed(4)
    weight = torch.nn.Parameter((0.02 * torch.randn(5000, generator=random)).to(dtype))
    saved = None
    for number in numbers:
        optimizer = build_optimizer([weight], 2e-4, (0.9, 0.999), 1e-8, weight_decay)
        if saved:
            unpack_state(partial(dict, saved[0]), saved[1], optimizer)
        for _ in range(number):
            weight.grad = torch.randn(5000, generator=random).to(dtype)
            optimizer.step()
        saved = pack_state(optimizer, {})
    return weight.detach().double()


def test_weights_in_bfloat16_decay_as_in_float32() -> None:
    """Guards against a decay that is rounded away, as 1 - 2e-5 is in bfloat16, or is forgotten
    where a run resumes."""

    def share(dtype: torch.dtype) -> float:
        plain, decayed = after_steps(0.0, dtype, 1000), after_steps(0.1, dtype, 1000)
        return ((plain - decayed) @ plain / (plain @ plain)).item()

    assert share(torch.bfloat16) == pytest.approx(share(torch.float32), rel=0.005)
    one, other = (after_steps(0.1, torch.bfloat16, *each) for each in ((100,), (7, 30, 63)))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("betas", "epsilon"), [((0.5, 0.999), 1e-8), ((0.9, 0.6), 1e-8), ((0.9, 0.999), 1.0)]
)
def test_betas_and_epsilon_are_those_that_were_asked_for(
    dtype: torch.dtype, betas: tuple[float, float], epsilon: float
) -> None:
    """Guards against defaults of a package in place of the settings."""
    scale = torch.linspace(0.1, 2, 50)

    def change(dtype: torch.dtype, betas: tuple[float, float], epsilon: float) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(50, dtype=dtype))
        make = build_optimizer if dtype != torch.float64 else torch.optim.AdamW
        optimizer = make([weight], 1e-2, betas, epsilon, 0.0)
        for number in (1, -3, 2):
            weight.grad = (number * scale).to(dtype)
            optimizer.step()
        return weight.detach().double()

    expected = change(torch.float64, betas, epsilon)
    # The states have the weight's dtype, which is 8 bits in bfloat16: off by 1.7 %.
    bounds = {"rtol": 1e-5, "atol": 0} if dtype == torch.float32 else {"rtol": 0.03, "atol": 1e-4}
    torch.testing.assert_close(change(dtype, betas, epsilon), expected, **bounds)


def test_a_decay_that_an_older_version_saved_is_not_optimis() -> None:
    """Guards against weights in bfloat16 that decay twice after an update of this program."""

    def two_steps(saved_decay: float | None) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(1, 2, 100).bfloat16())
        optimizer = build_optimizer([weight], 0.1, (0.9, 0.999), 1e-8, 0.1)
        if saved_decay is not None:
            optimizer.param_groups[0]["weight_decay"] = saved_decay
        for _ in range(2):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        return weight.detach()

    assert torch.equal(two_steps(0.1), two_steps(None))


def test_the_loss_in_bfloat16_falls_as_in_float32(
    model_folder: Path, tokenizer: Tokenizer, problems: list[dataset.Problem]
) -> None:
    """Guards against an update that stalls in part: the loss would fall, but by too little."""
    examples = data.encode(tokenizer, problems[:6], PROMPT)
    micro_batches = packing.pack(examples, 1024, kernels_for(CPU))

    def falls(dtype: torch.dtype, make: Callable[..., torch.optim.Optimizer]) -> float:
        model = load_model(model_folder, dtype, CPU)
        return gain(model, make(model.parameters()), micro_batches, 50)

    expected = falls(torch.float32, ours)
    # Gradients of bfloat16 have errors of their own: 2.4 % less after 50 steps.
    assert falls(torch.bfloat16, ours) == pytest.approx(expected, rel=0.03)
    assert falls(torch.bfloat16, rounded_to_nearest) < 0.1 * expected


def with_gradients(dtype: torch.dtype, scale: float = 1.0) -> list[torch.nn.Parameter]:
    """Parameters of several shapes, the same in each call, with gradients."""
    random = torch.Generator().manual_seed(3)
    parameters = []
    for shape in ((40, 50), (300, 700), (7,)):
        made = [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2)]
        parameters.append(torch.nn.Parameter(made[0].to(dtype)))
        parameters[-1].grad = (scale * made[1]).to(dtype)
    return parameters


def steps(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], number: int
) -> list[torch.Tensor]:
    """The weights after ``number`` steps with their gradients, each with a small change."""
    for _ in range(number):
        for parameter in parameters:
            parameter.grad = parameter.detach() * 0.1 + 1e-3
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_made_before_the_first_step_changes_no_bit(dtype: torch.dtype) -> None:
    """Guards against a state that optimi or PyTorch would make otherwise, or makes again."""
    lazy, early = with_gradients(dtype), with_gradients(dtype)
    lazy_optimizer, early_optimizer = ours(lazy), ours(early)
    make_state(early_optimizer)
    made = [tensor for state in early_optimizer.state.values() for tensor in state.values()]
    assert not any(tensor.any() for tensor in made)
    assert all(map(torch.equal, steps(lazy_optimizer, lazy, 3), steps(early_optimizer, early, 3)))
    kept = [tensor for state in early_optimizer.state.values() for tensor in state.values()]
    assert [*map(id, kept)] == [*map(id, made)]
    one, other = (pack_state(optimizer, {}) for optimizer in (lazy_optimizer, early_optimizer))
    assert list(one[0]) == list(other[0]) and one[1] == other[1]
    for name, tensor in one[0].items():
        assert tensor.dtype == other[0][name].dtype and torch.equal(tensor, other[0][name]), name
    make_state(early_optimizer)  # which leaves alone what is there
    assert [*map(id, kept)] == [
        id(tensor) for state in early_optimizer.state.values() for tensor in state.values()
    ]


def bytes_of(state: Mapping[str, Any]) -> dict[str, int]:
    tensors = {name: each for name, each in state.items() if isinstance(each, torch.Tensor)}
    return {name: tensor.nbytes for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", get_args(get_type_hints(Config)["optimizer"]))
def test_every_optimizer_is_built_and_its_state_counted(name: str, dtype: torch.dtype) -> None:
    """Guards against a setting that is AdamW under another name, or has AdamW's state as well."""
    shape = torch.Size([64, 64])  # large enough for 8 bits
    weight = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = build_optimizer([weight], 1e-3, (0.9, 0.999), 1e-8, 0.0, name)
    make_state(optimizer)
    made = bytes_of(optimizer.state[weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert made == bytes_of(optimizer.state[weight])
    held = sum(size for name, size in made.items() if name != "step")
    assert state_bytes(shape, dtype, name) == held
    llama = ModelShape(LlamaConfig(), dtype)
    planned = recipe.state_bytes(llama, recipe.Recipe(optimizer=name))
    assert planned / llama.parameters == pytest.approx(held / weight.numel(), rel=1e-6)


def test_an_optimizer_that_is_unknown_is_not_taken_for_adamw() -> None:
    """Guards against a name that the settings allow, and one of these places does not know."""
    weight, shape = torch.nn.Parameter(torch.ones(4)), ModelShape(LlamaConfig(), torch.float32)
    for where, ask in (
        ("optimizer.py, build_optimizer", partial(build_optimizer, [weight], 1, (0, 0), 1, 0)),
        ("optimizer.py, state_bytes", partial(state_bytes, weight.shape, weight.dtype)),
        (
            "recipe.py, state_bytes",
            lambda name: recipe.state_bytes(shape, recipe.Recipe(optimizer=name)),
        ),
        ("optimizer.py, make_state", lambda name: make_state(torch.optim.SGD([weight]))),
    ):
        with pytest.raises((ValueError, TypeError), match=f"engine/{where}: add a case for it"):
            ask("sgd")


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """As train.py does; gives the norm before."""
    norm, factor = clipping(parameters, max_norm)
    scale(parameters, factor.item())
    return norm


def test_the_norm_of_bfloat16_gradients_is_float32() -> None:
    """Guards against a norm, and a clipping factor, of 8 bits."""
    parameters = with_gradients(torch.bfloat16)
    exact = math.sqrt(sum(parameter.grad.double().square().sum() for parameter in parameters))
    norm = clip_gradients(parameters, None)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=1e-4)
    assert clip_gradients(with_gradients(torch.float64), None).dtype == torch.float64
    overflowing = with_gradients(torch.float16, scale=1000.0)
    assert math.isfinite(clip_gradients(overflowing, None).item())


def test_without_clipping_no_gradient_is_touched() -> None:
    """Guards against a pass over all gradients that multiplies them by 1."""
    parameters = with_gradients(torch.bfloat16)
    versions = [parameter.grad._version for parameter in parameters]
    clip_gradients(parameters, None)
    assert [parameter.grad._version for parameter in parameters] == versions
    clip_gradients(parameters, 1e9)
    assert [parameter.grad._version for parameter in parameters] == versions
    clip_gradients(parameters, 1.0)
    assert [parameter.grad._version for parameter in parameters] != versions


@pytest.mark.parametrize(("scale", "max_norm"), [(1e-8, 1e-7), (1e-8, 1.0), (1.0, 1.0), (1e6, 1.0)])
def test_clipping_in_float32_is_pytorchs_to_the_bit(scale: float, max_norm: float) -> None:
    clipped, pytorchs = (with_gradients(torch.float32, scale) for _ in range(2))
    expected = torch.nn.utils.clip_grad_norm_(pytorchs, max_norm)
    assert torch.equal(clip_gradients(clipped, max_norm), expected)
    for one, other in zip(clipped, pytorchs, strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("dtype", "of_a_gpu"),
    [
        (torch.bfloat16, {"triton": True, "foreach": None}),
        (torch.float32, {"foreach": True, "fused": None, "capturable": True}),
    ],
)
def test_a_run_takes_no_implementation_along_to_another_device(
    dtype: torch.dtype, of_a_gpu: dict[str, bool | None]
) -> None:
    """Guards against Triton on a CPU's tensors, and the slow loop on a GPU that has Triton."""
    parameters = with_gradients(dtype)
    optimizer = ours(parameters)
    steps(optimizer, parameters, 2)
    tensors, state = pack_state(optimizer, {"step": 2})
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    other = ours(resumed)
    own = {name: other.param_groups[0][name] for name in of_a_gpu}
    assert own != of_a_gpu
    [group] = state["groups"]
    saved = state | {"groups": [group | of_a_gpu | {"lr": 0.25, "weight_decay": 0.5}]}
    assert unpack_state(lambda: tensors, saved, other) == {"step": 2}
    [group] = other.param_groups
    assert {name: group[name] for name in of_a_gpu} == own
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)  # everything else is restored
    group |= {"lr": 2e-5, "weight_decay": 0.0}
    assert all(map(torch.equal, steps(optimizer, parameters, 2), steps(other, resumed, 2)))


def test_schedule() -> None:
    """Guards against a first step at rate zero, a peak never reached, a floor ignored, and a name
    that the settings allow and no schedule has."""

    def rates(schedule: str, minimum: float = 0.0) -> list[float]:
        made = Schedule(100, peak=2.0, shape=schedule, warmup_ratio=0.03, min_ratio=minimum)
        return [made.learning_rate(step) for step in range(100)]

    # A part of a step is a whole one.
    assert Schedule(174, 2.0, "cosine", 0.03, 0.0).warmup_steps == 6

    for schedule in get_args(get_type_hints(Config)["lr_schedule"]):
        assert rates(schedule)[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert rates("constant")[-1] == 2.0
    assert rates("linear")[50] == pytest.approx(2 * (1 - 47 / 97))
    assert rates("cosine")[50] == pytest.approx(1 + math.cos(math.pi * 47 / 97))
    assert rates("cosine")[-1] == pytest.approx(1 + math.cos(math.pi * 96 / 97))
    assert rates("cosine", 0.1)[-1] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi * 96 / 97)))
    assert rates("cosine") == sorted(rates("cosine")[:3]) + sorted(
        rates("cosine")[3:], reverse=True
    )
