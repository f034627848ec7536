"""How soon a plan is shown and training starts, and how much memory loading a model takes.

python benchmarks/startup.py
python benchmarks/startup.py --hidden_size 2048 --intermediate_size 5504 --layers 8

The first table shows what `python train.py --plan` takes for Llama-2-7B on a GPU of 16 GB: seconds,
and seconds of a processor's time. The second shows the seconds from the start of `python train.py
--config demo.yaml` to the end of its first optimizer step, and the seconds that its imports take.
Both have medians of new processes. For the third, a random Llama is written in one dtype and loaded
in another, in a new process. Its peak memory is compared with the size of the loaded weights. `own`
is the process's own memory. `mapped` is pages of the checkpoint's file, which the kernel drops when
memory runs short. Linux only.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine  # noqa: F401  (before Transformers, which it keeps quiet)

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
)


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="starts; the tables show medians")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--intermediate_size", type=int, default=2752)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the plan


def seconds_to_plan(folder: Path) -> tuple[float, float]:
    """Of the whole command, and of a processor's time."""
    command = [sys.executable, "train.py", "--plan", "--device_memory=16", f"--model={folder}"]
    started, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ---------------------------------------------------------------- the first step


def seconds_to_first_step(folder: Path, run_name: str) -> float:
    metrics = folder / "runs" / run_name / "metrics.jsonl"
    flags = {"model": folder / "model", "dataset": folder / "data", "output_dir": folder / "runs"}
    flags |= {"run_name": run_name, "log_every": 1}
    started = time.time()
    typed = [f"--{key}={value}" for key, value in flags.items()]
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", "demo.yaml", *typed],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (metrics.exists() and b"\n" in metrics.read_bytes()):
            if process.poll() is not None:
                sys.exit(f"train.py ended with {process.returncode} before its first step")
            time.sleep(0.01)
        return json.loads(metrics.read_bytes().split(b"\n")[0])["time"] - started
    finally:
        process.kill()
        process.wait()


def seconds_to_import() -> float:
    started = time.time()
    subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, check=True)
    return time.time() - started


# ---------------------------------------------------------------- loading


def memory_now() -> dict[str, int]:
    """Resident bytes of this process: its own, and mapped from files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(fields[field].split()[0]) * 1024
        for name, field in (("own", "RssAnon"), ("mapped", "RssFile"))
    }


def load(folder: Path, dtype: str) -> None:
    """Load the model and print, as JSON, the size of its weights and the peak growth of memory."""
    import torch

    from engine.loading import load_model

    before = memory_now()
    samples, done = [before], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(memory_now())

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    model = load_model(folder, getattr(torch, dtype), torch.device("cpu"))
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    peak = {key: max(sample[key] for sample in samples) - before[key] for key in before}
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(json.dumps({"weights": weights, "seconds": seconds, **peak}))


def in_dtype(source: Path, target: Path, dtype: str) -> None:
    import torch
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).save_pretrained(target)


# ---------------------------------------------------------------- the tables


def main(arguments: argparse.Namespace) -> None:
    from training import write_model
    from what_fits import LLAMA_2_7B

    import demo

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LLAMA_2_7B.save_pretrained(folder / "7b")
        planned = [seconds_to_plan(folder / "7b") for _ in range(arguments.runs)]
        seconds, busy = map(statistics.median, zip(*planned, strict=True))
        print("| --plan of Llama-2-7B | of a processor's time |")
        print("| --- | --- |")
        print(f"| {seconds:.1f} s | {busy:.1f} s |\n")

        demo.make_stand_in(folder)
        first = [seconds_to_first_step(folder, f"run{number}") for number in range(arguments.runs)]
        imports = [seconds_to_import() for _ in range(arguments.runs)]
        print("| to the end of the first optimizer step of the demo | of that, imports |")
        print("| --- | --- |")
        print(f"| {statistics.median(first):.1f} s | {statistics.median(imports):.1f} s |\n")

        (folder / "float32").mkdir()
        write_model(folder / "float32", arguments)
        in_dtype(folder / "float32", folder / "bfloat16", "bfloat16")
        print(
            "| file | loaded as | weights, GB | most own memory, GB | most mapped, GB | seconds |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        for stored, loaded in CASES:
            result = subprocess.run(
                [sys.executable, __file__, "--worker", str(folder / stored), loaded],
                check=True,
                capture_output=True,
                text=True,
            )
            sizes = json.loads(result.stdout.splitlines()[-1])
            columns = " | ".join(f"{sizes[key] / 1e9:.3f}" for key in ("weights", "own", "mapped"))
            print(f"| {stored} | {loaded} | {columns} | {sizes['seconds']:.2f} |")


if __name__ == "__main__":
    options = read_arguments(sys.argv[1:])
    if options.worker:
        load(Path(options.worker[0]), options.worker[1])
    else:
        main(options)
