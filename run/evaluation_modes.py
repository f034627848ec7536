"""The flags of evaluate.py: which can be used together, and which repeat an evaluation."""

import argparse
from typing import Any

from run.errors import UserError
from run.manifest import checkpoint_around
from run.streams import is_one_of_several


def check_mode(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    """Raises UserError if flags contradict each other, or results would be in a checkpoint."""
    model_flags = ["ckpt", "split", "limit", "verify_batching", "samples", "temperature"]
    excluded = {"compare": [*model_flags, "output", "rescore"], "rescore": model_flags}
    for mode, names in excluded.items():
        set_here = [name for name in names if getattr(arguments, name) is not None]
        used = [f"--{name.replace('_', '-')}" for name in set_here] + [f"--{key}" for key in typed]
        if getattr(arguments, mode) and used:
            raise UserError(
                f"command line: {', '.join(used)} can't be used with --{mode}, which reads files, "
                "not a model"
            )
    mode = next((mode for mode in excluded if getattr(arguments, mode)), None)
    if mode and is_one_of_several():
        raise UserError(
            f"command line: --{mode} reads files, for which one process is enough: start it with "
            "python, not torchrun"
        )
    if arguments.split == "train" and arguments.samples and arguments.verify_batching is not None:
        raise UserError(
            "command line: --verify-batching verifies greedy decoding, and --split train with "
            "--samples decodes only samples: leave one of them out"
        )
    if arguments.temperature and not arguments.samples:
        raise UserError(
            "command line: --temperature applies to samples: set their number with --samples K"
        )
    if arguments.output and checkpoint_around(arguments.output):
        raise UserError(
            f"command line: --output {arguments.output}: is in a checkpoint, which a save would "
            "replace with all that is in it: name a folder outside it, or leave --output out"
        )


def given_flags(arguments: argparse.Namespace, typed: dict[str, str]) -> dict[str, Any]:
    """What a command needs, besides ``--ckpt``, to evaluate the same rows in the same way.

    Args:
        typed: the settings from the command line.

    Returns:
        The flags by name without the dashes; None: not needed.
    """
    _, *files = arguments.config.layers
    return {
        "split": None if arguments.split == "test" else arguments.split,
        "limit": arguments.limit,
        "output": arguments.output,
        **typed,
        "config": files[0] if files else None,
    }
