"""The slices of an optimizer's state that each rank of a job writes to a checkpoint, and reads.

In safetensors files by `torch.distributed.checkpoint`, so that another number of ranks can read
them, one process included, and that these can read what one process wrote.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from engine.sharding import slice_of

if TYPE_CHECKING:
    from engine.ranks import Ranks

FOLDER = "state"  # in a checkpoint
FILE_BYTES = 10**9  # of one file, which is put together in host memory


@dataclass(frozen=True)
class Slices:
    """The ``tensors`` of this rank: its slices of what is spread, and what it has for itself."""

    ranks: "Ranks"
    tensors: Mapping[str, Tensor]

    def save(self, folder: Path | None) -> None:
        """Write the slices of all ranks into ``folder``, which rank 0 names; all must call this.

        Raises:
            OSError: a rank can't write.
        """
        path = Path(self.ranks.broadcast(folder and str(folder))) / FOLDER
        tensors = {_name_of(name, self.ranks.rank): each for name, each in self.tensors.items()}
        files, size = {}, 0
        for name in sorted({name for names in self.ranks.gather([*tensors]) for name in names}):
            files[name] = 1 + size // FILE_BYTES
            size += slice_of(tensors[name]).nbytes if name in tensors else 0
        files = self.ranks.broadcast(files)  # every rank has the same slices, but for a few bytes
        writer = checkpoint.HuggingFaceStorageWriter(str(path), files, save_distributed=True)
        with _own_error():
            checkpoint.save(tensors, storage_writer=writer)


def _name_of(name: str, rank: int) -> str:
    """The name of a tensor in the file: each rank has its own random state."""
    return f"rank.{rank}.{name}" if rank and name.startswith("random.") else name


@contextmanager
def _own_error() -> Iterator[None]:
    """Raise what went wrong on a rank, instead of the collection of what every rank says."""
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise failures[0] from None


def has_slices(folder: Path) -> bool:
    """Whether several ranks have saved this checkpoint."""
    return (folder / FOLDER).is_dir()


def read_slices(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read into ``tensors``, in place, what a checkpoint of any number of ranks has of them.

    A random state of a rank that did not exist remains as it is.

    Args:
        folder: the checkpoint.

    Returns:
        ``tensors``, without an optimizer's state if the checkpoint is from before its first step.

    Raises:
        ValueError: the checkpoint has other tensors.
    """
    is_alone = not distributed.is_initialized()
    rank = 0 if is_alone else distributed.get_rank()
    path = folder / FOLDER if has_slices(folder) else folder
    reader = checkpoint.HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    named = {_name_of(name, rank): tensor for name, tensor in tensors.items()}
    ours, theirs = ({name for name in names if _is_of_all(name)} for names in (named, saved))
    if theirs and ours != theirs:  # before its first step, an optimizer has no state
        raise ValueError(f"it lacks {sorted(ours - theirs)}, and has {sorted(theirs - ours)}")
    wanted = {name: tensor for name, tensor in named.items() if name in saved}
    with warnings.catch_warnings(), _own_error():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        checkpoint.load(wanted, storage_reader=reader, no_dist=is_alone)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if _name_of(name, rank) in saved or not _is_of_all(name)
    }


def _is_of_all(name: str) -> bool:
    return name.startswith(("optimizer.", "group."))
