"""Loss and perplexity of a checkpoint, or of any Llama in Hugging Face format, on a split of the data.

python perplexity.py --ckpt checkpoints/llama-2-7b-gsm8k/best --split test
python perplexity.py --ckpt meta-llama/Llama-2-7b-hf --split validation
python perplexity.py --ckpt checkpoints/llama-2-7b-gsm8k/last --split train --limit 500

The loss is the mean negative log-likelihood, in nats, of the tokens of answer and EOS; the
perplexity is its exponential. Training, validation and this script share the one function
`summed_loss`.
"""

import argparse
import sys

from run.script import check_platform, check_printed, run_script

check_platform()  # before the imports that would fail

from run.arguments import ArgumentParser, parse_arguments, positive_number
from run.config import Config


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--ckpt",
        metavar="DIR",
        help="checkpoint, model folder or hub id (best of the config's run)",
    )
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="default: test"
    )
    parser.add_argument("--limit", type=positive_number, metavar="N", help="only the first N rows")
    return parse_arguments(parser, argv)


if (
    __name__ == "__main__"
):  # before the heavy imports: --help and a mistyped flag are answered at once
    _parsed: list = []
    run_script(lambda: _parsed.extend(read_arguments(sys.argv[1:])))


import torch

import data
from engine.cpu import heap
from engine.device import pick_device
from engine.hub import fetch
from engine.loading import check_ids, check_positions, load_model, load_tokenizer
from engine.loss import measure
from run.model_source import resolve_source

# ---------------------------------------------------------------- the loss


# ---------------------------------------------------------------- the script


def main(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    heap.keep_freed_memory()
    source = resolve_source(arguments.ckpt, arguments.config, typed)
    config: Config = source.config
    device = pick_device()
    folder = fetch(source.path)
    tokenizer = load_tokenizer(folder)
    problems = data.load_split(config.dataset, arguments.split, config.validation_size, config.seed)
    if (
        arguments.split != "train"
    ):  # of which a run knows the hash with the validation rows among them
        source.check_rows(arguments.split, data.fingerprint(problems))
    examples = data.encode(tokenizer, problems[: arguments.limit], config.prompt)
    examples = data.leave_out_long(examples, config.max_length, arguments.split)
    model = load_model(folder, getattr(torch, config.dtype), device)
    source.check_unchanged()
    check_ids(model, (example.input_ids for example in examples), source.path)
    longest = max(len(example.input_ids) for example in examples)
    check_positions(model, longest, "the longest row", "set a smaller max_length")
    result = measure(model, examples, config.micro_batch_tokens, device)
    print(
        f"{source.path} on {arguments.split}: {len(examples)} rows, {result.num_tokens} supervised tokens"
    )
    print(f"loss {result.loss:#.8g}")
    print(f"perplexity {result.perplexity:#.8g}")
    check_printed()


if __name__ == "__main__":
    run_script(main, *_parsed)
