"""Loss and perplexity of a checkpoint, or of any Llama in Hugging Face format, on a split.

python perplexity.py --ckpt checkpoints/llama-2-7b-gsm8k/best --split test
python perplexity.py --ckpt meta-llama/Llama-2-7b-hf --split validation
python perplexity.py --ckpt checkpoints/llama-2-7b-gsm8k/last --split train --limit 500

The loss is the mean negative log-likelihood, in nats, over the tokens of the answers and EOS.
Perplexity is its exponential. Training and validation use the same loss function.
"""

import argparse

from run.script import check_platform, check_printed, read_command_line, run_script

check_platform()  # before the imports that would fail

from run.arguments import ArgumentParser, parse_arguments, positive_int


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--ckpt",
        metavar="DIR",
        help="checkpoint, model folder or hub id (default: best of the run in the settings)",
    )
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="default: test"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N rows")
    return parse_arguments(parser, argv)


if __name__ == "__main__":
    command_line = read_command_line(read_arguments)  # before the heavy imports

import torch

import data
from engine import memory
from engine.device import pick_device, prepare_process
from engine.hub import fetch
from engine.loading import check_fits, check_ids, check_positions, load_model, load_tokenizer
from engine.measure import measure
from engine.plan import MOST_TOKENS
from run.model_source import resolve_source
from run.training_json import tokenizer_record


@memory.reported("measuring", "set a smaller micro_batch_tokens, or take a larger device")
def main(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    device = pick_device()
    source = resolve_source(arguments.ckpt, arguments.config, typed)
    config = source.config
    dtype = getattr(torch, config.dtype)
    prepare_process(device, dtype)
    check_fits(source.path, dtype, adapter=source.adapter)
    folder = fetch(source.model)
    if source.adapter:
        source.weights_identity(folder)  # of its base
    tokenizer_folder = source.tokenizer(folder)
    tokenizer = load_tokenizer(tokenizer_folder, tokenizer_record(tokenizer_folder))
    problems = data.load_split(config.dataset, arguments.split, config.validation_size, config.seed)
    if arguments.split != "train":  # for which a run's hash includes the validation rows
        source.check_rows(arguments.split, data.fingerprint(problems))
    examples = data.encode(tokenizer, problems[: arguments.limit], config.prompt)
    examples = data.leave_out_long(examples, config.max_length, arguments.split)

    model = load_model(folder, dtype, device, adapter=source.adapter)
    source.check_unchanged()
    check_ids(model, (example.input_ids for example in examples), source.path)
    longest = max(len(example.input_ids) for example in examples)
    check_positions(model, longest, "the longest row", "set a smaller max_length")

    # Nothing is kept for a backward pass, so that even large micro-batches need little memory.
    result = measure(model, examples, config.micro_batch_tokens or MOST_TOKENS)
    print(
        f"{source.path} on {arguments.split}: {len(examples)} rows, "
        f"{result.num_tokens} supervised tokens"
    )
    print(f"loss {result.loss:#.8g}")
    print(f"perplexity {result.perplexity:#.8g}")
    check_printed()


if __name__ == "__main__":
    run_script(main, *command_line)
