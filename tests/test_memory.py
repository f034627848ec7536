"""Running out of memory changes no step, and the loss holds no full logits."""

import contextlib
import copy
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT, flags
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import data
import train
from engine import functions, memory, packing
from engine import loss as loss_module
from engine.cpu import cache
from engine.tokenizer import Tokenizer
from grading import dataset
from run.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def examples(tokenizer: Tokenizer, problems: list[dataset.Problem]) -> list[packing.Example]:
    return data.encode(tokenizer, problems[:24], PROMPT)


@pytest.fixture
def run_out(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Injects errors at the micro-batches with the given numbers (from 0, over all tries)."""

    def arrange(
        numbers: set[int], where: str = "forward", error: Callable[[], Exception] | None = None
    ) -> list[int]:
        calls: list[int] = []
        original = loss_module.summed_loss
        make = error or (lambda: torch.OutOfMemoryError("CUDA out of memory"))

        class Fail(torch.autograd.Function):
            @staticmethod
            def forward(ctx, loss: torch.Tensor) -> torch.Tensor:
                return loss.clone()

            @staticmethod
            def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
                raise make()

        def summed_loss(model: LlamaForCausalLM, batch: packing.Batch) -> torch.Tensor:
            calls.append(batch.num_tokens)
            fails = len(calls) - 1 in numbers
            if fails and where == "forward":
                original(model, batch)
                raise make()
            return Fail.apply(original(model, batch)) if fails else original(model, batch)

        monkeypatch.setattr(train, "summed_loss", summed_loss)
        return calls

    return arrange


class CountProducts(TorchDispatchMode):
    """Counts the matrix products of what runs under it."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.mkldnn._linear_pointwise,
        )
        return func(*args, **(kwargs or {}))


def gradients(model: LlamaForCausalLM) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("numbers", [{0}, {1}, {2}, {0, 1}, {2, 4, 9}])
def test_out_of_memory_anywhere_leaves_the_gradient_as_it_was(
    model64: LlamaForCausalLM,
    examples: list[packing.Example],
    run_out,
    where: str,
    numbers: set[int],
) -> None:
    """Guards against gradients of the failed try that stay, sequences that are lost, and a wrong divisor."""
    plain, healed = copy.deepcopy(model64), copy.deepcopy(model64)
    *expected, budget = train.accumulate_in_memory(plain, examples, 1024, CPU, 1.0)
    assert budget == 1024
    run_out(numbers, where)
    *found, budget = train.accumulate_in_memory(healed, examples, 1024, CPU, 1.0)
    assert budget == 1024 // 2 ** len(numbers)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients(healed), gradients(plain), rtol=0, atol=1e-10)
    # Bit for bit what the smaller budget gives from the start.
    small = copy.deepcopy(model64)
    train.accumulate_in_memory(small, examples, budget, CPU, 1.0)
    assert all(map(torch.equal, gradients(healed), gradients(small)))


@pytest.mark.parametrize(
    "message", ["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes", ""]
)
def test_main_memory_runs_out_too(
    model: LlamaForCausalLM, examples: list[packing.Example], run_out, message: str
) -> None:
    calls = run_out({0}, error=lambda: RuntimeError(message) if message else MemoryError())
    assert train.accumulate_in_memory(model, examples, 512, CPU, None)[3] == 256
    assert max(calls[1:]) <= 256 < calls[0]


