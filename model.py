"""The tokenizer and the model, and the forward pass over packed sequences.

Weights, files and configuration are Transformers' Llama as it is. The forward pass is our own,
over the same modules, since three things cost others a third of their time and memory: padding,
what elementwise operations keep for the backward pass, and copies between layouts. What attends
to what is a parameter of it (`Attend`): packed sequences in training and validation, a cache in
decoding.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import memory
from attention import PackedAttention
from checkpoint import STATE_FILES, hash_file, verified_hashes
from config import local_path
from data import Batch, Example, collate, is_hub_id
from errors import UserError, one_line
from linear import product_plus, product_times, use_fast_products

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

# attend(layer, query, key, value) with [N, heads, head_dim] and [N, kv_heads, head_dim] gives
# [N, heads, head_dim], for N tokens of whichever sequences.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# remade(tensor, make): what is computed under it keeps make for its backward pass, not tensor.
Remade = Callable[[torch.Tensor, Callable[[], torch.Tensor]], AbstractContextManager[None]]


def _kept(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


# Errors end in one line of ours; their warnings on the way, and bars where there is no terminal, are noise.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- forward


def forward(
    model: LlamaForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attend: Attend,
    wanted: torch.Tensor | None = None,
) -> torch.Tensor:
    """The hidden states before the head.

    Args:
        input_ids, position_ids: ``[N]``, tokens of whichever sequences.
        attend: which of them attend to what; see `Attend`.
        wanted: ``[W]``, which tokens' states to give; None: all. The last layer computes nothing
            but keys and values of the others.

    Returns:
        ``[N, hidden]``, or ``[W, hidden]``.
    """
    hidden = model.model.embed_tokens(input_ids)
    cos, sin = model.model.rotary_emb(hidden, position_ids[None])
    recompute = model.model.gradient_checkpointing and model.training and torch.is_grad_enabled()
    prepare_rope, *parts = _parts(model, recompute)
    rope = prepare_rope(cos[0, :, None], sin[0, :, None])
    *layers, last = model.model.layers
    for layer, positions in [*((layer, None) for layer in layers), (last, wanted)]:
        if recompute:
            hidden = checkpoint(_layer, layer, hidden, *rope, attend, positions, *parts, use_reentrant=False)
        else:
            hidden = _layer(layer, hidden, *rope, attend, positions, *parts)
    return _norm(hidden, model.model.norm)


def forward_packed(model: LlamaForCausalLM, batch: Batch, wanted: torch.Tensor | None = None) -> torch.Tensor:
    """`forward` over packed sequences, each blind to the others."""
    attend = PackedAttention(batch, model.config.attention_dropout if model.training else 0.0)
    return forward(model, batch.input_ids[0], batch.position_ids[0], attend, wanted)


def _parts(model: LlamaForCausalLM, recompute: bool) -> tuple[Callable[..., Any], ...]:
    """What becomes of the rotary embedding's cos and sin, and what a layer does before and after its attention.

    As it is, compiled, keeping less for the backward pass, or without one.
    """
    # Not under no_grad: that is also where tensors are made again for a backward pass, bit for bit.
    if torch.is_inference_mode_enabled():
        return _signed_rope, _before_attention_in_decoding, _after_attention_in_decoding
    if torch.is_grad_enabled() and getattr(model.model, "compiled", False):
        return _half_rope, *_compiled_parts()
    if torch.is_grad_enabled() and not recompute:
        kept_less = (partial(part, remade=memory.remade) for part in (_before_attention, _after_attention))
        return _half_rope, *kept_less
    return _half_rope, _before_attention, _after_attention


def _half_rope(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For `_rotate`: of ``[N, 1, head_dim]`` one half, since both are the same."""
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def _signed_rope(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For `_rotate_in_decoding`: sin with the sign that each half takes."""
    half = cos.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


@cache
def _compiled_parts() -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Not in compiled code: attention, whose kernels are as good as they get, and whose sequences differ each time.
    # dynamic: one graph for every number of tokens; and since a layer's weights are inputs of it, for every layer.
    return tuple(torch.compile(part, dynamic=True, fullgraph=True) for part in (_before_attention, _after_attention))


def _layer(
    layer: "LlamaDecoderLayer",
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attend: Attend,
    wanted: torch.Tensor | None,
    before_attention: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    after_attention: Callable[..., torch.Tensor],
) -> torch.Tensor:
    attended = attend(layer.self_attn.layer_idx, *before_attention(layer, hidden, cos, sin))
    if wanted is not None:
        hidden, attended = hidden.index_select(0, wanted), attended.index_select(0, wanted)
    return after_attention(layer, hidden, attended)


def _before_attention(
    layer: "LlamaDecoderLayer", hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, remade: Remade = _kept
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attention, norm = layer.self_attn, layer.input_layernorm
    normed = _norm(hidden, norm)
    with remade(normed, lambda: _norm(hidden, norm)):
        query, key, value = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    query, key, value = (tensor.unflatten(-1, (-1, attention.head_dim)) for tensor in (query, key, value))
    return Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin), value


def _after_attention(
    layer: "LlamaDecoderLayer", hidden: torch.Tensor, attended: torch.Tensor, remade: Remade = _kept
) -> torch.Tensor:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    hidden = hidden + layer.self_attn.o_proj(attended.flatten(-2))
    normed = _norm(hidden, norm)
    with remade(normed, lambda: _norm(hidden, norm)):
        gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
    activated = SwiGLU.apply(gate, up)
    with remade(activated, lambda: SwiGLU.apply(gate, up)):
        return hidden + mlp.down_proj(activated)


def _before_attention_in_decoding(
    layer: "LlamaDecoderLayer", hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attention, normed = layer.self_attn, _norm_in_decoding(hidden, layer.input_layernorm)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return _rotate_in_decoding(query, cos, sin), _rotate_in_decoding(key, cos, sin), value


def _rotate_in_decoding(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`_rotate` in fewer passes, by what `_signed_rope` gives."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def _after_attention_in_decoding(
    layer: "LlamaDecoderLayer", hidden: torch.Tensor, attended: torch.Tensor
) -> torch.Tensor:
    mlp = layer.mlp
    hidden = product_plus(layer.self_attn.o_proj, attended.flatten(-2), hidden)
    normed = _norm_in_decoding(hidden, layer.post_attention_layernorm)
    activated = product_times(mlp.up_proj, normed, F.silu(mlp.gate_proj(normed), inplace=True))
    return product_plus(mlp.down_proj, activated, hidden)


def _norm_in_decoding(hidden: torch.Tensor, norm: "LlamaRMSNorm") -> torch.Tensor:
    if hidden.is_cuda or hidden.dtype != torch.float32:
        return _norm(hidden, norm)
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)  # fewer passes over it than `RMSNorm`
    scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return (hidden * scale).mul_(norm.weight)


def _norm(hidden: torch.Tensor, norm: "LlamaRMSNorm") -> torch.Tensor:
    if hidden.is_cuda:  # one kernel there
        return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
    return RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)


class RMSNorm(torch.autograd.Function):
    """Root mean square norm (arXiv:1910.07467) that keeps its input and one number a token.

    Computed in float32 or better, like Transformers' own.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return (exact * scale).to(hidden.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.to(scale.dtype) * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = (grad * weight).to(scale.dtype)
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_hidden = grad_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return grad_hidden.to(hidden.dtype), grad_weight, None


class Rotate(torch.autograd.Function):
    """Rotary position embedding (arXiv:2104.09864); its gradient is the rotation back, so nothing is kept."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``heads`` is ``[N, heads, head_dim]``; ``cos`` and ``sin`` are ``[N, 1, head_dim / 2]``."""
        ctx.rope = cos, sin
        return _rotate(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rotate(grad, *ctx.rope, -1), None, None


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    halves = heads.unflatten(-1, (2, -1))
    rotated = halves * cos[..., None, :]
    rotated[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-direction)
    rotated[..., 1, :].addcmul_(halves[..., 0, :], sin, value=direction)
    return rotated.flatten(-2)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202), keeping the two and computing silu(gate) again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def checkpoint_activations(model: LlamaForCausalLM) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    model.model.gradient_checkpointing = True


def compile_layers(model: LlamaForCausalLM) -> None:
    """Compile what a layer does before and after its attention, for passes with gradients.

    Raises:
        UserError: this machine can't, mostly for want of a C++ compiler.
    """
    model.model.compiled = True
    example = Example([0] * 8, [0] * 8)
    batch = collate([example, example]).to(model.device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's notes about its own ways
            forward_packed(model, batch, batch.loss_positions[::2]).sum().backward()
    except Exception as error:  # the compiler's layers raise many types
        raise UserError(
            f"compile true: torch.compile fails here ({_cause(error)}): install a C++ compiler, or set compile false"
        ) from None
    model.zero_grad()


# ---------------------------------------------------------------- loading


def fetch(name: str) -> Path:
    """The local folder of a model: ``name`` itself, or the hub's files, downloaded where they are not yet.

    Raises:
        UserError: there is no such folder, or the hub can't be reached, does not know it, or wants a
            licence accepted first.
    """
    folder = local_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model {name!r} is a folder without a config.json: name a Hugging Face model folder")
        return folder
    if folder.exists():
        raise UserError(f"model {name!r} is a file: name the Hugging Face model folder around it")
    if not is_hub_id(name):
        raise UserError(f"model {name!r} is no folder here and no hub id such as meta-llama/Llama-2-7b-hf")
    try:
        # safetensors only: what is pickled in a .bin would be executed, and Llama-2's repository holds both.
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except HfHubHTTPError as error:
        raise _refused(name, error) from None
    except Exception as error:  # the hub's client and its HTTP library raise many types
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"model {name!r} can't be loaded from the hub{offline} ({_cause(error)}): check the network, or name a "
            "local folder"
        ) from None


def _refused(name: str, error: HfHubHTTPError) -> UserError:
    status = error.response.status_code
    log_in = "log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, GatedRepoError) or (status in (401, 403) and not isinstance(error, RepositoryNotFoundError)):
        return UserError(f"model {name!r} is gated: accept its licence at huggingface.co/{name}, then {log_in}")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"model {name!r} is not on the hub, or is private: check the id, {log_in}")
    return UserError(f"model {name!r}: the hub answers {status} ({one_line(error)[:120]}): try again later")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in ``folder``, checked to have the BOS and EOS that data.py needs."""
    _refuse_code(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers and sentencepiece raise many types
        raise _damaged(folder, "tokenizer", error) from None
    for token in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, token) is None:
            raise UserError(f"model {folder}: its tokenizer has no {token}: use one of the Llama family")
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The model in ``folder``, in eval mode.

    Raises:
        UserError: it can't be read, is no Llama, or its files lack weights (Transformers would
            fill them at random with no more than a warning).
    """
    _refuse_code(folder)
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "llama":
        raise UserError(f"model {folder} is of type {kind!r}: only 'llama' is supported")
    if not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        raise UserError(f"model {folder}: has pickled weights only (.bin), which are not read: convert to safetensors")
    try:
        config = LlamaConfig.from_pretrained(folder)
        if (folder / "generation_config.json").exists():
            _read_json(folder / "generation_config.json")  # a damaged one would be passed over, with its EOS tokens
        model, report = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # as in load_tokenizer
        raise _damaged(folder, "weights", error) from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model {folder}: its files lack {len(missing)} weights, the first is {missing[0]}: copy it anew"
        )
    if config.hidden_act != "silu":
        raise UserError(f"model {folder}: its hidden_act is {config.hidden_act!r}: only 'silu' is supported")
    unknown = sorted(key for key in report["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise UserError(
            f"model {folder}: its files hold {len(unknown)} weights that its config.json has no place for, the "
            f"first is {unknown[0]}: the two do not belong together, copy them anew"
        )
    # Llama-2's own generation_config carries sampling settings: here decoding is greedy, and an
    # inconsistent one would make save_pretrained raise after the last epoch.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
        do_sample=False,
    )
    use_fast_products(model)
    return model.to(device).eval()


