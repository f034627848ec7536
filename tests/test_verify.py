"""A sample is decoded again alone, and what differs is an error in float32, a count in bfloat16."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import PROMPT, flags

import data
import evaluate
from engine import verify
from engine.decoding import Completion, greedy_decode
from engine.llama import Llama
from engine.strategy import decode
from engine.tokenizer import Tokenizer
from grading import dataset

LIMITS = {"max_new_tokens": 12, "eos_token_ids": frozenset({2})}


@pytest.fixture
def prompts(tokenizer: Tokenizer, problems: list[dataset.Problem]) -> dict[int, list[int]]:
    encoded = data.encode_prompts(tokenizer, problems[:5], PROMPT)
    return {10 * number: prompt for number, prompt in enumerate(encoded)}


@pytest.fixture
def completions(model: Llama, prompts: dict[int, list[int]]) -> dict[int, Completion]:
    found = greedy_decode(model, list(prompts.values()), slots=3, **LIMITS)
    return {10 * completion.index: completion for completion in found}


def test_sample_is_spread_evenly() -> None:
    assert verify.spread(range(100), 4) == [0, 25, 50, 75]
    assert (
        verify.spread([3, 5], 4) == [3, 5]
        and verify.spread([], 4) == []
        and verify.spread([3, 5], 0) == []
    )


def test_what_generate_writes_is_no_difference(model, prompts, completions) -> None:
    assert verify.compare_with_generate(model, prompts, completions, **LIMITS) == {}


def test_an_end_by_eos_is_no_difference(model, prompts, completions) -> None:
    """Guards against EOS taken for a token of the completion."""
    eos = frozenset({1, completions[10].token_ids[3]})  # the first of which is never written
    limits = LIMITS | {"eos_token_ids": eos}
    again = {
        10 * one.index: one
        for one in greedy_decode(model, list(prompts.values()), slots=2, **limits)
    }
    assert any(one.stop == "eos" for one in again.values())
    assert verify.compare_with_generate(model, prompts, again, **limits) == {}


@pytest.mark.parametrize("limit", range(1, 8))
def test_a_result_at_the_limit_is_no_difference(model, prompts, limit: int) -> None:
    """Guards against results that one of the two writes in full, or into the last token."""

    class Fourth:
        def after(self, token_ids: Sequence[int]) -> list[int]:
            return [7, 8, 9] if len(token_ids) == 4 else []

    limits = LIMITS | {"max_new_tokens": limit, "calculator": Fourth()}
    found = greedy_decode(model, list(prompts.values()), slots=2, **limits)
    batched = {10 * one.index: one for one in found}
    for one in batched.values():  # the last token that fits is the model's own
        assert limit <= 4 or one.token_ids[3:6] == [7, 8, 9][: limit - 3]
    assert verify.compare_with_generate(model, prompts, batched, **limits) == {}


def test_the_first_differing_token_is_shown_with_both_gaps(
    model, prompts, completions, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = copy.deepcopy(completions)
    right = wrong[20].token_ids[4]
    wrong[20].token_ids[4:] = [7, 8, 9]
    found = verify.compare_with_generate(model, prompts, wrong, **LIMITS)
    assert list(found) == [20]
    assert (found[20].position, found[20].batched, found[20].alone) == (4, 7, right)
    theirs, ours = found[20].gaps
    logits = model.pretrained(
        torch.tensor([[*prompts[20], *completions[20].token_ids[:4]]])
    ).logits[0, -1]
    assert theirs == pytest.approx((logits[right] - logits[7]).item(), abs=1e-5) and theirs > 0
    assert ours == pytest.approx(theirs, abs=1e-5)
    text = found[20].describe(tokenizer)
    assert (
        "token 4 is " in text
        and "(7) in the batch" in text
        and f"({right}) alone" in text
        and "ahead by" in text
    )
    after = verify._logits_after
    monkeypatch.setattr(verify, "_logits_after", lambda *each: 2 * after(*each))
    [doubled] = verify.compare_with_generate(model, {20: prompts[20]}, wrong, **LIMITS).values()
    assert doubled.gaps == pytest.approx((theirs, 2 * ours))
    assert f"{theirs:.3g} in Transformers and by {2 * ours:.3g} here" in doubled.describe(tokenizer)


def test_a_completion_that_ends_too_soon_or_too_late(
    model, prompts, completions, tokenizer
) -> None:
    wrong = copy.deepcopy(completions)
    last = wrong[0].token_ids.pop()
    wrong[40].token_ids.append(5)
    found = verify.compare_with_generate(model, prompts, wrong, **LIMITS)
    assert found[0] == verify.Difference(11, None, last, None) and found[40] == verify.Difference(
        12, 5, None, None
    )
    assert "token 11 is its end in the batch" in found[0].describe(tokenizer)


def broken(*arguments, **settings):
    for completion in decode(*arguments, **settings):
        completion.token_ids[2:3] = [9]
        yield completion


@pytest.mark.parametrize(
    ("count", "expected"),
    [([], 4), (["--verify-batching", "7"], 7), (["--verify-batching", "0"], None)],
)
def test_float32_is_verified_by_default(
    call, settings: dict[str, str], tmp_path: Path, count: list[str], expected: int | None
) -> None:
    outcome = call(
        evaluate,
        "--ckpt",
        settings["model"],
        *flags(settings),
        "--output",
        str(tmp_path / "out"),
        *count,
    )
    assert outcome.code == 0, outcome.err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores.get("verified_batching") == (
        expected and {"problems": expected, "differences": 0}
    )
    assert (f"verified: {expected} of {expected}" in outcome.out) == bool(expected)


def test_a_difference_in_float32_is_an_error_and_no_score(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path / "out")]
    outcome = call(evaluate, *arguments, parts=evaluate.Parts(decode=broken))
    outcome.assert_user_error("4 of 4 completions differ", "problem 0: token 2 is", "ahead by")
    assert not (tmp_path / "out" / "scores.json").exists()
    # The same command again decodes nothing; what the file holds is still wrong.
    call(evaluate, *arguments).assert_user_error(
        "of 4 completions differ", "the recorded completion is not the one that"
    )
    assert not (tmp_path / "out" / "scores.json").exists()
    assert call(evaluate, *arguments, "--verify-batching", "0").code == 0


def test_differences_in_bfloat16_are_counted(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    settings |= {"dtype": "bfloat16"}
    parts = evaluate.Parts(decode=broken)
    arguments = ["--ckpt", settings["model"], *flags(settings)]
    outcome = call(evaluate, *arguments, "--output", str(tmp_path / "a"), parts=parts)
    assert outcome.code == 0 and "verified" not in outcome.out
    arguments += ["--output", str(tmp_path / "b")]
    outcome = call(evaluate, *arguments, "--verify-batching", "3", parts=parts)
    assert (
        outcome.code == 0
        and "verified: 0 of 3" in outcome.out
        and "problem 0: token 2 is" in outcome.out
    )
    scores = json.loads((tmp_path / "b" / "scores.json").read_text())
    assert scores["verified_batching"] == {"problems": 3, "differences": 3}
    # One that is asked for is made, also where there has been another.
    outcome = call(evaluate, *arguments, "--verify-batching", "2", parts=parts)
    assert outcome.code == 0 and "verified: 0 of 2" in outcome.out
    call(evaluate, *arguments, "--verify-batching", "-1").assert_user_error(
        "'-1' must be zero or a positive integer"
    )
