"""A model whose weights, gradients and optimizer state are spread over the ranks of a job.

FSDP2 does it (`torch.distributed.fsdp.fully_shard`, arXiv:2304.11277): each rank keeps a slice of
every weight, gathers a block's weights just before the block is computed, and sums the gradients so
that each rank keeps its slice of the sum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from run.errors import UserError

if TYPE_CHECKING:
    from engine.llama import Llama
    from engine.packing import MicroBatch

COPIES, SLICES = "copies", "slices"  # the dimensions of the mesh of ranks


def shard(
    model: "Llama",
    shard_over: int | None,
    reshard_after_forward: bool,
    reduces_each: bool = False,
) -> None:
    """Spread ``model`` over its ranks, in place, and onto the device of its kernels.

    Args:
        shard_over: how many ranks share one copy of the weights; each group of so many has a copy,
            and only gradients travel between the groups (HSDP). None: all of them share one.
        reshard_after_forward: whether a block's gathered weights are freed after the forward pass
            and gathered again for the backward pass.
        reduces_each: whether gradients are summed over the ranks after each micro-batch, instead of
            the last one of a step. This sends more, but no rank keeps whole gradients.

    Raises:
        UserError: ``shard_over`` does not divide the number of ranks.
    """
    ranks, model.reduces_each = model.ranks, reduces_each
    if ranks.size == 1:
        return
    check_divides(shard_over, ranks.size)
    slices = shard_over or ranks.size
    shape = (ranks.size // slices, slices) if slices < ranks.size else (slices,)
    names = (COPIES, SLICES)[-len(shape) :]
    mesh = init_device_mesh(model.kernels.device.type, shape, mesh_dim_names=names)
    # Gradients are summed in float32 or better, as they are over the tokens of one process.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(model.dtype, torch.float32))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.in_turn = partial(reducing_last, model)
    for module in (model, *model.blocks):
        # A sum, not FSDP's mean: each rank divides by the supervised tokens of all.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def check_divides(shard_over: int | None, devices: int) -> None:
    """Raises UserError if groups of ``shard_over`` can't be made of so many devices."""
    if shard_over and devices % shard_over:
        divisors = [str(number) for number in range(1, devices + 1) if devices % number == 0]
        raise UserError(
            f"shard_over {shard_over}: must divide the {devices} processes of this job: set one of "
            f"{', '.join(divisors)}, or null"
        )


def reducing_last(model: "Llama", micro_batches: Sequence["MicroBatch"]) -> Iterator["MicroBatch"]:
    """Yield a step's ``micro_batches``, so that gradients are summed over the ranks at its end."""
    for number, micro_batch in enumerate(micro_batches, start=1):
        is_last = number == len(micro_batches)
        model.set_requires_gradient_sync(is_last or model.reduces_each)
        model.set_requires_all_reduce(is_last)  # between copies of the weights
        yield micro_batch


def free_gathered(model: "Llama") -> None:
    """Free the weights that a forward pass without a backward pass has left gathered."""
    for module in (model, *model.blocks):
        if isinstance(module, FSDPModule):
            module.reshard()


def is_spread(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def slices_of(tensor: Tensor) -> int:
    """Over how many ranks a tensor is spread."""
    return tensor.device_mesh[SLICES].size() if isinstance(tensor, DTensor) else 1


def slice_of(tensor: Tensor) -> Tensor:
    """This rank's slice of a tensor, which shares its memory; one that is not spread, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread, on every rank; one that is not, itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def each_whole(
    tensors: Mapping[str, Tensor], keep: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, Tensor]:
    """What ``keep`` makes of the `whole` of each of ``tensors``, one after the other.

    What is one tensor under two names, as tied weights are, is gathered once, and remains one.
    """
    found: dict[tuple, Tensor] = {}
    for tensor in tensors.values():
        if (place := place_of(tensor)) not in found:
            found[place] = keep(whole(tensor))
    return {name: found[place_of(tensor)] for name, tensor in tensors.items()}


def place_of(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Where this rank's slice lies, the same for all names of one tensor.

    Each name has an object of its own. An address alone would not do: empty slices have none.
    """
    own = slice_of(tensor)
    return own.untyped_storage()._cdata, own.storage_offset(), tuple(own.shape)


def norm_over_slices(norm: Tensor, tensor: Tensor) -> Tensor:
    """The norm of something spread as ``tensor`` is, from the ``norm`` of this rank's slices."""
    if not isinstance(tensor, DTensor):
        return norm
    square = norm.square()
    distributed.all_reduce(square, group=tensor.device_mesh.get_group(SLICES))
    return square.sqrt()
