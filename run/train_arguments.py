"""The command line of train.py: the settings, and what to do instead of training."""

import argparse
from dataclasses import dataclass

from run.arguments import ArgumentParser, parse_arguments, positive_float, positive_int
from run.config import Config
from run.errors import UserError
from run.sweep import with_trial


def read_train_arguments(doc: str, argv: list[str]) -> tuple[Config, bool, "PlanFor | None"]:
    parser = ArgumentParser(doc)
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="check, with a few steps in a temporary folder, that a killed run resumes bit for bit",
    )
    add_plan_arguments(parser)
    arguments, typed = parse_arguments(parser, argv)
    config = with_trial(arguments.config, typed)
    arguments.config.report_changes(typed)
    return config, arguments.selftest, plan_wanted(arguments)


@dataclass(frozen=True)
class PlanFor:
    """What ``--plan`` is to plan for.

    Attributes:
        device_memory: of each device in GB, as GPUs are sold; None: the devices that are here.
        devices: how many train together.
    """

    device_memory: float | None
    devices: int


def add_plan_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what training and decoding take, what fits and how fast; loads no weights",
    )
    parser.add_argument(
        "--device_memory",
        type=positive_float,
        metavar="GB",
        help="with --plan: GPUs of this memory, which need not be here; 24 is 24 x 2^30 bytes",
    )
    parser.add_argument(
        "--devices", type=positive_int, metavar="N", help="with --plan: N devices (default: 1)"
    )


def plan_wanted(arguments: argparse.Namespace) -> PlanFor | None:
    """None without ``--plan``.

    Raises:
        UserError: a flag of ``--plan`` without it, or ``--plan`` with ``--selftest``.
    """
    if arguments.plan:
        if arguments.selftest:
            raise UserError("command line: --plan and --selftest exclude each other: leave one out")
        return PlanFor(arguments.device_memory, arguments.devices or 1)
    for name in ("device_memory", "devices"):
        if getattr(arguments, name) is not None:
            raise UserError(f"command line: --{name} belongs to --plan: add --plan")
    return None
