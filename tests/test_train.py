"""The loop as a whole: bit-identical resuming, the best epoch, what a run writes and refuses."""

import itertools
import json
import math
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    PROMPT,
    Killed,
    die_and_resume,
    flags,
    kill,
    make_config,
    named,
    small_run,
    step_that,
    with_model,
    write_rows,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import data
import evaluate
import perplexity
import train
from engine import device, fused, packing
from engine.device import cpu_kernels
from engine.loading import load_tokenizer
from engine.measure import Measurement
from grading.dataset import Problem
from run import checkpoint, manifest, training_json
from run.config import Config
from run.errors import Stopped, UserError

STEPS = 14  # 2 epochs of 7 steps: 26 rows in batches of 4, the last one of 2


def run_folder(settings: dict[str, str]) -> Path:
    return Path(settings["output_dir"]) / settings["run_name"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(settings: dict[str, str]) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (run_folder(settings) / "metrics.jsonl").read_text().splitlines()
    ]


def logged(settings: dict[str, str]) -> list[dict[str, Any]]:
    """All logged numbers that must not depend on the clock."""
    clock = ("time", "train/tokens_per_second", "train/memory_gib")
    return [
        {key: value for key, value in line.items() if key not in clock}
        for line in metrics(settings)
    ]


def measuring(*losses: float) -> Callable[..., Measurement]:
    """What stands in for the validation, and finds one of ``losses`` after each epoch."""
    left = iter(losses)
    return lambda *_: Measurement(loss := next(left), math.exp(loss), 1)


def test_each_setting_of_the_update_has_its_effect(settings: dict[str, str]) -> None:
    """Guards against two settings in each other's place, and one that is dropped on the way."""
    settings |= {"adam_beta1": "0.8", "adam_beta2": "0.95", "adam_epsilon": "1e-3"}
    settings |= {"weight_decay": "0.1", "max_grad_norm": "2.5", "lr_schedule": "linear"}
    settings |= {"warmup_ratio": "0.3", "min_lr_ratio": "0.5", "learning_rate": "1.0", "seed": "5"}
    rates: list[float] = []

    def step(
        model: Any, optimizer: Any, batch: Any, rate: float, budget: int, norm: float, *_: Any
    ) -> train.StepResult:
        [group] = optimizer.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-3, 0.1)
        assert (budget, norm, torch.initial_seed()) == (256, 2.5, 5)
        rates.append(rate)
        return train.StepResult(1.0, 1, 1.0, budget)

    train.main(make_config(settings), step=step, measure=measuring(1.0, 1.0))
    falling = [0.5 + 0.5 * (1 - number / 9) for number in range(9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, *falling])
    held_out = data.load_split(settings["dataset"], "validation", 17, seed=5)[0]
    recorded = training_json.read_description(run_folder(settings) / "last")["data"]
    assert recorded["validation_sha256"] == data.fingerprint(held_out)


def test_one_row_and_one_step_are_counted_as_one(call, settings: dict[str, str]) -> None:
    words = flags(settings | {"epochs": "1", "validation_size": "1", "batch_size": "64"})
    shown = "training: 42 rows, 1 step of 64 sequences in 1 epoch, on cpu in float32; "
    assert f"{shown}validation: 1 row\n" in call(train, *words).out
    call(train, *words).assert_user_error("this run is finished (1 step): ")


def test_a_signal_in_the_last_step_ends_a_run_that_is_finished(
    call, settings: dict[str, str]
) -> None:
    """Guards against a stop that asks for a command which has nothing left to do."""
    arrives = partial(os.kill, os.getpid(), signal.SIGTERM)
    outcome = call(train, *flags(settings | {"epochs": "1"}), step=step_that(arrives, at=7))
    assert outcome.code == 0 and "done: " in outcome.out, outcome.err


