"""The memory that the plan counts against the memory that training takes, on a CPU.

python benchmarks/plan.py
python benchmarks/plan.py --layers 8 --hidden_size 512

Each setting trains in a process of its own: two optimizer steps of two full micro-batches, as
train.py makes them, on a random Llama and rows of GSM8K's lengths. What it takes is the largest
resident memory (VmHWM, reset before the model is loaded) beyond what was resident before, after a
first small model has made the libraries load what they need. The weights are mapped from their
file; they count, since training touches and changes all of them.

On Linux only. It ends with an error if a setting is off by more than the promised 15 %.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import LENGTHS

from run.errors import UserError
from run.script import run_script

MOST_ERROR = 0.15
VOCABULARY = 8000
RANK = 16  # of adapters


@dataclass(frozen=True)
class Setting:
    """What one process trains; ``recomputed``: all layers, none, or norms and SwiGLU neither."""

    dtype: str
    tokens: int
    recomputed: str
    method: str = "full"


SETTINGS = (
    Setting("float32", 4096, "parts"),
    Setting("float32", 4096, "nothing"),
    Setting("float32", 4096, "all"),
    Setting("float32", 1024, "parts"),
    Setting("bfloat16", 4096, "parts"),
    Setting("bfloat16", 4096, "all"),
    Setting("bfloat16", 1024, "parts"),
    Setting("float32", 4096, "parts", "lora"),
    Setting("float32", 4096, "all", "lora"),
    Setting("bfloat16", 4096, "parts", "lora"),
)


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # for its own processes
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> None:
    if arguments.setting:
        print(json.dumps(measure(arguments.folder, Setting(**json.loads(arguments.setting)))))
        return
    print("| method | dtype | tokens | recomputed | plan, MB | measured, MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments.hidden_size, arguments.layers)
        for setting in SETTINGS:
            planned, measured = in_its_own_process(Path(folder), setting)
            ratio = planned / measured
            print(
                f"| {setting.method} | {setting.dtype} | {setting.tokens} | {setting.recomputed} "
                f"| {planned / 1e6:.0f} | {measured / 1e6:.0f} | {ratio:.3f} |",
                flush=True,
            )
            if abs(ratio - 1) > MOST_ERROR:
                wrong.append(setting)
    if wrong:
        raise UserError(f"the plan is off by more than {MOST_ERROR:.0%}: {wrong}")


def write_model(folder: Path, hidden: int, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def in_its_own_process(folder: Path, setting: Setting) -> tuple[int, int]:
    command = [sys.executable, __file__, "--folder", folder, "--setting", json.dumps(vars(setting))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    planned, measured = json.loads(output.splitlines()[-1])
    return planned, measured


def measure(folder: Path, setting: Setting) -> tuple[int, int]:
    """What the plan counts for ``setting``, and what it takes, in bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.compiling import prepare
    from engine.device import kernels_for, pick_device, prepare_process
    from engine.footprint import footprint
    from engine.llama import Llama
    from engine.loading import load_model
    from engine.recipe import Recipe, Recomputation
    from engine.shape import read_shape
    from plan import rows_of
    from run.method import Adapter

    dtype, device = getattr(torch, setting.dtype), pick_device()
    prepare_process(device)
    kernels = kernels_for(device)
    rows = examples(setting.tokens)
    shape = read_shape(folder, dtype)
    again = Recomputation(
        shape.layers if setting.recomputed == "all" else 0, setting.recomputed != "nothing"
    )
    recipe, adapter = Recipe(), None
    if setting.method == "lora":
        recipe = Recipe("lora", RANK)
        adapter = Adapter(str(folder), setting.dtype, False, RANK, RANK, False, 0.0, 0, None)
    planned = footprint(shape, recipe, kernels, rows_of(rows, len(rows)), setting.tokens, again)

    if adapter:
        import engine.lora  # noqa: F401  (PEFT is not part of what training takes)
    small = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
    warm_up = Llama(LlamaForCausalLM(small).to(dtype), kernels)
    train_two_steps(warm_up, examples(128, vocabulary=64), 128)
    del warm_up
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    model = load_model(folder, dtype, device, adapter=adapter)
    prepare(model, again, wants_compiled=False)
    train_two_steps(model, rows, setting.tokens)
    return planned.total, resident("VmHWM") - before


def train_two_steps(model: Any, rows: list, tokens: int) -> None:
    from engine.optimizer import build_optimizer, make_state
    from train import train_step

    optimizer = build_optimizer(model.trained, 1e-5, (0.9, 0.999), 1e-8, 0.0)
    make_state(optimizer)
    for _ in range(2):
        train_step(model, optimizer, rows, 1e-5, tokens, 1.0)


def examples(tokens: int, vocabulary: int = VOCABULARY) -> list:
    """Rows for two micro-batches of nearly ``tokens`` tokens."""
    from engine.packing import IGNORE, Example

    rng, rows, total = random.Random(0), [], 0
    while total < 1.95 * tokens:
        prompt, answer = rng.choice(LENGTHS)
        ids = [rng.randrange(3, vocabulary) for _ in range(prompt + answer)]
        rows.append(Example(ids, [IGNORE] * prompt + ids[prompt:]))
        total += prompt + answer - 1
    return rows


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":") for line in lines)[name].split()[0]) * 1024


if __name__ == "__main__":
    run_script(main, read_arguments(sys.argv[1:]))
