"""Proof, on a sample, that batching changes no completion: decoded again, alone, by Transformers' own generate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import LlamaForCausalLM

from data import Example, collate
from generate import Completion
from model import forward_packed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Difference:
    """Where a completion from the batch leaves the one that generate writes alone.

    Attributes:
        position: of the first token that differs, from 0.
        batched, alone: the two token ids there; None where a completion has ended before.
        gaps: by how much the logit of ``alone`` is above that of ``batched`` there, as Transformers'
            forward pass computes it and as ours does; None where one has no token there.
    """

    position: int
    batched: int | None
    alone: int | None
    gaps: tuple[float, float] | None

    def describe(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        batched, alone = (
            "its end" if token is None else f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"
            for token in (self.batched, self.alone)
        )
        text = f"token {self.position} is {batched} in the batch and {alone} alone"
        if self.gaps:
            text += f"; alone, its logit is ahead by {self.gaps[0]:.3g} in Transformers and by {self.gaps[1]:.3g} here"
        return text


def sample(indices: Sequence[int], count: int) -> list[int]:
    """``count`` of ``indices``, evenly spread."""
    count = min(count, len(indices))
    return [indices[number * len(indices) // count] for number in range(count)]


def differences(
    model: LlamaForCausalLM,
    prompts: Mapping[int, list[int]],
    completions: Mapping[int, Completion],
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
) -> dict[int, Difference]:
    """Decode ``prompts`` again one at a time, and say where ``completions`` differ from that.

    Args:
        prompts, completions: by the number of the problem, the same numbers in both.
    """
    found = {}
    for index, prompt in prompts.items():
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(eos_token_ids),
                pad_token_id=0,
            )
        alone, batched = output[0, len(prompt) :].tolist(), completions[index].token_ids
        if alone and alone[-1] in eos_token_ids:
            alone.pop()
        if alone != batched:
            found[index] = _first_difference(model, prompt, batched, alone)
    return found


def _first_difference(model: LlamaForCausalLM, prompt: list[int], batched: list[int], alone: list[int]) -> Difference:
    position = next(
        (number for number, (one, other) in enumerate(zip(batched, alone, strict=False)) if one != other),
        min(len(batched), len(alone)),
    )
    tokens = [ids[position] if position < len(ids) else None for ids in (batched, alone)]
    if None in tokens:
        return Difference(position, *tokens, None)
    prefix = [*prompt, *alone[:position]]
    batch = collate([Example([*prefix, 0], [0] * (len(prefix) + 1))]).to(model.device)
    with torch.inference_mode():
        theirs = model(torch.tensor([prefix], device=model.device)).logits[0, -1].float()
        ours = model.lm_head(forward_packed(model, batch)[len(prefix) - 1]).float()
    gaps = tuple((logits[tokens[1]] - logits[tokens[0]]).item() for logits in (theirs, ours))
    return Difference(position, *tokens, gaps)
