"""The fused kernels of a GPU's decoding: what they compute, what they cost, and where they lack.

Triton interprets them on a CPU, and compiles them for a GPU that is not there. Where Triton is not
installed, as beside PyTorch's builds for CPUs, those tests are skipped, and the others let PyTorch
compute what the kernels would.
"""

import math
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from triton_kernels import check_on_cpu, compiled_for_h100, load

from engine.cuda import layers
from engine.cuda.kernel_checks import wrong_small_kernels
from engine.cuda.kernels import small_kernels
from engine.decoding import greedy_decode
from engine.device import cuda_kernels
from engine.llama import Llama

CPU = torch.device("cpu")
FILE = Path(layers.__file__).with_name("small_kernels.py")
ROUNDING = {  # the largest relative error of one
    torch.float64: 2**-53,
    torch.float32: 2**-24,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-7,  # Triton's interpreter cuts bits off instead
}


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in the paper on rotary position embedding, but halves for pairs."""
    first, second = heads.chunk(2, dim=-1)
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_into(cos, sin, query, key, value, tokens, keys, values) -> Tensor:
    keys[tokens], values[tokens] = rotate(key, cos, sin), value
    return rotate(query, cos, sin)


def gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return hidden * (hidden.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


TEXTBOOK = SimpleNamespace(rotate_into=rotate_into, gated=gated, rms_norm=rms_norm)


@pytest.fixture(params=["textbook", "triton"])
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace | ModuleType]:
    yield TEXTBOOK if request.param == "textbook" else load(FILE, monkeypatch, True)


# ---------------------------------------------------------------- what they compute


def computed(kernels: Any, inputs: list[Tensor], tokens: Tensor, kv_heads: int) -> list[Tensor]:
    """Query, all keys, all values, activations and norms."""
    cos, sin, states = inputs
    sizes = [states.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
    query, key, value = states.split(sizes, dim=1)
    keys, values = states.new_full((2, 30, kv_heads, states.shape[2]), 7)
    query = kernels.rotate_into(cos, sin, query, key, value, tokens, keys, values)
    hidden = states.flatten(1)
    norms = kernels.rms_norm(hidden, hidden[0].flip(0).contiguous(), 0.1)
    return [query, keys, values, kernels.gated(hidden), norms]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 8), (20, 2, 12), (1, 1, 264), (17, 17, 6)]
)
def test_kernels_compute_what_float64_does(
    kernels: Any, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Guards against heads, halves and tokens that are exchanged or forgotten, and more roundings.

    Also for more heads than one program rotates, and sizes that are not powers of two.
    """
    generator = torch.Generator().manual_seed(heads)
    shape = 5, heads + 2 * kv_heads, head_dim
    states = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    angles = torch.randn(5, 1, head_dim // 2, generator=generator, dtype=torch.float64)
    rope = layers._rope(*(torch.cat([each, each], -1) for each in (angles.cos(), angles.sin())))
    inputs = [*(each.to(dtype) for each in rope), states]
    tokens = torch.tensor([29, 0, 7, 3, 11])
    found = computed(kernels, inputs, tokens, kv_heads)
    expected = computed(TEXTBOOK, [each.double() for each in inputs], tokens, kv_heads)
    # A rotation rounds two products of numbers up to about 4, and their difference; a value is
    # copied. Of float32 or better, an activation is rounded twice, and a norm once; the textbook's
    # five times.
    few = (2.1, 1.01 if kernels is not TEXTBOOK else 5) if dtype.itemsize == 2 else (16, 16)
    smallest = 8 * torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == dtype
        error = (4, 4, 0, *few)[number] * ROUNDING[dtype]
        atol = error if number < 2 else smallest
        torch.testing.assert_close(one.double(), other, rtol=error, atol=atol)
    for cache in found[1:3]:  # and what belongs to others is untouched
        assert bool((cache[[number for number in range(30) if number not in tokens]] == 7).all())


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 4}, {"attention_bias": True}])
def test_completions_are_those_of_generate(
    make_llama: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    kernels: Any,
    settings: dict[str, Any],
) -> None:
    """Guards against keys that are written unrotated, twice rotated, or to another place."""
    pretrained = make_llama(50, std=0.4, **settings)
    prompts = [[1, 5, 9, 4], [1], [1, 7, 30], [1, 8], [1, 44, 3, 2, 6, 11, 23], [1, 12], [1, 13]]
    prompts.append([1, 40, 41])  # eight, for which weights are fused
    expected = [generated(pretrained, prompt) for prompt in prompts]
    monkeypatch.setattr("engine.device.small_kernels", lambda kind: {"cpu": kernels}[kind])
    stops, limits = frozenset(), {"max_new_tokens": 5, "slots": 3}
    model = Llama(pretrained, cuda_kernels(CPU))
    found = greedy_decode(model, prompts, eos_token_ids=stops, **limits)
    assert {one.index: one.token_ids for one in found} == dict(enumerate(expected))


def generated(pretrained: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    stops = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5, "do_sample": False}
    return pretrained.generate(ids, attention_mask=torch.ones_like(ids), **stops)[
        0, len(prompt) :
    ].tolist()


