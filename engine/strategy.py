"""How the next token is chosen, greedily or at random, and which questions are completed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from engine.dealing import Deal, Ids, Worker
from engine.decoding import Calculator, Completion, greedy_decode, sample_decode
from engine.llama import Llama
from engine.refusals import each_of
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
    """Tokens sampled at a temperature. The same seed gives the same samples.

    Models of the same family draw similar samples from one seed, since they choose by the same
    random numbers. Where that is not wanted, the seed is a text that names the model as well.
    """

    temperature: float
    seed: int | str
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

    If ``model.ranks`` are several, each of them has such a decoder of the same questions, with a
    whole copy of the model: Llama-2-7B takes 13.5 GB of each device in bfloat16.

    Attributes:
        questions, prompts: as text, and as the token ids that the model reads.
        slots: how many completions are decoded at once on a device; None to choose.
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

    def completions(self, ids: Ids, how: How) -> Iterator[Completion]:
        """Complete ``ids``, each of which is the number of a question and the number of a sample.

        The index of a completion is its position in ``ids``. Of several ranks, rank 0 calls this
        while the others are in `answer`.
        """
        is_alone = self.model.ranks.size == 1
        return self._completed(ids, how) if is_alone else self._dealt(ids, how)

    def answer(self, calculator: Calculator | None) -> None:
        """Decode what rank 0 asks of this rank, until rank 0 leaves the job.

        Args:
            calculator: for completions that are written with one.
        """
        worker = Worker(self.model.ranks)
        for ids, how in worker.parts():
            for completion in self._completed(ids, remake(how, calculator), worker.give_sign):
                worker.send(completion)

    def _dealt(self, ids: Ids, how: How) -> Iterator[Completion]:
        deal = Deal(self.model.ranks, ids, describe(how))
        for completion in chain(self._completed(deal.own, how, deal.arrived), deal.rest()):
            completion.index = deal.positions[completion.index]
            yield completion

    def _completed(
        self, ids: Ids, how: How, arrived: Callable[[], list[Completion]] = list
    ) -> Iterator[Completion]:
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
            arrived=arrived,
        )


def describe(how: How) -> dict[str, Any]:
    """``how`` as a JSON object, from which another process can `remake` it."""
    settings = {"with_calculator": how.calculator is not None}
    if isinstance(how, Sampling):
        settings |= {"temperature": how.temperature, "seed": how.seed}
    return settings


def remake(settings: Mapping[str, Any], calculator: Calculator | None) -> How:
    """What `describe` described; ``calculator`` is this process's own."""
    used = calculator if settings["with_calculator"] else None
    if "seed" in settings:
        return Sampling(settings["temperature"], settings["seed"], used)
    return Greedy(used)


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
    listed = each_of(model.pretrained.generation_config.eos_token_id)
    return frozenset({tokenizer.eos_token_id, *listed})
