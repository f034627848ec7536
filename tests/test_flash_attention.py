"""FlashAttention's operators are called as they are meant to be, and deterministically.

A CPU has no kernels for them. Here they are computed by the textbook, from the same arguments.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from engine import attention
from engine.attention import FlashAttention, attend_to_lengths
from engine.cuda.pipeline import PipelinedModel
from engine.decoding import greedy_decode
from engine.device import cuda_kernels, kernels_for
from engine.llama import Llama
from engine.memory import CachePlan
from engine.packing import IGNORE, Example, collate
from engine.sampling import Choose

CPU = torch.device("cpu")
FORWARD, BACKWARD = "_flash_attention_forward", "_flash_attention_backward"


def scores(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """``[heads, queries, keys]``; causal from the last query on, as the operator counts."""
    queries, keys = query.shape[0], key.shape[0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    found = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    hidden = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).logical_not()
    return found.masked_fill(hidden, -torch.inf) if is_causal else found


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    seqused_k: Tensor | None = None,
    **others: None,
) -> tuple[Tensor, ...]:
    assert dropout_p == 0 and not return_debug_mask and not any(others.values())
    assert {cum_seq_q.dtype, cum_seq_k.dtype} == {torch.int32}
    output = torch.full_like(query, torch.nan)
    logsumexp = torch.full(query.shape[1::-1], torch.nan, dtype=query.dtype)
    for number in range(len(cum_seq_q) - 1):
        queries = slice(*cum_seq_q[number : number + 2].tolist())
        start, end = cum_seq_k[number : number + 2].tolist()
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32
            end = start + int(seqused_k[number])
        assert queries.stop - queries.start <= max_q and 0 < end - start <= max_k
        found = scores(query[queries], key[start:end], is_causal)
        logsumexp[:, queries] = found.logsumexp(-1)
        each = value[start:end].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        output[queries] = torch.einsum("hqk,khd->qhd", found.softmax(-1), each)
    state = torch.zeros(2, dtype=torch.uint64)
    return output, logsumexp, state, torch.zeros((), dtype=torch.uint64), query.new_empty(0)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    **others: None,
) -> tuple[Tensor, ...]:
    assert dropout_p == 0 and rng_state.dtype == torch.uint64 and not any(others.values())
    assert torch.equal(cum_seq_q, cum_seq_k) and max_q == max_k == int(cum_seq_q.diff().max())
    groups = query.shape[1] // key.shape[1]
    grads = [torch.full_like(tensor, torch.nan) for tensor in (query, key, value)]
    for number in range(len(cum_seq_q) - 1):
        tokens = slice(*cum_seq_q[number : number + 2].tolist())
        keys, values = (each[tokens].repeat_interleave(groups, dim=1) for each in (key, value))
        weights = (scores(query[tokens], key[tokens], is_causal) - logsumexp[:, tokens, None]).exp()
        grad_weights = torch.einsum("qhd,khd->hqk", grad[tokens], values)
        along = (grad[tokens] * output[tokens]).sum(-1).T[..., None]
        grad_scores = weights * (grad_weights - along) * query.shape[-1] ** -0.5
        grads[0][tokens] = torch.einsum("hqk,khd->qhd", grad_scores, keys)
        of_key = torch.einsum("hqk,qhd->khd", grad_scores, query[tokens])
        of_value = torch.einsum("hqk,qhd->khd", weights, grad[tokens])
        grads[1][tokens] = of_key.unflatten(1, (-1, groups)).sum(2)
        grads[2][tokens] = of_value.unflatten(1, (-1, groups)).sum(2)
    return tuple(grads)


@pytest.fixture
def textbook(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators on a CPU, in any dtype, wherever a GPU would use them in bfloat16."""
    monkeypatch.setattr(attention, "is_for_flash_attention", lambda query: True)
    monkeypatch.setattr("engine.cuda.cache.is_for_flash_attention", lambda query: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(FORWARD, forward, "CPU")
        library.impl(BACKWARD, backward, "CPU")
        yield


class Operators(TorchDispatchMode):
    """Notes each operator, and how deterministic it is asked to be."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.modes.append((func._schema.name[6:], torch.get_deterministic_debug_mode()))
        return func(*args, **(kwargs or {}))


def examples(*lengths: int) -> list[Example]:
    """Random sequences, of whose tokens the last third is supervised."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(50, (length,), generator=generator).tolist() for length in lengths]
    return [
        Example(row, [IGNORE] * (len(row) - len(row) // 3) + row[-(len(row) // 3) :])
        for row in rows
    ]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_each_sequence_alone(
    make_llama: Callable[..., LlamaForCausalLM], textbook: None, kv_heads: int, recomputed: bool
) -> None:
    """Guards against exchanged arguments, wrong borders, and shared heads that are not added up."""
    pretrained = make_llama(50, num_key_value_heads=kv_heads).double()
    ours, theirs = Llama(pretrained, cuda_kernels(CPU)), Llama(pretrained, kernels_for(CPU))
    found: list[list[Tensor]] = []
    for model in (ours, theirs):
        model.train().recomputed_blocks = len(model.blocks) if recomputed else 0
        with Operators() as operators:
            model(collate(examples(9, 4, 30, 3, 17), model.kernels)).backward()
        called = [name for name, _ in operators.modes]
        assert (FORWARD in called) == (BACKWARD in called) == (model is ours)
        found.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


class Tight(PipelinedModel):
    """With less memory for the cache than there is."""

    def __init__(self, model: Llama, plan: CachePlan, choose: Choose | None):
        super().__init__(model, replace(plan, regions=3), choose)


@pytest.mark.parametrize("kind", [PipelinedModel, Tight])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_completions_are_those_of_a_cpu(
    make_llama: Callable[..., LlamaForCausalLM],
    textbook: None,
    kv_heads: int,
    kind: type[PipelinedModel],
) -> None:
    """Guards against slots that read beyond their sequence, or another slot's keys."""
    pretrained = make_llama(50, num_key_value_heads=kv_heads).double()
    prompts = [row.input_ids for row in examples(9, 4, 30, 3, 17, 21, 18, 12, 20)]
    settings = {"max_new_tokens": 12, "eos_token_ids": frozenset({2}), "slots": 4}
    kernels = replace(cuda_kernels(CPU), cached_model=kind)
    with Operators() as operators:
        found = greedy_decode(Llama(pretrained, kernels), prompts, **settings)
        ours = {one.index: one.token_ids for one in found}
    assert FORWARD in {name for name, _ in operators.modes}
    found = greedy_decode(Llama(pretrained, kernels_for(CPU)), prompts, **settings)
    assert ours == {one.index: one.token_ids for one in found} and len(ours) == len(prompts)


def test_each_sequence_has_its_keys_in_any_place(textbook: None) -> None:
    """Guards against an order or distance of sequences that only slots of equal size have."""
    generator = torch.Generator().manual_seed(0)
    like = {"generator": generator, "dtype": torch.float64}
    query, keys, values = (torch.randn(rows, 2, 8, **like) for rows in (3, 40, 40))
    starts, lengths = [25, 3, 12], [7, 1, 10]
    found = attend_to_lengths(
        query,
        keys,
        values,
        torch.arange(4, dtype=torch.int32),
        torch.tensor([*starts, 0], dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        15,
    )
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[number][:, None],
            *(each[start : start + length].transpose(0, 1) for each in (keys, values)),
        )
        torch.testing.assert_close(found[number], expected[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_only_the_backward_operator_is_asked_to_be_deterministic(
    textbook: None, before: int
) -> None:
    """Guards against a resumed run with other bits, and a switch that slows the rest down.

    And against `use_deterministic_algorithms`, which changes how torch.compile compiles.
    """
    inputs = [torch.randn(7, 2, 8, requires_grad=True) for _ in range(3)]
    borders = torch.tensor([0, 3, 7], dtype=torch.int32)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    compiling = inductor.deterministic
    inductor.deterministic = "as it was"
    torch.set_deterministic_debug_mode(before)
    try:
        with Operators() as operators:
            FlashAttention.apply(*inputs, borders, 4).sum().backward()
        assert torch.get_deterministic_debug_mode() == before
        assert inductor.deterministic == "as it was"
        assert torch.utils.deterministic.fill_uninitialized_memory == fills
    finally:
        torch.set_deterministic_debug_mode(0)
        inductor.deterministic = compiling
    asked = {name: mode for name, mode in operators.modes if mode != before}
    assert asked == ({} if before == 2 else {BACKWARD: 2})
    assert {FORWARD, BACKWARD} <= {name for name, _ in operators.modes}


def test_a_backward_pass_that_fails_leaves_no_switch_behind(
    textbook: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a step that runs out of memory, and all later ones being slower."""
    inputs = [torch.randn(7, 2, 8, requires_grad=True) for _ in range(3)]
    borders = torch.tensor([0, 3, 7], dtype=torch.int32)
    output = FlashAttention.apply(*inputs, borders, 4)

    def fail(*_: object) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch.ops.aten, BACKWARD, fail)
    with pytest.raises(torch.OutOfMemoryError):
        output.sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(
    ("dtype", "head_dim", "is_taken"),
    [
        (torch.bfloat16, 128, True),
        (torch.float16, 256, True),
        (torch.bfloat16, 264, False),
        (torch.bfloat16, 36, False),
        (torch.float32, 128, False),
    ],
)
def test_flash_attention_is_for_what_its_kernels_take(
    dtype: torch.dtype, head_dim: int, is_taken: bool
) -> None:
    query = SimpleNamespace(shape=(7, 4, head_dim), dtype=dtype, is_cuda=True)
    assert attention.is_for_flash_attention(query) == is_taken
    query.is_cuda = False
    assert not attention.is_for_flash_attention(query)


def test_dropout_of_attention_is_left_out_by_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against training without the dropout that a model's config.json asks for."""
    for name in ("is_for_flash_attention", "is_for_efficient_attention"):
        monkeypatch.setattr(attention, name, lambda query: True)
    micro_batch = collate(examples(9, 4, 7), replace(cuda_kernels(CPU), device=CPU))
    torch.manual_seed(0)
    query, key = torch.randn(2, micro_batch.num_tokens, 64, 8)
    found = attention.packed_attention(micro_batch, 0.5, 0, query, key, torch.ones_like(query))
    first = micro_batch.cu_seqlens[:-1]  # each of which sees itself alone
    assert set(found[first].flatten().tolist()) == {0.0, 2.0}
    assert found.mean().item() == pytest.approx(1, abs=0.05)
