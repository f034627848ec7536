"""The plan: what it counts, what it chooses, what it keeps when a run resumes, what it prints."""

import cProfile
import importlib
import json
import math
import os
import pstats
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import Killed, flags, kill, make_config, run_folder, seal
from transformers import LlamaConfig, LlamaForCausalLM

import plan
import train
from engine import memory
from engine.device import Kernels, cpu_kernels, cuda_kernels
from engine.footprint import footprint, products_of_shapes
from engine.optimizer import build_optimizer, make_state
from engine.packing import Example
from engine.plan import CLEARLY_FASTER, GIB, Device, Plan, Wishes, choose, saved_plan
from engine.recipe import Recipe, Recomputation, Rows, gradient_bytes, state_bytes, weight_bytes
from engine.roofline import Card, card_named, expected_step
from engine.shape import ModelShape
from run.errors import UserError
from run.manifest import BEST, LAST, PREVIOUS
from run.training_json import read_description

ROOT = Path(plan.__file__).parent
FULL, FREE = Recipe(), Wishes()
GPU, CPU = cuda_kernels(torch.device("cuda")), cpu_kernels(with_onednn=False)
ROWS = Rows(tokens=201.4, longest=577, supervised=0.648, batch_size=128)
LLAMA_2_7B = ModelShape(
    LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    torch.bfloat16,
)


# ---------------------------------------------------------------- counting


