"""The attention kernel of a GPU's decoding: what it computes, what it costs, and where it is used.

See tests/test_small_kernels.py: Triton interprets it, or compiles it for a GPU that is not there.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_small_kernels import generated
from torch import Tensor
from transformers import LlamaForCausalLM
from triton_kernels import check_on_cpu, compiled_for_h100, load

from engine import cuda
from engine.cuda.kernel_checks import wrong_attention
from engine.cuda.kernels import _decode_attention, decode_attention
from engine.decoding import greedy_decode
from engine.device import cuda_kernels
from engine.llama import Llama

CPU = torch.device("cpu")
FILE = Path(cuda.__file__).with_name("attention_kernel.py")
# The interpreter has no products of bfloat16. Those of float32 are exact, unlike a GPU's.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4}
LENGTHS = [33, 1, 64, 31, 70, 32]
STARTS = [130, 4, 200, 90, 6, 300]
TOKENS = 350


def textbook(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor
) -> Tensor:
    """One sequence at a time. On a CPU; as in the cache, ``starts`` may be longer."""
    output = torch.empty_like(query)
    for row, length in enumerate(lengths.tolist()):
        tokens = slice(int(starts[row]), int(starts[row]) + length)
        groups = query.shape[1] // keys.shape[1]
        both = (
            each[tokens].repeat_interleave(groups, 1).transpose(0, 1) for each in (keys, values)
        )
        output[row] = F.scaled_dot_product_attention(query[row, :, None], *both)[:, 0]
    return output


TEXTBOOK = SimpleNamespace(attend=textbook)


@pytest.fixture(params=["textbook", "triton"])
def kernel(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace | ModuleType]:
    yield TEXTBOOK if request.param == "textbook" else load(FILE, monkeypatch, True)


# ---------------------------------------------------------------- what it computes


def inputs(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, which is part of a larger tensor, and keys and values between rows of NaN."""
    generator = torch.Generator().manual_seed(heads)
    like = {"generator": generator, "dtype": torch.float64}
    query = 2 * torch.randn(len(LENGTHS), heads + 3, head_dim, **like)
    cache = torch.full((2, TOKENS, kv_heads, head_dim), torch.nan, dtype=dtype)
    for start, length in zip(STARTS, LENGTHS, strict=True):
        cache[:, start : start + length] = torch.randn(2, length, kv_heads, head_dim, **like)
    return [query.to(dtype)[:, :heads], *cache]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(2, 2, 128), (9, 3, 64), (20, 1, 24), (34, 2, 8), (1, 1, 256)],
)
def test_attention_is_that_of_each_sequence_in_float64(
    kernel: Any, dtype: torch.dtype, integer: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Guards against keys that are missed at a block's border, NaN from others, and wrong heads."""
    tensors = inputs(heads, kv_heads, head_dim, dtype)
    numbers = [torch.tensor(each, dtype=integer) for each in (STARTS, LENGTHS)]
    found = kernel.attend(*tensors, *numbers)
    expected = textbook(*(each.double() for each in tensors), *numbers)
    assert found.dtype == dtype and found.shape == expected.shape
    for row in range(len(LENGTHS)):
        error = (found[row] - expected[row]).norm() / expected[row].norm()
        assert error < TOLERANCES[dtype], LENGTHS[row]


def test_a_row_has_the_same_bits_alone_and_among_others(kernel: Any) -> None:
    """Guards against a completion that depends on which other ones are decoded beside it."""
    query, *cache = inputs(6, 2, 16, torch.float16)
    starts, lengths = torch.tensor(STARTS), torch.tensor(LENGTHS)
    together = kernel.attend(query, *cache, starts, lengths)
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        alone = kernel.attend(query[[row]], *cache, starts[[row]], lengths[[row]])
        moved = [torch.full_like(each, torch.nan) for each in cache]
        for new, old in zip(moved, cache, strict=True):
            new[11 : 11 + length] = old[start : start + length]
        many = kernel.attend(
            query[[row] * 9], *moved, torch.tensor([11] * 9), torch.tensor([length] * 9)
        )
        for one in (alone[0], *many):
            assert torch.equal(one, together[row])


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("group", "kv_heads", "head_dim"), [(1, 32, 128), (4, 8, 128), (3, 3, 64), (1, 16, 256)]
)
def test_an_h100_copies_16_bytes_at_a_time_while_it_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: int, kv_heads: int, head_dim: int
) -> None:
    """Guards against registers that spill, small accesses, and programs that wait for each read.

    Also against too few bytes on the way to a processor, which has room for 227 KiB.
    """
    kernel = load(FILE, monkeypatch, False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"kv_heads": kv_heads, "group": group, "parts": 1, "head_dim": head_dim}
    sizes |= {"block_dim": head_dim, "block_heads": kernel.HEADS, "block_keys": kernel.KEYS}
    types = {"query_stride": "i32", "starts": "*i32", "lengths": "*i32", "scale": "fp32"}
    options = {"num_warps": kernel.warps(head_dim)} | kernel.OPTIONS
    code, report = compiled_for_h100(kernel._attend, types, sizes, tmp_path, **options)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    threads = 32 * kernel.warps(head_dim)
    copies = 2 * kernel.KEYS * head_dim * 2 // (16 * threads)  # of keys and values, by each thread
    asynchronous = re.findall(r"cp\.async\.c\w\.shared\.global .*, 0x10, ", code)
    # In two passes before the loop, and in the loop.
    assert len(asynchronous) == len(re.findall(r"cp\.async\.c[ag]", code)) == 3 * copies
    assert len(re.findall(r"ld\.global", code)) == 2 + len(re.findall(r"ld\.global\.v4\.b32", code))
    assert "wgmma" not in code and "mma.sync" in code and ".local" not in code


