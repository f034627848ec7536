"""The step contenders of cuda.py: Transformers' Trainer and generate, and ours beside them.

All train and decode the same random Llama-2-7B in one process, one after another.

Training: three optimizer steps of 128 rows, of which the first one is not timed, with fused AdamW
on bfloat16 weights. The Trainer uses Transformers' own layers and attention (SDPA), at the settings
of cuda_trainer.py. Ours takes the same rows as they come, and what train.py chooses by default.
Tokens are those of the rows, without padding. The learning rate is 0, which takes as long as any
other: the weights stay the same, so all must find the same loss.

Decoding: the first 256 test problems, each completed with as many tokens as its answer has. Without
knowing it, generate gets them sorted by this length, in batches that are padded on the left and end
with their longest completion. Tokens beyond an answer's length don't count. Its rate counts if its
time was enough for all problems, or if it was not for any size of batch before. Ours takes the
problems as they come, in as many slots as evaluate.py plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from time import perf_counter

import torch

# This benchmark's neighbour, which also puts the repository on the path.
from cuda_decode import count_tokens
from cuda_train import AS_CHOSEN, BATCH_SIZE, Training
from cuda_work import Work, prompts_of, random_llama_2_7b, read_rows
from transformers import LlamaForCausalLM

from engine import device_errors, memory
from engine.llama import Llama
from engine.packing import IGNORE, Example
from engine.recipe import Recipe
from run.errors import one_line

STEPS = 3  # the first one is not timed; as many as a `Training` makes
PROBLEMS = 256
GENERATE_BATCHES = (128, 256)
GENERATE_SECONDS = 22.0  # after which it writes no other token
# The cache grows by copies of one layer's keys or values at a time.
CACHE_GROWTH = 1.1


@dataclass
class Speeds:
    """Useful tokens a second of each setting that was measured."""

    trainer: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)


def measure_contenders(work: Work) -> None:
    from cuda_trainer import train_with_trainer  # whose imports take seconds

    model, speeds = random_llama_2_7b(work), Speeds()
    size = 4 if work.is_dry else BATCH_SIZE
    rows = read_rows("train", STEPS * size)
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    train_with_trainer(work, model.pretrained, batches, speeds.trainer)
    problems = read_rows("test", 8 if work.is_dry else PROBLEMS)
    model.eval()
    generate_all(work, model.pretrained, problems, speeds.generate)
    work.attempt("decoding", decode, model, problems, speeds.generate)
    # Last, since compiling may take until the limit. The step train measures the same.
    work.attempt("training", train, model.train(), speeds.trainer)


# ---------------------------------------------------------------- training


def train(work: Work, model: Llama, others: list[float]) -> None:
    """Our steps on the same rows."""
    training = Training(work, model, Recipe())
    training.measure(AS_CHOSEN)
    if training.tokens_per_s and others:
        ratio = training.tokens_per_s / max(others)
        work.results.write("training beside the Trainer", times_the_trainer=ratio)


# ---------------------------------------------------------------- generate


def generate_all(
    work: Work, pretrained: LlamaForCausalLM, problems: list[Example], speeds: list[float]
) -> None:
    sizes = (2, 4) if work.is_dry else GENERATE_BATCHES
    work.attempt("generate", warm_up, pretrained, problems[: sizes[0]])
    ends = perf_counter() + GENERATE_SECONDS
    for size in sizes:
        work.attempt("generate", try_size, pretrained, problems, size, ends, speeds)


def warm_up(work: Work, pretrained: LlamaForCausalLM, problems: list[Example]) -> None:
    generate(pretrained, prompts_of(problems), 4, GENERATE_SECONDS)


def try_size(
    work: Work,
    pretrained: LlamaForCausalLM,
    problems: list[Example],
    size: int,
    ends: float,
    speeds: list[float],
) -> None:
    """Running out of memory is a result of the size, not a fault."""
    pairs = sorted(
        zip(prompts_of(problems), lengths_of(work, problems), strict=True), key=itemgetter(1)
    )
    batches = [pairs[first : first + size] for first in range(0, len(pairs), size)]
    needed = max(cache_bytes(pretrained, batch) for batch in batches)
    free = memory.free_bytes(pretrained.device)
    why = f"the cache takes {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free"
    if needed < free:
        try:
            return measure_generate(work, pretrained, batches, ends, speeds)
        except Exception as error:
            if not device_errors.is_out_of_memory(error):
                raise
            why = one_line(error)[:200]
    work.results.write("generate", batch=size, out_of_memory=why)


def measure_generate(
    work: Work,
    pretrained: LlamaForCausalLM,
    batches: list[list[tuple[list[int], int]]],
    ends: float,
    speeds: list[float],
) -> None:
    """Each of ``batches`` has prompts, and the number of tokens to complete each with."""
    work.reset_peak()
    started, tokens = work.time(), 0
    for batch in batches:
        prompts, lengths = zip(*batch, strict=True)
        if (left := ends - perf_counter()) > 0:
            written = generate(pretrained, prompts, max(lengths), left)
            tokens += sum(min(length, written) for length in lengths)
    seconds = work.time() - started
    if not tokens:
        return work.results.write("generate", batch=len(batches[0]), skipped="no time is left")
    wanted = sum(length for batch in batches for _, length in batch)
    if tokens == wanted or not speeds:
        speeds.append(tokens / seconds)
    work.results.write(
        "generate",
        batch=len(batches[0]),
        problems=sum(map(len, batches)),
        tokens=tokens,
        of_tokens=wanted,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        **work.peak_gib(),
    )


def generate(
    pretrained: LlamaForCausalLM, prompts: Sequence[list[int]], most: int, seconds: float
) -> int:
    """The tokens that each of ``prompts`` got: ``most``, or fewer if the ``seconds`` are over."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = pretrained.generate(
        torch.tensor(ids, device=pretrained.device),
        attention_mask=torch.tensor(mask, device=pretrained.device),
        do_sample=False,
        use_cache=True,  # which training has turned off
        max_new_tokens=most,
        max_time=seconds,
        eos_token_id=pretrained.config.vocab_size,  # not a token
        pad_token_id=0,
    )
    return output.shape[1] - longest