def test_the_size_of_a_model_in_words() -> None:
    small = {"vocab_size": 32000, "hidden_size": 256, "num_hidden_layers": 2}
    tiny = small | {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48}
    shapes = [ModelShape(LlamaConfig(**values), torch.float32) for values in (small, tiny)]
    sizes = [shape.size for shape in (LLAMA_2_7B, *shapes)]
    # 2 x 32000 x 256 and, in each of 2 layers, 4 x 256 x 256 + 3 x 256 x 11008, with 5 norms.
    assert sizes == ["6.74 billion parameters", "33.8 million parameters", "20,128 parameters"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        {"head_dim": 16, "num_hidden_layers": 3},
    ],
)
def test_weights_gradients_and_states_are_counted_to_the_byte(
    make_llama: Callable[..., LlamaForCausalLM], dtype: torch.dtype, settings: dict
) -> None:
    """Guards against a bias, a norm or a tied head that the formulas forget."""
    model = make_llama(50, **settings).to(dtype)
    shape, recipe = ModelShape(model.config, dtype), Recipe()
    weights = list(model.parameters())
    optimizer = build_optimizer(weights, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    make_state(optimizer)
    states = [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    assert weight_bytes(shape, recipe) == sum(weight.nbytes for weight in weights)
    assert gradient_bytes(shape, recipe) == sum(weight.nbytes for weight in weights)
    assert state_bytes(shape, recipe) == sum(tensor.nbytes for tensor in states)


def test_the_published_sizes_of_llama_2_7b() -> None:
    """Guards against formulas that hold for tiny models only, and against NF4 of the head."""
    assert LLAMA_2_7B.parameters == 6_738_415_616
    full, small = Recipe(), Recipe(optimizer="adamw_8bit")
    assert state_bytes(LLAMA_2_7B, full) == 6 * LLAMA_2_7B.parameters
    assert state_bytes(LLAMA_2_7B, small) == math.ceil(2.03125 * LLAMA_2_7B.parameters)
    lora, qlora = Recipe("lora", rank=64), Recipe("qlora", rank=64)
    adapters = 2 * 159_907_840  # as PEFT counts them, in bfloat16
    assert weight_bytes(LLAMA_2_7B, lora) == 2 * LLAMA_2_7B.parameters + adapters
    assert gradient_bytes(LLAMA_2_7B, lora) == adapters
    outside = 2 * LLAMA_2_7B.other_parameters + 2 * 2 * 4096 * 32
    nf4 = 32 * LLAMA_2_7B.block_products * 0.515869
    assert weight_bytes(LLAMA_2_7B, qlora) == pytest.approx(nf4 + outside + adapters, rel=1e-5)


def test_the_peak_that_was_counted_on_meta_tensors_of_llama_2_7b() -> None:
    """Guards against a formula that is right for tiny shapes only.

    A storage tracker over meta tensors counted 72.2 GiB for 3,072 tokens of GSM8K without, and
    65.96 GiB for 8,192 with full recomputation; all but 62.76 GiB depend on the micro-batch. With
    recomputation, the formula takes a block's backward pass for a little more than it needs.
    """
    cases = (3072, 0, 72.2, 0.01), (4032, 0, 74.9, 0.01), (8192, 32, 65.96, 0.05)
    for tokens, blocks, counted, error in cases:
        job = LLAMA_2_7B, Recipe(), GPU, ROWS, tokens, Recomputation(blocks, True)
        found = footprint(*job)
        whole = (found.weights + found.gradients + found.states) / GIB
        assert whole == 10 * LLAMA_2_7B.parameters / GIB
        assert found.total / GIB - whole == pytest.approx(counted - whole, rel=error)


def test_devices_share_weights_gradients_and_states() -> None:
    """Guards against sharing activations, and against gathered weights that are not counted."""
    alone, shared = (
        footprint(LLAMA_2_7B, Recipe(devices=n), GPU, ROWS, 2048, Recomputation(0, True))
        for n in (1, 8)
    )
    for part in ("weights", "gradients", "states"):
        assert getattr(shared, part) == pytest.approx(getattr(alone, part) / 8, abs=1)
    assert (shared.activations, shared.head) == (alone.activations, alone.head)
    assert alone.gathered == 0
    block, outside = LLAMA_2_7B.block_parameters, LLAMA_2_7B.other_parameters
    at_once = block * (2 * 2 + 2 + 4) + outside * (2 + 4)
    whole = 4 * LLAMA_2_7B.parameters  # until the end of a step of several micro-batches
    assert shared.gathered == at_once + whole
    each = Recipe(devices=8, reduces_each=True), GPU, ROWS, 2048, Recomputation(0, True)
    assert footprint(LLAMA_2_7B, *each).gathered == at_once
    one = Recipe(devices=8), GPU, ROWS, 4096, Recomputation(0, True)
    assert footprint(LLAMA_2_7B, *one).gathered == at_once
    sums = 4 * LLAMA_2_7B.parameters // 4  # of a group of 4, until those of the other are added
    copies = Recipe(devices=8, shard_over=4, reduces_each=True), *each[1:]
    assert footprint(LLAMA_2_7B, *copies).gathered == at_once + sums
    kept = Recipe(devices=8, reshards=False), GPU, ROWS, 4096, Recomputation(0, True)
    assert footprint(LLAMA_2_7B, *kept).gathered == at_once + 30 * block * 2


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)
def test_the_kernels_that_onednn_keeps_are_counted(capfd: pytest.CaptureFixture) -> None:
    """Guards against a heap that grows with every row of another length, and is not planned."""
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        for length in (201, 203, 201):
            states = torch.zeros(3, 1, 2, length, 64, dtype=torch.bfloat16, requires_grad=True)
            attended = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True)
            attended.sum().backward()
    lines = capfd.readouterr().out.splitlines()
    made = [line for line in lines if "create:cache_miss" in line and ",matmul," in line]
    one, three = (
        products_of_shapes(LLAMA_2_7B, FULL, replace(ROWS, lengths=lengths), 4)
        for lengths in (1, 3)
    )
    assert len(made) == three - one == 12


def test_only_a_cpu_has_a_heap() -> None:
    """Guards against plans for a GPU that an allocator of the host changes; and the heap's term in
    bfloat16 grows with the lengths of rows, until oneDNN forgets the oldest kernels."""
    cases = [(kernels, replace(ROWS, lengths=n)) for kernels in (GPU, CPU) for n in (1, 171, 9999)]
    heaps = [
        footprint(LLAMA_2_7B, FULL, kernels, rows, 4096, Recomputation(0, True)).heap
        for kernels, rows in cases
    ]
    assert heaps[:3] == [0, 0, 0] and 0 < heaps[3] < heaps[4] == heaps[5]


# ---------------------------------------------------------------- choosing


