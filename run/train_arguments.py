"""The command line of train.py: the settings, and what to do instead of training."""

import argparse

from run.arguments import ArgumentParser, parse_arguments, positive_float, positive_int
from run.config import Config
from run.errors import UserError
from run.looks import Look, PlanFor
from run.sweep import with_trial


def read_train_arguments(doc: str, argv: list[str]) -> tuple[Config, bool, PlanFor | Look | None]:
    parser = ArgumentParser(doc)
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="check, with a few steps in a temporary folder, that a killed run resumes bit for bit",
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="show rows, tokens, batches, plan, time and disk of the run; makes two steps with the "
        "model, and writes nothing",
    )
    add_plan_arguments(parser)
    arguments, typed = parse_arguments(parser, argv)
    config = with_trial(arguments.config, typed)
    if not arguments.preflight:  # which lists them with their values
        arguments.config.report_changes(typed)
    wanted = plan_wanted(arguments)
    return config, arguments.selftest, Look.PREFLIGHT if arguments.preflight else wanted


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
        UserError: a flag of ``--plan`` without it, or two of the flags that exclude each other.
    """
    modes = [name for name in ("plan", "preflight", "selftest") if getattr(arguments, name)]
    if len(modes) > 1:
        one, other, *_ = modes
        raise UserError(f"command line: --{one} and --{other} exclude each other: leave one out")
    if arguments.plan:
        return PlanFor(arguments.device_memory, arguments.devices or 1)
    for name in ("device_memory", "devices"):
        if getattr(arguments, name) is not None:
            raise UserError(f"command line: --{name} belongs to --plan: add --plan")
    return None
