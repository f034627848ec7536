"""Running out of memory changes no step, and the loss holds no full logits."""

import contextlib
import copy
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT, Killed, flags, kill, named, processes, step_that
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import data
import train
from engine import functions, memory, packing
from engine.cpu import heap
from engine.device import cpu_kernels, cuda_kernels, kernels_for
from engine.functions import LayerParts, saved
from engine.llama import EAGER, KEEPING_LESS, Llama, layer_parts
from engine.tokenizer import Tokenizer
from grading import dataset
from run.errors import UserError

CPU = torch.device("cpu")
KERNELS = kernels_for(CPU)


@pytest.fixture
def examples(tokenizer: Tokenizer, problems: list[dataset.Problem]) -> list[packing.Example]:
    return data.encode(tokenizer, problems[:24], PROMPT)


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


def run_out(
    model: torch.nn.Module,
    numbers: Container[int],
    where: str = "forward",
    error: Callable[[], Exception] = out_of_memory,
) -> list[int]:
    """Makes ``model`` raise in the training passes with these numbers (from 0, over all attempts).

    Returns:
        The number of tokens in each pass, as they come.
    """
    calls: list[int] = []

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
            raise error()

    def hook(module: Llama, inputs: tuple[packing.MicroBatch], loss: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():  # validation
            return None
        calls.append(inputs[0].num_tokens)
        if len(calls) - 1 not in numbers:
            return None
        if where == "forward":
            raise error()
        return Fail.apply(loss)

    model.register_forward_hook(hook)
    return calls


class Recorder:
    """In the place of an optimizer: keeps the gradients of the last step."""

    def __init__(self, model: Llama):
        self.model = model
        self.param_groups: list[dict[str, Any]] = []

    def step(self) -> None:
        self.gradients = gradients(self.model)

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad()


def step_on(
    model: Llama,
    examples: list[packing.Example],
    micro_batch_tokens: int,
    max_grad_norm: float | None = None,
) -> tuple[train.StepResult, list[torch.Tensor]]:
    """The result and the gradients of one optimizer step."""
    optimizer = Recorder(model)
    result = train.train_step(model, optimizer, examples, 1.0, micro_batch_tokens, max_grad_norm)
    return result, optimizer.gradients


class CountProducts(TorchDispatchMode):
    """Counts the matrix products of what runs under it."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.mkldnn._linear_pointwise,
        )
        return func(*args, **(kwargs or {}))


def gradients(model: Llama) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("numbers", [{0}, {1}, {2}, {0, 1}, {2, 4, 9}])
def test_out_of_memory_anywhere_leaves_the_gradient_as_it_was(
    model64: Llama,
    examples: list[packing.Example],
    where: str,
    numbers: set[int],
) -> None:
    """Guards against leftover gradients of the failed attempt, lost rows, and a wrong divisor."""
    plain, healed = copy.deepcopy(model64), copy.deepcopy(model64)
    expected, expected_gradients = step_on(plain, examples, 1024, 1.0)
    assert expected.micro_batch_tokens == 1024
    run_out(healed, numbers, where)
    found, found_gradients = step_on(healed, examples, 1024, 1.0)
    assert found.micro_batch_tokens == 1024 // 2 ** len(numbers)
    for name in ("nats", "num_labels", "grad_norm"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0, abs=1e-9)
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=0, atol=1e-10)
    # Bit for bit what the smaller limit gives from the start.
    _, small_gradients = step_on(copy.deepcopy(model64), examples, found.micro_batch_tokens, 1.0)
    assert all(map(torch.equal, found_gradients, small_gradients))


def test_a_failed_attempt_is_gone_before_memory_is_released(
    model: Llama, examples: list[packing.Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a traceback that keeps the tensors whose memory the next attempt needs."""
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    collect = gc.collect

    def count_and_collect() -> int:
        alive.append(sum(reference() is not None for reference in kept))
        return collect()

    calls = run_out(model, {0})
    named(model, "up_proj").register_forward_hook(
        lambda module, inputs, output: kept.append(weakref.ref(output))
    )
    monkeypatch.setattr(gc, "collect", count_and_collect)
    step_on(model, examples, 512)
    assert len(calls) > 1 and alive == [0]


@pytest.mark.parametrize(
    "message", ["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes", ""]
)
def test_main_memory_runs_out_too(
    model: Llama, examples: list[packing.Example], message: str
) -> None:
    calls = run_out(model, {0}, error=lambda: RuntimeError(message) if message else MemoryError())
    assert step_on(model, examples, 512)[0].micro_batch_tokens == 256
    assert max(calls[1:]) <= 256 < calls[0]


def test_other_errors_are_no_reason_to_try_again(
    model: Llama, examples: list[packing.Example]
) -> None:
    """Guards against a fault that is hidden, and met again with smaller batches."""
    calls = run_out(model, {0}, error=lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        step_on(model, examples, 512)
    assert len(calls) == 1


def test_one_sequence_that_does_not_fit_is_an_error_with_a_cure(
    model: Llama, examples: list[packing.Example]
) -> None:
    run_out(model, range(1000))
    with pytest.raises(
        UserError, match=r"each sequence alone, the longest of \d+ tokens: set gradient"
    ):
        step_on(model, examples, 512)


def test_a_run_that_runs_out_once_goes_on_with_the_smaller_budget(
    call, settings: dict[str, str]
) -> None:
    """The rest of the run, resumed or not, is bit-identical to one with the smaller limit."""
    settings["micro_batch_tokens"] = "512"
    small = settings | {"run_name": "small", "micro_batch_tokens": "256"}
    assert call(train, *flags(small)).code == 0
    calls: list[list[int]] = []
    dies = step_that(kill, at=9)

    def step(model: Any, *rest: Any) -> train.StepResult:
        if not calls:
            calls.append(run_out(model, {0}))
        return dies(model, *rest)

    with pytest.raises(Killed):
        call(train, *flags(settings | {"checkpoint_steps": "4"}), step=step)
    outcome = call(train, *flags(settings))
    assert outcome.code == 0 and calls[0][0] > 256 >= max(calls[0][1:])
    folder = Path(settings["output_dir"])
    assert '"train/micro_batch_tokens": 256' in (folder / "test" / "metrics.jsonl").read_text()
    ours, theirs = (
        load_file(folder / name / "last" / "model.safetensors") for name in ("test", "small")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_dropout_is_drawn_again_after_a_failed_try(
    model: Llama, examples: list[packing.Example]
) -> None:
    """Guards against a random state that the failed attempt has moved."""
    model.config.attention_dropout = 0.3
    torch.manual_seed(5)
    expected, _ = step_on(copy.deepcopy(model), examples, 256)
    torch.manual_seed(6)
    other, _ = step_on(copy.deepcopy(model), examples, 256)
    run_out(model, {2})
    torch.manual_seed(5)
    found, _ = step_on(model, examples, 512)
    assert (found.nats, found.grad_norm) == (expected.nats, expected.grad_norm)
    assert found.nats != other.nats


def test_the_loss_holds_no_full_logits() -> None:
    """Peak memory of the loss grows with tokens + vocabulary, not with their product."""
    code = """
import resource, sys, torch
from engine import loss
from engine.device import kernels_for
kernels = kernels_for(torch.device("cpu"))
tokens, vocabulary, hidden = map(int, sys.argv[1:])
h = torch.randn(tokens, hidden, requires_grad=True)
w = torch.randn(vocabulary, hidden, requires_grad=True)
y = torch.randint(vocabulary, (tokens,))
loss.LinearCrossEntropy.apply(h[:300], w, y[:300], True, kernels).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss.LinearCrossEntropy.apply(h, w, y, True, kernels).backward()
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


def test_validation_computes_no_gradients(model: Llama, examples: list[packing.Example]) -> None:
    """Guards against computing gradients in every evaluation, three times the work."""
    batch = packing.collate(examples[:2], KERNELS)
    linears = 7 * model.config.num_hidden_layers
    for grad, expected in ((True, linears + 3), (False, linears + 1)):
        with torch.set_grad_enabled(grad), CountProducts() as count:
            model(batch)
        assert count.products == expected


def test_the_last_layer_computes_nothing_for_positions_without_a_label(
    model: Llama, examples: list[packing.Example]
) -> None:
    """Guards against the MLP of the last layer over the prompts, whose result nobody reads."""
    batch, rows = packing.collate(examples[:4], KERNELS), []
    for layer in model.pretrained.model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda module, inputs, output: rows.append(len(inputs[0]))
        )
    model(batch)
    assert rows == [batch.num_tokens] * (len(rows) - 1) + [len(batch.output_positions)]
    assert len(batch.output_positions) < batch.num_tokens


def measure_loading(folder: Path, dtype: str) -> None:
    """In a process of its own, so that memory which another test gave back is not used again."""
    sys.path.append(str(Path(train.__file__).parent / "benchmarks"))
    from startup import load

    with (folder / "sizes.json").open("w") as file, contextlib.redirect_stdout(file):
        load(folder, dtype)


@pytest.mark.parametrize(
    ("stored", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_loading_never_holds_two_copies_of_the_weights(
    make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, stored: str, loaded: str
) -> None:
    """Guards against weights read in one dtype and copied into another, or a second model."""
    make_llama(32_000, hidden_size=512, intermediate_size=1024).to(
        getattr(torch, stored)
    ).save_pretrained(tmp_path)
    process = processes.Process(target=measure_loading, args=[tmp_path, loaded])
    process.start()
    process.join()
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sizes["weights"] > 60e6
    # Where the file has the dtype the weights are mapped from it. Otherwise there is one copy, and
    # the tensor being read.
    assert sizes["own"] < (0.3 if stored == loaded else 1.3) * sizes["weights"]


def test_gradients_are_cleared_in_their_place_on_a_cpu(
    model: Llama, examples: list[packing.Example]
) -> None:
    """Guards against new gradients in each step, amid the activations, that fragment the heap."""
    assert not cpu_kernels(with_onednn=False).frees_gradients
    assert cuda_kernels(torch.device("meta")).frees_gradients
    assert not model.kernels.frees_gradients
    for kept in (True, False):
        model.kernels = replace(model.kernels, frees_gradients=not kept)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = [parameter.grad for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters())
        train.train_step(model, optimizer, examples, 1e-3, 1024, None)
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
        with contextlib.nullcontext() if kept else functions.recomputed(tensor, make):
            output = sum((tensor @ weight).sum() for weight in weights)
        del tensor
        assert (alive() is not None) is kept
        return torch.autograd.grad(output, [base, *weights])

    expected = gradients(kept=True)
    made.clear()
    assert all(map(torch.equal, gradients(kept=False), expected))
    assert len(made) == 2  # once forward, and once backward for all three


def test_training_keeps_neither_normed_nor_activated_tensors(
    model: Llama, examples: list[packing.Example]
) -> None:
    """Guards against keeping the largest activations of a layer, which are cheap to recompute."""
    batch = packing.collate(examples[:4], KERNELS)
    inputs: list[weakref.ref[torch.Tensor]] = []
    for layer in model.pretrained.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            linear.register_forward_pre_hook(
                lambda module, arguments: inputs.append(weakref.ref(arguments[0]))
            )

    def loss(parts: LayerParts) -> torch.Tensor:
        attend = partial(KERNELS.attention, batch, 0.0)
        inputs.clear()
        return model.hidden_states(batch.input_ids, batch.position_ids, attend, parts=parts).sum()

    kept = loss(layer_parts(EAGER, saved))
    assert all(tensor() is not None for tensor in inputs)
    kept.backward()
    expected = gradients(model.blocks)
    model.zero_grad()
    del kept
    sparing = loss(KEEPING_LESS)
    assert len(inputs) == 3 * len(model.blocks)
    assert [tensor() for tensor in inputs] == [None] * len(inputs)
    sparing.backward()
    assert all(map(torch.equal, gradients(model.blocks), expected))


def test_a_loss_is_differentiated_once(model: Llama, examples: list[packing.Example]) -> None:
    """Guards against gradients, scaled in place, that a second backward pass would scale again."""
    loss = model(packing.collate(examples[:2], KERNELS))
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
    tensor = heap.empty_in_large_pages(5, 2**20, dtype=torch.float64)
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
    assert heap.empty_in_large_pages(3, dtype=torch.float32).shape == (3,)


@pytest.mark.parametrize("limited", ["", "job_7", "job_7/step_0"])
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_batch_job_holds(
    tmp_path: Path, version: int, seen: bool, limited: str
) -> None:
    """Guards against a copy of the weights, beside training, that Slurm kills the job for."""
    root, line, prefix, names = {
        1: (
            tmp_path / "memory",
            "4:cpu,memory:",
            "total_",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ),
        2: (tmp_path, "0::", "", ("memory.max", "memory.current")),
    }[version]
    membership = tmp_path / "membership"
    path = "/job_7/step_0" if seen else "/seen/by/the/host"
    membership.write_text(f"9:name=systemd:/other\n{line}{path}\n")
    for name in ("", "job_7", "job_7/step_0", "other"):
        group = root / name
        group.mkdir(parents=True, exist_ok=True)
        limit = {limited: 5000, "other": 2000}.get(name, 2**63 - 4096 if version == 1 else "max")
        for file, content in zip(names, (limit, 1000), strict=True):
            (group / file).write_text(f"{content}\n")
        (group / "memory.stat").write_text(f"{prefix}inactive_file 200\n{prefix}active_file 30\n")
    found = memory.free_bytes(CPU, tmp_path, membership)
    assert found == 4230 if seen or not limited else found > 2**20


def test_the_tightest_of_nested_limits_holds(tmp_path: Path) -> None:
    """Guards against a step's generous limit that hides its job's."""
    membership = tmp_path / "membership"
    membership.write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    for limits in ((9000, 5000, 7000), (5000, 9000, 7000), (7000, 9000, 5000)):
        for group, limit in zip(("", "job", "job/step"), limits, strict=True):
            (tmp_path / group / "memory.max").write_text(f"{limit}\n")
            (tmp_path / group / "memory.current").write_text("1000\n")
            (tmp_path / group / "memory.stat").write_text("inactive_file 0\nactive_file 0\n")
        assert memory.free_bytes(CPU, tmp_path, membership) == 4000


def test_processes_of_one_machine_divide_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against three caches, each as large as if its process were alone."""
    (tmp_path / "memory.max").write_text("7000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("inactive_file 0\nactive_file 0\n")
    for number, expected in (("1", 6000), ("3", 2000)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", number)
        assert memory.free_bytes(CPU, tmp_path, tmp_path / "none") == expected
