"""Compares the loss curves of bfloat16 training, with several kinds of updates, to float32.

python benchmarks/bfloat16.py
python benchmarks/bfloat16.py --updates float32 kahan fp8
python benchmarks/bfloat16.py --steps 400 --updates float32 kahan adamw_8bit nearest

A Llama of 0.9 M parameters is trained on generated word problems (standin.py) in float32, at a
learning rate that suits its random weights. From there each contender continues on the same rows,
at a constant fine-tuning rate, with train.py's own gradient accumulation:

- float32: AdamW, 16 bytes per parameter including its gradient.
- kahan: bfloat16. The rounding error is kept and added to the next update, as in train.py. 10
  bytes.
- fp8: the same, with the layers' products in 8-bit floats, as in train.py. 10 bytes.
- adamw_8bit: bfloat16, moments of 8 bits, weights rounded up or down at random, as in train.py.
  6 bytes.
- adamw_8bit_float32: float32, moments of 8 bits, as in train.py. 10 bytes.
- masters: bfloat16, with moments and a copy of the weights in float32. 16 bytes.
- nearest: bfloat16, rounded to nearest as in torch.optim.AdamW. 8 bytes. It is offered nowhere.
- adamw_8bit_nearest: the same with moments of 8 bits. 6 bytes. Neither is this.

The loss is the validation loss in the contender's own dtype, computed by the function that train.py
uses.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    import torch

    import data
    from engine.llama import Llama
    from engine.packing import Example

PROMPT, BATCH, MICRO_BATCH_TOKENS = "Question: {question}\nAnswer:", 16, 2048
NUM_TRAIN, NUM_VALIDATION = 4000, 200
BETAS, EPSILON = (0.9, 0.999), 1e-8


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", nargs="+", choices=tuple(UPDATES), default=list(UPDATES))
    parser.add_argument("--pretrain", type=int, default=300, help="steps in float32 beforehand")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each contender")
    parser.add_argument("--points", type=int, default=5, help="points per curve after its start")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- contenders: how each makes a step


def _ours(
    parameters: "list[torch.nn.Parameter]", rate: float, name: str = "adamw"
) -> Callable[[], None]:
    from engine.optimizer import build_optimizer

    return build_optimizer(
        parameters,
        learning_rate=rate,
        betas=BETAS,
        epsilon=EPSILON,
        weight_decay=0.0,
        name=name,
    ).step


_ours_8bit = partial(_ours, name="adamw_8bit")


def _nearest_8bit(parameters: "list[torch.nn.Parameter]", rate: float) -> Callable[[], None]:
    from engine import adamw_8bit

    step = _ours_8bit(parameters, rate)

    def step_to_nearest() -> None:
        rounded, adamw_8bit.write = adamw_8bit.write, lambda weight, exact: weight.copy_(exact)
        try:
            step()
        finally:
            adamw_8bit.write = rounded

    return step_to_nearest


def _nearest(parameters: "list[torch.nn.Parameter]", rate: float) -> Callable[[], None]:
    import torch

    return torch.optim.AdamW(
        parameters, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
    ).step


def _masters(parameters: "list[torch.nn.Parameter]", rate: float) -> Callable[[], None]:
    import torch

    masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
    step_masters = _nearest(masters, rate)

    def step() -> None:
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float()
        step_masters()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)

    return step


UPDATES: dict[str, tuple[str, int, Callable[..., Callable[[], None]]]] = {
    "float32": ("float32", 16, _ours),
    "kahan": ("bfloat16", 10, _ours),
    "fp8": ("bfloat16", 10, _ours),
    "adamw_8bit": ("bfloat16", 6, _ours_8bit),
    "adamw_8bit_float32": ("float32", 10, _ours_8bit),
    "masters": ("bfloat16", 16, _masters),
    "nearest": ("bfloat16", 8, _nearest),
    "adamw_8bit_nearest": ("bfloat16", 6, _nearest_8bit),
}


# ---------------------------------------------------------------- the comparison


def prepare(folder: Path) -> "tuple[Llama, data.Batches, list[Example]]":
    """A model with random weights, training batches, and validation examples."""
    import torch

    import data
    import standin
    from engine.loading import load_model, load_tokenizer
    from grading import dataset

    rows = standin.make_problems(NUM_TRAIN + NUM_VALIDATION, seed=0)
    standin.make_tokenizer(
        [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows], folder, 512
    )
    standin.make_model(folder, hidden_size=128, intermediate_size=352, layers=4, heads=4)
    examples = data.encode(load_tokenizer(folder), [dataset.Problem(**row) for row in rows], PROMPT)
    model = load_model(folder, torch.float32, torch.device("cpu")).train()
    return model, data.Batches(examples[:NUM_TRAIN], BATCH, seed=0), examples[NUM_TRAIN:]


def train_on(
    model: "Llama",
    batches: "data.Batches",
    step: Callable[[], None],
    numbers: Iterable[int],
) -> None:
    import train
    from engine import packing

    for number in numbers:
        micro_batches = packing.pack(batches[number], MICRO_BATCH_TOKENS, model.kernels)
        train.accumulate_gradients(model, micro_batches, 1.0)
        step()
        model.zero_grad()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from engine.measure import measure

    with tempfile.TemporaryDirectory() as folder:
        base, batches, validation = prepare(Path(folder))
    train_on(base, batches, _ours(list(base.parameters()), 2e-3), range(arguments.pretrain))
    interval = arguments.steps // arguments.points
    curves: dict[str, list[float]] = {}
    for name in arguments.updates:
        dtype, _, make_step = UPDATES[name]
        torch.manual_seed(0)
        model = copy.deepcopy(base).to(getattr(torch, dtype))
        if name == "fp8":
            model.kernels.use_fp8(model)
        step = make_step(list(model.parameters()), arguments.learning_rate)
        curves[name] = [measure(model, validation, MICRO_BATCH_TOKENS).loss]
        for point in range(arguments.points):
            first = arguments.pretrain + point * interval
            train_on(model, batches, step, range(first, first + interval))
            curves[name].append(measure(model, validation, MICRO_BATCH_TOKENS).loss)
        print(f"{name}: {' '.join(f'{loss:.4f}' for loss in curves[name])}", file=sys.stderr)
    print_table(curves, interval)


def print_table(curves: dict[str, list[float]], interval: int) -> None:
    reference = next(iter(curves.values()))
    points = " | ".join(f"{number * interval}" for number in range(len(reference)))
    print(f"| update | bytes per parameter | loss after {points} | share of the first's gain |")
    print("| --- | --- |" + " --- |" * (len(reference) + 1))
    for name, losses in curves.items():
        share = (losses[0] - losses[-1]) / (reference[0] - reference[-1])
        shown = " | ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {name} | {UPDATES[name][1]} | {shown} | {share:.0%} |")


if __name__ == "__main__":
    main(read_arguments(sys.argv[1:]))
