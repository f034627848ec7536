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
from collections.abc import Sequence
from dataclasses import dataclass

from config import ArgumentParser, Config, parse_arguments, positive_number
from errors import run_script


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--ckpt", metavar="DIR", help="checkpoint, model folder or hub id (best of the config's run)")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument("--limit", type=positive_number, metavar="N", help="only the first N rows")
    return parse_arguments(parser, argv)


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag are answered at once
    _parsed: list = []
    run_script(lambda: _parsed.extend(read_arguments(sys.argv[1:])))

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import LlamaForCausalLM

import data
from checkpoint import resolve_source
from model import check_vocabulary, fetch, load_model, load_tokenizer, pick_device

CHUNK_ELEMENTS = 2**25  # most logits that exist at a time: 128 MiB in float32


# ---------------------------------------------------------------- the loss


def summed_loss(model: LlamaForCausalLM, batch: data.Batch) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all supervised tokens of a micro-batch, in nats.

    A sum, not a mean: divided by the number of supervised tokens of all micro-batches of a step
    it gives gradients that do not depend on how the step was cut up, since every supervised
    token weighs the same. (The mean of micro-batch means does not: transformers #34191.)

    The head runs on the supervised positions only, in chunks whose logits are recomputed in
    the backward pass, so that logits of the whole micro-batch never exist.

    Returns:
        A scalar in float64; each token's own loss is computed in float32 or better.
    """
    hidden = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        seqlens=batch.seqlens,
        cu_seqlens=batch.cu_seqlens,
    ).last_hidden_state[0, batch.loss_positions]
    rows = max(1, CHUNK_ELEMENTS // model.lm_head.weight.shape[0])
    chunks = list(zip(hidden.split(rows), batch.labels.split(rows), strict=True))
    if len(chunks) == 1:
        return _head_loss(hidden, model.lm_head.weight, batch.labels)
    losses = [checkpoint(_head_loss, h, model.lm_head.weight, t, use_reentrant=False) for h, t in chunks]
    return torch.stack(losses).sum()


def _head_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    # The log-sum-exp of bfloat16 logits would be off in the third digit.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Added up in float64: a float32 sum over thousands of tokens is off in the sixth digit.
    return F.cross_entropy(logits, labels, reduction="none").sum(dtype=torch.float64)


@dataclass(frozen=True)
class Measurement:
    """Mean loss in nats over ``num_tokens`` supervised tokens, and its exponential."""

    loss: float
    perplexity: float
    num_tokens: int

    def __str__(self) -> str:
        return f"loss {self.loss:.8g}, perplexity {self.perplexity:.8g}"


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats; infinity where float64 ends."""
    return math.exp(loss) if loss < 709 else math.inf


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, examples: Sequence[data.Example], micro_batch_tokens: int, device: torch.device
) -> Measurement:
    """Loss and perplexity over ``examples``: all nats divided once by all supervised tokens.

    The result does not depend on ``micro_batch_tokens`` nor on the order of the examples. The
    model's train or eval mode is as before afterwards.
    """
    was_training = model.training
    model.eval()
    batches = data.pack(examples, micro_batch_tokens)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for batch in tqdm(batches, desc="loss", unit="batch", leave=False, disable=None):
        nats += summed_loss(model, batch.to(device))
    model.train(was_training)
    num_tokens = sum(batch.num_labels for batch in batches)
    loss = nats.item() / num_tokens
    return Measurement(loss, perplexity_of(loss), num_tokens)


# ---------------------------------------------------------------- the script


def main(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    source = resolve_source(arguments.ckpt, arguments.config, typed)
    config: Config = source.config
    device = pick_device()
    folder = fetch(source.path)
    tokenizer = load_tokenizer(folder)
    problems = data.load_split(config.dataset, arguments.split, config.validation_size, config.seed)
    examples = data.encode(tokenizer, problems[: arguments.limit], config.prompt)
    examples = data.leave_out_long(examples, config.max_length, arguments.split)
    model = load_model(folder, getattr(torch, config.dtype), device)
    check_vocabulary(model, tokenizer, source.path)
    result = measure(model, examples, config.micro_batch_tokens, device)
    print(f"{source.path} on {arguments.split}: {len(examples)} rows, {result.num_tokens} supervised tokens")
    print(f"loss {result.loss:.8g}")
    print(f"perplexity {result.perplexity:.8g}")


if __name__ == "__main__":
    run_script(main, *_parsed)
