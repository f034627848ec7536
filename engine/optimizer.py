"""AdamW, and the learning rate of each step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import optimi
import torch


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) for parameters of one dtype.

    In bfloat16, at a learning rate such as 2e-5, most updates are smaller than half the distance to
    the next representable weight, and would be rounded away. Kahan summation keeps the rounding
    error and adds it to the next update (arXiv:2010.06192). With gradient and both moments this
    takes 10 bytes per parameter, while float32 takes 16.
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
    """The sizes in bytes of a checkpoint's weights and of its optimizer state.

    Computed from the parameters, since the state exists only after the first step.
    """
    parameters = list(parameters)
    weights = sum(parameter.nbytes for parameter in parameters)
    moments = 2
    compensation = 1 if parameters[0].dtype == torch.bfloat16 else 0  # of Kahan summation
    return weights, (moments + compensation) * weights


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each optimizer step.

    It rises linearly over the first ``ceil(warmup_ratio * total_steps)`` steps and reaches the peak
    at the last of them. Then it falls to ``min_ratio * peak`` along half a cosine (SGDR,
    arXiv:1608.03983) or a line, or stays constant. No step is wasted on a rate of zero.

    Attributes:
        peak: the highest rate.
        shape: ``cosine``, ``linear`` or ``constant``; the setting lr_schedule allows these names.
    """

    total_steps: int
    peak: float
    shape: str
    warmup_ratio: float
    min_ratio: float

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step ``step``, counted from 0."""
        warmup_steps = math.ceil(self.warmup_ratio * self.total_steps)
        if step < warmup_steps:
            return self.peak * (step + 1) / warmup_steps
        if self.shape == "constant":
            return self.peak
        progress = (step - warmup_steps) / max(1, self.total_steps - warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        remaining = {"cosine": cosine, "linear": 1 - progress}[self.shape]
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * remaining)
