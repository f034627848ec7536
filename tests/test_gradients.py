"""Accumulation and packing change no gradient, in float64 at 1e-10."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from engine import fused, packing
from engine.compiling import compile_layers
from engine.device import cpu_kernels, kernels_for
from engine.llama import Llama
from engine.loading import load_model
from engine.loss import LinearCrossEntropy
from engine.masking import Masking
from engine.optimizer import build_optimizer
from engine.tokenizer import Tokenizer
from grading import dataset
from run.errors import UserError

CPU = torch.device("cpu")
KERNELS = kernels_for(CPU)
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def examples(tokenizer: Tokenizer, problems: list[dataset.Problem]) -> list[packing.Example]:
    ragged = [*problems[:20], *problems[-9:]]
    return data.encode(tokenizer, ragged, PROMPT)


def padded_loss(model: Llama, examples: Sequence[packing.Example]) -> torch.Tensor:
    """The textbook big batch: Transformers' own attention, padding, mask, and its own mean loss."""
    reference = copy.deepcopy(model.pretrained)
    reference.set_attn_implementation("sdpa")
    longest = max(len(example.input_ids) for example in examples)

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    mask = pad([[1] * len(example.input_ids) for example in examples], 0)
    labels = pad([example.labels for example in examples], packing.IGNORE)
    logits = reference(
        input_ids=pad([e.input_ids for e in examples], 0), attention_mask=mask, use_cache=False
    ).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    model.zero_grad()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        ours.grad = theirs.grad
    return loss.detach()


def step(model: Llama) -> None:
    optimizer = build_optimizer(
        model.parameters(), learning_rate=1e-2, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1
    )
    optimizer.step()


def gradients(model: Llama) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def mean_of_means(model: Llama, micro_batches: list[packing.MicroBatch], *_: object) -> None:
    """The fault of other projects: each micro-batch counts the same, however few its labels."""
    for micro_batch in micro_batches:
        (model(micro_batch) / micro_batch.num_labels / len(micro_batches)).backward()


@pytest.mark.parametrize(
    "rows", [29, 16, 5], ids=["full window", "partial window", "small last window"]
)
@pytest.mark.parametrize("budget", [96, 200, 333, 10_000])
def test_accumulated_gradients_and_weights_equal_one_big_batch(
    model64: Llama, examples: list[packing.Example], budget: int, rows: int
) -> None:
    """Guards against micro-batches weighed by anything but their supervised tokens."""
    window = examples[:rows]
    budget = max(budget, max(len(example.input_ids) for example in window))
    big, ours = copy.deepcopy(model64), copy.deepcopy(model64)
    expected_loss = padded_loss(big, window)
    nats, num_labels, grad_norm = train.accumulate_gradients(
        ours, packing.pack(window, budget, KERNELS), None
    )
    torch.testing.assert_close(nats / num_labels, expected_loss.item(), **EXACT)
    torch.testing.assert_close(gradients(ours), gradients(big), **EXACT)
    torch.testing.assert_close(
        grad_norm,
        math.sqrt(sum(gradient.square().sum().item() for gradient in gradients(big))),
        **EXACT,
    )
    step(big)
    step(ours)
    torch.testing.assert_close(list(ours.parameters()), list(big.parameters()), **EXACT)


def slowly_masked(row: packing.Example, rate: float, epoch: int) -> packing.Example:
    """Number by number, by the words of engine/masking.py; by any of the 420 tokens."""
    first = row.labels.count(packing.IGNORE)
    key = json.dumps(["mask", 5, epoch, row.line]).encode()
    ids = row.input_ids.copy()
    for number in range(len(ids) - 1 - first):
        drawn = hashlib.shake_128(key).digest(8 * number + 8)[-8:]
        if int.from_bytes(drawn[:4], "little") / 2**32 < rate:
            ids[first + number] = int.from_bytes(drawn[4:], "little") * 420 // 2**32
    return packing.Example(ids, row.labels)