def test_the_space_for_a_run_is_that_of_its_optimizer(
    settings: dict[str, str], wide_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a run with moments of 8 bits that needs room for others."""
    needed: list[int] = []

    def check(folder: Path, weights: int, state: int) -> None:
        needed.append(state)
        kill()

    monkeypatch.setattr(train, "check_disk_space", check)
    for name in ("adamw", "adamw_8bit"):
        with pytest.raises(Killed):
            train.main(make_config(settings | {"model": str(wide_folder), "optimizer": name}))
    assert needed[1] < 0.5 * needed[0]


def test_a_step_is_made_at_its_rate(settings: dict[str, str], model: Any) -> None:
    """Guards against an optimizer that stays at the rate it was made with."""
    optimizer = train.build_optimizer(model.trained, 1.0, (0.9, 0.999), 1e-8, 0.0)
    before = [weight.detach().clone() for weight in model.trained]
    row = packing.Example([1, 5, 6, 2], [packing.IGNORE, 5, 6, 2])
    train.train_step(model, optimizer, [row], 1e-3, 64, None)
    moved = max((one - two).abs().max() for one, two in zip(model.trained, before, strict=True))
    # Adam's first update is the rate itself; a weight near 1 is rounded by up to 6e-8.
    assert moved.item() == pytest.approx(1e-3, rel=1e-4)


def assert_same_bits(ours: Path, theirs: Path) -> None:
    for name in ("model.safetensors", "state-00001.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resume_in_mid_epoch_2_equals_the_run_that_was_not_stopped(
    settings: dict[str, str],
    dtype: str,
    dropout: float,
    tmp_path: Path,
) -> None:
    """Guards against optimizer, data order, schedule, random state or log sums that are lost.

    Killed in step 13 and resumed from the save of step 10, it repeats steps 11 and 12.
    """
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)
    shape = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(shape | {"attention_dropout": dropout}))
    settings |= {
        "model": str(base),
        "dtype": dtype,
        "checkpoint_steps": "5",
        "log_every": "4",
        "seed": "11",
    }
    whole = settings | {"run_name": "whole"}
    train.main(make_config(whole))
    assert die_and_resume(settings, at=13) == 10
    assert_same_bits(run_folder(settings) / "last", run_folder(whole) / "last")
    assert logged(settings) == logged(whole)
    steps = [line["step"] for line in logged(settings) if "train/loss" in line]
    assert steps == [4, 8, 12, 14]
    assert [line["step"] for line in logged(settings) if "val/loss" in line] == [7, 14]


@pytest.fixture(scope="module")
def whole(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The settings of a run that nothing stopped."""
    settings = small_run(model_folder, data_folder, tmp_path_factory.mktemp("whole"))
    train.main(make_config(settings), report=lambda folder: None)
    return settings


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_signals_finish_the_step_save_and_resume(
    call, settings: dict[str, str], whole: dict[str, str], name: str
) -> None:
    """Guards against a step cut in the middle, and against an exit code that says all is done."""
    arrives = partial(os.kill, os.getpid(), getattr(signal, name))
    outcome = call(train, *flags(settings), step=step_that(arrives, at=9))
    assert outcome.code == 128 + getattr(signal, name)
    assert (
        outcome.err.startswith(f"stopped: {name} after step 9, saved in ")
        and outcome.err.count("\n") == 1
    )
    outcome = call(train, *flags(settings))
    assert outcome.code == 0 and "last at step 9 of 14" in outcome.out
    assert_same_bits(run_folder(settings) / "last", run_folder(whole) / "last")
    assert logged(settings) == logged(whole)


def test_resume_from_every_step(settings: dict[str, str], tmp_path: Path) -> None:
    """With dropout, across the epochs' boundary, with several steps between two logged lines."""
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)
    shape = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(shape | {"attention_dropout": 0.1}))
    settings |= {"model": str(base), "checkpoint_steps": "1", "log_every": "3"}
    whole = settings | {"run_name": "whole"}
    calls = itertools.count()

    def step(*arguments: Any) -> train.StepResult:
        """Keeps what a kill before this step would leave."""
        if number := next(calls):
            kept = run_folder(whole).with_name(f"step-{number}")
            ignore = shutil.ignore_patterns(".*.removed")  # which a thread may be about to finish
            shutil.copytree(run_folder(whole), kept, ignore=ignore)
        return train.train_step(*arguments)

    train.main(make_config(whole), step=step)
    for number in range(1, STEPS):
        each = settings | {"run_name": f"step-{number}"}
        assert training_json.read_description(run_folder(each) / "last")["step"] == number
        torch.manual_seed(12345)  # another process would not have this one's random state
        train.main(make_config(each))
        assert_same_bits(run_folder(each) / "last", run_folder(whole) / "last")
        assert logged(each) == logged(whole), number


