"""AdamW, and the learning rate of each step."""

import math
from collections.abc import Iterable

import optimi
import torch


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) for parameters of one dtype.

    In bfloat16 most updates of a learning rate such as 2e-5 are below half the distance to the
    next representable weight, and would vanish. There Kahan summation keeps what rounding cut
    off and adds it to the next update (arXiv:2010.06192): 10 bytes a parameter with gradient and
    both moments, where float32 takes 16.
    """
    parameters = list(parameters)
    if parameters[0].dtype == torch.bfloat16:
        return optimi.AdamW(
            parameters,
            lr=learning_rate,
            betas=betas,
            eps=epsilon,
            weight_decay=weight_decay,
            kahan_sum=True,
        )
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        weight_decay=weight_decay,
        fused=True,
    )


def checkpoint_bytes(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """What a checkpoint of ``parameters`` takes: the weights, and the state that `build_optimizer`'s keeps for them.

    That state comes into being with the first step only.
    """
    parameters = list(parameters)
    weights = sum(parameter.nbytes for parameter in parameters)
    tensors = (
        3 if parameters[0].dtype == torch.bfloat16 else 2
    )  # two moments, and what rounding cut off
    return weights, tensors * weights


def scheduled_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: str,
    warmup_ratio: float,
    min_ratio: float,
) -> float:
    """The learning rate of optimizer step ``step``, counted from 0.

    It rises linearly over the first ``ceil(warmup_ratio * total_steps)`` steps, whose last one
    has the ``peak``, and then falls to ``min_ratio * peak`` along half a cosine (SGDR,
    arXiv:1608.03983) or a line, or stays. No step has a rate of zero: it would be wasted.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return peak
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (min_ratio + (1 - min_ratio) * shape)