@pytest.mark.parametrize("budget", [96, 333, 10_000])
def test_masked_gradients_equal_those_of_rows_masked_one_by_one(
    model64: Llama, examples: list[packing.Example], budget: int
) -> None:
    """Guards against masks that depend on the packing, and labels that are masked too."""
    rows = [replace(example, line=line) for line, example in enumerate(examples, start=1)]
    batches = data.Batches(rows, 16, 5, Masking(0.4, 1.0, range(420)))
    for step_number, (epoch, rate) in enumerate([(0, 0.0), (0, 0.2), (1, 0.4)]):
        numbers = data.stable_permutation(len(rows), 5, epoch)
        window = [rows[number] for number in numbers[16 * (step_number % 2) :][:16]]
        big, ours = copy.deepcopy(model64), copy.deepcopy(model64)
        expected_loss = padded_loss(big, [slowly_masked(row, rate, epoch) for row in window])
        limit = max(budget, max(len(row.input_ids) for row in window))
        micro_batches = packing.pack(batches[step_number], limit, KERNELS)
        nats, num_labels, _ = train.accumulate_gradients(ours, micro_batches, None)
        torch.testing.assert_close(nats / num_labels, expected_loss.item(), **EXACT)
        torch.testing.assert_close(gradients(ours), gradients(big), **EXACT)


@pytest.mark.parametrize("masking", [None, Masking(0.0, 0, range(420))])
def test_a_mask_rate_of_zero_changes_no_bit(
    model64: Llama, examples: list[packing.Example], masking: Masking | None
) -> None:
    """Guards against one token that is replaced after all, and rows in another order."""
    numbers = data.stable_permutation(len(examples), 0, 0)
    plain = [examples[number] for number in numbers[:16]]
    found = []
    for batch in (plain, data.Batches(examples, 16, 0, masking)[0]):
        model64.zero_grad()
        train.accumulate_gradients(model64, packing.pack(batch, 333, KERNELS), None)
        found.append(gradients(model64))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_mean_of_micro_batch_means_fails_the_same_comparison(
    model64: Llama, examples: list[packing.Example]
) -> None:
    """The negative control: if this passed, the test above could not see its fault."""
    big, ours = copy.deepcopy(model64), copy.deepcopy(model64)
    padded_loss(big, examples)
    window = packing.pack(examples, 333, KERNELS)
    assert len({batch.num_labels for batch in window}) > 1
    mean_of_means(ours, window)
    with pytest.raises(AssertionError, match="are not close"):
        torch.testing.assert_close(gradients(ours), gradients(big), rtol=0, atol=1e-6)
    step(big)
    step(ours)
    with pytest.raises(AssertionError, match="are not close"):
        torch.testing.assert_close(
            list(ours.parameters()), list(big.parameters()), rtol=0, atol=1e-6
        )


def test_packed_loss_and_gradients_equal_those_of_each_sequence_alone(
    model64: Llama, examples: list[packing.Example]
) -> None:
    """Guards against attention, positions or labels that reach across a boundary."""
    packed, alone = copy.deepcopy(model64), copy.deepcopy(model64)
    loss = packed(packing.collate(examples[:9], KERNELS))
    loss.backward()
    losses = [alone(packing.collate([example], KERNELS)) for example in examples[:9]]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(loss, torch.stack(losses).sum(), **EXACT)
    torch.testing.assert_close(gradients(packed), gradients(alone), **EXACT)


