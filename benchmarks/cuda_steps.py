"""The steps selftest and real of cuda.py: the scripts themselves, as users run them."""

import shutil
from concurrent.futures import ThreadPoolExecutor

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
    """The scripts themselves: before, three epochs, and after.

    Perplexity is measured beside the score, which hardly slows it down: a small model's decoding
    leaves most of the device idle, and half of a script's time passes before it uses the device.
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
    work.run_script(
        "training",
        "train.py",
        *("--model", base, *rows, *few, *short),
        *("--output_dir", run.parent, "--run_name", run.name, "--wandb_mode", "disabled"),
        *("--learning_rate", "1e-4", "--gradient_checkpointing", "false"),
    )
    after = ["--ckpt", run / "best"]
    with ThreadPoolExecutor() as beside:
        beside.submit(work.run_script, "perplexity after", "perplexity.py", *after)
        sampled = ["--calculator", "true", "--samples", "4"]
        work.run_script("score after", "evaluate.py", *after, *sampled)
    kept = {
        "smollm_before.json": work.scratch / "before" / "scores.json",
        "smollm_metrics.jsonl": run / "metrics.jsonl",
        "smollm_after.json": run / "eval" / "test" / "scores.json",
    }
    for name, file in kept.items():
        if file.exists():
            shutil.copy(file, work.output / name)
