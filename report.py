"""A run as one HTML file to open: curves, scores and every problem.

python report.py --run checkpoints/llama-2-7b-gsm8k
python report.py --run checkpoints/llama-2-7b-gsm8k --split validation
python report.py --run checkpoints/llama-2-7b-gsm8k checkpoints/lora --output two-runs.html

train.py and evaluate.py write it at their ends. This makes it anew for any run, also an old one, or
shows two runs side by side. The file needs no network and no other file.
"""

import argparse
from pathlib import Path

from run.script import check_platform, read_command_line, run_script

check_platform()  # before the imports that would fail

from run.arguments import ArgumentParser
from run.errors import UserError


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace]:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="folder of a run, or one with a predictions.jsonl; a second one to compare",
    )
    add("--split", metavar="NAME", help="which evaluation: a folder's name under eval (test)")
    add("--output", type=Path, metavar="FILE", help="the file to write (a report in the last DIR)")
    arguments = parser.parse_args(argv)
    if len(arguments.run) > 2:
        raise UserError(
            f"command line: --run names {len(arguments.run)} folders: name one, or two to compare"
        )
    return (arguments,)


if __name__ == "__main__":
    command_line = read_command_line(read_arguments)  # before the heavier imports

from page.write import write_report


def main(arguments: argparse.Namespace) -> None:
    print(f"report: {write_report(arguments.run, arguments.split, arguments.output)}")


if __name__ == "__main__":
    run_script(main, *command_line)
