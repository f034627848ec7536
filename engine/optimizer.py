"""AdamW, and the learning rate of each step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import optimi
import torch

from engine import adamw_8bit, memory
from engine.device_errors import cure_for_kernels, is_of_a_kernel
from engine.recipe import ADAMW, ADAMW_8BIT, check_is_adamw
from engine.sharding import is_spread
from run.errors import cause_of, root_cause

# The share of a weight by which it decays at once in bfloat16, where its rounding error is up to
# 2**-8 of it, and is itself rounded by up to 2**-17 of the weight.
LEAST_DECAY = 2**-14


def check_optimizer(name: str) -> None:
    """Raises UserError if a package that the optimizer needs is missing."""
    if name == ADAMW_8BIT:
        adamw_8bit.check_torchao()


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    name: str = ADAMW,
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) for parameters of one dtype.

    Args:
        name: ``adamw``, or ``adamw_8bit`` for moments of 8 bits (`adamw_8bit.AdamW8bit`), with
            which bfloat16 takes 6 bytes per parameter, and float32 takes 10.

    In bfloat16, at a learning rate such as 2e-5, most updates are smaller than half the distance to
    the next representable weight, and would be rounded away. Kahan summation keeps the rounding
    error and adds it to the next update (arXiv:2010.06192). With gradient and both moments this
    takes 10 bytes per parameter, while float32 takes 16.
    """
    parameters = list(parameters)
    first = parameters[0]
    if name == ADAMW_8BIT:
        step = partial(adamw_8bit.try_step, dtype=first.dtype)
        compiled = first.is_cuda and runs_triton(first.device, step)
        return adamw_8bit.AdamW8bit(
            parameters, learning_rate, betas, epsilon, weight_decay, compiled
        )
    check_is_adamw(name, "optimizer.py, build_optimizer")
    if first.dtype == torch.bfloat16:
        optimizer = optimi.AdamW(
            parameters,
            lr=learning_rate,
            betas=betas,
            eps=epsilon,
            weight_decay=0.0,
            kahan_sum=True,
            triton=has_triton_step(first),
            foreach=False,
        )
        if weight_decay:
            optimizer.param_groups[0]["decay_owed"] = 0.0
            optimizer.register_step_pre_hook(partial(decay, weight_decay))
        return optimizer
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        weight_decay=weight_decay,
        fused=True,
    )


@torch.no_grad()
def decay(weight_decay: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let bfloat16 weights decay by Kahan summation, before a step of optimi.

    optimi multiplies the weight itself, by a number such as 0.999998, which bfloat16 rounds to 1.
    The rounding error has 8 bits as well, so the decay of several steps is subtracted at once.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0  # an older version has saved another, which had no effect
        group["decay_owed"] += group["lr"] * weight_decay
        if group["decay_owed"] < LEAST_DECAY or not optimizer.state:
            continue
        for weight in group["params"]:
            optimizer.state[weight]["kahan_comp"].add_(weight, alpha=-group["decay_owed"])
        group["decay_owed"] = 0.0


def has_triton_step(parameter: torch.nn.Parameter) -> bool:
    """Whether optimi's fused kernel can update ``parameter``; it takes no tensor that is spread."""
    return parameter.is_cuda and not is_spread(parameter) and runs_triton(parameter.device)


def runs_triton(device: torch.device, step: Callable[[torch.device], None] | None = None) -> bool:
    """Whether a fused kernel runs on ``device``; prints a line if it does not.

    Args:
        step: makes a step with the kernel; None for a step of one weight with optimi's.
    """
    try:
        (step or step_with_triton)(device)
    except Exception as error:  # Triton, its compilers and optimi raise many types
        if not is_of_a_kernel(error):
            raise
        print(
            f"AdamW: its fused kernel does not run here ({cause_of(error)}); using PyTorch's "
            f"operations, which are slower: {cure_for_kernels(root_cause(error))}"
        )
        return False
    return True


def step_with_triton(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16, device=device))
    weight.grad = torch.zeros_like(weight)
    optimi.AdamW([weight], lr=0.0, kahan_sum=True, triton=True, foreach=False).step()


@memory.reported("making the optimizer's state", memory.LARGER_DEVICE)
def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the optimizer would make in its first step, unless it is there already.

    A step that runs out of memory has changed some of the weights, so it can't be repeated. With
    its state in place it needs no further memory. On a CPU the gradients are made as well, since
    among the activations of the first backward pass they would fragment the heap for good.

    Args:
        optimizer: from `build_optimizer`.

    Raises:
        UserError: the state does not fit into memory.
        TypeError: the optimizer's state is not known here.
    """
    if not isinstance(optimizer, adamw_8bit.AdamW8bit | optimi.AdamW | torch.optim.AdamW):
        kind = type(optimizer).__name__
        raise TypeError(f"{kind} is unknown to engine/optimizer.py, make_state: add a case for it")
    for group in optimizer.param_groups:
        if isinstance(optimizer, optimi.AdamW) and not group["setup"]:
            group["setup"], group["step"] = True, torch.tensor(0, dtype=torch.int32)
        for parameter in group["params"]:
            if parameter.device.type == "cpu" and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            state = optimizer.state[parameter]
            if state:
                continue
            if isinstance(optimizer, adamw_8bit.AdamW8bit):
                state.update(adamw_8bit.new_state(parameter))
                continue
            if "fused" in group:  # PyTorch's AdamW, which counts the steps of each weight
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if has_compensation(parameter.dtype):
                state["kahan_comp"] = torch.zeros_like(parameter)


def has_compensation(dtype: torch.dtype) -> bool:
    """Whether `build_optimizer` keeps a rounding error for each weight (Kahan summation)."""
    return dtype == torch.bfloat16


def state_bytes(shape: torch.Size, dtype: torch.dtype, name: str = ADAMW) -> int:
    """What the optimizer's state of a weight of ``shape`` and ``dtype`` takes in memory and files.

    The counters of steps, a few bytes, are left out.
    """
    if name == ADAMW_8BIT:
        return adamw_8bit.state_bytes(shape)
    check_is_adamw(name, "optimizer.py, state_bytes")
    return (2 + has_compensation(dtype)) * dtype.itemsize * math.prod(shape)


def training_bytes(dtype: torch.dtype, name: str = ADAMW) -> float:
    """What training takes for each parameter of a large weight: weight, gradient and state."""
    large = torch.Size([adamw_8bit.SMALLEST])
    return 2 * dtype.itemsize + state_bytes(large, dtype, name) / large.numel()


def checkpoint_bytes(
    parameters: Iterable[torch.nn.Parameter], name: str = ADAMW
) -> tuple[int, int]:
    """The sizes in bytes of a checkpoint's weights and of its optimizer state.

    Computed from the parameters, since the state exists only after the first step.
    """
    parameters = list(parameters)
    state = sum(state_bytes(parameter.shape, parameter.dtype, name) for parameter in parameters)
    return sum(parameter.nbytes for parameter in parameters), state


# ---------------------------------------------------------------- learning rate


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

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.total_steps)

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step ``step``, counted from 0."""
        warmup_steps = self.warmup_steps
        if step < warmup_steps:
            return self.peak * (step + 1) / warmup_steps
        if self.shape == "constant":
            return self.peak
        progress = (step - warmup_steps) / max(1, self.total_steps - warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        remaining = {"cosine": cosine, "linear": 1 - progress}[self.shape]
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * remaining)
