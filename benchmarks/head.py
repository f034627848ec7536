"""Head and loss with their gradients: ours, and torch's own ways to the same number.

python benchmarks/head.py
python benchmarks/head.py --rows 4096 --hidden_size 4096 --dtype bfloat16

- ours: perplexity.LinearCrossEntropy;
- logits: all logits at once, linear and cross_entropy;
- fused: torch.nn.functional.linear_cross_entropy (torch 2.13) as it is;
- chunked: the same with LinearCrossEntropyOptions(), which holds no full logits.

Each contender is a process of its own; they compute in turn, forward and backward, for the summed
loss of random rows. Medians after a first round, and the memory that came on top of the inputs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

# The other benchmark lies beside this one, and shows the way to the product.
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

    from engine.loss import LinearCrossEntropy

    if name == "ours":
        return lambda hidden, weight, labels: LinearCrossEntropy.apply(hidden, weight, labels, True)
    if name == "logits":
        return lambda hidden, weight, labels: F.cross_entropy(
            F.linear(hidden, weight), labels, reduction="sum"
        )
    options = torch.nn.LinearCrossEntropyOptions() if name == "chunked" else None
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", options=options
    )


def work(arguments: argparse.Namespace) -> None:
    """Compute once at every turn, and report seconds, loss and memory."""
    import torch

    from engine.cpu import heap
    from engine.device import pick_device

    heap.keep_freed_memory()
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
            f"| {contender.name} | {seconds * 1e3:.0f} | {last['memory'] * 1e3:.0f} | {last['loss']:.3f} |"
        )


if __name__ == "__main__":
    parsed = read_arguments(sys.argv[1:])
    if parsed.worker:
        work(parsed)
    else:
        main(parsed)
