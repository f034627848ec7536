"""Loss and perplexity of a checkpoint, or of any Llama in Hugging Face format, on a split.

python perplexity.py --ckpt checkpoints/llama-2-7b-gsm8k/best --split test
python perplexity.py --ckpt meta-llama/Llama-2-7b-hf --split validation
python perplexity.py --ckpt checkpoints/llama-2-7b-gsm8k/last --split train --limit 500
torchrun --nproc_per_node 8 perplexity.py --ckpt checkpoints/llama-2-7b-gsm8k/best

The loss is the mean negative log-likelihood, in nats, over the tokens of the answers and EOS.
Perplexity is its exponential. Training and validation use the same loss function. Both are also
printed for three classes of these tokens: reasoning, equations (the annotations), final answer.
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
from engine import memory, ranks
from engine.agreement import check_same_on_all
from engine.device import pick_device, prepare_process
from engine.hub import fetch
from engine.loading import check_fits, check_ids, check_positions, load_model, load_tokenizer
from engine.measure import Measurement, measure
from engine.plan import MOST_TOKENS
from engine.ranks import Ranks
from grading.answer_parts import PARTS
from run.model_source import Source, resolve_source
from run.training_json import tokenizer_record


def main(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    with ranks.job(pick_device()) as here:
        source = resolve_source(arguments.ckpt, arguments.config, typed)
        examples, result = measure_source(source, arguments.split, arguments.limit, here)
        print(
            f"{source.path} on {arguments.split}: {examples} rows, "
            f"{result.num_tokens} supervised tokens"
        )
        for name, part in result.by_class.items():
            print(f"  {name.replace('_', ' '):<13} {part.num_tokens:>8} tokens, {part}")
        print(f"loss {result.loss:#.8g}")
        print(f"perplexity {result.perplexity:#.8g}")
        check_printed()


@memory.reported("measuring", "set a smaller micro_batch_tokens, or take a larger device")
def measure_source(
    source: Source, split: str, limit: int | None, here: Ranks
) -> tuple[int, Measurement]:
    """The number of rows that fit, and the loss over them."""
    config, device = source.config, pick_device()
    dtype = getattr(torch, config.dtype)
    prepare_process(device, dtype)
    check_fits(source.path, dtype, adapter=source.adapter)
    folder = fetch(source.model)
    tokenizer_folder = source.tokenizer(folder)
    tokenizer = load_tokenizer(tokenizer_folder, tokenizer_record(tokenizer_folder))
    rows = config.dataset, split, config.validation_size, config.seed
    problems, sha256 = data.load_split(*rows)
    source.check_rows(split, sha256)
    examples = data.encode(tokenizer, problems[:limit], config.prompt, by_class=True)
    examples = data.leave_out_long(examples, config.max_length, split)

    # An adapter's base is compared with the one that it was trained on.
    weights = source.weights_identity(folder) if source.manifest else folder.name
    model = load_model(folder, dtype, device, adapter=source.adapter)
    model.ranks = here  # to which the micro-batches are dealt, each with a whole copy of the model
    source.check_unchanged()
    check_ids(model, (example.input_ids for example in examples), source.path)
    longest = max(len(example.input_ids) for example in examples)
    check_positions(model, longest, "the longest row", "set a smaller max_length")
    # Nothing is kept for a backward pass, so that even large micro-batches need little memory. More
    # tokens than a CPU takes would be as fast.
    budget = config.micro_batch_tokens or MOST_TOKENS
    here.check_same(
        {"weights": weights, "data_sha256": sha256[split], "rows": len(examples), "budget": budget}
        | {key: getattr(config, key) for key in ("prompt", "dtype")}
    )
    check_same_on_all(model, examples)
    return len(examples), measure(model, examples, budget, PARTS)


if __name__ == "__main__":
    run_script(main, *command_line)
