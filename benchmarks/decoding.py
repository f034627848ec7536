"""Greedy decoding: this product, and Transformers' generate and generate_batch at the same work.

python benchmarks/decoding.py
python benchmarks/decoding.py --problems 96 --slots 64 --contenders ours generate32
python benchmarks/decoding.py --hidden_size 4096 --intermediate_size 11008 --layers 32 --heads 32 --dtype bfloat16

The work: complete each prompt with as many tokens as its real answer has, with a random Llama.
Prompts and lengths are those of GSM8K's test split where GSM8K_DIR and TOKENIZER_DIR name data and
tokenizer, else random tokens of its lengths. A completion's length is forced, since a random model
knows no end, but no contender knows it beforehand:

- ours: generate.greedy_decode with ``--slots`` slots, or as many as decode_slots null takes;
- generate16, generate32: model.generate in batches of so many prompts, padded on the left, each
  until its longest completion is there, in the order of the data set;
- generate_batch: Transformers' continuous batching with its defaults.

Each contender is a process of its own; they take turns. Counted are useful tokens, those of the
completions. The limit is what the matrix products of one decoding step for all slots would allow
if nothing else took time, measured on the same layers, as our own contender computes them; since a
shared machine's speed drifts, right before and right after each turn, whose share is of the mean of
the two.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The other benchmark lies beside this one, and shows the way to the product.
from training import (
    LENGTHS,
    PROMPT,
    Contender,
    launch,
    peak_memory,
    report,
    wait_for_turn,
    write_model,
)


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", choices=tuple(WORKERS), default=list(WORKERS))
    parser.add_argument("--problems", type=int, default=384)
    parser.add_argument(
        "--slots", type=int, default=None, help="of our own contender; default: it chooses"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="timed ones, after a short one that is not"
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--intermediate_size", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--profile", action="store_true", help="instead of the race, a profile of our own contender"
    )
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the work


def prepare(folder: Path, arguments: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Write model and work into ``folder``; returns prompts and how many tokens each is completed with."""
    import data
    from engine import packing
    from engine.loading import load_tokenizer
    from grading import dataset

    write_model(folder, arguments)
    if os.environ.get("GSM8K_DIR") and os.environ.get("TOKENIZER_DIR"):
        problems = dataset.load_problems(os.environ["GSM8K_DIR"], "test")[: arguments.problems]
        examples = data.encode(load_tokenizer(folder), problems, PROMPT)
        prompt_lengths = [example.labels.count(packing.IGNORE) for example in examples]
        work = [
            (example.input_ids[:length], len(example.input_ids) - length)
            for example, length in zip(examples, prompt_lengths, strict=True)
        ]
        print(f"prompts: the first {len(work)} of GSM8K's test split, Llama-2's tokenizer")
    else:
        rng = random.Random(0)
        drawn = [rng.choice(LENGTHS) for _ in range(arguments.problems)]
        work = [
            ([1, *(rng.randrange(3, 32_000) for _ in range(prompt - 1))], answer)
            for prompt, answer in drawn
        ]
        print(f"prompts: {len(work)} of random tokens with GSM8K's lengths")
    (folder / "work.json").write_text(json.dumps(work))
    return work


# ---------------------------------------------------------------- contenders, each in a process of its own


def our_decoder(arguments: argparse.Namespace) -> Callable[[list[tuple[list[int], int]]], int]:
    import torch

    from engine.cpu import heap
    from engine.decoding import greedy_decode, plan_slots
    from engine.device import pick_device
    from engine.loading import load_model

    heap.keep_freed_memory()
    model = load_model(arguments.folder, getattr(torch, arguments.dtype), pick_device())
    everything = json.loads((arguments.folder / "work.json").read_text())
    longest = max(len(prompt) + length for prompt, length in everything)
    arguments.slots_taken = plan_slots(model, arguments.slots, longest, len(everything))

    def decode(work: list[tuple[list[int], int]]) -> int:
        prompts, lengths = zip(*work, strict=True)
        completions = greedy_decode(
            model,
            prompts,
            max_new_tokens=lengths,
            eos_token_ids=frozenset(),
            slots=arguments.slots_taken,
        )
        return sum(len(completion.token_ids) for completion in completions)

    return decode


