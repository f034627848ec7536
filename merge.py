"""Merge a LoRA or QLoRA checkpoint into its base model, for programs that do not read adapters.

python merge.py --ckpt checkpoints/lora/best --output merged/lora
python merge.py --ckpt checkpoints/lora/best --output merged/lora --model ./moved-base

Each adapter is added to its weight in float32, and the sum is rounded once, to the run's dtype. The
base of a QLoRA run is first converted back from 4 bits. The result is a Hugging Face folder that
evaluate.py and perplexity.py take like any other checkpoint. Neither base nor adapter is changed.
"""

import argparse
from typing import Any

from run.errors import UserError
from run.script import check_platform, read_command_line, run_script

check_platform()  # before the imports that would fail

from run.arguments import ArgumentParser, parse_arguments


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--ckpt",
        metavar="DIR",
        help="adapter checkpoint (default: best of the run in the settings)",
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="the folder to write, which must not exist"
    )
    return parse_arguments(parser, argv)


if __name__ == "__main__":
    command_line = read_command_line(read_arguments)  # before the heavy imports

import torch

from engine import memory
from engine.device import pick_device, prepare_process
from engine.hub import fetch
from engine.loading import check_fits, load_model, load_tokenizer
from engine.state import save_from_device
from run.checkpoint import save_checkpoint
from run.manifest import checkpoint_around
from run.model_source import Source, resolve_source
from run.paths import hide_home, local_path
from run.shell import evaluation_command
from run.streams import is_one_of_several
from run.training_json import tokenizer_record


@memory.reported("merging", memory.LARGER_DEVICE)
def main(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    if is_one_of_several():
        raise UserError("merge.py: works in one process: type it without torchrun")
    source = resolve_source(arguments.ckpt, arguments.config, typed)
    output = local_path(arguments.output)
    if source.adapter is None:
        raise UserError(f"{source.path}: contains no adapter of this program: name one with --ckpt")
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already: name another folder with --output")
    if checkpoint_around(output):
        raise UserError(
            f"{output}: is in a checkpoint, which a save would replace with all that is in it: "
            "name a folder outside it with --output"
        )

    dtype, device = getattr(torch, source.config.dtype), pick_device()
    prepare_process(device, dtype)
    check_fits(source.path, dtype, adapter=source.adapter)
    folder = fetch(source.model)
    weights = source.weights_identity(folder)
    tokenizer = load_tokenizer(source.adapter.folder, tokenizer_record(source.adapter.folder))
    model = load_model(folder, dtype, device, None, source.adapter)
    source.check_unchanged()

    from engine.lora import merge_adapters  # which imports PEFT

    merged = merge_adapters(model, dtype)
    save_from_device(save_checkpoint, output, merged, tokenizer, description(source, weights))
    print(f"merged: {output}; next: {evaluation_command(output)}")


def description(source: Source, weights: str) -> dict[str, Any]:
    """The ``training.json`` of the merged model: the adapter's, and what was merged.

    Args:
        weights: see `Source.weights_identity`.
    """
    kept = {name: value for name, value in source.description.items() if name != "state"}
    merged = {"adapter": hide_home(source.path), "weights": weights, "base": kept.pop("base")}
    return kept | {"merged": merged}


if __name__ == "__main__":
    run_script(main, *command_line)
