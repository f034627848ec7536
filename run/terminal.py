"""Draws within 80 columns: in colour on a terminal, as plain text elsewhere or with NO_COLOR."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

WIDTH, NARROWEST = 80, 40  # on a terminal with fewer columns, lines wrap
LABEL = 18  # columns before the value of a fact, with the margin
MARGIN = "  "
BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", "    #####"
SUPERVISED, NOT_SUPERVISED = "bold green", "dim"


def open_console() -> Console:
    """Where this process prints, at most 80 columns wide."""
    is_plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    console = Console(
        file=sys.stdout,
        color_system=None if is_plain else "auto",
        force_jupyter=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.width = WIDTH if is_plain else max(NARROWEST, min(WIDTH, console.width))
    return console


def is_plain(console: Console) -> bool:
    return console.color_system is None


def title(console: Console, text: str) -> None:
    console.print()
    console.print(Text(printable(console, text), style="bold"))


def facts(console: Console, values: Mapping[str, str]) -> None:
    """Each value beside its label, in as many lines as it needs."""
    for label, value in values.items():
        for line in Text(printable(console, value)).wrap(console, console.width - LABEL):
            line.rstrip()
            beginning = f"{MARGIN}{label}".ljust(LABEL)
            console.print(Text.assemble((beginning, "dim"), line))
            label = ""


def lines(console: Console, text: str) -> None:
    """Each line of ``text``, in as many as it needs."""
    for line in text.splitlines():
        console.print(Text(printable(console, line)))


def printable(console: Console, text: str) -> str:
    """``text`` with an escape sequence for what is no letter, or what the output lacks."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return shown.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _blocks(console: Console) -> str:
    return BLOCKS if printable(console, BLOCKS) == BLOCKS else ASCII_BLOCKS


# ---------------------------------------------------------------- pictures


def histogram(numbers: Sequence[int], most: int = 10) -> list[tuple[int, int, int]]:
    """Ranges of equal width that cover ``numbers``: first and last number, and how many there are.

    Args:
        most: of the ranges.
    """
    low, high = min(numbers), max(numbers)
    width = -(-(high - low + 1) // most)
    count = -(-(high - low + 1) // width)
    counts = [0] * count
    for number in numbers:
        counts[(number - low) // width] += 1
    return [
        (low + index * width, low + (index + 1) * width - 1, counts[index])
        for index in range(count)
    ]


def draw_histogram(console: Console, numbers: Sequence[int], unit: str) -> None:
    bars = histogram(numbers)
    most, full = max(count for _, _, count in bars), _blocks(console)[-1]
    for low, high, count in bars:
        beginning = f"{MARGIN}{low:>6,} to {high:>6,} {unit} {count:>7,}"
        room = console.width - len(beginning) - len(MARGIN)
        bar = full * max(round(room * count / most), count > 0)
        console.print(Text.assemble((beginning, "dim"), (f"{MARGIN}{bar}".rstrip(), "cyan")))


def draw_curve(
    console: Console,
    value: Callable[[int], float],
    count: int,
    top: float,
    unit: str,
    height: int = 5,
) -> None:
    """``count`` values from left to right, from 0 to ``top``, over their numbers from 1 on.

    Args:
        value: called with the indices of a few of them, of which there may be millions.
        top: the largest of all.
    """
    blocks = _blocks(console)
    labels = [f"{top:.3g}", *[""] * (height - 2), "0"]
    indent = len(MARGIN) + max(map(len, labels)) + 1
    columns = console.width - indent
    shown = [value(index * count // columns) for index in range(columns)]
    for row, label in zip(range(height - 1, -1, -1), labels, strict=True):
        eighths = [round(8 * height * each / top) - 8 * row for each in shown]
        line = "".join(blocks[min(max(eighth, 0), 8)] for eighth in eighths).rstrip()
        beginning = f"{label.rjust(indent - 1)} "
        console.print(Text.assemble((beginning, "dim"), (line, "cyan")))
    first, last = f"{unit} 1", f"{unit} {count:,}"
    console.print(Text(" " * indent + first + last.rjust(columns - len(first)), style="dim"))


def draw_tokens(console: Console, tokens: Iterable[tuple[str, bool]]) -> None:
    """Tokens in their order, the supervised ones in colour, or underlined in plain text.

    A token that is longer than a line is cropped.

    Args:
        tokens: the piece of each, and whether it is supervised.
    """
    room = console.width - len(MARGIN)
    line, marks, used = Text(), "", 0
    for piece, is_supervised in tokens:
        shown = printable(console, piece)
        length = cell_len(shown)
        if used + length > room:
            _print_tokens(console, line, marks)
            line, marks, used = Text(), "", 0
        line.append(shown, SUPERVISED if is_supervised else NOT_SUPERVISED).append(" ")
        marks += ("^" if is_supervised else " ") * length + " "
        used += length + 1
    _print_tokens(console, line, marks)


def _print_tokens(console: Console, line: Text, marks: str) -> None:
    line.rstrip()
    console.print(Text.assemble(MARGIN, line), no_wrap=True)
    if is_plain(console) and marks.strip():
        console.print(Text(MARGIN + marks.rstrip()), no_wrap=True)
