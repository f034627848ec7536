"""Does training in bfloat16 follow float32's loss curve, and with which update?

python benchmarks/bfloat16.py
python benchmarks/bfloat16.py --steps 400 --updates float32 kahan stochastic masters nearest

A Llama of 0.9 M parameters learns generated word problems (standin.py) in float32, at a rate that
suits its random weights. From there, each contender trains on, on the same rows, at a fine-tuning
rate, constant, by train.py's own accumulation:

- float32: AdamW, 16 bytes a parameter with its gradient;
- kahan: bfloat16, what rounding cuts off is kept and added to the next update (train.py's way), 10;
- stochastic: bfloat16, weights rounded up or down at random (torchao), 8;
- masters: bfloat16, moments and a copy of the weights in float32, 16;
- nearest: bfloat16, rounded to nearest as torch.optim.AdamW does, 8.

The loss is the validation loss in the contender's own dtype, by the function that train.py uses.
Torchao stands in no requirements file: Transformers imports it where it is installed, and it warns
at every start. `pip install --no-deps --target torchao torchao==0.18.0` keeps it apart, and
PYTHONPATH=torchao shows it to this benchmark.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    import data

PROMPT, BATCH, MICRO_BATCH_TOKENS = "Question: {question}\nAnswer:", 16, 2048
NUM_TRAIN, NUM_VALIDATION = 4000, 200
BETAS, EPSILON = (0.9, 0.999), 1e-8


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--updates",
        nargs="+",
        choices=tuple(UPDATES),
        default=[name for name in UPDATES if name != "stochastic"],
    )
    parser.add_argument("--pretrain", type=int, default=300, help="steps in float32 beforehand")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each contender")
    parser.add_argument("--points", type=int, default=5, help="of the loss curve after its start")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- contenders: parameters -> a function that steps


def _ours(parameters: "list[torch.nn.Parameter]", rate: float) -> Callable[[], None]:
    from engine.optimizer import build_optimizer

    return build_optimizer(
        parameters, learning_rate=rate, betas=BETAS, epsilon=EPSILON, weight_decay=0.0
    ).step


def _stochastic(parameters: "list[torch.nn.Parameter]", rate: float) -> Callable[[], None]:
    from torchao.optim import _AdamW

    return _AdamW(
        parameters, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0, bf16_stochastic_round=True
    ).step


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
    "stochastic": ("bfloat16", 8, _stochastic),
    "masters": ("bfloat16", 16, _masters),
    "nearest": ("bfloat16", 8, _nearest),
}


# ---------------------------------------------------------------- the comparison


def prepare(folder: Path) -> "tuple[LlamaForCausalLM, data.TrainingData, list[data.Example]]":
    """A model with random weights, training data, and validation examples."""
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
    return model, data.TrainingData(examples[:NUM_TRAIN], BATCH, seed=0), examples[NUM_TRAIN:]


def train_on(
    model: "LlamaForCausalLM",
    training: "data.TrainingData",
    step: Callable[[], None],
    numbers: Iterable[int],
) -> None:
    import train
    from engine import packing

    for number in numbers:
        window = packing.pack(training.window(number), MICRO_BATCH_TOKENS)
        train.accumulate(model, window, model.device, 1.0)
        step()
        model.zero_grad()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from engine.loss import measure

    with tempfile.TemporaryDirectory() as folder:
        base, training, validation = prepare(Path(folder))
    train_on(base, training, _ours(list(base.parameters()), 2e-3), range(arguments.pretrain))
    interval = arguments.steps // arguments.points
    curves: dict[str, list[float]] = {}
    for name in arguments.updates:
        dtype, _, make_step = UPDATES[name]
        torch.manual_seed(0)
        model = copy.deepcopy(base).to(getattr(torch, dtype))
        step = make_step(list(model.parameters()), arguments.learning_rate)
        curves[name] = [measure(model, validation, MICRO_BATCH_TOKENS, model.device).loss]
        for point in range(arguments.points):
            first = arguments.pretrain + point * interval
            train_on(model, training, step, range(first, first + interval))
            curves[name].append(measure(model, validation, MICRO_BATCH_TOKENS, model.device).loss)
        print(f"{name}: {' '.join(f'{loss:.4f}' for loss in curves[name])}", file=sys.stderr)
    print_table(curves, interval)


def print_table(curves: dict[str, list[float]], interval: int) -> None:
    reference = next(iter(curves.values()))
    points = " | ".join(f"{number * interval}" for number in range(len(reference)))
    print(f"| update | bytes a parameter | loss after {points} | share of the first's gain |")
    print("| --- | --- |" + " --- |" * (len(reference) + 1))
    for name, losses in curves.items():
        share = (losses[0] - losses[-1]) / (reference[0] - reference[-1])
        shown = " | ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {name} | {UPDATES[name][1]} | {shown} | {share:.0%} |")


if __name__ == "__main__":
    main(read_arguments(sys.argv[1:]))