# ---------------------------------------------------------------- what they cost


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8)])
def test_an_h100_reads_and_writes_each_number_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, heads: int, kv_heads: int
) -> None:
    """Guards against registers that spill to memory, and accesses of fewer than 16 bytes.

    At Llama-2-7B's sizes. 128 threads of 16 bytes are 16 heads' halves, or half a block of columns.
    """
    kernels = load(FILE, monkeypatch, False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tl = kernels.tl
    types = dict.fromkeys(("query_stride", "key_stride", "value_stride", "columns"), "i32")
    types |= {"tokens": "*i64"}
    count = kernels.HEADS
    sizes = {"heads": heads, "kv_heads": kv_heads, "half": 64, "block_heads": count}
    sizes |= {"block_half": 64, "exact": tl.float32}
    sizes |= {"blocks": heads // count, "kv_blocks": math.ceil(kv_heads / count)}
    rotation = compiled_for_h100(kernels._rotate_into, types, sizes, tmp_path, **kernels.ROUNDED)
    sizes = {"block": kernels.COLUMNS, "exact": tl.float32}
    activation = compiled_for_h100(kernels._gated, types, sizes, tmp_path, **kernels.ROUNDED)
    sizes = {"columns": 4096, "epsilon": 1e-5, "block": 4096, "exact": tl.float32}
    options = {"num_warps": kernels.warps(4096)} | kernels.ROUNDED
    norm = compiled_for_h100(kernels._rms_norm, types, sizes, tmp_path, **options)
    # Query and key read cos and sin too, the value does not; one token number.
    expected = {rotation: (4 + 4 + 2, 2 + 2 + 2, 1), activation: (2, 1, 0), norm: (4, 2, 0)}
    for (code, report), (reads, writes, scalars) in expected.items():
        assert "0 bytes spill stores, 0 bytes spill loads" in report, report
        assert len(re.findall(r"ld\.global\.v4\.b32", code)) == reads
        assert len(re.findall(r"st\.global\.v4\.b32", code)) == writes
        assert len(re.findall(r"ld\.global", code)) == reads + scalars
        assert len(re.findall(r"st\.global", code)) == writes
        assert "fma." not in code and ".local" not in code


# ---------------------------------------------------------------- where they lack


@pytest.fixture
def undecided() -> Iterator[None]:
    """Whether the kernels run is found again."""
    small_kernels.cache_clear()
    yield
    small_kernels.cache_clear()


COMPILER = "install a C compiler"


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (ModuleNotFoundError("No module named 'triton'"), "pip install -r requirements.txt"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), COMPILER),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), COMPILER),
        (FileNotFoundError(2, "No such file or directory: 'gcc'"), COMPILER),
        (PermissionError(13, "Permission denied: 'cache'"), "set TRITON_CACHE_DIR to"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "update the GPU's"),
    ],
)
def test_where_they_do_not_run_pytorchs_operators_take_their_place(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    undecided: None,
    fault: Exception,
    cure: str,
) -> None:
    """Guards against a run that ends at the first validation, and one that is slow in silence."""

    def fail() -> None:
        raise fault

    monkeypatch.setattr("engine.cuda.kernels._import_small_kernels", fail)
    assert small_kernels("cpu") is None and capsys.readouterr().out == ""
    assert small_kernels("cuda") is None and small_kernels("cuda") is None
    out = capsys.readouterr().out
    assert type(fault).__name__ in out and f": {cure}" in out and out.count("\n") == 1


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: no kernel image is available"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_a_failing_device_is_not_taken_for_missing_kernels(
    monkeypatch: pytest.MonkeyPatch, undecided: None, fault: Exception
) -> None:
    def fail() -> None:
        raise fault

    monkeypatch.setattr("engine.cuda.kernels._import_small_kernels", fail)
    with pytest.raises(type(fault), match=re.escape(str(fault))):
        small_kernels("cuda")


def unrotated(cos, sin, query, key, value, tokens, keys, values) -> Tensor:
    rotate_into(cos, sin, query, key, value, tokens, keys, values)
    return query


def exchanged(cos, sin, query, key, value, tokens, keys, values) -> Tensor:
    return rotate_into(cos, sin, query, value, key, tokens, keys, values)


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        ({}, []),
        ({"rotate_into": unrotated}, ["query"]),
        ({"rotate_into": exchanged}, ["key", "value"]),
        ({"gated": lambda both: both.chunk(2, dim=-1)[0]}, ["activation"]),
        ({"rms_norm": lambda hidden, weight, _: rms_norm(hidden, weight, 0)}, ["norm"]),
    ],
)
def test_wrong_kernels_are_found_before_they_are_used(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    undecided: None,
    broken: dict[str, Any],
    wrong: list[str],
) -> None:
    """Guards against completions of another model, by a compiler's fault."""
    kernels = SimpleNamespace(**(vars(TEXTBOOK) | broken))
    assert wrong_small_kernels(kernels, CPU) == wrong
    monkeypatch.setattr("engine.cuda.kernels._import_small_kernels", lambda: kernels)
    check_on_cpu(monkeypatch, wrong_small_kernels)
    assert small_kernels("cuda") is (None if wrong else kernels)
    out = capsys.readouterr().out
    assert out.count("\n") == bool(wrong) and ", ".join(wrong) in out
    assert not wrong or f"install another torch than {torch.__version__}" in out