def test_micro_batches_may_change_on_resume_and_change_no_step(
    settings: dict[str, str],
) -> None:
    """The memory knob is free: the losses stay those of the unstopped run, within float32."""
    whole = settings | {"run_name": "whole"}
    train.main(make_config(whole))
    with pytest.raises(Killed):
        train.main(make_config(settings), step=step_that(kill, at=10))
    train.main(make_config(settings | {"micro_batch_tokens": "512"}))
    ours, theirs = (
        [line["train/loss"] for line in logged(s) if "train/loss" in line]
        for s in (settings, whole)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"batch_size": "8"}, "batch_size was 4 and is 8"),
        (
            {"seed": "1", "learning_rate": "1e-3"},
            "seed was 0 and is 1; learning_rate was 0.003 and is 0.001",
        ),
        ({"epochs": "3"}, "epochs was 2 and is 3"),
        ({"validation_size": "18"}, "validation_size was 17 and is 18"),
    ],
)
def test_resuming_with_what_may_not_change_is_refused(
    call, settings: dict[str, str], change: dict[str, str], fragment: str
) -> None:
    settings["epochs"] = "2"
    assert call(train, *flags(settings)).code == 0
    before = {path: path.read_bytes() for path in run_folder(settings).rglob("*") if path.is_file()}
    # A list, so that learning_rate is compared in the order of the settings, as the message has it.
    outcome = call(train, *flags(settings | change))
    outcome.assert_user_error(*fragment.split("; "))
    assert {
        path: path.read_bytes() for path in run_folder(settings).rglob("*") if path.is_file()
    } == before


def test_what_may_change_on_resume_is_said(call, settings: dict[str, str]) -> None:
    with pytest.raises(Killed):
        call(train, *flags(settings), step=step_that(kill, at=9))
    outcome = call(train, *flags(settings | {"log_every": "3", "micro_batch_tokens": "300"}))
    assert outcome.code == 0
    assert (
        "resuming: micro_batch_tokens was 256 and is 300; log_every was 1 and is 3\n" in outcome.out
    )


def test_a_constant_rate_can_be_trained_on(call, settings: dict[str, str]) -> None:
    """As if it had the larger number of epochs from the start. With a warmup it is refused."""
    constant = settings | {"lr_schedule": "constant", "warmup_ratio": "0"}
    whole = constant | {"run_name": "whole", "epochs": "3"}
    assert call(train, *flags(whole)).code == 0
    assert call(train, *flags(constant)).code == 0
    outcome = call(train, *flags(constant | {"epochs": "3"}))
    assert outcome.code == 0 and "resuming: epochs was 2 and is 3" in outcome.out
    assert_same_bits(run_folder(constant) / "last", run_folder(whole) / "last")
    assert logged(constant) == logged(whole)
    # Guards against calling a run finished, and removing its state, that has gone on beyond.
    fewer = flags(constant | {"epochs": "1", "keep_state": "false"})
    for look in ([], ["--preflight"]):
        call(train, *fewer, *look).assert_user_error(
            "is at step 21 already, over the 7 of epochs 1"
        )
    warm = constant | {"run_name": "warm", "warmup_ratio": "0.03"}
    assert call(train, *flags(warm)).code == 0
    call(train, *flags(warm | {"epochs": "3"})).assert_user_error("epochs was 2 and is 3")


def test_resuming_needs_no_base_model(call, settings: dict[str, str], tmp_path: Path) -> None:
    """Guards against asking the hub, or needing a base that is gone: last holds everything."""
    shutil.copytree(settings["model"], tmp_path / "base")
    settings["model"] = str(tmp_path / "base")
    with pytest.raises(Killed):
        call(train, *flags(settings), step=step_that(kill, at=9))
    shutil.rmtree(tmp_path / "base")
    assert call(train, *flags(settings)).code == 0