def choices(kernels: Kernels, recipe: Recipe = FULL, wishes: Wishes = FREE) -> list[Plan]:
    """The plan for memory from 1 to 140 GiB, in smaller steps where most plans change."""
    sizes = [*range(4, 62, 8), *(size / 2 for size in range(2 * 62, 2 * 90)), *range(90, 141, 8)]
    devices = [Device("", int(size * GIB), recipe.devices) for size in sizes]
    return [choose(LLAMA_2_7B, recipe, kernels, ROWS, device, wishes) for device in devices]


@pytest.mark.parametrize("kernels", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("wishes", [Wishes(), Wishes(4096)], ids=["free", "4096"])
def test_more_memory_never_recomputes_more(kernels, method: str, wishes: Wishes) -> None:
    """And whatever fits is chosen: guards against an order that skips a fitting choice."""
    found = choices(kernels, Recipe(method, rank=64), wishes)
    work = [(one.recomputed_blocks, one.recomputes_parts) for one in found]
    assert work == sorted(work, reverse=True)
    assert {32, 0} <= {blocks for blocks, _ in work}
    assert work[-1] == (0, kernels is CPU)
    for less, more in pairwise(found):
        if less.recomputation == more.recomputation:
            assert less.micro_batch_tokens <= more.micro_batch_tokens
    if wishes.micro_batch_tokens:
        assert {one.micro_batch_tokens for one in found} == {4096}


def test_what_fits_is_chosen_and_nothing_else() -> None:
    """Guards against a plan that needs more than is free, and against an order that skips one."""
    for size in (67, 70, 72, 76, 90):
        device = Device("", size * GIB)
        chosen = choose(LLAMA_2_7B, Recipe(), GPU, ROWS, device, Wishes())
        assert chosen.needed <= 0.97 * device.free
        less = Recomputation(chosen.recomputed_blocks - 1, True)
        if chosen.recomputed_blocks:
            tokens = 2048
        else:
            less, tokens = (
                Recomputation(0, chosen.recomputes_parts),
                chosen.micro_batch_tokens + (256 if chosen.micro_batch_tokens < 8192 else 1024),
            )
        better = footprint(LLAMA_2_7B, Recipe(), GPU, ROWS, tokens, less).total
        assert better > 0.97 * device.free or tokens > 16384


def test_levels_come_in_the_order_of_what_they_cost() -> None:
    """Few layers before many, whole layers only below the micro-batch that keeps a GPU busy."""
    found = choices(GPU)
    for one in found:
        assert one.micro_batch_tokens >= 2048 or one.recomputed_blocks == 32
    kept = [one for one in found if not one.recomputes_parts]
    assert max(one.micro_batch_tokens for one in kept) == 16384
    assert all(8192 <= one.micro_batch_tokens <= 16384 for one in kept)
    assert (found[0].micro_batch_tokens, found[0].recomputed_blocks) == (768, 32)


@pytest.mark.parametrize(("wish", "blocks"), [(True, 32), (False, 0)])
def test_a_wish_is_kept(wish: bool, blocks: int) -> None:
    found = choices(GPU, wishes=Wishes(None, wish, False))
    assert {one.recomputed_blocks for one in found} == {blocks}
    assert {one.compiles for one in found} == {False}
    assert len({one.micro_batch_tokens for one in found}) > 3


def test_a_cpu_with_enough_memory_has_the_micro_batches_it_always_had() -> None:
    """Guards against slower training, and other bits, on a CPU."""
    chosen = choose(LLAMA_2_7B, Recipe(), CPU, ROWS, Device("cpu", 10**13), Wishes())
    assert (chosen.micro_batch_tokens, chosen.recomputation) == (8192, Recomputation(0, True))


def test_a_saved_plan_is_only_for_its_device_and_wishes() -> None:
    device, recipe, wishes = Device("NVIDIA H100", 80 * GIB, 2), Recipe(devices=2), Wishes()
    made = choose(LLAMA_2_7B, recipe, GPU, ROWS, device, wishes)
    record = json.loads(json.dumps(asdict(made)))
    assert saved_plan(record, recipe, replace(device, free=GIB), wishes) == made
    assert saved_plan(record, recipe, replace(device, name="NVIDIA H200"), wishes) is None
    for change in ({"devices": 3}, {"shard_over": 1}, {"reshards": False}):
        assert saved_plan(record, replace(recipe, **change), device, wishes) is None
    for change in ({"compile": True}, {"reduces_each": True}, {"reduces_each": False}):
        assert saved_plan(record, recipe, device, Wishes(**change)) is None
    assert saved_plan(None, recipe, device, wishes) is None
    assert saved_plan({"other": 1}, recipe, device, wishes) is None


@pytest.mark.parametrize(("method", "is_kept"), [("full", True), ("lora", False)])
def test_a_saved_plan_does_not_depend_on_adapters_that_there_are_not(
    method: str, is_kept: bool
) -> None:
    """Guards against a full run whose bits change on resuming with another lora_rank."""
    device, recipe = Device("NVIDIA H100", 80 * GIB), Recipe(method, rank=64)
    made = choose(LLAMA_2_7B, recipe, GPU, ROWS, device, Wishes())
    record = json.loads(json.dumps(asdict(made)))
    assert (saved_plan(record, recipe, device, Wishes())) == made
    for change in ({"rank": 8}, {"has_dropout": True}):
        found = saved_plan(record, replace(recipe, **change), device, Wishes())
        assert found == (made if is_kept else None)


@pytest.mark.parametrize("before", [False, True])
def test_a_plan_from_before_there_was_a_choice_of_when_to_sum_is_kept(before: bool) -> None:
    """Its setting still stands, or nothing is asked for any more: guards against other bits."""
    device, recipe = Device("NVIDIA H100", 80 * GIB, 2), Recipe(devices=2)
    made = choose(LLAMA_2_7B, recipe, GPU, ROWS, device, Wishes(reduces_each=before))
    record = json.loads(json.dumps(asdict(made)))
    del record["wishes"]["reduces_each"]
    for wish, is_kept in ((None, True), (before, True), (not before, False)):
        found = saved_plan(record, recipe, device, Wishes(reduces_each=wish))
        assert (found and found.reduces_each) == (before if is_kept else None)


def test_gradients_are_summed_when_it_is_fastest_of_what_fits() -> None:
    """Guards against whole gradients that others pay for with recomputation, and against sums after
    each micro-batch that nobody needs."""
    found = []
    for card, count in product((card_named("4090"), card_named("H100")), (2, 8, 32)):
        for size in (12, 16, 24, 32, 40, 48, 60, 80):
            device, recipe = Device("", size * GIB, count, card), Recipe(devices=count)
            free, once, each = (
                choose(LLAMA_2_7B, recipe, GPU, ROWS, device, Wishes(reduces_each=wish))
                for wish in (None, False, True)
            )
            assert (once.reduces_each, each.reduces_each) == (False, True)
            assert replace(free, wishes={}) in (replace(one, wishes={}) for one in (once, each))
            fitting = [one for one in (once, each) if one.needed <= device.room]
            if fitting:
                assert free.needed <= device.room
                fastest = min(map(partial(seconds, card), fitting))
                assert seconds(card, free) <= fastest / CLEARLY_FASTER
            if len(fitting) == 2:
                is_slower = seconds(card, each) >= seconds(card, once)
                assert not (free.reduces_each and is_slower)
                found.append(free.reduces_each)
    assert {*found} == {False, True}


def seconds(card: Card, one: Plan) -> float:
    recipe, tokens = Recipe(**one.recipe), one.micro_batch_tokens
    step = LLAMA_2_7B, recipe, ROWS, card, tokens, one.recomputation, one.compiles
    return expected_step(*step).seconds


# ---------------------------------------------------------------- in a run


def null(settings: dict[str, str]) -> list[str]:
    free = {"micro_batch_tokens": "null", "gradient_checkpointing": "null"}
    return flags(settings | free)


def test_a_plan_is_saved_and_kept_on_resuming(call, settings: dict[str, str], monkeypatch) -> None:
    """And made anew, which is said, on another kind of device."""
    found: list[tuple[int, int]] = []

    def note(model, optimizer, batch, rate, budget, *rest):
        found.append((budget, model.recomputed_blocks))
        return train.train_step(model, optimizer, batch, rate, budget, *rest)

    # Enough for one row at a time, with all layers recomputed.
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**6)
    settings["checkpoint_steps"] = "2"
    with pytest.raises(Killed):
        call(train, *null(settings), step=lambda *each: kill() if len(found) > 2 else note(*each))
    record = read_description(run_folder(settings) / LAST)["plan"]
    assert set(found) == {(256, 2)}
    assert (record["micro_batch_tokens"], record["recomputed_blocks"]) == (256, 2)
    assert record["device"] == "cpu" and record["wishes"]["micro_batch_tokens"] is None

    found.clear()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    with pytest.raises(Killed):
        call(train, *null(settings), step=lambda *each: kill() if len(found) > 2 else note(*each))
    assert set(found) == {(256, 2)}

    found.clear()
    monkeypatch.setattr(memory, "kind", lambda device: "another")
    outcome = call(train, *null(settings), step=note)
    assert outcome.code == 0 and set(found) == {(8192, 0)}
    assert "plan: micro_batch_tokens 8192, no layer is recomputed" in outcome.out
    assert ", made anew" in outcome.out
    assert read_description(run_folder(settings) / BEST)["plan"]["device"] == "another"