def cache_bytes(pretrained: LlamaForCausalLM, batch: list[tuple[list[int], int]]) -> float:
    """What generate's cache takes for a batch that is padded to its longest prompt."""
    prompts, lengths = zip(*batch, strict=True)
    config = pretrained.config
    width = config.num_key_value_heads * config.head_dim
    token = 2 * config.num_hidden_layers * width * pretrained.dtype.itemsize
    return CACHE_GROWTH * len(batch) * (max(map(len, prompts)) + max(lengths)) * token


def lengths_of(work: Work, problems: list[Example]) -> list[int]:
    """The tokens of each answer."""
    most = 8 if work.is_dry else 1024
    lengths = [len(each.labels) - each.labels.count(IGNORE) for each in problems]
    return [min(most, length) for length in lengths]


def decode(work: Work, model: Llama, problems: list[Example], others: list[float]) -> None:
    """Our completions of the same problems, in as many slots as evaluate.py plans."""
    prompts, lengths = prompts_of(problems), lengths_of(work, problems)
    count_tokens(model, prompts[:16], lengths[:16], min(16, len(prompts)))  # a warm-up
    slots = memory.plan_slots(model, None, max(map(len, prompts)) + 512, len(prompts)).slots
    work.reset_peak()
    started = work.time()
    tokens = count_tokens(model, prompts, lengths, slots)
    seconds = work.time() - started
    work.results.write(
        "decoding",
        problems=len(prompts),
        slots=slots,
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        times_generate=tokens / seconds / max(others) if others else None,
        **work.peak_gib(),
    )