def test_each_packed_sequence_has_the_loss_transformers_gives_it_alone(
    model64: Llama,
    examples: list[packing.Example],
) -> None:
    """The same against a model that has nothing of ours in it, sequence by sequence."""
    reference = copy.deepcopy(model64.pretrained)
    reference.set_attn_implementation("sdpa")
    for example in examples[:9]:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        theirs = reference(input_ids=ids, labels=labels, use_cache=False).loss * sum(
            label != packing.IGNORE for label in example.labels
        )
        ours = model64(packing.collate([example], KERNELS))
        # Transformers takes its own loss in float32.
        torch.testing.assert_close(ours.item(), theirs.item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("elements", [1, 420 * 130, 2**30])
def test_chunks_of_the_head_change_nothing(
    model64: Llama,
    examples: list[packing.Example],
    elements: int,
) -> None:
    """Guards against a chunk that is left out, counted twice, or not differentiated."""
    whole, chunked = copy.deepcopy(model64), copy.deepcopy(model64)
    batch = packing.collate(examples[:5], KERNELS)
    assert batch.num_labels > 128  # several chunks, the last one part padding
    expected = whole(batch)
    expected.backward()
    chunked.kernels = replace(chunked.kernels, logits_at_once=elements)
    loss = chunked(batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradients(chunked), gradients(whole), **EXACT)


def test_gradient_checkpointing_changes_nothing(
    model64: Llama, examples: list[packing.Example]
) -> None:
    """Guards against keyword arguments (the borders) that do not reach the recomputation."""
    plain, checkpointed = copy.deepcopy(model64).train(), copy.deepcopy(model64).train()
    checkpointed.recomputed_blocks = len(checkpointed.blocks)
    for each in (plain, checkpointed):
        each(packing.collate(examples[:7], KERNELS)).backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain), **EXACT)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and nothing left for the next test."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    fused.compiled.cache_clear()
    yield
    torch.compiler.reset()
    fused.compiled.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "recomputed", "fast"), [(torch.float64, 1, False), (torch.float32, 0, True)]
)
def test_compiled_layers_give_the_gradients_of_float64_and_are_compiled_once(
    model64: Llama,
    examples: list[packing.Example],
    dtype: torch.dtype,
    recomputed: int,
    fast: bool,
    fresh_compiler: None,
    model_folder: Path,
) -> None:
    """Guards against wrong kernels, and compiling again for each layer or number of tokens."""
    compiled = load_model(model_folder, dtype, CPU, cpu_kernels(with_onednn=fast))
    compiled.recomputed_blocks = recomputed
    compile_layers(compiled)
    assert all(parameter.grad is None for parameter in compiled.parameters())
    train.accumulate_gradients(model64.train(), packing.pack(examples, 333, KERNELS), None)
    formulas = 9  # with their backward passes; each for one number of tokens, and for any
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * formulas
    with torch.compiler.set_stance("fail_on_recompile"):
        for budget in (96, 150, 1000):
            train.accumulate_gradients(compiled, packing.pack(examples[:9], budget, KERNELS), None)
        compiled.zero_grad()
        train.accumulate_gradients(compiled, packing.pack(examples, 333, KERNELS), None)
    if dtype == torch.float64:
        torch.testing.assert_close(gradients(compiled), gradients(model64), **EXACT)
    assert relative_error(gradients(compiled), gradients(model64)) < 1e-6


def test_compiled_layers_in_bfloat16_are_as_exact_as_others_however_many_are_recomputed(
    model64: Llama,
    examples: list[packing.Example],
    fresh_compiler: None,
    model_folder: Path,
) -> None:
    """Guards against a tensor made again with other roundings than in the forward pass."""
    half = load_model(model_folder, torch.bfloat16, CPU).train()
    with torch.no_grad():
        for rounded, exact in zip(half.parameters(), model64.parameters(), strict=True):
            exact.copy_(rounded)
    window = packing.pack(examples, 333, KERNELS)
    for model in (model64.train(), half):
        train.accumulate_gradients(model, window, None)
    usual = relative_error(gradients(half), gradients(model64))
    compile_layers(half)
    found = []
    for number in range(3):
        half.recomputed_blocks = number
        half.zero_grad()
        train.accumulate_gradients(half, window, None)
        found.append(gradients(half))
    assert relative_error(found[0], gradients(model64)) < 1.05 * usual
    assert all(
        torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True)
    )


def test_compiled_kernels_are_chosen_without_a_measurement(monkeypatch, fresh_compiler) -> None:
    """Guards against a resumed run that sums in another order, since another kernel was faster."""
    options: list[dict[str, bool]] = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **given: options.append(given["options"])
    )
    fused.compiled(fused.rms_norm)
    assert options[0]["deterministic"] and not options[0]["triton.mix_order_reduction"]
    assert options[0].keys() <= torch._inductor.config.get_config_copy().keys()


