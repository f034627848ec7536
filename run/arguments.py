"""Command lines: one flag for each setting, and the types of the others."""

import argparse
import math
from pathlib import Path

from run.config import CONFIG_FILE, KEYS, read_settings
from run.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Complains in one line, with exit code 2, and accepts no abbreviated flags."""

    def __init__(self, doc: str):
        summary, _, commands = doc.partition("\n\n")
        super().__init__(
            description=summary,
            epilog=commands,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        raise UserError(f"command line: {message}; --help lists all arguments")


def positive_number(text: str) -> int:
    """The type of arguments such as ``--limit``."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def positive_float(text: str) -> float:
    """The type of arguments such as ``--temperature``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def not_negative_number(text: str) -> int:
    """The type of arguments such as ``--verify-batching``."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 on")
    return int(text)


def parse_arguments(
    parser: ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Add ``--config`` and one flag a setting to ``parser``, and parse.

    Returns:
        The script's own arguments (with ``config``, the settings file), and the settings
        that were typed as flags, as text.
    """
    parser.add_argument(
        "--config", type=Path, default=CONFIG_FILE, metavar="FILE", help="settings file"
    )
    finder = ArgumentParser("")
    finder.add_argument("--config", type=Path, default=CONFIG_FILE)
    file = finder.parse_known_args(
        [argument for argument in argv if argument not in ("-h", "--help")]
    )[0].config
    values, comments = read_settings(file)
    meanings = read_settings(CONFIG_FILE)[1] | {
        key: comment for key, comment in comments.items() if comment
    }
    group = parser.add_argument_group(f"settings (values from {file.name})")
    for key in KEYS:
        shown = f"{meanings.get(key, '')} (now {values.get(key, 'missing')!r})"
        group.add_argument(
            f"--{key}", metavar="VALUE", help=shown.replace("%", "%%"), default=argparse.SUPPRESS
        )
    for key in KEYS:
        if sum(argument == f"--{key}" or argument.startswith(f"--{key}=") for argument in argv) > 1:
            raise UserError(f"command line: --{key} is given twice: keep one")
    arguments = vars(parser.parse_args(argv))
    typed = {key: arguments.pop(key) for key in KEYS if key in arguments}
    return argparse.Namespace(**arguments), typed
