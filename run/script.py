"""How a script starts and ends, with one clear line and an exit code instead of a traceback."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable, MutableMapping
from typing import NoReturn

from run import streams
from run.errors import STORAGE_FAULTS, NotFiniteError, Stopped, UserError, one_line, storage_cure
from run.signals import StopSignal

OLDEST_PYTHON = (3, 11)
# PyTorch's settings of how it allocates GPU memory. It also reads the older name.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

# Packages that the scripts require. Not wandb, since a run continues without it.
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "pyarrow",
    "sentencepiece",
    "safetensors",
    "xxhash",
    "optimi",
    "pydantic",
    "yaml",
    "scipy",
    "tqdm",
    "rich",
)

SECONDS_UNTIL_RAISED = 0.01  # what could not be raised where a signal arrived


def let_gpu_memory_grow(environment: MutableMapping[str, str]) -> None:
    """Let PyTorch's blocks of GPU memory grow, unless the user has set how it allocates.

    Micro-batches differ in size from step to step. Blocks of fixed sizes would have gaps in which
    the next ones do not fit.
    """
    if not any(name in environment for name in ALLOCATOR):
        environment[ALLOCATOR[0]] = "expandable_segments:True"


def check_platform() -> None:
    """End with one line and exit code 2 if these scripts can't run here.

    Must be called before the first import that would fail, or that would initialise CUDA, as those
    of some packages do.
    """
    let_gpu_memory_grow(os.environ)
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        _refuse(
            f"Python {found} is too old, 3.11 or newer is needed: start this with a newer one, "
            "such as python3.11"
        )
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            _refuse(
                f"the environment variable {name} is {value!r}: torchrun sets it to a number: "
                "unset it, or start this with torchrun"
            )
    try:
        import fcntl  # noqa: F401
    except ImportError:
        _refuse(
            f"{sys.platform} has no file locks (fcntl): run this on Linux or macOS, "
            "on Windows in WSL2"
        )
    missing = [
        name
        for name in PACKAGES
        if sys.modules.get(name) is None and importlib.util.find_spec(name) is None
    ]
    if missing:
        _refuse(f"{sys.executable} lacks {', '.join(missing)}: {_install_cure()}")


def _refuse(fault: str) -> None:
    sys.exit(_complain(f"error: {fault}", UserError.exit_code))


def _install_cure() -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    own = os.path.join(root, ".venv", "bin", "python")
    if os.path.exists(own) and sys.executable != own:
        return f"start this with {own}"
    return (
        f"install {os.path.join(root, 'requirements.txt')} into it (pip install -r), "
        "or start this with one that has them"
    )


def run_script(story: Callable[..., None], *arguments: object) -> None:
    """Run ``story(*arguments)``; end the process with the documented exit code if it fails.

    One of several processes (torchrun) ends here in any case, without the interpreter's clean-up.
    A thread of PyTorch's communication (gloo) may then be about to free a tensor, for which it
    waits for the interpreter's lock. Before Python 3.14, an interpreter that shuts down ends such a
    thread by pthread_exit, which C++ answers with abort ("terminate called without an active
    exception"; cpython #87135, pytorch #190489). destroy_process_group ends no thread while a mesh
    or a sharded model still refers to the group, and after an error it may wait forever.
    """
    if not streams.is_one_of_several():
        return _run(story, *arguments)
    exit_code: object = 1
    try:
        _run(story, *arguments)
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code
    except BaseException:  # which Python would print, too
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code if isinstance(exit_code, int) else int(exit_code is not None))


def _run(story: Callable[..., None], *arguments: object) -> None:
    check_platform()
    streams.prepare()
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _raise_again
    StopSignal().listen().tell(_stop)
    try:
        story(*arguments)
    except UserError as error:
        _end(f"error: {one_line(error)}", error.exit_code)
    except (NotFiniteError, Stopped) as error:
        _end(f"stopped: {one_line(error)}", error.exit_code)
    except RuntimeError as error:
        if not isinstance(stop := error.__cause__, Stopped):
            raise
        # Python 3.11 wraps what is raised in __set_name__, as while a library defines its classes.
        _end(f"stopped: {one_line(stop)}", stop.exit_code)
    except KeyboardInterrupt:  # from a library that installs its own handler to ask a question
        _end("stopped: SIGINT", 128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in STORAGE_FAULTS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fault = f"{where}{error.strerror}: {storage_cure(error)}, or choose another folder"
        _end(f"error: {one_line(fault)}", UserError.exit_code)
    StopSignal().listen().tell(_leave)  # during the heavy imports that may follow


def read_command_line(read_arguments: Callable[[list[str]], tuple]) -> tuple:
    """Parse the command line before a script's heavy imports.

    This way --help and mistakes are answered within a second. After the imports, the script runs
    with the result.
    """
    parsed: list[tuple] = []
    with streams.one_mouth():
        _run(lambda: parsed.append(read_arguments(sys.argv[1:])))
    return parsed[0]


def ends_early(story: Callable[..., bool], *arguments: object) -> bool:
    """Whether ``story``, called before a script's heavy imports, is all that there is to do.

    What it raises ends the script as in `run_script`.
    """
    done: list[bool] = []
    with streams.one_mouth():
        _run(lambda: done.append(story(*arguments)))
    return done[0]


def _stop(number: int) -> None:
    # True of any script: some save as they go, and others have nothing to save.
    raise Stopped(number, f"{_name(number)}; what is saved is kept: type the same command again")


def _leave(number: int) -> None:
    sys.exit(_complain(f"stopped: {_name(number)}", 128 + number))


def _raise_again(dropped: sys.UnraisableHookArgs) -> None:
    """Raise a moment later what was to end the script, and report anything else that is dropped.

    Python drops what is raised in a destructor or a weak reference's callback, in which a signal
    may arrive.
    """
    error = dropped.exc_value
    if not isinstance(error, (Stopped, SystemExit)):
        sys.__unraisablehook__(dropped)
        return

    def raise_it(*_: object) -> NoReturn:
        raise error

    signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_UNTIL_RAISED)


def _name(number: int) -> str:
    return signal.Signals(number).name


def check_printed() -> None:
    """Check that standard output was written, for a script whose only result is its output.

    Raises:
        UserError: it was not written.
        SystemExit: the reader, such as `| head`, has exited. That is not an error, and nobody is
            left to read a message, so the script ends as if by SIGPIPE.
    """
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", None)
    if isinstance(fault, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    if fault is not None:
        why = getattr(fault, "strerror", None) or fault
        raise UserError(
            f"standard output: can't be written ({why}): make room there, or redirect it elsewhere"
        )


def _end(line: str, exit_code: int) -> NoReturn:
    """Print why the process ends, and end it."""
    sys.exit(_complain(line, exit_code))


def _complain(line: str, exit_code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return exit_code
