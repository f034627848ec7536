"""How the processes that torchrun has started at the same time find each other in its store."""

import secrets
import time
from datetime import timedelta

from torch import distributed

STARTS = "starts"  # in the store: how often rank 0 was started
SECONDS_BETWEEN_LOOKS = 0.05


def part_of_this_start(
    store: distributed.Store, rank: int, size: int, timeout: timedelta
) -> distributed.Store:
    """The part of ``store`` that these ``size`` processes have, and none that were started before.

    torchrun's store outlives a restart, and with it the addresses of processes that are gone. Its
    count of restarts differs between machines, since each torchrun counts only those for which a
    process of its own was the cause. So rank 0 numbers its starts. The others can't know whether
    the number that they find is from before, and wait until a rank 0 answers that is there now.

    Raises:
        RuntimeError: the others, or rank 0, do not answer in time.
    """
    if rank == 0:
        number = store.add(STARTS, 1)
        for other in range(1, size):
            token = store.get(f"{number}/{other}").decode()  # waits until it is there
            store.set(f"{number}/{token}", "")
    else:
        number = _answered(store, rank, timeout)
    return distributed.PrefixStore(f"start-{number}", store)


def _answered(store: distributed.Store, rank: int, timeout: timedelta) -> int:
    """The number of the start whose rank 0 answers ``rank``."""
    token, asked = secrets.token_hex(8), -1
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        if (number := store.add(STARTS, 0)) != asked:
            store.set(f"{number}/{rank}", token)
            asked = number
        if store.check([f"{number}/{token}"]):
            return number
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise RuntimeError(f"rank 0 does not answer rank {rank}")
