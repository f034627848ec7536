"""Command lines: one flag for each setting, and the types of the other flags."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from run.config import CONFIG_FILE, KEYS, SettingsFiles, read_files
from run.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake as a UserError, and accepts no flag that is abbreviated or repeated."""

    def __init__(self, doc: str | None):
        summary, _, commands = (doc or "").partition("\n\n")  # None in python -OO
        super().__init__(
            description=summary,
            epilog=commands,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("type", Path, named_path)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """Read ``args``, in which argparse would take the last of several values silently."""
        words = sys.argv[1:] if args is None else args
        for flag, count in Counter(word.partition("=")[0] for word in words).items():
            action = self._option_string_actions.get(flag)
            if count > 1 and action:
                cure = "keep one, with all values behind it" if action.nargs else "keep one"
                raise UserError(f"command line: {flag} is given twice: {cure}")
        return super().parse_args(words)

    def error(self, message: str) -> None:
        raise UserError(f"command line: {message}; --help lists all arguments")


def named_path(text: str) -> Path:
    """What argparse calls for the type Path, which is the working folder if ``text`` is empty."""
    if not text:
        raise argparse.ArgumentTypeError("'' must name a file or folder")
    return Path(text)


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
