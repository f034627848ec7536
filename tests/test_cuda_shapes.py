"""What a GPU would compute, as far as a CPU can tell: shapes, dtypes, devices, and no waiting.

A tensor on the meta device has everything but its values. Here it stands for one on a GPU: the
product is told that it is on CUDA, and whatever would mix devices or wait for a value fails.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from engine.cuda import pipeline
from engine.cuda.layers import fused_weights
from engine.cuda.pipeline import PipelinedModel
from engine.decoding import Completion
from engine.device import cuda_kernels
from engine.llama import Llama
from engine.memory import CachePlan
from engine.packing import IGNORE, Example, pack
from engine.sampling import Choose, sampled

GPU = torch.device("meta")
HALF = (torch.bfloat16, torch.float16)
FORWARD, BACKWARD = "aten::_flash_attention_forward", "aten::_flash_attention_backward"
COPIES = ("aten::to", "aten::_to_copy", "aten::copy_")


class Launches(TorchDispatchMode):
    """Counts the operators on the GPU.

    Raises AssertionError where one has a tensor on the CPU too, unless this is a single number
    (which a kernel takes as an argument) or a copy that is allowed, and where attention's operator
    is called with what its kernel refuses.
    """

    def __init__(self, may_copy: bool = False) -> None:
        super().__init__()
        self.may_copy = may_copy
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in (FORWARD, BACKWARD):
            check_attention(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        if any(tensor.device == GPU for tensor in tensors):
            is_copy = name in COPIES
            on_cpu = any(one.device != GPU and (one.dim() or is_copy) for one in tensors)
            assert not on_cpu or (is_copy and self.may_copy), f"{name} on both devices"
            self.count[name] += not (func.is_view or name == "aten::_unsafe_view")
        return result


def check_attention(*arguments: Any, seqused_k: Tensor | None = None) -> None:
    """What the operators require, from PyTorch's flash_api.cpp."""
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    is_forward = len(tensors) == 5
    query, key, value = tensors[:3] if is_forward else tensors[1:4]
    borders = tensors[3:5] if is_forward else tensors[6:8]
    heads, head_dim = query.shape[1:]
    assert query.dtype == key.dtype == value.dtype and query.dtype in HALF
    assert head_dim <= 256 and head_dim % 8 == 0
    assert key.shape == value.shape and heads % key.shape[1] == 0 and key.shape[2] == head_dim
    assert {one.stride(-1) for one in (query, key, value)} == {1}
    lengths = [] if seqused_k is None else [seqused_k]
    for numbers in (*borders, *lengths):
        assert numbers.dtype == torch.int32 and numbers.is_contiguous() and numbers.device == GPU
    assert borders[0].shape == borders[1].shape
    assert all(one.shape[0] == borders[0].shape[0] - 1 for one in lengths)
    if not is_forward:
        grad, output, logsumexp = tensors[0], *tensors[4:6]
        assert grad.dtype == output.dtype == query.dtype and grad.shape == output.shape
        assert logsumexp.dtype == torch.float32 and logsumexp.shape == query.shape[1::-1]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.device == GPU))


def llama(
    make_llama: Callable[..., LlamaForCausalLM], dtype: torch.dtype, **settings: int
) -> Llama:
    pretrained, kernels = make_llama(50, **settings).to(dtype).to(GPU), cuda_kernels(GPU)
    kernels.replace_linear_layers(pretrained)
    return Llama(pretrained, kernels)


ROWS = [Example([1, *range(3, length)], [IGNORE] * 3 + [7] * (length - 5)) for length in (9, 20, 6)]
SHAPES = [  # with whether FlashAttention has a kernel for it
    pytest.param(torch.bfloat16, {}, True, id="bfloat16"),
    pytest.param(torch.float16, {"num_key_value_heads": 4}, True, id="float16, no shared heads"),
    pytest.param(torch.float32, {}, False, id="float32"),
    pytest.param(torch.bfloat16, {"head_dim": 12}, False, id="a head_dim without a kernel"),
    pytest.param(torch.bfloat16, {"head_dim": 264}, False, id="a large head_dim"),
]


