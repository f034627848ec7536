"""How a script ends: one clear line and an exit code instead of a traceback."""

from __future__ import annotations  # that a Python too old to run this can say so

import errno
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Callable

import streams

USER_ERROR, NOT_FINITE = 2, 3
OLDEST_PYTHON = (3, 11)
# Without these no script gets anywhere; all of requirements.txt that is imported here but wandb, which is a guest.
PACKAGES = (
    *("torch", "transformers", "datasets", "pyarrow", "sentencepiece", "safetensors", "xxhash", "optimi", "pydantic"),
    *("yaml", "scipy", "tqdm"),
)

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
INSISTING = signal.SIGINT, signal.SIGTERM  # a second one of these, in any order, ends the process at once
ONE_REQUEST = 0.5  # seconds: `timeout` sends each signal twice, and a terminal and make both send Ctrl-C


class UserError(Exception):
    """Something the user typed, or a file of theirs, is wrong.

    The message names the value, the rule and the cure, on one line. Exit code 2.
    """


class NotFiniteError(Exception):
    """The loss or the gradient norm is NaN or infinite. Exit code 3."""


class Stopped(BaseException):
    """A stop signal arrived and the state is saved. Exit code 128 + signal number.

    Like KeyboardInterrupt no Exception: what guards against other people's errors must not swallow it.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def one_line(text: object) -> str:
    """``text`` on one line; what is not printable, such as what steers a terminal, as an escape sequence."""
    line = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def cause_of(error: BaseException) -> str:
    """Type and message of what ``error`` came from in the first place, on one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {one_line(error)[:160]}"


class StopSignal:
    """The first signal that asks this process to end, from when it listens on.

    Signals after the first one change nothing: a closed terminal sends SIGHUP twice, a scheduler SIGUSR1
    and later SIGTERM. Only a second Ctrl-C or SIGTERM ends the process at once. What the parent has
    ignored, as nohup does with SIGHUP, stays ignored.

    Attributes:
        signal_number: the first signal, or None so far.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._listener: Callable[[int], None] | None = None
        self._insisted: float | None = None  # when the first Ctrl-C or SIGTERM came
        self._before: dict[int, object] = {}

    def tell(self, listener: Callable[[int], None]) -> None:
        """Call ``listener`` with the first signal, between any two instructions; now, if that has come already."""
        self._listener = listener
        if self.signal_number is not None:
            listener(self.signal_number)

    def listen(self) -> StopSignal:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __enter__(self) -> StopSignal:
        return self.listen()

    def __exit__(self, *_: object) -> None:
        """Goes on listening once a signal has come: the next one must not cut the clean-up."""
        if self.signal_number is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        if number in INSISTING:
            now = time.monotonic()
            if self._insisted is not None and now - self._insisted > ONE_REQUEST:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._insisted = self._insisted or now
        if self.signal_number is None:
            self.signal_number = number
            if self._listener:
                self._listener(number)


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
    missing = [name for name in PACKAGES if sys.modules.get(name) is None and importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(_complain(f"error: {sys.executable} lacks {', '.join(missing)}: {_install_cure()}", USER_ERROR))


def _install_cure() -> str:
    root = os.path.dirname(os.path.abspath(__file__))
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


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _numbers(names: str) -> set[int]:
    """Those of ``names`` that this system has."""
    return {getattr(errno, name) for name in names.split() if hasattr(errno, name)}


# Of disks and mounts, and never a fault of these programs. Their other OSErrors stay tracebacks.
_STORAGE_FAULTS = _FULL | _numbers(
    "EROFS EIO EACCES EPERM EBUSY ETXTBSY ENXIO ENODEV ENOMEDIUM EREMOTEIO EUCLEAN EBADMSG ENOLCK EDEADLK "
    "ESTALE ENOTCONN ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNRESET ECONNABORTED ECONNREFUSED "
    "ESHUTDOWN ECOMM EPROTO ENOLINK ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED EREMCHG "
    "EISDIR ENOTDIR EEXIST ENOTEMPTY ELOOP EMLINK ENAMETOOLONG"  # something is in the way, or the name is
)


def storage_cure(error: Exception) -> str:
    """What helps against a fault of the disk."""
    found = re.search(r"\(os error ([0-9]+)\)", str(error))  # so libraries in Rust have it
    number = getattr(error, "errno", None) or (int(found[1]) if found else None)
    return "make room there" if number in _FULL else "check that disk or mount, and your rights there"


def _stop(number: int) -> None:
    raise Stopped(number, f"{_name(number)}; what was finished is saved, and the same command goes on from there")


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
        raise UserError(f"standard output: can't be written ({why}): make room there, or choose another file for it")


def _complain(line: str, exit_code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return exit_code
