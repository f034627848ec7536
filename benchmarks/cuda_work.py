"""What the steps of cuda.py work on: rows, models, and a clock that waits for the device."""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# This benchmark's neighbour, which also puts the repository on the path.
from training import LENGTHS, PROMPT, ROOT, write_model
from transformers import AutoModelForCausalLM, LlamaConfig

from engine import memory
from engine.device import pick_device
from engine.llama import Llama
from engine.loading import load_tokenizer
from engine.packing import IGNORE, Example
from engine.tokenizer import Tokenizer
from run.errors import UserError

if TYPE_CHECKING:
    from cuda import Results

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class Work:
    """What a step is given.

    Attributes:
        is_dry: whether everything is tiny, and on the CPU.
        results: where each result is written.
        output: the folder for profiles and other files that are kept.
        scratch: a folder that is removed after the step.
        smollm: the folder of a real small model, if one was named.
    """

    is_dry: bool
    results: "Results"
    output: Path
    scratch: Path
    smollm: Path | None

    @property
    def device(self) -> torch.device:
        device = pick_device()
        if device.type == "cpu" and not self.is_dry:
            raise UserError("no CUDA device is available: run it with --dry on a CPU")
        return device

    def attempt(self, part: str, measure: Callable[..., None], *arguments: Any) -> None:
        """`Results.attempt`, with the memory of the part freed after it."""
        self.results.attempt(part, measure, self, *arguments)
        self.release()

    def release(self) -> None:
        """Free what PyTorch's allocator keeps of the device's memory."""
        if not self.is_dry:
            memory.release()

    def synchronize(self) -> None:
        if not self.is_dry:
            torch.cuda.synchronize()

    def time(self) -> float:
        """Seconds, when the device has finished its work."""
        self.synchronize()
        return time.perf_counter()

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The median time of ``run``, by the device's own clock."""
        for _ in range(1 if self.is_dry else 3):
            run()
        self.synchronize()
        return statistics.median(self._once(run) for _ in range(2 if self.is_dry else 10))

    def _once(self, run: Callable[[], object]) -> float:
        if self.is_dry:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def milliseconds_in_graph(self, run: Callable[[], object], times: int = 32) -> float:
        """The time of one ``run`` of several in a CUDA graph, where Python launches none of them.

        In a dry run there is no graph.
        """
        if self.is_dry:
            return self.milliseconds(run)
        run()  # what is compiled or initialised at a first call can't be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                run()
        return self.milliseconds(graph.replay) / times

    def reset_peak(self) -> None:
        if not self.is_dry:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> dict[str, float]:
        """The most memory since `reset_peak`: in tensors, and held by the allocator."""
        if self.is_dry:
            return {}
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return dict(
            zip(("peak_GiB", "reserved_GiB"), (peak / 2**30 for peak in peaks), strict=True)
        )

    def profile(self, name: str, run: Callable[[], object]) -> None:
        """Write where the time of ``run`` goes, operator by operator, and a trace of it."""
        with torch.profiler.profile() as result:
            run()
            self.synchronize()
        order = "self_cpu_time_total" if self.is_dry else "self_cuda_time_total"
        table = result.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70)
        (self.output / f"profile_{name}.txt").write_text(table)
        result.export_chrome_trace(str(self.output / f"trace_{name}.json.gz"))
        self.results.write("profile", file=f"profile_{name}.txt", trace=f"trace_{name}.json.gz")

    def run_script(self, part: str, *command: str | Path) -> None:
        """Run one of the repository's scripts; its exit code and last lines are the result.

        All that it prints is kept, even if the step is stopped.
        """
        started, file = time.perf_counter(), self.output / f"{part.replace(' ', '_')}.txt"
        with file.open("w") as printed:
            process = subprocess.run(
                [sys.executable, *map(str, command)], cwd=ROOT, stdout=printed, stderr=printed
            )
        failure = {"failed": f"exit code {process.returncode}"} if process.returncode else {}
        seconds = round(time.perf_counter() - started, 1)
        last_lines = file.read_text().splitlines()[-30:]
        self.results.write(part, seconds=seconds, output=last_lines, **failure)


# ---------------------------------------------------------------- rows


def has_real_rows() -> bool:
    return bool(os.environ.get("GSM8K_DIR") and os.environ.get("TOKENIZER_DIR"))


