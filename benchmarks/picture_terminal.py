"""Draws what a terminal of 80 columns shows of a script as an SVG, from a run of it on the demo.

python benchmarks/picture_terminal.py --show preflight --output preflight.svg
python benchmarks/picture_terminal.py --show training --output training.svg

Needs the model and data of make demo. The run goes to a temporary folder, whose name is not shown.
"""

import argparse
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fcntl import ioctl
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from termios import TIOCSWINSZ

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run.errors import UserError
from run.paths import hide_home
from run.script import run_script
from run.terminal import WIDTH

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {
    "preflight": ("train.py", "--config", "demo.yaml", "--preflight"),
    "training": ("train.py", "--config", "demo.yaml", "--epochs", "3"),
}
# A letter, or what moves the cursor, erases or colours.
TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", re.DOTALL)
FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def record(command: Sequence[str]) -> str:
    """What ``command`` writes to a terminal."""
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"TERM": "xterm-256color", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    text = written.decode(errors="replace")
    if process.wait():
        raise UserError(f"{' '.join(command)}: ended with {process.returncode}: {text[-300:]}")
    return text


def screen(text: str) -> list[str]:
    """The lines that are left at the end, with their colours, as escape sequences."""
    rows: list[list[tuple[str, str]]] = [[]]  # of each letter its style, and the letter
    row = column = 0
    style = ""
    for numbers, command, letter in TOKEN.findall(text):
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
        elif letter:
            while len(rows) <= row:
                rows.append([])
            line = rows[row]
            line += [("", " ")] * (column - len(line))
            line[column : column + 1] = [(style, letter)]
            column += 1
        elif command == "m":
            style = "" if numbers in ("", "0") else f"{style}\x1b[{numbers}m"
        elif command == "A":
            row = max(0, row - int(numbers or 1))
        elif command == "K" and row < len(rows):
            del rows[row][column:]
    return ["".join(_styled(line)).rstrip() for line in rows]


def _styled(line: list[tuple[str, str]]) -> Iterator[str]:
    for style, cells in groupby(line, key=itemgetter(0)):
        letters = "".join(letter for _, letter in cells)
        yield f"{style}{letters}\x1b[0m" if style else letters


def picture(lines: Sequence[str], title: str) -> str:
    """An SVG that needs no other file: Rich's own names fonts that a browser would fetch."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    for line in lines:
        console.print(Text.from_ansi(line))
    template = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code, monospace", FONT)
    return console.export_svg(title=title, code_format=template, unique_id="terminal")


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", choices=SHOWN, required=True, help="what is run")
    parser.add_argument("--output", type=Path, required=True, help="SVG file to write")
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> None:
    if not (ROOT / "demo" / "model").is_dir():
        raise UserError("demo/model: missing; run make demo first")
    command = SHOWN[arguments.show]
    with tempfile.TemporaryDirectory() as folder:
        text = record([*command, "--output_dir", folder])
    shown = hide_home(text.replace(folder, "demo").replace(f"{ROOT}/", ""))
    title = f"python {' '.join(command)}"
    arguments.output.write_text(picture(screen(shown), title), encoding="utf-8")


if __name__ == "__main__":
    run_script(main, read_arguments(sys.argv[1:]))