@pytest.mark.parametrize(("dtype", "settings", "is_flash"), SHAPES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_micro_batch_is_computed_without_the_host(
    make_llama: Callable[..., LlamaForCausalLM],
    on_gpu: None,
    dtype: torch.dtype,
    settings: dict[str, int],
    is_flash: bool,
    recomputed: bool,
) -> None:
    """Guards against mixed devices, wrong arguments, and a step that waits for its own values."""
    model = llama(make_llama, dtype, **settings).train()
    model.recomputed_blocks = len(model.blocks) if recomputed else 0
    for micro_batch in pack(ROWS, 32, model.kernels):
        with Launches() as launches:
            loss = model(micro_batch)
            (loss / micro_batch.num_labels).backward()
        assert loss.shape == () and loss.dtype == torch.float64
        layers = model.config.num_hidden_layers
        assert launches.count[FORWARD] == (is_flash and (1 + recomputed) * layers)
        assert launches.count[BACKWARD] == (is_flash and layers)
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == dtype


@pytest.mark.parametrize(("dtype", "settings", "is_flash"), SHAPES)
@pytest.mark.parametrize("choose", [None, partial(sampled, 0.7)], ids=["greedy", "sampled"])
@torch.inference_mode()
def test_decoding_is_computed_without_the_host(
    make_llama: Callable[..., LlamaForCausalLM],
    on_gpu: None,
    dtype: torch.dtype,
    settings: dict[str, int],
    is_flash: bool,
    choose: Choose | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a step that can't be captured: one that copies, or waits for a value."""
    model = llama(make_llama, dtype, **settings)
    layers = model.config.num_hidden_layers
    monkeypatch.setattr(pipeline, "Arrival", Unread)
    cached = PipelinedModel(model, CachePlan(6, 40, 4), choose)
    prompts = {2: [1, 5, 9], 0: [1, 4], 3: [1, 6, 7, 8]}
    running = {slot: Completion(0, len(prompt)) for slot, prompt in prompts.items()}
    for slot, prompt in prompts.items():
        cached.regions.take(slot, len(prompt))
    with Launches(may_copy=True) as launches:
        assert cached.prefill(prompts, running) == {}
    assert launches.count[FORWARD] == (is_flash and layers)
    step = cached._step(3)
    with Launches() as launches:
        step._run()  # what a graph captures
    assert launches.count[FORWARD] == (is_flash and layers)
    assert launches.count["aten::index_put_"] == 2 * layers + 1
    assert step.chosen.shape == (4,) and step.chosen.dtype == torch.long
    with Launches(may_copy=True):
        assert cached.decode_one_token(running) == {2: 7, 0: 7, 3: 7}


class Unread:
    """Instead of tokens from the GPU, which here have no values, as many sevens."""

    def __init__(self, tokens: Tensor) -> None:
        assert tokens.shape == (3,) and tokens.dtype == torch.long and tokens.device == GPU

    def wait(self) -> list[int]:
        return [7, 7, 7]


class SmallKernels:
    """Instead of the fused kernels: counts their calls, and makes their outputs."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def rotate_into(self, cos: Tensor, sin: Tensor, query: Tensor, *others: Tensor) -> Tensor:
        key, value, tokens, keys, values = others
        assert query.stride() == key.stride() == value.stride()  # without a copy
        assert cos.is_contiguous() and sin.shape == cos.shape == (len(query), 1, query.shape[2])
        assert tokens.shape == (len(query),) and keys.is_contiguous() and values.is_contiguous()
        self.count["rotate_into"] += 1
        return query.new_empty(query.shape)

    def rms_norm(self, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        assert hidden.is_contiguous() and weight.shape == hidden.shape[1:] and epsilon > 0
        self.count["rms_norm"] += 1
        return hidden.new_empty(hidden.shape)

    def gated(self, both: Tensor) -> Tensor:
        assert both.is_contiguous()
        self.count["gated"] += 1
        return both.new_empty(len(both), both.shape[1] // 2)


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_layer_of_a_decoding_step_is_few_kernels(
    make_llama: Callable[..., LlamaForCausalLM],
    on_gpu: None,
    is_fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against kernels of microseconds that add up to more than the products."""
    counts = []
    for layers in (1, 2):
        small = SmallKernels() if is_fused else None
        monkeypatch.setattr("engine.device.small_kernels", {GPU.type: small}.get)
        model = llama(make_llama, torch.bfloat16, num_hidden_layers=layers)
        with torch.inference_mode(), fused_weights(model):
            cached = PipelinedModel(model, CachePlan(4, 40, 3), None)
            step = cached._step(4)
            with Launches() as launches:
                step._run()
        counts.append(launches.count + (small.count if small else Counter()))
    each = counts[1] - counts[0]  # without zeros
    expected = {
        "rms_norm": 2,
        "linear": 2,  # queries, keys and values; gate and up
        "addmm_": 2,  # with the residual connection
        "_flash_attention_forward": 1,
    }
    if is_fused:
        expected |= {"rotate_into": 1, "gated": 1, "new_empty": 4}  # the last is no kernel
    else:
        expected |= {
            "mul": 1,  # the rotation of queries and keys: three, and a copy that roll makes
            "roll": 1,
            "addcmul": 1,
            "index_put_": 2,  # the cache
            "silu": 1,
            "mul_": 1,
        }
    assert {name.removeprefix("aten::"): each[name] for name in each} == expected