@pytest.mark.parametrize("shape", [{"hidden_size": 64}, {"hidden_size": 128, "head_dim": 128}])
def test_no_layer_or_shape_is_compiled_later(
    make_llama: Callable[..., Any], monkeypatch, fresh_compiler: None, shape: dict[str, int]
) -> None:
    """Guards against a number of tokens that is fixed, since a weight happened to be of that size.

    64 is also the least number of tokens that a CPU computes. Without code, which takes longer.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = Llama(make_llama(420, num_hidden_layers=4, **shape), cpu_kernels(with_onednn=False))
    compile_layers(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (9, 70, 139, 300):
            row = packing.Example([7] * length, [7] * length)
            model(packing.collate([row], model.kernels)).backward()


def test_a_gpus_kernels_are_compiled_for_many_tokens(
    make_llama: Callable[..., Any], monkeypatch, fresh_compiler: None
) -> None:
    """Guards against sums that a few programs walk through, since they were compiled for a few.

    An operation is compiled for the first number of tokens, and at the second one for any number.
    """
    sizes: dict[str, list[int]] = {}

    def compiled(part: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        met = sizes.setdefault(part.__name__, [])

        def call(*inputs: Any) -> Any:
            met.append(len(next(each for each in inputs if isinstance(each, torch.Tensor))))
            return part(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    kernels = replace(cpu_kernels(with_onednn=False), row_multiple=1, compiles_layers=True)
    compile_layers(Llama(make_llama(50, num_hidden_layers=3), kernels))
    assert len(sizes) >= 7
    for name, met in sizes.items():
        few, many, *_ = dict.fromkeys(met)
        assert few < 20 and many > 1900, name


def test_a_machine_that_cannot_compile_is_told_so(
    model: Llama, monkeypatch, fresh_compiler: None
) -> None:
    def fail(*args: object, **settings: object) -> Callable[..., torch.Tensor]:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"compile: .*no compiler found.*or set compile false"):
        compile_layers(model)


@pytest.mark.parametrize("name", ["embed_tokens", "1.mlp.gate_proj", "0.input_layernorm", "q_proj"])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (torch.zeros_like, "100%"),
        (torch.neg, "20[01]%"),
        (lambda gradient: gradient / 0, "(nan|inf)%"),
    ],
)
def test_a_wrong_compiled_gradient_is_refused(
    model: Llama,
    monkeypatch,
    fresh_compiler: None,
    name: str,
    fault: Callable[[torch.Tensor], torch.Tensor],
    error: str,
) -> None:
    """Guards against a run that trains on zeros, as with torch 2.11 (pytorch #180642)."""
    weights = model.to(torch.bfloat16).pretrained.named_parameters()
    weight = next(weight for key, weight in weights if name in key)
    computes_wrongly(monkeypatch, lambda: weight.register_hook(fault))
    shown = rf"compile: the compiled gradient of \S*{name}\S* differs by {error} .*set compile"
    with pytest.raises(UserError, match=shown):
        compile_layers(model)


def test_a_missing_compiled_gradient_is_refused(
    model: Llama, monkeypatch, fresh_compiler: None
) -> None:
    """Guards against a weight that the compiled layers do not train."""
    model.head.requires_grad_(False)
    computes_wrongly(monkeypatch, lambda: model.norm.requires_grad_(False))
    with pytest.raises(UserError, match=r"gradient of model\.norm\.weight differs by 100%"):
        compile_layers(model)


def test_the_check_of_compiled_gradients_leaves_nothing_behind(
    model_folder: Path, monkeypatch, fresh_compiler: None, make_llama: Callable[..., Any]
) -> None:
    """Guards against layers that stay cut off, other dropout in both passes, and stale gradients.

    Rounding as in a compiled layer, here that of float32 weights in bfloat16, is not refused.
    """
    monkeypatch.setattr(torch, "compile", lambda part, **_: partial(rounded_differently, part))
    pretrained = make_llama(420, num_hidden_layers=3, attention_dropout=0.5)
    model = Llama(pretrained.to(torch.bfloat16), KERNELS)
    blocks, names = list(model.blocks), [name for name, _ in model.named_parameters()]
    compile_layers(model)
    assert list(model.blocks) == blocks and model.elementwise is fused.FUSED
    assert names == [name for name, _ in model.named_parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


def rounded_differently(part: Callable[..., Any], *inputs: Any) -> Any:
    """``part`` in float32, whose results are rounded once."""
    usual = part(*inputs)
    exact = part(*(each.float() if isinstance(each, torch.Tensor) else each for each in inputs))
    if isinstance(usual, torch.Tensor):
        return exact.to(usual.dtype)
    return tuple(one.to(other.dtype) for one, other in zip(exact, usual, strict=True))


def computes_wrongly(monkeypatch: pytest.MonkeyPatch, fault: Callable[[], object]) -> None:
    """Let ``torch.compile`` return its function as it is, after ``fault``."""

    def compiled(part: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        if part is fused.swiglu:
            fault()
        return part

    monkeypatch.setattr(torch, "compile", compiled)


def test_bfloat16_follows_float32(
    model_folder: Path, model64: Llama, examples: list[packing.Example]
) -> None:
    """Guards against sums and softmaxes in bfloat16, whose error exceeds that of the weights."""
    half = load_model(model_folder, torch.bfloat16, CPU)
    with torch.no_grad():
        for rounded, exact in zip(half.parameters(), model64.parameters(), strict=True):
            exact.copy_(rounded)
    window = packing.pack(examples, 333, KERNELS)
    nats, num_labels, _ = train.accumulate_gradients(half, window, None)
    expected, _, _ = train.accumulate_gradients(model64, window, None)
    assert abs(nats - expected) / num_labels < 1e-4
    assert relative_error(gradients(half), gradients(model64)) < 2**-7


class RoundingAsAGpu(TorchDispatchMode):
    """A tensor without dimensions takes the dtype of the one it is multiplied by, as on a GPU. On a
    CPU it is a number like any other."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_):
            one, other = args
            if isinstance(other, torch.Tensor) and one.dim() > 0 == other.dim():
                args = one, other.to(one.dtype)
        return function(*args, **(kwargs or {}))


def test_the_number_of_labels_is_not_rounded_on_a_gpu() -> None:
    """Guards against 1 / 982 with 8 bits, by which all gradients but the head's would be 0.4 % too
    small."""
    random = torch.Generator().manual_seed(6)
    hidden, weight = (torch.randn(64, 32, generator=random).bfloat16() for _ in range(2))
    labels, grads = torch.arange(64), []
    for dtype, mode in ((torch.float64, nullcontext()), (torch.bfloat16, RoundingAsAGpu())):
        leaf = hidden.to(dtype).requires_grad_()
        with mode:
            arguments = weight.to(dtype), labels, True, KERNELS
            (LinearCrossEntropy.apply(leaf, *arguments) / 982).backward()
        grads.append(leaf.grad.double().flatten())
    exact, found = grads
    assert (found @ exact / (exact @ exact)).item() == pytest.approx(1, abs=5e-4)


def test_the_gradient_of_the_head_in_bfloat16_adds_up_chunks_in_float32() -> None:
    """Guards against a sum with 8 bits, in which every later chunk counts for less."""
    random = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(4096, 16, generator=random), torch.randn(48, 16, generator=random)
    labels, grads = torch.randint(48, (4096,), generator=random), []
    in_chunks = replace(KERNELS, logits_at_once=1)
    for dtype in (torch.float64, torch.bfloat16):
        head = weight.bfloat16().to(dtype).requires_grad_()
        states = hidden.bfloat16().to(dtype)
        LinearCrossEntropy.apply(states, head, labels, True, in_chunks).backward()
        grads.append([head.grad])
    assert relative_error(grads[1], grads[0]) < 4e-3


def test_a_loss_is_differentiated_once() -> None:
    """Guards against gradients that were scaled in place, and would be scaled again."""
    hidden, weight = torch.ones(2, 4, requires_grad=True), torch.ones(3, 4)
    loss = LinearCrossEntropy.apply(hidden, weight, torch.tensor([0, 1]), True, KERNELS)
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        (loss / 2).backward()


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """L2 norm of the difference relative to the expected one, over all parameters together."""
    off = sum(
        (f.double() - e.double()).square().sum() for f, e in zip(found, expected, strict=True)
    )
    return math.sqrt(off / sum(e.double().square().sum() for e in expected))


def test_clipping_scales_to_the_norm(model64: Llama, examples: list[packing.Example]) -> None:
    """Guards against clipping each micro-batch, and against reporting the clipped norm."""
    free, clipped = copy.deepcopy(model64), copy.deepcopy(model64)
    window = packing.pack(examples, 333, KERNELS)
    _, _, norm = train.accumulate_gradients(free, window, None)
    _, _, reported = train.accumulate_gradients(clipped, window, norm / 4)
    torch.testing.assert_close(reported, norm, **EXACT)
    # clip_grad_norm_ adds 1e-6 to the norm that it divides by.
    scaled = [gradient * (norm / 4) / (norm + 1e-6) for gradient in gradients(free)]
    torch.testing.assert_close(gradients(clipped), scaled, **EXACT)