def test_other_errors_are_no_reason_to_try_again(
    model: LlamaForCausalLM, examples, run_out
) -> None:
    """Guards against a fault that is hidden, and met again with smaller batches."""
    calls = run_out({0}, error=lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train.accumulate_in_memory(model, examples, 512, CPU, None)
    assert len(calls) == 1


def test_one_sequence_that_does_not_fit_is_an_error_with_a_cure(
    model: LlamaForCausalLM, examples, run_out
) -> None:
    run_out(set(range(1000)))
    with pytest.raises(
        UserError, match=r"each sequence alone, the longest of \d+ tokens: set gradient"
    ):
        train.accumulate_in_memory(model, examples, 512, CPU, None)


def test_a_run_that_runs_out_once_goes_on_with_the_smaller_budget(
    call, settings: dict[str, str], run_out, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the run, resumed or not, is bit for bit that of the smaller budget; said in log and metrics."""
    small = settings | {"run_name": "small", "micro_batch_tokens": "256"}
    assert call(train, *flags(small)).code == 0
    original = train.accumulate
    with monkeypatch.context():
        calls = run_out({0})
        steps = iter(range(100))
        monkeypatch.setattr(
            train, "accumulate", lambda *a: original(*a) if next(steps) < 9 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            call(train, *flags(settings | {"checkpoint_steps": "4"}))
    monkeypatch.setattr(train, "accumulate", original)
    monkeypatch.setattr(train, "summed_loss", loss_module.summed_loss)
    outcome = call(train, *flags(settings))
    assert outcome.code == 0 and max(calls[1:]) <= 256
    folder = Path(settings["output_dir"])
    assert '"train/micro_batch_tokens": 256' in (folder / "test" / "metrics.jsonl").read_text()
    ours, theirs = (
        load_file(folder / name / "last" / "model.safetensors") for name in ("test", "small")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_dropout_is_drawn_again_after_a_failed_try(
    settings: dict[str, str], model: LlamaForCausalLM, examples, run_out
):
    """Guards against a random state that the failed try has moved."""
    model.config.attention_dropout = 0.3
    model.train()
    torch.manual_seed(5)
    expected = train.accumulate_in_memory(copy.deepcopy(model), examples, 256, CPU, None)
    run_out({2})
    torch.manual_seed(5)
    assert train.accumulate_in_memory(model, examples, 512, CPU, None)[:3] == expected[:3]


def test_the_loss_holds_no_full_logits() -> None:
    """Peak memory of the loss grows with tokens + vocabulary, not with their product: measured in a process."""
    code = """
import resource, sys, torch
from engine import loss
tokens, vocabulary, hidden = map(int, sys.argv[1:])
h = torch.randn(tokens, hidden, requires_grad=True)
w = torch.randn(vocabulary, hidden, requires_grad=True)
y = torch.randint(vocabulary, (tokens,))
loss.LinearCrossEntropy.apply(h[:300], w, y[:300], True).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss.LinearCrossEntropy.apply(h, w, y, True).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    tokens, vocabulary = 16_384, 32_000
    result = subprocess.run(
        [sys.executable, "-c", code, str(tokens), str(vocabulary), "16"],
        cwd=Path(train.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    full_logits = tokens * vocabulary * 4
    assert int(result.stdout) < full_logits / 8


def test_validation_computes_no_gradients(
    model: LlamaForCausalLM, examples: list[packing.Example]
) -> None:
    """Guards against the two matrix products of the gradients in every evaluation, three times the work."""
    batch = packing.collate(examples[:2])
    linears = 7 * model.config.num_hidden_layers
    for grad, expected in ((True, linears + 3), (False, linears + 1)):
        with torch.set_grad_enabled(grad), CountProducts() as count:
            loss_module.summed_loss(model, batch)
        assert count.products == expected


def test_the_last_layer_computes_nothing_for_positions_without_a_label(
    model: LlamaForCausalLM, examples: list[packing.Example]
) -> None:
    """Guards against the MLP of the last layer over the prompts, whose result nobody reads."""
    batch, rows = packing.collate(examples[:4]), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda module, inputs, output: rows.append(len(inputs[0]))
        )
    loss_module.summed_loss(model, batch)
    assert rows == [batch.num_tokens] * (len(rows) - 1) + [len(batch.loss_positions)]
    assert len(batch.loss_positions) < batch.num_tokens


@pytest.mark.parametrize(
    ("stored", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_loading_never_holds_two_copies_of_the_weights(
    make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, stored: str, loaded: str
) -> None:
    """Guards against weights that are read in one dtype and then copied into another, or onto a second model."""
    make_llama(32_000, hidden_size=512, intermediate_size=1024).to(
        getattr(torch, stored)
    ).save_pretrained(tmp_path)
    command = [sys.executable, "benchmarks/startup.py", "--worker", str(tmp_path), loaded]
    result = subprocess.run(
        command, cwd=Path(train.__file__).parent, capture_output=True, text=True, check=True
    )
    sizes = json.loads(result.stdout.splitlines()[-1])
    assert sizes["weights"] > 60e6
    # Where the file has the dtype the weights are mapped from it; else there is one copy, and the tensor being read.
    assert sizes["own"] < (0.3 if stored == loaded else 1.3) * sizes["weights"]


@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("cuda", False)])
def test_gradients_are_cleared_in_their_place_on_a_cpu(
    model: LlamaForCausalLM, device: str, kept: bool
) -> None:
    """Guards against gradients that lie elsewhere in each step, amid the activations, and tear the heap."""
    optimizer = torch.optim.SGD(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.grad for parameter in model.parameters()]
    memory.clear_gradients(optimizer, torch.device(device))
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is grad and not grad.any()) if kept else parameter.grad is None


def test_what_is_remade_is_not_kept_and_changes_no_gradient() -> None:
    """Guards against a hook that keeps what it should not, or makes something else."""
    torch.manual_seed(0)
    weights = [torch.randn(5, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    base = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return base.tanh()

    def gradients(kept: bool) -> tuple[torch.Tensor, ...]:
        tensor = make()
        alive = weakref.ref(tensor)
        with contextlib.nullcontext() if kept else functions.remade(tensor, make):
            output = sum((tensor @ weight).sum() for weight in weights)
        del tensor
        assert (alive() is not None) is kept
        return torch.autograd.grad(output, [base, *weights])

    expected = gradients(kept=True)
    made.clear()
    assert all(map(torch.equal, gradients(kept=False), expected))
    assert len(made) == 2  # once forward, and once backward for all three


def test_training_keeps_neither_normed_nor_activated_tensors(
    model: LlamaForCausalLM, examples: list[packing.Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against the largest activations of a layer, cheap to make again, kept for the backward pass."""
    batch = packing.collate(examples[:4])
    outputs: list[weakref.ref[torch.Tensor]] = []
    original = functions.SwiGLU.apply

    def apply(*inputs: torch.Tensor) -> torch.Tensor:
        output = original(*inputs)
        outputs.append(weakref.ref(output))
        return output

    monkeypatch.setattr(functions.SwiGLU, "apply", apply)
    loss = loss_module.summed_loss(model, batch)
    layers = model.config.num_hidden_layers
    assert [output() for output in outputs] == [None] * layers
    loss.backward()
    assert len(outputs) == 2 * layers
    remade = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(functions, "remade", lambda tensor, make: contextlib.nullcontext())
    loss_module.summed_loss(model, batch).backward()
    assert all(map(torch.equal, gradients(model), remade))


def test_a_loss_is_differentiated_once(
    model: LlamaForCausalLM, examples: list[packing.Example]
) -> None:
    """Guards against gradients, scaled in place, that a second backward pass would scale again."""
    loss = loss_module.summed_loss(model, packing.collate(examples[:2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def advised_spans() -> list[tuple[int, int]]:
    """Where large pages are asked for in this process."""
    spans, span = [], (0, 0)
    maps = Path("/proc/self/smaps")
    for line in maps.read_text().splitlines() if maps.exists() else []:
        name, *rest = line.split()
        if "-" in name:
            span = tuple(int(end, 16) for end in name.split("-"))
        elif name == "VmFlags:" and "hg" in rest:
            spans.append(span)
    return spans


def test_large_pages_are_asked_for() -> None:
    """Guards against advice for memory before or behind the tensor, or for none."""
    before = advised_spans()
    tensor = cache.empty_in_large_pages(5, 2**20, dtype=torch.float64)
    assert tensor.shape == (5, 2**20) and tensor.dtype == torch.float64
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes

    def inside(spans: list[tuple[int, int]]) -> int:
        return sum(max(0, min(end, last) - max(start, first)) for start, end in spans)

    def outside(spans: list[tuple[int, int]]) -> int:
        return sum(end - start for start, end in spans) - inside(spans)

    after = advised_spans()
    known = Path("/sys/kernel/mm/transparent_hugepage").is_dir()  # not in every kernel
    assert (
        inside(after) == 0
        if not known
        else tensor.nbytes - 4 * 2**20 < inside(after) <= tensor.nbytes
    )
    assert outside(after) == outside(before)
    assert cache.empty_in_large_pages(3, dtype=torch.float32).shape == (3,)
