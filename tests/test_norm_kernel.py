"""The backward pass of a GPU's norms: what it computes, what it costs, and where it lacks."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from triton_kernels import check_on_cpu, compiled_for_h100, load

from engine import cuda, fused
from engine.compiling import compile_layers
from engine.cuda.kernel_checks import wrong_norm_gradients
from engine.cuda.kernels import norm_gradients
from engine.device import cpu_kernels
from engine.llama import Llama
from engine.packing import Example, collate

FILE = Path(cuda.__file__).with_name("norm_kernel.py")
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,  # Triton's interpreter cuts bits off instead of rounding
}


def textbook(grad_total: Tensor | None, grad: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
    if grad_total is None:
        return fused.rms_norm_backward(grad, *others)
    return fused.add_rms_norm_backward(grad_total, grad, *others)


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("tokens", "hidden_size"), [(1, 12), (15, 300), (16, 12), (17, 300), (100, 12)]
)
def test_the_kernel_computes_what_autograd_does_in_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, hidden_size: int
) -> None:
    """Guards against tokens that are left out or counted twice, however many there are."""
    kernel = load(FILE, monkeypatch, True).norm_gradients
    generator = torch.Generator().manual_seed(tokens)
    drawn = torch.randn(4, tokens, hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    grad_total, grad, total, weight = *drawn[:3], drawn[3, 0]
    exact, exact_weight = (each.double().requires_grad_() for each in (total, weight))
    F.rms_norm(exact, [hidden_size], exact_weight, 1e-5).backward(grad.double())
    inputs = total, weight, fused.rms_norm(total, weight, 1e-5)[1]
    # Of the second one each row lies apart from the next one, as in a gradient that was sliced.
    for added, shown in ((None, grad), (grad_total, torch.cat([grad, grad], -1).chunk(2, -1)[0])):
        found, found_weight = kernel(added, shown, *inputs, True)
        expected = exact.grad if added is None else exact.grad + added
        for one, other in ((found, expected), (found_weight, exact_weight.grad)):
            assert one.dtype == dtype
            assert (one - other).norm() <= TOLERANCES[dtype] * other.norm()
        frozen = kernel(added, shown, *inputs, False)
        assert torch.equal(frozen[0], found) and frozen[1] is None


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("recomputed", [0, 2])
def test_the_norms_of_compiled_blocks_have_it_for_their_backward_pass(
    make_llama: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    recomputed: int,
    is_trained: bool,
) -> None:
    """Guards against gradients in the wrong order, and those of weights that are not trained."""
    calls: list[bool] = []

    def counted(*inputs: Any) -> tuple[Tensor, Tensor | None]:
        calls.append(inputs[-1])
        return textbook(*inputs)

    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    fused.compiled.cache_clear()
    pretrained = make_llama(50, num_hidden_layers=3).double()
    for name, weight in pretrained.named_parameters():
        weight.requires_grad_(is_trained or "layernorm" not in name)
    asked: list[tuple[int, torch.dtype]] = []
    kernels = replace(
        cpu_kernels(with_onednn=False),
        norm_gradients=lambda *kind: asked.append(kind) or counted,
    )
    model = Llama(pretrained, kernels).train()
    batch = collate([Example([*range(1, 20)], [7] * 19)], kernels)
    model(batch).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    compile_layers(model)
    calls.clear()
    model.recomputed_blocks = recomputed
    model(batch).backward()
    fused.compiled.cache_clear()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert calls == [is_trained] * 6 and asked == [(len(model.norm.weight), torch.float64)]


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("adds", [True, False])
def test_an_h100_reads_and_writes_each_number_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adds: bool
) -> None:
    """Guards against registers that spill to memory, and accesses of fewer than 16 bytes.

    At Llama-2-7B's sizes. Two programs of 512 threads are computed at the same time.
    """
    kernels = load(FILE, monkeypatch, False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"columns": 4096, "block": 4096, "tokens": kernels.TOKENS, "is_trained": True}
    sizes |= {"exact": kernels.tl.float32} | ({} if adds else {"grad_total": None})
    types = {"scale": "*fp32", "sums": "*fp32", "rows": "i32"}
    options = {"enable_fp_fusion": False, "num_warps": kernels.warps(4096)}
    code, report = compiled_for_h100(kernels._norm_backward, types, sizes, tmp_path, **options)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 65536 // (2 * 512)
    # The weight, and of each token its number, its gradients, and itself.
    assert len(re.findall(r"ld\.global\.v4\.b32", code)) == 3 + adds
    assert len(re.findall(r"ld\.global", code)) == 4 + adds
    # The gradient, and the sum, in float32.
    assert (
        len(re.findall(r"st\.global\.v4\.b32", code)) == len(re.findall(r"st\.global", code)) == 3
    )
    assert "fma.rn" not in code and ".local" not in code


# ---------------------------------------------------------------- where it lacks


@pytest.fixture
def undecided() -> Iterator[None]:
    """Whether the kernel runs is found again."""
    norm_gradients.cache_clear()
    yield
    norm_gradients.cache_clear()


def asked(kind: str) -> Any:
    return norm_gradients(kind, 8, torch.float32)


def test_where_it_does_not_run_a_compiled_one_takes_its_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, undecided: None
) -> None:
    """Guards against layers that are not compiled at all, and a run that is slow in silence."""

    def fail() -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr("engine.cuda.kernels._import_norm_kernel", fail)
    assert asked("cpu") is None and capsys.readouterr().out == ""
    assert asked("cuda") is None and asked("cuda") is None
    out = capsys.readouterr().out
    assert "No module named 'triton'" in out and "pip install -r requirements.txt" in out
    assert out.count("\n") == 1


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_failing_device_is_not_taken_for_a_missing_kernel(
    monkeypatch: pytest.MonkeyPatch, undecided: None, fault: type[Exception]
) -> None:
    def fail() -> None:
        raise fault("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("engine.cuda.kernels._import_norm_kernel", fail)
    with pytest.raises(fault):
        asked("cuda")


def not_a_number(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    found, found_weight = textbook(*inputs)
    return found * math.nan, found_weight


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        (textbook, []),
        (lambda _, *others: textbook(None, *others), ["gradient of a sum"]),
        (lambda *inputs: (textbook(*inputs)[0], torch.zeros(8)), ["gradient of the weight"]),
        (not_a_number, ["gradient", "gradient of a sum"]),
    ],
)
def test_a_wrong_kernel_is_found_before_it_is_used(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    undecided: None,
    kernel: Callable[..., Any],
    wrong: list[str],
) -> None:
    """Guards against a run that trains on the gradients of a compiler's fault."""
    module = SimpleNamespace(norm_gradients=kernel)
    monkeypatch.setattr("engine.cuda.kernels._import_norm_kernel", lambda: module)
    check_on_cpu(monkeypatch, wrong_norm_gradients)
    assert asked("cuda") is (None if wrong else kernel)
    out = capsys.readouterr().out
    assert out.count("\n") == bool(wrong) and ", ".join(wrong) in out
    assert not wrong or f"install another torch than {torch.__version__}" in out
