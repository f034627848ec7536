"""The steps selftest and real of cuda.py: the scripts themselves, as users run them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# This benchmark's neighbour, which also puts the repository on the path.
from cuda_work import Work, dataset_folder, write_random_llama

# ---------------------------------------------------------------- selftest


def run_selftest(work: Work) -> None:
    """Is a run that was killed resumed bit for bit on this device?"""
    hidden_size, layers, heads = (128, 2, 2) if work.is_dry else (1024, 4, 8)
    model = work.scratch / "model"
    write_random_llama(model, hidden_size, layers, heads)
    options = ["--model", model, "--dataset", dataset_folder(work), "--wandb_mode", "disabled"]
    options += ["--output_dir", work.scratch / "runs"]
    # Not every processor computes the same bits of bfloat16 in each process.
    dry = ["--batch_size", "2", "--max_new_tokens", "1", "--dtype", "float32"]
    options += dry if work.is_dry else []
    work.run_script("selftest", "train.py", "--selftest", *options)


# ---------------------------------------------------------------- real


def measure_real_model(work: Work) -> None:
    """The scripts themselves: before, three epochs, and after; with the samples last.

    Perplexity is measured beside the score, which hardly slows it down: a small model's decoding
    leaves most of the device idle, and half of a script's time passes before it uses the device.
    What a script has written is kept as soon as it ends.
    """
    base, run = work.smollm.resolve(), work.scratch / "runs" / "smollm"
    rows = ["--dataset", dataset_folder(work), "--dtype", "bfloat16"]
    short = ["--max_new_tokens", "16"] if work.is_dry else []
    few = ["--epochs", "1", "--batch_size", "8", "--validation_size", "4"] if work.is_dry else []
    before = ["--ckpt", base, *rows]
    scored = [*before, *short, "--output", work.scratch / "before"]
    with ThreadPoolExecutor() as beside:
        beside.submit(work.run_script, "perplexity before", "perplexity.py", *before)
        work.run_script("score before", "evaluate.py", *scored)
    keep(work, work.scratch / "before" / "scores.json", "smollm_before.json")
    work.run_script(
        "training",
        "train.py",
        *("--model", base, *rows, *few, *short),
        *("--output_dir", run.parent, "--run_name", run.name, "--wandb_mode", "disabled"),
        *("--learning_rate", "1e-4", "--gradient_checkpointing", "false"),
    )
    keep(work, run / "metrics.jsonl", "smollm_metrics.jsonl")
    after, scores = ["--ckpt", run / "best"], run / "eval" / "test" / "scores.json"
    calculated = [*after, "--calculator", "true"]
    with ThreadPoolExecutor() as beside:
        beside.submit(work.run_script, "perplexity after", "perplexity.py", *after)
        work.run_script("score after", "evaluate.py", *calculated)
    keep(work, scores, "smollm_after.json")
    # What has been decoded is not decoded again.
    work.run_script("samples after", "evaluate.py", *calculated, "--samples", "4")
    keep(work, scores, "smollm_samples.json")


def keep(work: Work, file: Path, name: str) -> None:
    if file.exists():  # a script that failed may have written none
        shutil.copy(file, work.output / name)