def read_rows(split: str, count: int | None) -> list[Example]:
    """The first ``count`` rows of GSM8K's ``split``, or random tokens of its lengths."""
    if has_real_rows():
        import data
        from grading.dataset import load_problems

        problems = load_problems(os.environ["GSM8K_DIR"], split)[:count]
        return data.encode(real_tokenizer(), problems, PROMPT)
    rng = random.Random(split)
    examples = []
    for _ in range(count or 1319):
        prompt, answer = rng.choice(LENGTHS)
        ids = [1, *(rng.randrange(3, 32_000) for _ in range(prompt + answer - 2)), 2]
        examples.append(Example(ids, [IGNORE] * prompt + ids[prompt:]))
    return examples


@cache
def real_tokenizer() -> Tokenizer:
    return load_tokenizer(Path(os.environ["TOKENIZER_DIR"]))


def prompts_of(examples: Sequence[Example]) -> list[list[int]]:
    return [example.input_ids[: example.labels.count(IGNORE)] for example in examples]


def dataset_folder(work: Work) -> Path:
    """GSM8K, or problems that are made up; in a dry run a few rows of either."""
    import standin
    from grading.dataset import load_problems

    if has_real_rows() and not work.is_dry:
        return Path(os.environ["GSM8K_DIR"]).resolve()
    counts = {"train": 40, "test": 10} if work.is_dry else {"train": 1000, "test": 200}
    made_up = iter(standin.make_problems(sum(counts.values()), seed=0))
    folder = work.scratch / "data"
    folder.mkdir()
    for split, count in counts.items():
        if has_real_rows():
            problems = load_problems(os.environ["GSM8K_DIR"], split)[:count]
            rows = [{"question": one.question, "answer": one.answer} for one in problems]
        else:
            rows = [next(made_up) for _ in range(count)]
        standin.write_jsonl(rows, folder / f"{split}.jsonl")
    return folder


# ---------------------------------------------------------------- models


def random_llama(device: torch.device, dtype: torch.dtype, shape: dict[str, int]) -> Llama:
    """A Llama with random weights, made on the device: a CPU takes minutes for billions."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=4096, **shape)
    with device:
        return Llama(AutoModelForCausalLM.from_config(config, dtype=dtype))


def random_llama_2_7b(work: Work) -> Llama:
    return random_llama(work.device, torch.bfloat16, TINY if work.is_dry else LLAMA_2_7B)


def write_random_llama(folder: Path, hidden_size: int, layers: int, heads: int) -> None:
    """A model folder with a random Llama, and Llama-2's tokenizer or a stand-in."""
    folder.mkdir()
    shape = {"hidden_size": hidden_size, "intermediate_size": hidden_size * 43 // 16}
    write_model(folder, argparse.Namespace(**shape, layers=layers, heads=heads))


def tokens_of(batch: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in batch)


def flops(model: Llama, batch: Sequence[Example]) -> float:
    """What an optimizer step needs: 6 for each token and weight, and causal attention.

    The embedding's weights do not count. Attention is 6 * layers * hidden * length for each token.
    Each token of a row counts, and the head for each of them; `engine.roofline`, which also says
    what train.py logs, counts those that are read, and the head for the supervised ones.
    """
    embedding = model.pretrained.get_input_embeddings().weight.numel()
    weights = sum(weight.numel() for weight in model.parameters()) - embedding
    attention = model.config.num_hidden_layers * model.config.hidden_size
    squares = sum(len(example.input_ids) ** 2 for example in batch)
    return 6.0 * (weights * tokens_of(batch) + attention * squares)


# ---------------------------------------------------------------- results against others


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.detach().double()
    return ((found.double() - exact).norm() / exact.norm()).item()


def worst_error(
    found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]
) -> tuple[float, str]:
    """The largest relative error of the tensors of ``found``, and whose it is."""
    return max((relative_error(found[name], exact[name]), name) for name in found)


def gradients_on_host(model: Llama) -> dict[str, torch.Tensor]:
    """The gradient of each weight in float64, without memory of the device."""
    weights = model.pretrained.named_parameters()
    return {name: weight.grad.cpu().double() for name, weight in weights}


def compile_no_code() -> None:
    """Let ``torch.compile`` run its graphs as they are: code for them takes a CPU a minute."""
    torch.compile = partial(torch.compile, backend="eager")
