"""Checks that a model can answer, and on a sample that batching changes no completion.

The sample is decoded again, one prompt at a time, by Transformers' own generate.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from engine.packing import collate_prompts
from run.errors import UserError

if TYPE_CHECKING:
    from engine.decoding import Calculator, Completion
    from engine.llama import Llama
    from engine.strategy import Decoder, Greedy
    from engine.tokenizer import Tokenizer

Key = TypeVar("Key", bound=Hashable)

# How many questions are verified in float32 by default.
VERIFIED_IN_FLOAT32 = 4


@dataclass(frozen=True)
class Difference:
    """Where a batched completion differs from the one that generate writes for its prompt alone.

    Attributes:
        position: of the first token that differs, counted from 0.
        batched, alone: the two token ids at that position; None if a completion has already ended.
        gaps: logit of ``alone`` minus logit of ``batched`` at that position, in Transformers'
            forward pass and in ours; None if either token is None.
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
            text += (
                f"; alone, its logit is ahead by {self.gaps[0]:.3g} in Transformers "
                f"and by {self.gaps[1]:.3g} here"
            )
        return text


@torch.inference_mode()
def check_finite(model: "Llama", prompt: list[int], name: str) -> None:
    """Raises UserError if a logit after ``prompt`` is NaN or infinite.

    Such a model writes without an error, and scores 0 as a bad one does.
    """
    if not _logits_after(model, prompt).isfinite().all():
        cure = "" if model.dtype == torch.float32 else ", or set dtype float32"
        raise UserError(
            f"model {name!r}: its logits after the first prompt are not finite, so no answer of it "
            "means anything (its training diverged, or its files are damaged): take another "
            f"checkpoint, or copy it again{cure}"
        )