def test_other_rows_are_refused(
    call, settings: dict[str, str], problems: list[Problem], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(settings["dataset"], folder)
    settings["dataset"] = str(folder)
    assert call(train, *flags(settings)).code == 0
    write_rows(folder / "train.jsonl", problems[-42:])
    call(train, *flags(settings)).assert_user_error("the rows of the data set are not the same")


def test_finished_foreign_and_forbidden_folders_are_refused(call, settings: dict[str, str]) -> None:
    """Guards against a run that overwrites another one."""
    assert call(train, *flags(settings)).code == 0
    call(train, *flags(settings)).assert_user_error("this run is finished", "--run_name")
    call(train, *flags(settings), "--resume", "never").assert_user_error(
        "is in use", "--resume auto"
    )
    foreign = settings | {"run_name": "foreign"}
    run_folder(foreign).mkdir()
    (run_folder(foreign) / "thesis.tex").write_text("precious")
    call(train, *flags(foreign)).assert_user_error("is in use (thesis.tex)")
    assert [path.name for path in run_folder(foreign).iterdir()] == ["thesis.tex"]


# ---------------------------------------------------------------- the best epoch


def test_best_is_the_epoch_with_the_lowest_validation_loss(
    settings: dict[str, str],
) -> None:
    """Guards against best = last, >= for >, and a best that a later, worse epoch replaces."""
    saved = {}

    def save(folder: Path, model: Any, *rest: Any, **keywords: Any) -> None:
        checkpoint.save_checkpoint(folder, model, *rest, **keywords)
        if folder.name == "last":
            saved[rest[1]["step"]] = weights(folder)

    measure = measuring(3.0, 2.0, 2.5, 2.0)
    train.main(make_config(settings | {"epochs": "4"}), measure=measure, save=save)
    best = run_folder(settings) / "best"
    description = json.loads((best / "training.json").read_text())
    assert (description["epoch"], description["step"], description["validation_loss"]) == (
        2,
        14,
        2.0,
    )
    assert not list(best.glob(manifest.STATE_FILES))
    for key, tensor in weights(best).items():
        assert torch.equal(tensor, saved[14][key])
    assert any(not torch.equal(tensor, saved[28][key]) for key, tensor in weights(best).items())


@pytest.mark.parametrize(
    ("matches", "losses", "best"),
    [
        ([0.25, 0.5, 0.25], [3.0, 2.9, 2.0], 2),  # where the loss says 3
        ([0.5, 0.5, 0.5], [3.0, 2.0, 2.5], 2),  # of equal ones the lower loss
        ([0.5, 0.25, 0.0], [3.0, 2.0, 1.0], 1),
        ([0.0, 0.0, 0.0], [3.0, 3.0, 3.0], 1),
    ],
)
def test_best_by_exact_match(
    settings: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    matches: list[float],
    losses: list[float],
    best: int,
) -> None:
    """Guards against a best that the loss chooses all the same, and one that is forgotten.

    Its loss need not be the lowest, and must not be called that at the end.
    """
    settings |= {"epochs": "3", "best_by": "val_exact_match", "validation_size": "16"}
    config, left = make_config(settings), iter(matches)
    rows = data.load_split(config.dataset, "validation", 16, config.seed)[0]

    def complete(*arguments: Any) -> list[tuple[str, str]]:
        prompts = arguments[-1]
        if len(prompts) < len(rows):  # the samples
            return [("", "eos")] * len(prompts)
        correct = int(next(left) * len(prompts))
        return [
            (f"#### {row.gold if number < correct else 'none'}", "eos")
            for number, row in enumerate(rows)
        ]

    train.main(config, measure=measuring(*losses), complete=complete)
    description = training_json.read_description(run_folder(settings) / "best")
    assert (description["epoch"], description["validation_exact_match"]) == (
        best,
        matches[best - 1],
    )
    logged = [line["val/exact_match"] for line in metrics(settings) if "val/exact_match" in line]
    assert logged == matches
    match, loss = matches[best - 1], losses[best - 1]
    end = f"\ndone: best validation exact match {match:.2%}, loss {loss:.6f}\n"
    assert end in capsys.readouterr().out


def test_exact_match_in_training_is_that_of_evaluation(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against a prompt, split or rule other than evaluate.py's, and a step in eval mode."""
    rows = [Problem(f"{n} or {n}?", f"#### {1 + (n % 3 == 0)}") for n in range(120)]
    write_rows(tmp_path / "data" / "train.jsonl", rows[:110])
    write_rows(tmp_path / "data" / "test.jsonl", rows[110:])
    # It learns the more frequent of the two answers, which is right for a part of the rows.
    settings |= {"dataset": str(tmp_path / "data"), "best_by": "val_exact_match"}
    settings |= {"learning_rate": "3e-2", "epochs": "3", "validation_size": "30"}
    modes: list[bool] = []
    outcome = call(train, *flags(settings), step=with_model(partial(note_modes, modes=modes)))
    assert outcome.code == 0 and len(modes) >= 3 * 5 and all(modes)
    logged = [line["val/exact_match"] for line in metrics(settings) if "val/exact_match" in line]
    best = run_folder(settings) / "best"
    assert call(evaluate, "--ckpt", str(best), "--split", "validation").code == 0
    scores = json.loads((run_folder(settings) / "eval" / "validation" / "scores.json").read_text())
    epoch = training_json.read_description(best)["epoch"]
    assert logged[int(epoch) - 1] == scores["exact_match"] and 0 < scores["exact_match"] < 1


def note_modes(model: torch.nn.Module, modes: list[bool]) -> None:
    """Notes at each forward pass of a training step whether dropout and recomputation are on."""

    def note(*_: Any) -> None:
        if torch.is_grad_enabled():
            modes.append(model.training)

    named(model, "down_proj").register_forward_pre_hook(note)


def test_a_sample_that_is_refused_leaves_the_model_in_training(
    call, settings: dict[str, str]
) -> None:
    """Guards against an epoch without recomputation and dropout after a sample that did not fit."""
    modes: list[bool] = []

    def refuse(model: torch.nn.Module, *_: Any) -> None:
        model.eval()
        raise UserError("no memory for one slot")

    outcome = call(
        train,
        *flags(settings | {"gradient_checkpointing": "true"}),
        step=with_model(partial(note_modes, modes=modes)),
        complete=refuse,
    )
    assert outcome.code == 0 and outcome.out.count("no sample: no memory for one slot") == 2
    # Each layer is computed twice, since its activations are recomputed in all epochs.
    assert len(modes) >= 2 * STEPS and len(modes) % 2 == 0 and all(modes)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (TypeError("no such argument"), "TypeError: no such argument"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory. Tried"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_sample_that_fails_costs_neither_the_run_nor_memory(
    call, settings: dict[str, str], error: Exception, shown: str
) -> None:
    """Guards against hours of training that end with a sample, and memory that it leaves behind."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def fail(*_: Any) -> None:
        cache: list[Any] = [torch.zeros(8)]
        cache.append(cache)  # which only a collection of garbage frees
        held.append(weakref.ref(cache[0]))
        raise type(error)(*error.args)  # a new one, since a traceback holds the cache

    def step(*arguments: Any) -> train.StepResult:
        alive.extend(reference() is not None for reference in held)
        return train.train_step(*arguments)

    outcome = call(train, *flags(settings), step=step, complete=fail)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if "no sample" in line]
    assert len(lines) == 2 and all(shown in line for line in lines)
    assert len(alive) == STEPS // 2 and not any(alive)


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM, "stopped"), 143)]
)
def test_a_sample_can_be_interrupted(
    call, settings: dict[str, str], stop: BaseException, code: int
) -> None:
    """Guards against a Ctrl-C that is taken for a sample that failed."""

    def interrupted(*_: Any) -> None:
        raise stop

    try:
        outcome = call(train, *flags(settings), complete=interrupted)
        assert outcome.code == code and "no sample" not in outcome.out
    except KeyboardInterrupt:
        assert code == 130


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (RuntimeError("no kernel image"), "no kernel image): type the same command to try again"),
        (torch.OutOfMemoryError("none left"), "none left): type the same command with a smaller "),
        (UserError("no memory for one slot"), "error: no memory for one slot"),
    ],
)
def test_an_exact_match_that_fails_stops_the_run_in_one_line(
    call, settings: dict[str, str], error: Exception, cure: str
) -> None:
    """Guards against a best that was chosen without its measure, and against a traceback."""
    settings |= {"best_by": "val_exact_match", "checkpoint_steps": "5"}

    def fail(*_: Any) -> None:
        raise error

    call(train, *flags(settings), complete=fail).assert_user_error(cure)
    last = training_json.read_description(run_folder(settings) / "last")
    assert last["step"] == 5 and not (run_folder(settings) / "best").exists()


def test_the_test_split_chooses_nothing(call, settings: dict[str, str]) -> None:
    for value in ("test_exact_match", "test_loss", "exact_match"):
        call(train, *flags(settings), "--best_by", value).assert_user_error(
            "best_by", value, "val_exact_match"
        )


def test_best_survives_a_resume_with_worse_epochs(
    settings: dict[str, str],
) -> None:
    """Guards against a best loss that is forgotten with the process."""
    measure = measuring(2.0, 2.5, 2.6)
    settings["epochs"] = "3"
    with pytest.raises(Killed):
        train.main(make_config(settings), measure=measure, step=step_that(kill, at=9))
    train.main(make_config(settings), measure=measure)
    assert training_json.read_description(run_folder(settings) / "best")["epoch"] == 1


def test_transformers_loads_best_and_gives_the_same_logits(
    settings: dict[str, str], problems: list[Problem]
) -> None:
    """Guards against an export that only this program can read, or reads differently."""
    models: list[Any] = []
    train.main(make_config(settings), step=with_model(models.append))
    best = run_folder(settings) / "best"
    loaded = AutoModelForCausalLM.from_pretrained(best)
    assert loaded.dtype == torch.float32
    tokenizer = load_tokenizer(best, training_json.tokenizer_record(best))
    examples = data.encode(tokenizer, problems, PROMPT)
    assert examples == data.encode(load_tokenizer(Path(settings["model"])), problems, PROMPT)
    [trained] = models
    batch = packing.collate(examples[:6], trained.eval().kernels)
    attend = partial(trained.kernels.attention, batch, 0.0)
    with torch.no_grad():
        hidden = trained.hidden_states(batch.input_ids, batch.position_ids, attend)
        logits = trained.pretrained.lm_head(hidden).split(batch.seqlens)
        for example, ours in zip(examples[:6], logits, strict=False):
            theirs = loaded(torch.tensor([example.input_ids[:-1]])).logits[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_export_is_tried_before_the_first_step(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """With Llama-2's own generation_config, on which save_pretrained raises in some versions."""
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)
    own = {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.9,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_length": 4096,
    }
    (base / "generation_config.json").write_text(json.dumps(own))
    with pytest.raises(Killed):
        call(train, *flags(settings | {"model": str(base)}), step=step_that(kill, at=1))
    last = run_folder(settings) / "last"
    assert training_json.read_description(last)["step"] == 0
    exported = json.loads((last / "generation_config.json").read_text())
    assert [exported[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 0]
    assert not {"temperature", "top_p", "max_length"} & {
        key for key, value in exported.items() if value is not None
    }


@pytest.mark.parametrize("usual", [True, False], ids=["on a GPU", "on a CPU"])
@pytest.mark.parametrize("setting", ["true", "false", "null"])
def test_compile_is_on_by_setting(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, setting: str, usual: bool
) -> None:
    """Guards against a setting that does nothing."""
    parts: list[Any] = []

    def compiled_part(part: Any, **_: Any) -> Any:
        parts.append(part)
        return part

    monkeypatch.setattr(torch, "compile", compiled_part)
    monkeypatch.setattr(device, "cpu_kernels", with_kernels(compiles_layers=usual))
    fused.compiled.cache_clear()
    settings |= {"compile": setting, "epochs": "1"}
    assert call(train, *flags(settings)).code == 0
    fused.compiled.cache_clear()
    assert bool(parts) == (usual if setting == "null" else setting == "true")


def with_kernels(**changes: Any) -> Callable[[bool], device.Kernels]:
    """`cpu_kernels`, with ``changes``."""
    return lambda with_onednn: replace(cpu_kernels(with_onednn), **changes)


def test_where_layers_cannot_be_compiled_training_goes_on_without(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a default that needs a compiler, and a setting that is not obeyed."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler found")

    fused.compiled.cache_clear()
    monkeypatch.setattr(device, "cpu_kernels", with_kernels(compiles_layers=True))
    settings |= {"epochs": "1", "run_name": "plain"}
    assert call(train, *flags(settings | {"compile": "false"})).code == 0
    monkeypatch.setattr(torch, "compile", fail)
    outcome = call(train, *flags(settings | {"compile": "null", "run_name": "test"}))
    assert outcome.code == 0 and outcome.out.count("no compiler found") == 1
    assert "the layers are not compiled" in outcome.out
    ours, theirs = (
        (Path(settings["output_dir"]) / name / "last" / "model.safetensors").read_bytes()
        for name in ("test", "plain")
    )
    assert ours == theirs
    call(train, *flags(settings | {"compile": "true", "run_name": "third"})).assert_user_error(
        "torch.compile fails here", "no compiler found", "set compile false"
    )


def test_a_run_that_packs_ahead_is_the_same_run(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a step on another step's rows, and against packing each batch twice."""
    packed: list[int] = []

    def pack(rows: Any, *rest: Any) -> Any:
        packed.append(len(rows))
        return plainly(rows, *rest)

    plainly = packing.pack
    monkeypatch.setattr(packing, "pack", pack)
    for name, is_ahead in (("plain", False), ("ahead", True)):
        monkeypatch.setattr(device, "cpu_kernels", with_kernels(packs_ahead=is_ahead))
        packed.clear()
        assert call(train, *flags(settings | {"run_name": name})).code == 0
        assert len(packed) == STEPS + is_ahead  # and one that is thrown away
    ours, theirs = (
        (Path(settings["output_dir"]) / name / "last" / "model.safetensors").read_bytes()
        for name in ("ahead", "plain")
    )
    assert ours == theirs


# ---------------------------------------------------------------- what a run writes


def test_a_run_writes_what_the_interface_promises(call, settings: dict[str, str]) -> None:
    outcome = call(train, *flags(settings))
    assert outcome.code == 0, outcome.err
    folder = run_folder(settings)
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "best",
        "last",
        "previous",
    }
    config = make_config(settings)
    assert train.read_arguments(["--config", str(folder / "config.yaml")]) == (config, False, None)
    description = json.loads((folder / "best" / "training.json").read_text())
    assert description["settings"] == asdict(config)
    assert {
        "epoch",
        "step",
        "validation_loss",
        "validation_perplexity",
        "data",
        "versions",
    } <= description.keys()
    lines = metrics(settings)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    for line in lines:
        expected = {"step", "epoch", "time"}
        expected |= VALIDATION_NAMES if "val/loss" in line else TRAIN_NAMES
        assert line.keys() == expected
        assert line["epoch"] == pytest.approx(line["step"] / 7, abs=1e-6)
    assert lines[-1]["val/loss"] == min(line["val/loss"] for line in lines if "val/loss" in line)
    assert f"python evaluate.py --ckpt {folder / 'best'}" in outcome.out


def batches_of(config: Config) -> data.Batches:
    problems = data.load_for_training(config.dataset, config.validation_size, config.seed)
    tokenizer = load_tokenizer(Path(config.model))
    rows, _ = data.encode_for_training(tokenizer, problems, config.prompt, config.max_length)
    return data.Batches(rows, config.batch_size, config.seed)


TRAIN_NAMES = {
    "train/loss",
    "train/perplexity",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/memory_gib",
}
VALIDATION_NAMES = {
    "val/loss",
    "val/perplexity",
    "val/perplexity_reasoning",
    "val/perplexity_equations",
    "val/perplexity_final_answer",
}


def test_logged_loss_is_the_mean_over_all_tokens_since_the_last_line(
    settings: dict[str, str],
) -> None:
    """Guards against logging the last micro-batch's loss, or a mean of means."""
    each, fourth = (
        settings | {"run_name": "each"},
        settings | {"run_name": "fourth", "log_every": "4"},
    )
    train.main(make_config(each))
    train.main(make_config(fourth))
    config = make_config(each)
    batches = batches_of(config)
    count = [
        sum(label != packing.IGNORE for row in batches[step] for label in row.labels)
        for step in range(STEPS)
    ]
    losses = [line["train/loss"] for line in logged(each) if "train/loss" in line]
    found = [(line["step"], line["train/loss"]) for line in logged(fourth) if "train/loss" in line]
    assert [step for step, _ in found] == [4, 8, 12, 14]
    for (end, loss), start in zip(found, (0, 4, 8, 12), strict=True):
        nats = sum(losses[step] * count[step] for step in range(start, end))
        assert loss == pytest.approx(nats / sum(count[start:end]), rel=1e-12)


def test_validation_at_the_end_is_what_the_perplexity_script_says(
    call, settings: dict[str, str]
) -> None:
    """Guards against two losses, one that chooses the best checkpoint and one that is reported."""
    assert call(train, *flags(settings)).code == 0
    best = run_folder(settings) / "best"
    outcome = call(perplexity, "--ckpt", str(best), "--split", "validation")
    assert outcome.code == 0, outcome.err
    description = json.loads((best / "training.json").read_text())
    assert float(outcome.out.split()[-1]) == pytest.approx(
        description["validation_perplexity"], rel=1e-6
    )


def test_not_finite_stops_before_the_step(call, settings: dict[str, str]) -> None:
    """Guards against a NaN that is filtered, averaged away, or stepped on."""
    models: list[Any] = []
    calls = itertools.count(1)

    def step(model: Any, *rest: Any) -> train.StepResult:
        if next(calls) == 10:
            models.append(model)
            embedding = named(model, "embedding")
            embedding.register_forward_hook(lambda module, inputs, output: output * math.nan)
        return train.train_step(model, *rest)

    outcome = call(train, *flags(settings), step=step)
    assert outcome.code == 3
    assert outcome.err.startswith("stopped: step 10: loss nan") and outcome.err.count("\n") == 1
    assert training_json.read_description(run_folder(settings) / "last")["step"] == 7
    for tensor in (*weights(run_folder(settings) / "last").values(), *models[0].parameters()):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_names_the_rows_that_caused_it(
    call,
    settings: dict[str, str],
    problems: list[Problem],
    tmp_path: Path,
    where: str,
) -> None:
    """Two rows of the data have it in them, and only the one that is trained on counts."""
    marked = [Problem(f"{name} of 九九?", "#### 81") for name in ("七", "八")]
    data_folder = tmp_path / "data"
    shutil.copytree(settings["dataset"], data_folder)
    rows = [*problems[-43:-20], marked[0], *problems[-20:], marked[1]]
    write_rows(data_folder / "train.jsonl", rows)
    tokenizer = load_tokenizer(Path(settings["model"]))
    tokens = [data.encode(tokenizer, [problem], PROMPT)[0].input_ids[:-1] for problem in marked]

    def poison(model: Any) -> None:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: Any) -> Any:
            ids = inputs[0].flatten().tolist()
            if not any(ids[at : at + len(one)] == one for one in tokens for at in range(len(ids))):
                return output
            # The square root's gradient at zero is infinite, and times zero NaN.
            zero = (named(model, "head").weight.sum() * 0).sqrt()
            return output + zero + (torch.nan if where == "loss" else 0.0)

        named(model, "embedding").register_forward_hook(add)

    changed = settings | {"dataset": str(data_folder)}
    outcome = call(train, *flags(changed), step=with_model(poison))
    assert outcome.code == 3
    config = make_config(settings | {"dataset": str(data_folder)})
    batches = batches_of(config)
    step = next(s for s in range(99) if any(e.input_ids[:-1] in tokens for e in batches[s]))
    lines = [e.line for e in batches[step] if e.input_ids[:-1] in tokens]
    assert len(lines) == 1 and rows[lines[0] - 1] in marked
    assert outcome.err.startswith(
        f"stopped: step {step + 1}: loss {'nan' if where == 'loss' else ''}"
    )
    assert f"caused by 1 of its 4 rows of train, line {lines[0]};" in outcome.err
    last_line = metrics(settings)[-1]  # the NaN is in the log, whatever comes after
    assert last_line["step"] == step + 1 and math.isnan(last_line["train/grad_norm"])
    assert math.isnan(last_line["train/loss"]) == (where == "loss")
    assert outcome.err.count("\n") == 1
    for tensor in weights(run_folder(settings) / "last").values():
        assert tensor.isfinite().all()


def test_a_not_finite_validation_loss_is_no_best(call, settings: dict[str, str]) -> None:
    outcome = call(train, *flags(settings), measure=measuring(math.nan))
    assert (
        outcome.code == 3
        and "step 7: loss nan" in outcome.err
        and "the validation rows" in outcome.err
    )
    assert not (run_folder(settings) / "best").exists()


def test_training_learns(settings: dict[str, str]) -> None:
    """Guards against gradients that never reach the weights."""
    train.main(make_config(settings | {"epochs": "4", "learning_rate": "1e-2"}))
    losses = [line["train/loss"] for line in logged(settings) if "train/loss" in line]
    assert losses[-1] < losses[0] - 1


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.fsync
    calls = iter(range(10_000))

    def fsync(descriptor: int) -> None:
        if next(calls) > 30:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    outcome = call(train, *flags(settings))
    outcome.assert_user_error("No space left on device", "earlier ones are intact")
    assert checkpoint.newest_intact(run_folder(settings)) is not None
