"""The table "What fits where" of README.md: what train.py --plan finds for cards of several sizes.

python benchmarks/what_fits.py

It needs neither a GPU nor the model, only the shape of Llama-2-7B. Each cell is the plan of one
setting: micro_batch_tokens, recomputed layers, and the expected tokens a second at best.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine  # noqa: F401  (before Transformers, which it keeps quiet)

# isort: split

import torch
from transformers import LlamaConfig

from engine.recipe import Recipe
from engine.shape import ModelShape
from plan import find_devices, job_of
from run.arguments import ArgumentParser
from run.config import CONFIG_FILE, load_config
from run.script import run_script
from run.train_arguments import PlanFor

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
GPUS = ((16, 1), (24, 1), (48, 1), (80, 1), (141, 1), (24, 8), (80, 8))
RECIPES = {
    "full": {"method": "full", "optimizer": "adamw"},
    "full, `adamw_8bit`": {"method": "full", "optimizer": "adamw_8bit"},
    "LoRA": {"method": "lora", "optimizer": "adamw"},
    "QLoRA": {"method": "qlora", "optimizer": "adamw"},
}


def main() -> None:
    ArgumentParser(__doc__).parse_args()  # only for --help
    for line in table():
        print(line)


def table() -> list[str]:
    lines = [f"| GPUs | {' | '.join(RECIPES)} |", "| --- " * (1 + len(RECIPES)) + "|"]
    for memory, count in GPUS:
        cells = [cell(memory, count, names) for names in RECIPES.values()]
        many = f"{count} × " if count > 1 else ""
        lines.append(f"| {many}{memory} GB | {' | '.join(cells)} |")
    return lines


def cell(memory: int, count: int, names: dict[str, str]) -> str:
    if count > 1 and not Recipe(**names).spreads:
        return "-"
    here, card, kernels, _ = find_devices(PlanFor(memory, count))
    shape = ModelShape(LLAMA_2_7B, torch.bfloat16)
    job = job_of(load_config(CONFIG_FILE, {}), shape, kernels, count)
    job = replace(job, recipe=replace(job.recipe, **names))
    plan = job.on(here)
    if not plan.fits(here):
        return "no"
    speed = job.step(plan, card).tokens_per_second
    return f"{plan.micro_batch_tokens:,} / {plan.recomputed_blocks} / {speed:,.0f}"


if __name__ == "__main__":
    run_script(main)
