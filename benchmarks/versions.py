"""Speed of this checkout against an earlier commit of it, in training or in decoding.

python benchmarks/versions.py fd86c8e training
python benchmarks/versions.py fd86c8e decoding --pairs 5 --turns 4 --size 24

Both versions do the work of their own benchmarks/training.py or benchmarks/decoding.py, as its
contender "ours", with one random Llama and the same rows. A pair is one process of each version;
they take turns, and each turn starts with the other one. Two processes of one version can differ by
more than two versions do, by where their memory happens to lie and by which was started first, so
that there are several pairs and each is started in the other order. ``versions.py HEAD`` shows how
much two processes of one version differ.

A turn is one optimizer step of 32 rows in training, and ``--size`` problems in decoding.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import decoding
import training

HERE, BEFORE = "here", "before"


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the version to compare with")
    parser.add_argument("work", choices=("training", "decoding"))
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes")
    parser.add_argument("--turns", type=int, default=4, help="timed turns of each process")
    parser.add_argument("--size", type=int, default=24, help="problems in a turn of decoding")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--intermediate_size", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    return parser.parse_args(argv)


def check_out(commit: str, folder: Path) -> None:
    """Write the files of ``commit`` into ``folder``."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", commit], cwd=training.ROOT, capture_output=True
    )
    if archive.returncode:
        sys.exit(f"commit {commit!r}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "--extract", "--directory", folder], input=archive.stdout, check=True)


def prepare(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Write model and work into ``folder``.

    Returns:
        The options of a worker.
    """
    shape = [
        f"--{name}={getattr(arguments, name)}"
        for name in ("hidden_size", "intermediate_size", "layers", "heads")
    ]
    if arguments.work == "training":
        options = [f"--steps={arguments.turns}", f"--folder={folder}"]
        training.prepare(folder, training.read_arguments([*options, *shape]))
        return options
    options = [f"--rounds={arguments.turns}", f"--folder={folder}"]
    size = f"--problems={arguments.size}"
    decoding.prepare(folder, decoding.read_arguments([*options, *shape, size]))
    return options


def race(scripts: dict[str, Path], options: list[str], turns: int) -> dict[str, list[float]]:
    """The seconds of each turn of one pair of processes, started in the order of ``scripts``."""
    pair = [training.launch(str(script), "ours", options) for script in scripts.values()]
    try:
        for turn in range(turns + 1):  # the first is not timed
            for contender in pair if turn % 2 else reversed(pair):
                contender.step()
    finally:
        for contender in pair:
            contender.process.kill()
    seconds = [[report["seconds"] for report in contender.reports[1:]] for contender in pair]
    return dict(zip(scripts, seconds, strict=True))


def print_result(arguments: argparse.Namespace, pairs: list[dict[str, list[float]]]) -> None:
    names = {HERE: "this checkout", BEFORE: arguments.commit}
    everything = {name: [s for pair in pairs for s in pair[name]] for name in names}
    print(f"seconds of a turn, {len(pairs)} pairs of processes, {arguments.turns} turns each:")
    print("| version | median | middle half | range | medians of the processes |")
    print("| --- | --- | --- | --- | --- |")
    for name, shown in names.items():
        seconds = everything[name]
        low, _, high = statistics.quantiles(seconds, n=4)
        medians = ", ".join(f"{statistics.median(pair[name]):.2f}" for pair in pairs)
        print(
            f"| {shown} | {statistics.median(seconds):.2f} | {low:.2f} to {high:.2f} "
            f"| {min(seconds):.2f} to {max(seconds):.2f} | {medians} |"
        )
    ratios = [
        here / before for here, before in zip(everything[HERE], everything[BEFORE], strict=True)
    ]
    low, middle, high = statistics.quantiles(ratios, n=4)
    of_medians = statistics.median(everything[HERE]) / statistics.median(everything[BEFORE])
    print(
        f"this checkout takes {of_medians:.3f} times the seconds of {arguments.commit}, by medians"
    )
    print(f"turn by turn: {middle:.3f} times, the middle half {low:.3f} to {high:.3f}")


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as checkout, tempfile.TemporaryDirectory() as folder:
        check_out(arguments.commit, Path(checkout))
        script = f"{arguments.work}.py"
        scripts = {HERE: Path(__file__).with_name(script)}
        scripts[BEFORE] = Path(checkout) / "benchmarks" / script
        options = prepare(Path(folder), arguments)
        pairs = []
        for number in range(1, arguments.pairs + 1):
            order = list(scripts) if number % 2 else list(reversed(scripts))
            ordered = {name: scripts[name] for name in order}
            pairs.append(race(ordered, options, arguments.turns))
            medians = {name: statistics.median(seconds) for name, seconds in pairs[-1].items()}
            print(f"pair {number}: {medians}", file=sys.stderr)
        print_result(arguments, pairs)


if __name__ == "__main__":
    main(read_arguments(sys.argv[1:]))