def spread(keys: Sequence[Key], count: int) -> list[Key]:
    """Pick ``count`` of ``keys``, evenly spread."""
    count = min(count, len(keys))
    return [keys[number * len(keys) // count] for number in range(count)]


def compare_with_generate(
    model: "Llama",
    prompts: Mapping[Key, list[int]],
    completions: Mapping[Key, "Completion"],
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    calculator: "Calculator | None" = None,
) -> dict[Key, Difference]:
    """Decode ``prompts`` again one at a time, and find where ``completions`` differ.

    Args:
        prompts, completions: with the same keys.
    """
    found = {}
    model.eval()
    for key, prompt in prompts.items():
        alone = _generate_alone(model, prompt, max_new_tokens, eos_token_ids, calculator)
        if alone and alone[-1] in eos_token_ids:
            alone.pop()
        batched = completions[key].token_ids
        if alone != batched:
            found[key] = _first_difference(model, prompt, batched, alone)
    return found


@torch.inference_mode()
def _generate_alone(
    model: "Llama",
    prompt: list[int],
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    calculator: "Calculator | None",
) -> list[int]:
    """The completion by generate, with the results of the calculator if there is one.

    At each "=" for which the calculator has a result, the rest of generate's text is discarded, and
    generate is called again from the end of the result.
    """
    written: list[int] = []
    while len(written) < max_new_tokens:
        left = max_new_tokens - len(written)
        free = _generate(model, [*prompt, *written], left, eos_token_ids)
        if calculator is None:
            return free
        # No result can follow the last token within the limit.
        for number in range(1, min(len(free) + 1, left)):
            if forced := calculator.after([*written, *free[:number]]):
                written += [*free[: number - 1], *forced]
                break
        else:
            return written + free
    return written[:max_new_tokens]


def _generate(
    model: "Llama", prompt: list[int], max_new_tokens: int, eos_token_ids: frozenset[int]
) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    output = model.pretrained.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(eos_token_ids),
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def _first_difference(
    model: "Llama", prompt: list[int], batched: list[int], alone: list[int]
) -> Difference:
    pairs = enumerate(zip(batched, alone, strict=False))
    shorter = min(len(batched), len(alone))
    position = next((number for number, (one, other) in pairs if one != other), shorter)
    tokens = [ids[position] if position < len(ids) else None for ids in (batched, alone)]
    if None in tokens:
        return Difference(position, *tokens, None)
    prefix = [*prompt, *alone[:position]]
    theirs = model.pretrained(torch.tensor([prefix], device=model.device)).logits[0, -1].float()
    ours = _logits_after(model, prefix).float()
    gaps = tuple((logits[tokens[1]] - logits[tokens[0]]).item() for logits in (theirs, ours))
    return Difference(position, *tokens, gaps)


def _logits_after(model: "Llama", ids: list[int]) -> torch.Tensor:
    """The logits ``[vocabulary]`` of the next token, by our forward pass."""
    packed = collate_prompts([ids], model.kernels)
    attend = partial(model.kernels.attention, packed, 0.0)
    inputs = packed.input_ids, packed.position_ids, attend, packed.output_positions
    return model.next_logits(*inputs, count=1)[0]


def verify_batching(
    decoder: "Decoder",
    how: "Greedy",
    recorded: Mapping[tuple[int, int], str],
    completions: Mapping[tuple[int, int], "Completion"],
    count: int | None,
) -> dict[str, Any]:
    """Decode ``count`` of the questions again one at a time, compare, and print the result.

    Args:
        recorded: the text of every completion.
        completions: the completions that this process decoded. Only the text of the others is
            known, so they are decoded in a batch once more.
        count: None for `VERIFIED_IN_FLOAT32` in float32, and for 0 in any other dtype.

    Returns:
        ``verified_batching``, with the number of ``problems`` and of ``differences``; empty if
        none was verified.

    Raises:
        UserError: a completion differs in float32.
    """
    must_match = decoder.model.dtype == torch.float32
    if count is None:
        count = VERIFIED_IN_FLOAT32 if must_match else 0
    chosen = spread(sorted(recorded), count)
    if not chosen:
        return {}
    faults = _differences_from_generate(decoder, how, chosen, recorded, completions)
    if faults and must_match:
        (number, _), fault = next(iter(faults.items()))
        raise UserError(
            f"{len(faults)} of {len(chosen)} completions differ from Transformers' generate, one "
            f"prompt at a time (problem {number}: {fault}): no score is reported, since batching "
            "must not change anything in float32; --verify-batching 0 skips this check"
        )
    print(
        f"verified: {len(chosen) - len(faults)} of {len(chosen)} completions"
        + (" with the calculator" if how.calculator else "")
        + " match Transformers' generate, one prompt at a time"
    )
    for (number, _), fault in faults.items():
        print(f"  problem {number}: {fault}")
    return {"verified_batching": {"problems": len(chosen), "differences": len(faults)}}


def _differences_from_generate(
    decoder: "Decoder",
    how: "Greedy",
    chosen: Sequence[tuple[int, int]],
    recorded: Mapping[tuple[int, int], str],
    completions: Mapping[tuple[int, int], "Completion"],
) -> dict[tuple[int, int], str]:
    """Describes the differences in ``chosen``; see `verify_batching`."""
    batched = {which: completions[which] for which in chosen if which in completions}
    others = [which for which in chosen if which not in completions]
    for completion in decoder.completions(others, how):
        batched[others[completion.index]] = completion
    found = compare_with_generate(
        decoder.model,
        {which: decoder.prompts[which[0]] for which in chosen},
        batched,
        max_new_tokens=decoder.max_new_tokens,
        eos_token_ids=decoder.eos_token_ids,
        calculator=how.calculator,
    )
    faults = {which: difference.describe(decoder.tokenizer) for which, difference in found.items()}
    for which in others:
        text = decoder.tokenizer.decode(batched[which].token_ids)
        if which not in faults and text != recorded[which]:
            faults[which] = "the recorded completion is not the one that this machine produces now"
    return faults