def test_a_run_of_an_older_version_resumes(call, settings: dict[str, str], stopped: Path) -> None:
    """Its training.json has no plan."""
    for name in (LAST, PREVIOUS):
        description = read_description(stopped / name)
        del description["plan"]
        (stopped / name / "training.json").write_text(json.dumps(description))
        seal(stopped / name)
    outcome = call(train, *null(settings))
    assert outcome.code == 0 and "plan: micro_batch_tokens 8192" in outcome.out


def test_what_can_not_be_trained_is_refused_before_anything_is_loaded(
    call, settings: dict[str, str], monkeypatch, tmp_path: Path
) -> None:
    """With nothing but config.json there, and the numbers that the plan shows."""
    folder = tmp_path / "model"
    LLAMA_2_7B.config.save_pretrained(folder)
    monkeypatch.setattr(memory, "total_bytes", lambda device: 40 * GIB)
    outcome = call(train, *flags(settings | {"model": str(folder), "dtype": "bfloat16"}))
    outcome.assert_user_error(
        "takes", "weights 12.6, gradients 12.6, optimizer states 37.7", "40.0"
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--devices", "8"], "--devices belongs to --plan: add --plan"),
        (["--device_memory", "24"], "--device_memory belongs to --plan: add --plan"),
        (["--plan", "--selftest"], "exclude each other"),
        (["--plan", "--devices", "0"], "'0' must be a positive integer"),
        (["--plan", "--device_memory", "nan"], "'nan' must be a positive, finite number"),
    ],
)
def test_flags_that_make_no_sense(call, words: list[str], error: str) -> None:
    call(train, *words).assert_user_error(error)


