"""Command lines: one flag for each setting, and the types of the other flags."""

import argparse
import math
from pathlib import Path

from run.config import CONFIG_FILE, KEYS, SettingsFiles, read_files
from run.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake as a UserError, and accepts no abbreviated flags."""

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


def positive_int(text: str) -> int:
    """The type of arguments such as ``--limit``."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def positive_float(text: str) -> float:
    """The type of arguments such as ``--temperature``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive, finite number")
    return value


def not_negative_int(text: str) -> int:
    """The type of arguments such as ``--verify-batching``."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} must be zero or a positive integer")
    return int(text)


def parse_arguments(
    parser: ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Add ``--config`` and one flag per setting to ``parser``, and parse ``argv``.

    Returns:
        The script's own arguments, and the settings from the command line as text. The argument
        ``config`` is the content of the settings files, so that they are read only once.
    """
    files = read_files(_config_file(argv))
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings that differ from config.yaml; it may leave out the others",
    )
    group = parser.add_argument_group(f"settings (values from {_names(files)})")
    values = files.values
    for key in KEYS:
        shown = f"{files.meanings.get(key, '')} (now {values.get(key, 'missing')!r})"
        group.add_argument(
            f"--{key}", metavar="VALUE", help=shown.replace("%", "%%"), default=argparse.SUPPRESS
        )
    for flag in (*KEYS, "config"):
        given = [word for word in argv if word == f"--{flag}" or word.startswith(f"--{flag}=")]
        if len(given) > 1:
            raise UserError(f"command line: --{flag} is given twice: keep one")
    arguments = vars(parser.parse_args(argv)) | {"config": files}
    typed = {key: arguments.pop(key) for key in KEYS if key in arguments}
    return argparse.Namespace(**arguments), typed


def _config_file(argv: list[str]) -> Path:
    """The file that ``--config`` names, needed early because ``--help`` shows its values."""
    finder = ArgumentParser("")
    finder.add_argument("--config", default=str(CONFIG_FILE))
    without_help = [word for word in argv if word not in ("-h", "--help")]
    file = finder.parse_known_args(without_help)[0].config
    if not file:
        raise UserError("command line: --config names no file: name one, or leave it out")
    return Path(file)


def _names(files: SettingsFiles) -> str:
    return " and ".join(Path(file).name for file in reversed(files.layers))
