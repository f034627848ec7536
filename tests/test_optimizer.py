"""Updates in bfloat16 do what float32's do; the learning rate of each step."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from conftest import PROMPT

import data
import train
from engine import packing
from engine.device import kernels_for
from engine.loading import load_model
from engine.optimizer import Schedule, build_optimizer
from engine.tokenizer import Tokenizer
from grading import dataset

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


def test_the_loss_in_bfloat16_falls_as_in_float32(
    model_folder: Path, tokenizer: Tokenizer, problems: list[dataset.Problem]
) -> None:
    """Guards against an update that stalls in part: the loss would fall, but by too little."""
    examples = data.encode(tokenizer, problems[:6], PROMPT)
    micro_batches = packing.pack(examples, 1024, kernels_for(CPU))

    def gain(dtype: torch.dtype, make: Callable[..., torch.optim.Optimizer]) -> float:
        model = load_model(model_folder, dtype, CPU).train()
        optimizer = make(model.parameters())
        losses = []
        for _ in range(50):
            nats, num_labels, _ = train.accumulate_gradients(model, micro_batches, 1.0)
            losses.append(nats / num_labels)
            optimizer.step()
            optimizer.zero_grad()
        return losses[0] - losses[-1]

    expected = gain(torch.float32, ours)
    assert gain(torch.bfloat16, ours) == pytest.approx(expected, rel=0.03)
    assert gain(torch.bfloat16, rounded_to_nearest) < 0.1 * expected


def test_schedule() -> None:
    """Guards against a first step at rate zero, a peak never reached, and a floor ignored."""

    def rates(schedule: str, minimum: float = 0.0) -> list[float]:
        made = Schedule(100, peak=2.0, shape=schedule, warmup_ratio=0.03, min_ratio=minimum)
        return [made.learning_rate(step) for step in range(100)]

    for schedule in ("cosine", "linear", "constant"):
        assert rates(schedule)[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert rates("constant")[-1] == 2.0
    assert rates("linear")[50] == pytest.approx(2 * (1 - 47 / 97))
    assert rates("cosine")[50] == pytest.approx(1 + math.cos(math.pi * 47 / 97))
    assert 0 < rates("cosine")[-1] < 0.001
    assert rates("cosine", 0.1)[-1] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi * 96 / 97)))
    assert rates("cosine") == sorted(rates("cosine")[:3]) + sorted(
        rates("cosine")[3:], reverse=True
    )