# ---------------------------------------------------------------- train.py --plan


@pytest.fixture
def printed(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """What ``--plan`` prints of Llama-2-7B, of which nothing but config.json is downloaded."""
    LLAMA_2_7B.config.save_pretrained(tmp_path)

    def download(name: str, allow_patterns: list[str]) -> str:
        assert allow_patterns == ["config.json"]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    def run(*words: str) -> str:
        outcome = call(train, "--plan", "--model", "meta-llama/Llama-2-7b-hf", *words)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--shard_over", "3", "--devices", "4"], "shard_over 3: must divide the 4 processes"),
        (["--method", "qlora", "--devices", "2"], "method qlora: does not spread over 2 devices"),
        (["--optimizer", "adamw_8bit", "--devices", "2"], "use one, or set optimizer adamw"),
    ],
)
def test_what_can_not_be_spread_is_refused(call, tmp_path: Path, words: list, error: str) -> None:
    LLAMA_2_7B.config.save_pretrained(tmp_path)
    flags = ["--plan", "--model", str(tmp_path), "--device_memory", "80", *words]
    call(train, *flags).assert_user_error(error)


def test_the_plan_of_a_card_that_is_not_here(printed) -> None:
    """The parts add up to the total, which is the plan's and fits."""
    text = printed("--device_memory", "80")
    training = text.partition("\ntraining")[2].partition("\ndecoding")[0]
    *parts, total, lost = map(float, re.findall(r" (\d+\.\d\d)$", training, re.MULTILINE))
    # Each of 6 numbers is rounded to 0.01.
    assert sum(parts) == pytest.approx(total, abs=0.03) and 70 < total + lost < 78.1
    assert f"{total:.2f} GiB of the 7" in text.partition("\nplan: ")[2]
    assert "plan: micro_batch_tokens" in text and "301 slots" in text
    assert "of the peak of H100" in text


