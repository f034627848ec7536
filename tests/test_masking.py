"""Masked thought: which inputs are replaced and by what, and that nothing else is."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PROMPT, Killed, Outcome, flags, kill, make_config, seal, step_that
from test_train import assert_same_bits, logged, run_folder

import data
import perplexity
import train
from engine.masking import Masking
from engine.packing import IGNORE, Example
from engine.tokenizer import Tokenizer
from grading.dataset import Problem
from run.errors import UserError

VOCABULARY = range(420)
MASKED = {"mask_rate": "0.4", "mask_warmup_ratio": "0.5"}


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer, problems: list[Problem]) -> list[Example]:
    numbered = [replace(problem, line=line) for line, problem in enumerate(problems, start=1)]
    return data.encode(tokenizer, numbered, PROMPT)


def answer_positions(row: Example) -> list[int]:
    """Of the inputs, so without EOS."""
    return [position for position, label in enumerate(row.labels[:-1]) if label != IGNORE]


def changes(before: Example, after: Example) -> dict[int, int]:
    """The positions at which the inputs differ, and what is there now."""
    pairs = zip(before.input_ids, after.input_ids, strict=True)
    return {place: new for place, (old, new) in enumerate(pairs) if old != new}


# ---------------------------------------------------------------- what is replaced


def test_only_inputs_of_answers_change(rows: list[Example]) -> None:
    """Guards against a masked prompt, BOS or label, and a row that is changed for good."""
    everything = Masking(1.0, 0, range(1000, 1001))  # which no row contains
    for row in rows:
        before = list(row.input_ids), list(row.labels)
        masked = everything.mask(row, 1.0, 0, 0, row.line)
        assert (row.input_ids, row.labels) == before
        assert (masked.labels, masked.line) == (row.labels, row.line)
        assert changes(row, masked) == dict.fromkeys(answer_positions(row), 1000)


def test_the_share_rises_linearly_and_then_stays(rows: list[Example]) -> None:
    """Guards against a ramp in each epoch, one that never ends, and a first step at full rate."""
    batches = data.Batches(rows[:50], 16, 0, Masking(0.4, 2.5, VOCABULARY))  # 4 steps an epoch
    rates = [batches.mask_rate(step) for step in range(16)]
    assert rates == pytest.approx([0.04 * min(step, 10) for step in range(16)], abs=1e-15)
    assert Masking(0.4, 0, VOCABULARY).rate_after(0) == 0.4


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
def test_each_answer_token_is_replaced_with_the_same_probability(
    rows: list[Example], rate: float
) -> None:
    """By any token of the vocabulary: guards against choices that depend on what is masked."""
    method, unseen = Masking(rate, 0, range(1000, 1420)), set(range(1000, 1420))
    count = total = first = 0
    for epoch in range(12):
        for row in rows:
            found = changes(row, method.mask(row, rate, 0, epoch, row.line))
            positions = answer_positions(row)
            count, total = count + len(found), total + len(positions)
            first += positions[0] in found
            unseen -= set(found.values())
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(count - rate * total) <= 4 * deviation * math.sqrt(total)
    number = 12 * len(rows)
    assert abs(first - rate * number) <= 4 * deviation * math.sqrt(number)
    assert not unseen or rate == 0.0


def test_a_higher_rate_keeps_what_a_lower_one_replaces(rows: list[Example]) -> None:
    """So that the ramp is a function of the step alone: no draw depends on the rate."""
    method = Masking(0.4, 0, range(1000, 1420))
    for row in rows[:20]:
        low, high = (changes(row, method.mask(row, rate, 0, 0, row.line)) for rate in (0.2, 0.7))
        assert low.items() < high.items()


def test_each_epoch_row_and_seed_draws_anew(rows: list[Example]) -> None:
    """Guards against an epoch that repeats the last one's masks, and rows that share theirs."""
    method = Masking(0.4, 0, VOCABULARY)

    def masks(seed: int, epoch: int, line: int) -> Example:
        return method.mask(rows[0], 0.4, seed, epoch, line)

    first = masks(0, 0, 1)
    assert first == masks(0, 0, 1)
    for other in ((1, 0, 1), (0, 1, 1), (0, 0, 2)):
        assert masks(*other) != first
    batches = data.Batches(rows[:3], 3, 0, method)
    epochs = [sorted(batches[step], key=lambda row: row.line) for step in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    twice = [replace(rows[0], line=line) for line in (1, 2)]
    one, other = data.Batches(twice, 2, 0, method)[0]
    assert one.input_ids != other.input_ids
    [[one], [other]] = (data.Batches(rows[:1], 1, seed, method)[0] for seed in (0, 1))
    assert one.input_ids != other.input_ids


def test_draws_do_not_depend_on_batch_size_or_the_order_of_calls(rows: list[Example]) -> None:
    """Guards against a stream that rows share, which a resumed run would have to replay."""

    def of_epoch_2(batch_size: int) -> list[Example]:
        batches = data.Batches(rows[:50], batch_size, 0, Masking(0.4, 0, VOCABULARY))
        steps = range(batches.per_epoch, 2 * batches.per_epoch)
        found = [row for step in reversed(steps) for row in batches[step]]
        return sorted(found, key=lambda row: row.line)

    assert of_epoch_2(16) == of_epoch_2(7)


def test_masks_are_those_of_every_other_machine() -> None:
    """Fixed values: if they change, a resumed run no longer sees the masks that it saw before."""
    row = Example([1, *range(10, 20), 2], [IGNORE] * 4 + [*range(13, 20), 2])
    masked = Masking(0.5, 0, range(100, 200)).mask(row, 0.5, 0, 1, 7)
    assert masked.input_ids == EXPECTED


EXPECTED = [1, 10, 11, 12, 13, 187, 15, 16, 17, 100, 19, 2]


# ---------------------------------------------------------------- by what


def drawn_from(token: str, tokenizer: Tokenizer, folder: Path) -> range:
    """The ids that replace tokens in a run of the model in ``folder``."""
    settings = {"mask_rate": 0.4, "mask_token": token, "mask_warmup_ratio": 0.5, "epochs": 2}
    settings |= {"batch_size": 1, "seed": 0}
    return data.batches_of([], settings, tokenizer, folder).masking.replacements


def test_replacements_are_the_vocabulary_or_one_of_its_tokens(
    tokenizer: Tokenizer, model_folder: Path, tmp_path: Path
) -> None:
    """Guards against an id that the embedding has no row for, as that of an added pad token."""
    assert drawn_from("random", tokenizer, model_folder) == range(len(tokenizer))
    assert drawn_from("<unk>", tokenizer, model_folder) == range(
        tokenizer.unk_token_id, tokenizer.unk_token_id + 1
    )
    shape = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": 300}))
    assert drawn_from("random", tokenizer, tmp_path) == range(300)
    assert drawn_from(tokenizer.piece(299), tokenizer, tmp_path) == range(299, 300)
    with pytest.raises(UserError, match="is not in the embedding of model"):
        drawn_from(tokenizer.piece(300), tokenizer, tmp_path)


def test_a_token_that_there_is_not_is_refused(call, settings: dict[str, str]) -> None:
    """Guards against a typing error that masks by whatever text of that spelling becomes."""
    wrong = settings | {"mask_rate": "0.4", "mask_token": "<mask>"}
    call(train, *flags(wrong)).assert_user_error(
        "mask_token '<mask>': is not in the vocabulary of model", "set random, or a token"
    )


@pytest.mark.parametrize("setting", ["mask_token", "mask_warmup_ratio"])
def test_what_has_no_effect_is_refused(call, settings: dict[str, str], setting: str) -> None:
    """Guards against a user who names the token and believes that something is masked."""
    typed = [f"--{setting}", {"mask_token": "<unk>", "mask_warmup_ratio": "0.5"}[setting]]
    call(train, *flags(settings), *typed).assert_user_error(
        f"command line: {setting}: has no effect with mask_rate 0: leave it out, or set mask_rate "
        "too"
    )
    config, *_ = train.read_arguments([*flags(settings), *typed, "--mask_rate", "0.4"])
    assert str(getattr(config, setting)) == typed[1]


# ---------------------------------------------------------------- a run


def test_a_masked_run_resumes_in_mid_epoch_bit_for_bit(settings: dict[str, str]) -> None:
    """Guards against draws that depend on what a process has drawn before."""
    plain = settings | {"log_every": "2", "run_name": "plain"}
    whole, killed = (plain | MASKED | {"run_name": name} for name in ("whole", "killed"))
    for run in (plain, whole):
        train.main(make_config(run))
    killed["checkpoint_steps"] = "5"
    with pytest.raises(Killed):
        train.main(make_config(killed), step=step_that(kill, at=13))
    train.main(make_config(killed))
    assert_same_bits(run_folder(killed) / "last", run_folder(whole) / "last")
    assert logged(killed) == logged(whole)
    shown = [line["train/mask_rate"] for line in logged(whole) if "train/loss" in line]
    assert shown == pytest.approx([0.4 * min(step / 7, 1) for step in range(1, 14, 2)])
    assert all("train/mask_rate" not in line for line in logged(plain))
    assert logged(plain)[-1]["val/loss"] != logged(whole)[-1]["val/loss"]


def test_validation_is_never_masked(call, settings: dict[str, str]) -> None:
    """Guards against a perplexity that can't be compared with that of a run without masks."""
    settings |= {"epochs": "1", "mask_rate": "1", "mask_warmup_ratio": "0"}
    assert call(train, *flags(settings)).code == 0
    best = run_folder(settings) / "best"
    outcome = call(perplexity, "--ckpt", str(best), "--split", "validation")
    [shown] = [line["val/perplexity"] for line in logged(settings) if "val/loss" in line]
    assert float(outcome.out.split()[-1]) == pytest.approx(shown, rel=1e-6)


def test_an_older_run_resumes_unmasked(
    call: Callable[..., Outcome], stopped: Path, settings: dict[str, str]
) -> None:
    """Guards against settings that a checkpoint lacks, and masks that begin in mid-run."""
    for name in ("last", "previous"):
        file = stopped / name / "training.json"
        description = json.loads(file.read_text())
        for key in ("mask_rate", "mask_warmup_ratio", "mask_token"):
            del description["settings"][key]
        file.write_text(json.dumps(description))
        seal(stopped / name)
    call(train, *flags(settings | MASKED)).assert_user_error("mask_rate was 0.0 and is 0.4")
    outcome = call(train, *flags(settings))
    assert outcome.code == 0 and "last at step 8 of 14" in outcome.out, outcome.err


def test_what_has_no_effect_may_change(
    call: Callable[..., Outcome], stopped: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against a run without masks that can't be resumed for how it would be masked."""
    config = tmp_path / "config.yaml"
    config.write_text("mask_token: <unk>\nmask_warmup_ratio: 0.25\n")
    typed = [*flags(settings), "--config", str(config)]
    outcome = call(train, *typed)
    assert outcome.code == 0 and "last at step 8 of 14" in outcome.out, outcome.err
    masked = [*flags(settings | MASKED | {"run_name": "masked", "epochs": "1"})]
    assert call(train, *masked).code == 0
    call(train, *masked, "--mask_token", "<unk>").assert_user_error("mask_token was 'random'")


def test_more_epochs_are_refused_where_the_rate_rises(call, settings: dict[str, str]) -> None:
    """Guards against steps that were masked at another rate than those of the longer run."""
    settings |= {"lr_schedule": "constant", "warmup_ratio": "0", "epochs": "1"}
    rising = settings | MASKED | {"run_name": "rising"}
    assert call(train, *flags(rising)).code == 0
    longer = rising | {"epochs": "2"}
    call(train, *flags(longer)).assert_user_error("epochs was 1 and is 2")
    steady = settings | MASKED | {"mask_warmup_ratio": "0"}
    assert call(train, *flags(steady)).code == 0
    assert call(train, *flags(steady | {"epochs": "2"})).code == 0
