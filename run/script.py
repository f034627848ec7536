"""How a script ends: one clear line and an exit code instead of a traceback."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable

from run import streams
from run.errors import _STORAGE_FAULTS, NotFiniteError, Stopped, UserError, one_line, storage_cure
from run.signals import StopSignal

USER_ERROR, NOT_FINITE = 2, 3


OLDEST_PYTHON = (3, 11)


# Without these no script gets anywhere; all of requirements.txt that is imported here but wandb, which is a guest.
PACKAGES = (
    *(
        "torch",
        "transformers",
        "datasets",
        "pyarrow",
        "sentencepiece",
        "safetensors",
        "xxhash",
        "optimi",
        "pydantic",
    ),
    *("yaml", "scipy", "tqdm"),
)


def check_platform() -> None:
    """End in one line, exit code 2, where these scripts can't run: before the first import that fails there."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        fault = f"Python {found} is too old, 3.11 or newer is needed: start this with such a one (python3.11)"
        sys.exit(_complain(f"error: {fault}", USER_ERROR))
    try:
        import fcntl  # noqa: F401
    except ImportError:
        fault = f"{sys.platform} has no file locks (fcntl): run this on Linux or macOS, on Windows in WSL2"
        sys.exit(_complain(f"error: {fault}", USER_ERROR))
    missing = [
        name
        for name in PACKAGES
        if sys.modules.get(name) is None and importlib.util.find_spec(name) is None
    ]
    if missing:
        sys.exit(
            _complain(
                f"error: {sys.executable} lacks {', '.join(missing)}: {_install_cure()}", USER_ERROR
            )
        )


def _install_cure() -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    own = os.path.join(root, ".venv", "bin", "python")
    if os.path.exists(own) and sys.executable != own:
        return f"start this with {own}"
    return f"install {os.path.join(root, 'requirements.txt')} into it (pip install -r), or start this with one that has"


def run_script(story: Callable[..., None], *arguments: object) -> None:
    """Run ``story(*arguments)`` and end the process with the exit code that interface and shell expect."""
    check_platform()
    streams.prepare()
    StopSignal().listen().tell(_stop)
    try:
        story(*arguments)
    except UserError as error:
        sys.exit(_complain(f"error: {one_line(error)}", USER_ERROR))
    except NotFiniteError as error:
        sys.exit(_complain(f"stopped: {one_line(error)}", NOT_FINITE))
    except Stopped as stop:
        sys.exit(_complain(f"stopped: {one_line(stop)}", 128 + stop.signal_number))
    except KeyboardInterrupt:  # of a library that asks the terminal something
        sys.exit(_complain("stopped: SIGINT", 128 + signal.SIGINT))
    except OSError as error:
        if error.errno not in _STORAGE_FAULTS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fault = f"{where}{error.strerror}: {storage_cure(error)}, or choose another folder"
        sys.exit(_complain(f"error: {one_line(fault)}", USER_ERROR))
    StopSignal().listen().tell(_leave)  # for the heavy imports between a script's two stories


def _stop(number: int) -> None:
    raise Stopped(
        number,
        f"{_name(number)}; what was finished is saved, and the same command goes on from there",
    )


def _leave(number: int) -> None:
    sys.exit(_complain(f"stopped: {_name(number)}", 128 + number))


def _name(number: int) -> str:
    return signal.Signals(number).name


def check_printed() -> None:
    """For a script whose result is only what it prints: was it written?

    Raises:
        UserError: it was not.
        SystemExit: as by SIGPIPE, where the reader (a `| head`) is gone: not a fault, and nobody is left to tell.
    """
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", None)
    if isinstance(fault, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    if fault is not None:
        why = getattr(fault, "strerror", None) or fault
        raise UserError(
            f"standard output: can't be written ({why}): make room there, or choose another file for it"
        )


def _complain(line: str, exit_code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return exit_code