def test_what_does_not_fit_is_said_and_what_does_is_ranked(printed) -> None:
    text = printed("--device_memory", "24")
    assert "does not fit: " in text
    lines = text.partition("settings that fit")[2].splitlines()[1:]
    speeds = [int(re.match(r" *([\d,]+)  ", line)[1].replace(",", "")) for line in lines]
    assert speeds == sorted(speeds, reverse=True) and speeds
    free = float(re.search(r"([\d.]+) GiB free", text)[1])
    assert all(float(re.search(r"([\d.]+) GiB\)", line)[1]) <= 0.97 * free for line in lines)
    assert any("torchrun --nproc_per_node 8" in line for line in lines)


def test_the_plan_of_this_device(printed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against speeds of a processor of which nothing is known."""
    for free, line in ((10**9, "does not fit: "), (10**12, "plan: micro_batch_tokens 8192, ")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        text = printed()
        assert text.startswith(f"device: cpu, cpu, {free / GIB:.2f} GiB free\n") and line in text
        assert "tokens a second" not in text


def test_more_devices(printed) -> None:
    """A share of memory each, bytes that travel, and from where on more no longer pay."""
    text = printed("--device_memory", "80", "--devices", "32")
    table = text.partition("devices  GiB each")[2].splitlines()[1:7]
    rows = [[float(word.strip("%").replace(",", "")) for word in line.split()] for line in table]
    assert [row[0] for row in rows] == [1, 2, 4, 8, 16, 32]
    assert rows[0][4] == 0 and all(row[4] > 10 for row in rows[1:])
    assert all(one[1] > other[1] for one, other in pairwise(rows[:4]))  # GiB each
    assert rows[1][6] > rows[-1][6]  # share of the peak
    paying = max(row[0] for row in rows[1:] if row[-1] >= 1.5)  # gain over half as many
    assert 4 <= paying < 32 and f"more than {paying:.0f} devices no longer pay" in text


def test_six_devices_instead_of_four_pay_with_less_than_a_doubling(printed) -> None:
    """Guards against 98 % of what is possible that is said not to pay, since it is not 1.5."""
    text = printed("--device_memory", "80", "--devices", "6")
    *_, gain = text.splitlines()[-1].split()
    assert 1.45 < float(gain) < 1.5


# What train.py does with each of several command lines: exit code, standard output, standard error,
# and what it has loaded by then that only training needs.
TRAIN_EACH = """
import contextlib, io, json, runpy, sys
sys.path.insert(0, ".")
needless = {"data", "engine.loading", "transformers.modeling_utils", "scipy"}
for before, *words in json.loads(sys.argv[1]):
    exec(before)
    sys.argv, code = ["train.py", *words], 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                runpy.run_path("train.py", run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
    loaded = sorted(needless & set(sys.modules))
    print(json.dumps([code, out.getvalue(), err.getvalue(), loaded]))
"""


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """A folder, and how two commands ended: one that only plans, and one that can't train in it."""
    folder = tmp_path_factory.mktemp("early")
    LLAMA_2_7B.config.save_pretrained(folder / "model")
    model = ["--model", str(folder / "model")]
    places = ["--dataset", str(folder / "none"), "--output_dir", str(folder / "runs")]
    small = "from engine import memory\nmemory.total_bytes = lambda device: 16 * 2**30"
    commands = ["", "--plan", *model, "--device_memory", "80"], [small, *model, *places]
    command = [sys.executable, "-c", TRAIN_EACH, json.dumps(commands)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return folder, [json.loads(line) for line in result.stdout.splitlines()]


def test_the_plan_waits_for_nothing_that_only_training_needs(
    early: tuple[Path, list[list[Any]]],
) -> None:
    """Guards against the seconds that its imports take, such as those of Llama's layers."""
    _, [(code, output, errors, loaded), _] = early
    assert (code, errors, loaded) == (0, "", []) and "plan: micro_batch_tokens 4352" in output


def test_a_new_run_that_cannot_train_is_refused_as_early(
    early: tuple[Path, list[list[Any]]],
) -> None:
    """Guards against the same seconds, and against the folder of a run that never was."""
    folder, [_, (code, _, errors, loaded)] = early
    assert (code, loaded) == (2, []), errors
    assert "takes 64.0 GiB" in errors and "over the 16.0 GiB" in errors and errors.count("\n") == 1
    assert not (folder / "runs").exists()


def test_a_run_that_is_there_is_not_held_against_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a run that can't go on since its base, which it needs no more, has moved."""
    monkeypatch.setattr(memory, "total_bytes", lambda device: 16 * GIB)
    settings = {"model": str(tmp_path / "gone"), "output_dir": str(tmp_path), "run_name": "run"}
    config = make_config(settings)
    with pytest.raises(UserError, match="gone"):
        plan.look_early(config, None)
    with monkeypatch.context() as several:  # whose faults differ, and only one would be heard
        several.setenv("WORLD_SIZE", "2")
        assert not plan.look_early(config, None)
    (tmp_path / "run").mkdir()
    assert not plan.look_early(config, None)


def test_the_plan_counts_nothing_twice(printed) -> None:
    """Guards against shapes that are worked out anew for each of thousands of footprints.

    Of a card on which hardly anything fits, so that most has to be tried.
    """
    printed("--device_memory", "16")  # which may import
    with cProfile.Profile() as profile:
        printed("--device_memory", "16")
    assert pstats.Stats(profile).total_calls < 1_000_000


# ---------------------------------------------------------------- documents


def test_the_table_of_the_readme_is_what_the_plan_finds(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    what_fits = importlib.import_module("what_fits")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n" + "\n".join(what_fits.table()) + "\n" in readme


def test_the_slurm_script_is_bash_and_starts_train(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: guards against missing quotes and unset variables, a
    save that torchrun cuts off before Slurm does, and processes that get a single core."""
    script = ROOT / "docs" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    for name, body in {
        "scontrol": "echo node7; echo node8",
        "srun": 'printf "%s\\n" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SUBMIT_DIR": str(tmp_path), "JOB_NODELIST": "node[7-8]", "JOB_ID": "20042"}
    variables |= {"NNODES": "2", "GPUS_ON_NODE": "8", "CPUS_PER_TASK": "64"}
    environment = {f"SLURM_{name}": value for name, value in variables.items()}
    ran = subprocess.run(
        ["bash", script, "--run_name", "two nodes"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr == ""
    seconds, *words = ran.stdout.splitlines()
    before_the_limit = int(re.search("--signal=TERM@([0-9]+)", script.read_text())[1])
    assert 200 < int(seconds or 0) < before_the_limit
    assert words[:2] == ["--cpus-per-task", "64"]
    assert words[2:7] == [".venv/bin/torchrun", "--nnodes", "2", "--nproc_per_node", "8"]
    assert words[words.index("--rdzv_endpoint") + 1] == "node7:20042"
    assert words[-5:] == ["train.py", "--shard_over", "8", "--run_name", "two nodes"]


def test_ranks_with_other_cards_make_the_plan_of_rank_0(
    settings: dict[str, str], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against ranks that disagree on when gradients are summed, and wait for each other."""
    config = make_config(settings)
    ranks = SimpleNamespace(size=2, gather=lambda one: [one, 10**8], broadcast=lambda _: "first")
    monkeypatch.setattr(memory, "kind", lambda device: "second")
    rows = [Example([1, 2, 3], [-100, 2, 3])]
    planned = plan.plan_run(config, model_folder, rows, None, ranks)
    assert planned.device == "first"
