"""Proof, on a sample, that batching changes no completion: decoded again, alone, by Transformers' own generate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import LlamaForCausalLM

from engine.decoding import Completion
from engine.llama import forward_packed
from engine.packing import Example, collate
from grading.predictions import Key

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer
    from grading.calculator import ForcedResults


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

    def describe(self, tokenizer: "Tokenizer") -> str:
        batched, alone = (
            "its end" if token is None else f"{tokenizer.piece(token)!r} ({token})"
            for token in (self.batched, self.alone)
        )
        text = f"token {self.position} is {batched} in the batch and {alone} alone"
        if self.gaps:
            text += f"; alone, its logit is ahead by {self.gaps[0]:.3g} in Transformers and by {self.gaps[1]:.3g} here"
        return text


def sample(keys: Sequence[Key], count: int) -> list[Key]:
    """``count`` of ``keys``, evenly spread."""
    count = min(count, len(keys))
    return [keys[number * len(keys) // count] for number in range(count)]


def differences(
    model: LlamaForCausalLM,
    prompts: Mapping[Key, list[int]],
    completions: Mapping[Key, Completion],
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    calculator: "ForcedResults | None" = None,
) -> dict[Key, Difference]:
    """Decode ``prompts`` again one at a time, and say where ``completions`` differ from that.

    Args:
        prompts, completions: by which problem they are of, the same in both.
    """
    found = {}
    for key, prompt in prompts.items():
        with torch.inference_mode():
            if calculator is None:
                alone = _generate(model, prompt, max_new_tokens, eos_token_ids)
            else:
                alone = _generate_with_calculator(
                    model, prompt, max_new_tokens, eos_token_ids, calculator
                )
        batched = completions[key].token_ids
        if alone and alone[-1] in eos_token_ids:
            alone.pop()
        if alone != batched:
            found[key] = _first_difference(model, prompt, batched, alone)
    return found


def _generate(
    model: LlamaForCausalLM, prompt: list[int], max_new_tokens: int, eos_token_ids: frozenset[int]
) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(eos_token_ids),
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def _generate_with_calculator(
    model: LlamaForCausalLM,
    prompt: list[int],
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    calculator: "ForcedResults",
) -> list[int]:
    """`_generate`, anew from the end of each forced result on, and up to the next.

    What generate writes behind a "=" that is to be followed by a result is thrown away.
    """
    written: list[int] = []
    while len(written) < max_new_tokens:
        free = _generate(model, [*prompt, *written], max_new_tokens - len(written), eos_token_ids)
        last = max_new_tokens - len(written)  # nothing follows this one
        for number in range(1, min(len(free) + 1, last)):
            if forced := calculator.after([*written, *free[:number]]):
                written += [*free[: number - 1], *forced]
                break
        else:
            return written + free
    return written[:max_new_tokens]


def _first_difference(
    model: LlamaForCausalLM, prompt: list[int], batched: list[int], alone: list[int]
) -> Difference:
    position = next(
        (
            number
            for number, (one, other) in enumerate(zip(batched, alone, strict=False))
            if one != other
        ),
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
