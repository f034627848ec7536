"""What rounding to bfloat16, and to 8-bit floats, changes of a model's loss and gradient.

python benchmarks/fp8.py --model ./SmolLM2-135M --dataset ./gsm8k
python benchmarks/fp8.py --model ./SmolLM2-135M --dataset ./gsm8k --rows 64

The loss and gradient of the first training rows are computed in float32, in bfloat16, and in
bfloat16 with products in FP8, as `fp8: true` trains. Each is compared with float32. A gradient's
error is the norm of its difference, relative to its own norm: of all weights together, and of the
weight whose error is largest. "Cosine" is that of the angle between the gradients.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine  # noqa: F401  (before Transformers, which it keeps quiet)

# isort: split

import torch

import data
import train
from engine.device import pick_device
from engine.loading import load_model, load_tokenizer
from engine.packing import Example, pack
from grading.dataset import load_problems
from run.config import CONFIG_FILE, read_settings

VARIANTS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, FP8": (torch.bfloat16, True),
}


@dataclass(frozen=True)
class Found:
    """The mean loss in nats, and the gradient of each weight, by name."""

    loss: float
    gradients: dict[str, torch.Tensor]

    @property
    def whole(self) -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in self.gradients.values()])


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder")
    parser.add_argument("--dataset", required=True, help="a folder with train.jsonl")
    parser.add_argument("--rows", type=int, default=32, help="that are computed")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048)
    return parser.parse_args(argv)


def find(
    arguments: argparse.Namespace, rows: list[Example], dtype: torch.dtype, fp8: bool
) -> Found:
    model = load_model(arguments.model, dtype, pick_device()).train()
    if fp8:
        model.kernels.use_fp8(model)
    micro_batches = pack(rows, arguments.micro_batch_tokens, model.kernels)
    nats, num_labels, _ = train.accumulate_gradients(model, micro_batches, None)
    gradients = {name: weight.grad.double().cpu() for name, weight in model.named_parameters()}
    return Found(nats / num_labels, gradients)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def main(arguments: argparse.Namespace) -> None:
    prompt = read_settings(CONFIG_FILE)[0]["prompt"]
    problems = load_problems(arguments.dataset, "train")[: arguments.rows]
    rows = data.encode(load_tokenizer(arguments.model), problems, prompt)
    exact = find(arguments, rows, *VARIANTS["float32"])
    print("| in | loss | difference | error of the gradient | cosine | largest error of a weight |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, variant in VARIANTS.items():
        found = exact if name == "float32" else find(arguments, rows, *variant)
        ours, theirs = found.whole, exact.whole
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()
        errors = {
            weight: error(gradient, exact.gradients[weight])
            for weight, gradient in found.gradients.items()
        }
        worst = max(errors, key=errors.get)
        print(
            f"| {name} | {found.loss:.5f} | {found.loss - exact.loss:+.5f} | "
            f"{error(ours, theirs):.2%} | {cosine:.5f} | {errors[worst]:.1%} ({worst}) |",
            flush=True,
        )


if __name__ == "__main__":
    main(read_arguments(sys.argv[1:]))