# ---------------------------------------------------------------- where it is used


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decoding with FlashAttention as on a GPU, but prefill is by the textbook."""
    monkeypatch.setattr("engine.cuda.cache.is_for_flash_attention", lambda query: True)
    _decode_attention.cache_clear()
    yield
    _decode_attention.cache_clear()


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 4}])
def test_completions_are_those_of_generate(
    make_llama: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    on_a_gpu: None,
    kernel: Any,
    settings: dict[str, Any],
) -> None:
    """Guards against a step that does not use the kernel, or gives it other tokens."""
    pretrained = make_llama(50, std=0.4, **settings)
    calls = []

    def attend(*tensors: Tensor) -> Tensor:
        calls.append(len(tensors[0]))
        return kernel.attend(*tensors)

    prompts = [[1, 5, 9, 4], [1], [1, 7, 30], [1, 8], [1, 44, 3, 2, 6, 11, 23], [1, 12], [1, 13]]
    expected = [generated(pretrained, prompt) for prompt in prompts]
    limits = {"max_new_tokens": 5, "slots": 3, "eos_token_ids": frozenset()}
    chosen = SimpleNamespace(attend=attend)
    kernels = replace(cuda_kernels(CPU), decode_attention=lambda *_: chosen)
    model = Llama(pretrained, kernels)
    found = greedy_decode(model, prompts, **limits)
    assert {one.index: one.token_ids for one in found} == dict(enumerate(expected))
    assert len(calls) >= 4 * len(model.blocks) and set(calls) <= {3}


def shifted(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    return textbook(query, keys, values, starts, lengths + 1)


def without_the_last(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor
) -> Tensor:
    return textbook(query, keys, values, starts, (lengths - 1).clamp(min=1))


def exchanged(query: Tensor, *others: Tensor) -> Tensor:
    return textbook(query.flip(1), *others)


@pytest.mark.parametrize("sizes", [(torch.bfloat16, 4, 4, 128), (torch.float16, 9, 3, 8)])
@pytest.mark.parametrize("broken", [None, shifted, without_the_last, exchanged])
def test_a_wrong_kernel_is_found_before_it_is_used(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    on_a_gpu: None,
    sizes: tuple[Any, ...],
    broken: Callable[..., Tensor] | None,
) -> None:
    """Guards against completions of another model, by a compiler's fault."""
    kernel = SimpleNamespace(attend=broken or textbook)
    monkeypatch.setattr("engine.cuda.kernels.small_kernels", lambda kind: SimpleNamespace())
    monkeypatch.setattr("engine.cuda.kernels._import_attention_kernel", lambda: kernel)
    check_on_cpu(monkeypatch, wrong_attention)
    for _ in range(2):
        found = decode_attention("cuda", *sizes)
        assert found is (None if broken else kernel)
    out = capsys.readouterr().out
    assert out.count("\n") == bool(broken)
    assert not broken or "another attention than PyTorch; using PyTorch's operations" in out


def test_where_it_does_not_run_flash_attention_takes_its_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, on_a_gpu: None
) -> None:
    """Guards against a run that ends at its first validation, and two lines for one reason."""
    sizes = torch.bfloat16, 4, 4, 128

    def fail() -> None:
        raise faults[-1]

    faults: list[Exception] = [RuntimeError("Failed to find C compiler")]
    monkeypatch.setattr("engine.cuda.kernels._import_attention_kernel", fail)
    monkeypatch.setattr("engine.cuda.kernels.small_kernels", lambda kind: None)
    assert decode_attention("cuda", *sizes) is None
    assert decode_attention("cpu", *sizes) is None
    assert capsys.readouterr().out == ""
    some = {"cuda": SimpleNamespace()}
    monkeypatch.setattr("engine.cuda.kernels.small_kernels", some.get)
    assert decode_attention("cpu", *sizes) is None
    assert capsys.readouterr().out == ""
    assert decode_attention("cuda", *sizes) is None
    out = capsys.readouterr().out
    assert "Failed to find C compiler" in out and out.count("\n") == 1
    for fault in (torch.OutOfMemoryError, torch.AcceleratorError):
        _decode_attention.cache_clear()
        faults.append(fault("CUDA error: an illegal memory access was encountered"))
        with pytest.raises(fault):
            decode_attention("cuda", *sizes)