def own_memory(model: LlamaForCausalLM) -> None:
    """Copy the weights into memory of their own, where they are those of a mapped file.

    For a file that will be removed: it would keep its room on the disk as long as it is mapped.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _refuse_code(folder: Path) -> None:
    """Raises UserError where Transformers would offer to run Python code that comes with the model."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.exists() and "auto_map" in _read_json(file):
            raise UserError(
                f"model {folder}: its {file.name} asks to run code of its own (auto_map): that is never done"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file.parent, file.name, error) from None


def check_positions(model: LlamaForCausalLM, longest: int, what: str, cure: str) -> None:
    """Raises UserError where a sequence of ``longest`` tokens is more than the model has positions for."""
    positions = model.config.max_position_embeddings
    if longest > positions:
        raise UserError(f"{what} has {longest} tokens, over the model's {positions} positions: {cure}")


def _damaged(folder: Path, what: str, error: BaseException) -> UserError:
    return UserError(f"model {folder}: its {what} can't be read ({_cause(error)}): damaged or incomplete, copy it anew")


def _cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {one_line(error)[:160]}"


def check_vocabulary(model: LlamaForCausalLM, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Raises UserError where the tokenizer has ids that the model's embedding does not."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"model {name!r}: its tokenizer has {len(tokenizer)} tokens and its embedding {rows} rows: "
            "use the tokenizer that the model was made with"
        )


def eos_token_ids(model: LlamaForCausalLM, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that end a completion: the tokenizer's EOS, and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset({tokenizer.eos_token_id, *listed} - {None})


def weights_identity(folder: Path) -> str:
    """What tells the models in two folders apart: a hash over the names and contents of their files."""
    files = {folder / "config.json", *folder.glob("*.safetensors")} - {*folder.glob(STATE_FILES)}
    known = verified_hashes(folder)  # of a checkpoint of ours: 13 GB need not be read again
    hashes = [[file.name, known.get(file.name) or hash_file(file)] for file in sorted(files)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
