"""How the next token is chosen, greedily or at random, and which questions are completed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.decoding import Calculator, Completion, greedy_decode, sample_decode
from engine.llama import Llama
from engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Greedy:
    """The most probable token at each step."""

    calculator: Calculator | None = None
    unit = "problem"

    @property
    def title(self) -> str:
        return "calculating" if self.calculator else "decoding"


@dataclass(frozen=True)
class Sampling:
    """Tokens sampled at a temperature. The same seed gives the same samples."""

    temperature: float
    seed: int
    calculator: Calculator | None = None
    title, unit = "sampling", "sample"


How = Greedy | Sampling


def decode(
    model: Llama,
    prompts: Sequence[list[int]],
    how: How,
    names: Sequence[str],
    **limits: Any,
) -> Iterator[Completion]:
    """Complete ``prompts``, and yield the completions in the order in which they are finished.

    Args:
        names: one for each completion. The random numbers of a sample depend only on its name and
            the seed, not on the other prompts.
        limits: see `greedy_decode`.
    """
    if isinstance(how, Greedy):
        return greedy_decode(model, prompts, calculator=how.calculator, **limits)
    seeds = [f"{how.seed}/{name}" for name in names]
    return sample_decode(
        model, prompts, seeds, temperature=how.temperature, calculator=how.calculator, **limits
    )


@dataclass(frozen=True)
class Decoder:
    """A model and the questions to ask it.

    Attributes:
        questions, prompts: as text, and as the token ids that the model reads.
        slots: how many completions are decoded at once; None to choose.
        decode: see `decode`.
    """

    model: Llama
    tokenizer: Tokenizer
    questions: Sequence[str]
    prompts: Sequence[list[int]]
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    slots: int | None = None
    decode: Callable[..., Iterator[Completion]] = decode

    def completions(self, ids: Sequence[tuple[int, int]], how: How) -> Iterator[Completion]:
        """Complete ``ids``, each of which is the number of a question and the number of a sample.

        The index of a completion is its position in ``ids``.
        """
        prompts = [self.prompts[question] for question, _ in ids]
        # Named by the question's text, so that a sample does not depend on the other rows.
        names = [f"{sample}/{self.questions[question]}" for question, sample in ids]
        return self.decode(
            self.model,
            prompts,
            how,
            names,
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            slots=self.slots,
        )


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    slots: int | None,
    prompts: Sequence[list[int]],
) -> list[tuple[str, str]]:
    """Complete each of ``prompts`` greedily.

    Returns:
        Text and reason for stopping of each completion, in the order of ``prompts``.
    """
    completions = greedy_decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids(model, tokenizer),
        slots=slots,
    )
    return [
        (tokenizer.decode(completion.token_ids), completion.stop)
        for completion in sorted(completions, key=lambda completion: completion.index)
    ]


def eos_token_ids(model: Llama, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a completion: the tokenizer's EOS, and any that the model lists."""
    configured = model.pretrained.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset({tokenizer.eos_token_id, *listed} - {None})
