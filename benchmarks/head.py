"""Head and loss with their gradients: ours against PyTorch's ways to compute the same number.

python benchmarks/head.py
python benchmarks/head.py --rows 4096 --hidden_size 4096 --dtype bfloat16

- ours: engine.loss.LinearCrossEntropy.
- logits: all logits at once, linear and cross_entropy.
- fused: torch.nn.functional.linear_cross_entropy (torch 2.13) with its defaults.
- chunked: the same with LinearCrossEntropyOptions(), which never holds all logits.

Each contender runs in its own process. They take turns to compute the summed loss of random rows,
forward and backward. Times are medians over the rounds after the first. Memory is in addition to
the inputs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

# Another benchmark, which also puts the repository on the path.
from training import launch, peak_memory, report, wait_for_turn

if TYPE_CHECKING:
    import torch

CONTENDERS = ("ours", "logits", "fused", "chunked")


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024, help="supervised tokens")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def loss_function(
    name: str,
) -> "Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]":
    import torch
    import torch.nn.functional as F

    from engine.device import kernels_for, pick_device
    from engine.loss import LinearCrossEntropy

    if name == "ours":
        kernels = kernels_for(pick_device())
        return lambda *tensors: LinearCrossEntropy.apply(*tensors, True, kernels)
    if name == "logits":
        return lambda hidden, weight, labels: F.cross_entropy(
            F.linear(hidden, weight), labels, reduction="sum"
        )
    options = torch.nn.LinearCrossEntropyOptions() if name == "chunked" else None
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", options=options
    )


def work(arguments: argparse.Namespace) -> None:
    """Compute the loss once per turn, and report seconds, loss and memory."""
    import torch

    from engine.device import pick_device, prepare_process

    prepare_process(pick_device())
    torch.manual_seed(0)
    settings = {"dtype": getattr(torch, arguments.dtype), "device": pick_device()}
    hidden = torch.randn(arguments.rows, arguments.hidden_size, **settings).requires_grad_()
    weight = (
        torch.randn(arguments.vocab_size, arguments.hidden_size, **settings)
        .mul_(0.02)
        .requires_grad_()
    )
    labels = torch.randint(arguments.vocab_size, (arguments.rows,), device=settings["device"])
    compute, before = loss_function(arguments.worker), peak_memory()
    while True:
        wait_for_turn()
        started = time.perf_counter()
        loss = compute(hidden, weight, labels)
        loss.backward()
        hidden.grad = weight.grad = None
        nats = loss.item()  # waits for the device
        seconds = time.perf_counter() - started
        report(seconds=seconds, loss=nats, memory=peak_memory() - before)


def main(arguments: argparse.Namespace) -> None:
    options = [
        f"--{key}={getattr(arguments, key)}"
        for key in ("rows", "hidden_size", "vocab_size", "dtype")
    ]
    contenders = [launch(__file__, name, options) for name in CONTENDERS]
    for _ in range(arguments.rounds + 1):
        for contender in contenders:
            contender.step()
    print("| contender | ms | memory, MB | loss |\n| --- | --- | --- | --- |")
    for contender in contenders:
        contender.process.kill()
        seconds = statistics.median(entry["seconds"] for entry in contender.reports[1:])
        last = contender.reports[-1]
        print(
            f"| {contender.name} | {seconds * 1e3:.0f} | {last['memory'] * 1e3:.0f} "
            f"| {last['loss']:.3f} |"
        )


if __name__ == "__main__":
    parsed = read_arguments(sys.argv[1:])
    if parsed.worker:
        work(parsed)
    else:
        main(parsed)
