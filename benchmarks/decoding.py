"""Speed of greedy decoding: this repository against Transformers' generate and generate_batch.

python benchmarks/decoding.py
python benchmarks/decoding.py --problems 96 --slots 64 --contenders ours generate32
python benchmarks/decoding.py --hidden_size 4096 --intermediate_size 11008 --layers 32 \\
  --heads 32 --dtype bfloat16

All contenders do the same work. With a random Llama, they complete each prompt with as many tokens
as its real answer has. Prompts and lengths come from GSM8K's test split if GSM8K_DIR and
TOKENIZER_DIR name data and tokenizer. Otherwise prompts are random tokens of the same lengths. The
length of a completion is forced, since a random model never stops by itself, but no contender knows
it beforehand:

- ours: engine.decoding.greedy_decode with ``--slots`` slots, or the number that it chooses.
- generate16, generate32: model.generate in batches of 16 or 32 prompts, padded on the left, each
  until its longest completion is finished, in the order of the data set.
- generate_batch: Transformers' continuous batching with its defaults.

Each contender runs in its own process, and they take turns. Useful tokens are the tokens of the
completions. The limit is the speed that decoding would have if only its matrix products took time.
It is measured on the same layers, with the products computed as in our own contender. A shared
machine's speed drifts, so the limit is measured right before and right after each turn, and the
turn is compared with the mean of the two.
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

# Another benchmark, which also puts the repository on the path.
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
        "--slots", type=int, default=None, help="our own contender's; default: it chooses"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="timed rounds, after a short untimed one"
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--intermediate_size", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--profile", action="store_true", help="profile our own contender instead of the race"
    )
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the work


def prepare(folder: Path, arguments: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Write model and work into ``folder``.

    Returns:
        The prompts, and the number of tokens to complete each with.
    """
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


# ---------------------------------------------------------------- contenders, one process each


def our_decoder(arguments: argparse.Namespace) -> Callable[[list[tuple[list[int], int]]], int]:
    import torch

    from engine.decoding import greedy_decode
    from engine.device import pick_device, prepare_process
    from engine.loading import load_model
    from engine.memory import plan_slots

    device = pick_device()
    prepare_process(device)
    model = load_model(arguments.folder, getattr(torch, arguments.dtype), device)
    everything = json.loads((arguments.folder / "work.json").read_text())
    longest = max(len(prompt) + length for prompt, length in everything)
    plan = plan_slots(model, arguments.slots, longest, len(everything))
    arguments.slots_taken = plan.slots

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
                    eos_token_id=32_000,  # not a token; the criterion ends each completion
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
    """Tokens per second if a decoding step for all slots consisted only of matrix products."""
    import torch

    from engine import memory
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
    room = memory.free_bytes(device)
    with torch.inference_mode(), model.kernels.packed_weights(model, room):
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
            else:  # not timed; here our own contender reports how many slots it uses
                slots = last["slots"] or slots
        if not number:
            before = limit(arguments, slots)
    for contender in contenders:
        contender.process.kill()
    print_table(arguments, contenders, slots)


def print_table(arguments: argparse.Namespace, contenders: list[Contender], slots: int) -> None:
    limits = sorted(entry["allowed"] for contender in contenders for entry in contender.reports[1:])
    print(
        f"matrix products alone: {statistics.median(limits):.0f} tokens per second "
        f"({limits[0]:.0f} to {limits[-1]:.0f}) with {slots} slots in {arguments.dtype}"
    )
    print("| contender | useful tokens per s | seconds | peak memory, GB | share of the limit |")
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
    """Print our own contender's time by operator."""
    import torch

    decode = our_decoder(arguments)
    decode(work[:8])
    with torch.profiler.profile() as result:
        decode(work)
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(result.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))


def main(arguments: argparse.Namespace) -> None:
    from engine.device import pick_device, prepare_process

    prepare_process(pick_device())
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
