"""Writes a Llama with random weights for a given tokenizer, to measure or try out the scripts.

python benchmarks/random_llama.py --tokenizer DIR --output DIR
python benchmarks/random_llama.py --tokenizer DIR --output DIR --hidden_size 512 --layers 8
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run.errors import UserError
from run.script import run_script
from standin import make_model


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder with a tokenizer in Hugging Face format",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument(
        "--intermediate_size", type=int, default=None, help="default: 2.6875 times hidden_size"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> None:
    if arguments.output.exists():
        raise UserError(f"{arguments.output}: already exists: name a new folder")
    arguments.output.mkdir(parents=True)
    for file in arguments.tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, arguments.output / file.name)
    make_model(
        arguments.output,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size or arguments.hidden_size * 43 // 16,
        layers=arguments.layers,
        heads=arguments.heads,
    )


if __name__ == "__main__":
    run_script(main, read_arguments(sys.argv[1:]))
