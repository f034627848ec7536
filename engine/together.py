"""What the ranks of a job do together although a model is spread over them: save, load, decode."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine import memory
from engine.llama import Llama
from engine.sharding import each_whole
from engine.slices import Slices
from engine.state import save_from_device
from run.errors import UserError, cause_of

if TYPE_CHECKING:
    from engine.ranks import Ranks
    from engine.tokenizer import Tokenizer

Complete = Callable[..., list[tuple[str, str]]]


def parts_of(
    ranks: "Ranks", save: Callable[..., None], complete: Complete
) -> dict[str, Callable[..., Any]]:
    """How a model that is spread over ``ranks`` is saved and decoded; for one, how it is saved.

    Args:
        save: `run.checkpoint.save_checkpoint`.
        complete: `engine.strategy.complete`.
    """
    if ranks.size == 1:
        return {"save": partial(save_from_device, save)}
    return {
        "ranks": ranks,
        "save": partial(save_together, save, ranks),
        "copy": lambda *_: None,  # training waits until a checkpoint is written
        "complete": partial(complete_together, complete),
    }


# ---------------------------------------------------------------- saving


@dataclass(frozen=True)
class Gathered:
    """A model with the ``weights`` of all ranks in host memory."""

    model: LlamaForCausalLM
    weights: Mapping[str, Tensor]

    def save_pretrained(self, folder: Path, *, max_shard_size: int) -> None:
        weights = dict(self.weights)
        self.model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)


def save_together(
    save: Callable[..., None],
    ranks: "Ranks",
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: "Tokenizer",
    description: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
    **keywords: Any,
) -> None:
    """As ``save``, which rank 0 calls with all weights, while each rank writes its own slices.

    Returns on every rank when the checkpoint is in place. An error of rank 0 ends the job.
    """
    weights = gather_on_main(ranks, model.state_dict())
    slices = None if state is None else Slices(ranks, state)
    if ranks.is_main:
        save(folder, Gathered(model, weights), tokenizer, description, slices, **keywords)
    elif slices is not None:
        with suppress(OSError):  # of any rank, which rank 0 is told, too, and reports
            slices.save(None)
    ranks.wait()


def gather_on_main(ranks: "Ranks", tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of ``tensors`` in the host memory of rank 0; nothing on the others."""

    def keep(gathered: Tensor) -> Tensor:
        return gathered.cpu() if ranks.is_main else gathered.new_empty(0)

    found = each_whole(tensors, keep)
    return found if ranks.is_main else {}


# ---------------------------------------------------------------- decoding


def complete_together(
    complete: Complete,
    model: Llama,
    tokenizer: "Tokenizer",
    max_new_tokens: int,
    slots: int | None,
    prompts: Sequence[list[int]],
) -> list[tuple[str, str]]:
    """As ``complete``, each rank with a part of ``prompts`` and all weights.

    Raises:
        UserError, RuntimeError: on every rank, if it failed on one, with what that one says.
    """
    ranks, fault, answers = model.ranks, None, []
    plain = gathered_model(model)
    try:
        if mine := ranks.share(prompts):
            answers = complete(plain, tokenizer, max_new_tokens, slots, mine)
    except UserError as error:  # others would wait for an answer
        fault = True, str(error)
    except Exception as error:
        fault = False, cause_of(error)
    del plain
    memory.release()
    dealt: list[Any] = [None] * len(prompts)
    for rank, (rank_fault, rank_answers) in enumerate(ranks.gather([fault, answers])):
        if rank_fault:
            is_known, words = rank_fault
            raise (UserError if is_known else RuntimeError)(f"rank {rank}: {words}")
        dealt[rank :: ranks.size] = map(tuple, rank_answers)
    return dealt


@torch.no_grad()
def gathered_model(model: Llama) -> Llama:
    """A copy of a model that is spread over the ranks, with all weights on each of them.

    Raises:
        UserError: on every rank, if there is no room for it on one.
    """
    sizes = [weight.nbytes for weight in model.parameters()]
    needed = sum(sizes) + max(sizes)  # which is gathered before it is kept
    free = memory.free_bytes(model.device)
    found = model.ranks.gather([free, needed <= free and memory.has_room(needed, model.device)])
    if not all(has_room for _, has_room in found):
        free = min(free for free, _ in found)
        raise UserError(
            f"all weights take {needed / 1e9:.1f} GB on each process, which has {free / 1e9:.1f} "
            "GB free, or less in one piece: evaluate.py decodes the saved checkpoint"
        )
    with torch.device("meta"):
        plain = LlamaForCausalLM(model.config)
        if model.stored is not model.pretrained:
            from engine.lora import inject

            inject(plain, model.stored.adapter, model.dtype)
    plain.load_state_dict(each_whole(model.pretrained.state_dict()), assign=True)
    plain.tie_weights()
    plain.model.rotary_emb = model.rotary  # which is not spread, and has no weights
    plain.generation_config = model.pretrained.generation_config
    model.kernels.replace_linear_layers(plain)
    return Llama(plain, model.kernels).eval()