def transformers_model(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    from engine.device import pick_device

    dtype = getattr(torch, arguments.dtype)
    return LlamaForCausalLM.from_pretrained(arguments.folder, dtype=dtype).to(pick_device()).eval()


def padded_decoder(
    batch: int,
) -> Callable[[argparse.Namespace], Callable[[list[tuple[list[int], int]]], int]]:
    def make(arguments: argparse.Namespace) -> Callable[[list[tuple[list[int], int]]], int]:
        import torch
        from transformers import StoppingCriteria

        class AtItsLength(StoppingCriteria):
            def __init__(self, prompt: int, lengths: list[int]):
                self.ends = torch.tensor(
                    [prompt + length for length in lengths], device=model.device
                )

            def __call__(
                self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any
            ) -> torch.Tensor:
                return input_ids.shape[1] >= self.ends

        model = transformers_model(arguments)

        def decode(work: list[tuple[list[int], int]]) -> int:
            tokens = 0
            for first in range(0, len(work), batch):
                prompts, lengths = zip(*work[first : first + batch], strict=True)
                longest = max(map(len, prompts))
                ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
                mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
                output = model.generate(
                    torch.tensor(ids, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    do_sample=False,
                    max_new_tokens=max(lengths),
                    eos_token_id=32_000,  # no token's: the criterion ends each completion
                    pad_token_id=0,
                    stopping_criteria=[AtItsLength(longest, lengths)],
                )
                assert output.shape[1] == longest + max(lengths)
                tokens += sum(lengths)
            return tokens

        return decode

    return make


def continuous_decoder(
    arguments: argparse.Namespace,
) -> Callable[[list[tuple[list[int], int]]], int]:
    from transformers import GenerationConfig

    model = transformers_model(arguments)

    def decode(work: list[tuple[list[int], int]]) -> int:
        settings = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024
        )
        tokens = 0
        with model.continuous_batching_context_manager(
            generation_config=settings, block=True
        ) as manager:
            waiting = {
                manager.add_request(prompt, max_new_tokens=length) for prompt, length in work
            }
            while waiting:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    waiting.discard(result.request_id)
                    tokens += len(result.generated_tokens)
        return tokens

    return decode


WORKERS: dict[str, Callable[[argparse.Namespace], Callable[[list[tuple[list[int], int]]], int]]] = {
    "ours": our_decoder,
    "generate16": padded_decoder(16),
    "generate32": padded_decoder(32),
    "generate_batch": continuous_decoder,
}


def work_in_turns(arguments: argparse.Namespace) -> None:
    work = json.loads((arguments.folder / "work.json").read_text())
    decode = WORKERS[arguments.worker](arguments)
    rounds = [work[:8], *[work] * arguments.rounds]
    for each in rounds:
        wait_for_turn()
        started = time.perf_counter()
        tokens = decode(each)
        seconds = time.perf_counter() - started
        if tokens != sum(length for _, length in each):
            sys.exit(
                f"{arguments.worker} wrote {tokens} tokens, not {sum(length for _, length in each)}"
            )
        report(
            seconds=seconds,
            tokens=tokens,
            peak=peak_memory(),
            slots=getattr(arguments, "slots_taken", None),
        )


# ---------------------------------------------------------------- the race


def limit(arguments: argparse.Namespace, slots: int) -> float:
    """Tokens a second if a decoding step were its matrix products alone, for all slots in use."""
    import torch

    from engine import memory
    from engine.cpu.onednn import packed_weights
    from engine.device import pick_device
    from engine.loading import load_model

    device = pick_device()
    model = load_model(arguments.folder, getattr(torch, arguments.dtype), device)
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = {
        layer.in_features: torch.randn(slots, layer.in_features).to(device, model.dtype)
        for layer in layers
    }
    seconds = []
    with torch.inference_mode(), packed_weights(model):
        for _ in range(42):
            started = time.perf_counter()
            for layer in layers:
                result = layer(inputs[layer.in_features])
            result[0, 0].item()
            seconds.append(time.perf_counter() - started)
    del model, layers, layer, inputs, result
    memory.release()
    return slots / statistics.median(seconds[2:])


def race(arguments: argparse.Namespace) -> None:
    keys = ("folder", "slots", "rounds", "dtype")
    options = [
        f"--{key}={getattr(arguments, key)}" for key in keys if getattr(arguments, key) is not None
    ]
    contenders = [launch(__file__, name, options) for name in arguments.contenders]
    slots, before = arguments.slots or 64, 0.0
    for number in range(arguments.rounds + 1):
        for contender in contenders:
            contender.step()
            last = contender.reports[-1]
            print(
                f"round {number} {contender.name}: {last['tokens'] / last['seconds']:.0f} tok/s",
                file=sys.stderr,
            )
            if number:
                after = limit(arguments, slots)
                last["allowed"], before = (before + after) / 2, after
            else:  # not timed; our own contender says here how many slots it takes
                slots = last["slots"] or slots
        if not number:
            before = limit(arguments, slots)
    for contender in contenders:
        contender.process.kill()
    print_table(arguments, contenders, slots)


def print_table(arguments: argparse.Namespace, contenders: list[Contender], slots: int) -> None:
    limits = sorted(entry["allowed"] for contender in contenders for entry in contender.reports[1:])
    print(
        f"matrix products alone: {statistics.median(limits):.0f} tokens a second ({limits[0]:.0f} to {limits[-1]:.0f}) "
        f"with {slots} slots in {arguments.dtype}"
    )
    print("| contender | useful tokens a second | seconds | peak memory, GB | share of the limit |")
    print("| --- | --- | --- | --- | --- |")
    speeds = {}
    for contender in contenders:
        timed = contender.reports[1:]
        speed = statistics.median(entry["tokens"] / entry["seconds"] for entry in timed)
        share = statistics.median(
            entry["tokens"] / entry["seconds"] / entry["allowed"] for entry in timed
        )
        seconds, peak = statistics.median(entry["seconds"] for entry in timed), timed[-1]["peak"]
        print(f"| {contender.name} | {speed:.0f} | {seconds:.1f} | {peak:.2f} | {share:.0%} |")
        speeds[contender.name] = speed
    for contender in contenders[1:]:
        first, other = contenders[0].name, contender.name
        print(f"{first} against {other}: {speeds[first] / speeds[other]:.2f} x the speed")


def profile(arguments: argparse.Namespace, work: list[tuple[list[int], int]]) -> None:
    """Print where our own contender's time goes, operator by operator."""
    import torch

    decode = our_decoder(arguments)
    decode(work[:8])
    with torch.profiler.profile() as result:
        decode(work)
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(result.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))


def main(arguments: argparse.Namespace) -> None:
    from engine.cpu import heap

    heap.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        work = prepare(arguments.folder, arguments)
        profile(arguments, work) if arguments.profile else race(arguments)


if __name__ == "__main__":
    parsed = read_arguments(sys.argv[1:])
    if parsed.worker:
        work_in_turns(parsed)
    else:
        main(parsed)
