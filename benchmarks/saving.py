"""Time and memory of a save, against save_pretrained and torch.save of the same state.

python benchmarks/saving.py
python benchmarks/saving.py --hidden_size 2048 --intermediate_size 5504 --rounds 3

A random Llama with the moments of AdamW is saved in turn by run/checkpoint.py, as `last` with a
`previous` present, and by ``model.save_pretrained`` and ``torch.save(optimizer.state_dict())``,
into separate folders on the same disk. Our saves are staged, hashed, synced and renamed. Replaced
checkpoints are removed in the background, after the measured time. The plain save syncs nothing, so
it is timed twice, until it returns and until its files are on the disk. Pending writes are flushed
before each save.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Another benchmark, which also puts the repository on the path.
from startup import memory_now


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one untimed")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="a folder on the disk to measure",
    )
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--intermediate_size", type=int, default=2752)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=8)
    return parser.parse_args(argv)


def timed(save: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and the peak growth of the process's own memory."""
    os.sync()
    before, samples, done = memory_now()["own"], [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(memory_now()["own"] - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    save()
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    return seconds, max(samples)


def main(arguments: argparse.Namespace, folder: Path) -> None:
    import torch
    from training import write_model

    from engine.loading import load_model, load_tokenizer
    from engine.optimizer import build_optimizer
    from engine.state import pack_state
    from run.checkpoint import Removals, save_checkpoint
    from run.manifest import LAST, fault_of

    (folder / "base").mkdir()
    write_model(folder / "base", arguments)
    model = load_model(folder / "base", torch.float32, torch.device("cpu")).pretrained
    tokenizer = load_tokenizer(folder / "base")
    optimizer = build_optimizer(
        model.parameters(), learning_rate=1e-5, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.zero_grad(set_to_none=True)

    removals = Removals()

    def ours() -> None:
        tensors, plain = pack_state(optimizer, {})
        description = {"step": 1, "state": plain}
        save_checkpoint(folder / "run" / LAST, model, tokenizer, description, tensors, removals)

    def plain() -> None:
        model.save_pretrained(folder / "plain")
        tokenizer.save(folder / "plain")
        torch.save(optimizer.state_dict(), folder / "plain" / "optimizer.pt")

    def plain_and_sync() -> None:
        plain()
        for file in (folder / "plain").iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    found: dict[str, list[tuple[float, int]]] = {}
    for number in range(arguments.rounds + 1):
        for name, save in (
            ("ours", ours),
            ("plain", plain),
            ("plain, then synced", plain_and_sync),
        ):
            shutil.rmtree(folder / "plain", ignore_errors=True)
            removals.wait()  # for the background removal of the replaced checkpoint
            taken = timed(save)
            print(f"round {number} {name}: {taken[0]:.2f} s", file=sys.stderr)
            if number:
                found.setdefault(name, []).append(taken)
    started = time.perf_counter()
    assert fault_of(folder / "run" / LAST) is None
    verified = time.perf_counter() - started
    size = sum(file.stat().st_size for file in (folder / "run" / LAST).iterdir())
    median = {
        name: statistics.median(seconds for seconds, _ in taken) for name, taken in found.items()
    }
    print(f"{size / 1e9:.2f} GB of weights and optimizer state; verified in {verified:.2f} s")
    print("| save | seconds | least and most | GB per second | own memory, GB | ours takes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, taken in found.items():
        seconds = [each for each, _ in taken]
        memory = max(each for _, each in taken) / 1e9
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        columns = f"{median[name]:.2f} | {spread} | {size / median[name] / 1e9:.2f}"
        print(f"| {name} | {columns} | {memory:.3f} | {median['ours'] / median[name]:.2f} x |")


if __name__ == "__main__":
    parsed = read_arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=parsed.folder) as made:
        main(parsed, Path(made))
