"""The tokenizer and the model, and attention over packed sequences.

The model is Transformers' Llama as it is; only the attention is ours. Transformers hands every
keyword argument that it does not know on to the attention function, so a forward pass says
there what its row consists of:

- ``model(input_ids, position_ids, seqlens=..., cu_seqlens=...)``: packed sequences, each blind
  to the others (training, validation, prefill);
- the same with ``kv_cache=...``: the keys and values are kept in the cache as well (prefill);
- ``model(input_ids, position_ids, kv_cache=...)``: one new token for each slot of the cache.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from torch.nn.attention import varlen
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from checkpoint import STATE_FILE
from config import local_path
from data import is_hub_id
from errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from generate import KVCache

ATTENTION = "packed"  # our attention's name in Transformers' registry


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- attention


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    seqlens: tuple[int, ...] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    kv_cache: "KVCache | None" = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence, for Transformers' `AttentionInterface`.

    Args:
        query: ``[B, heads, T, head_dim]``; key and value: ``[B, kv_heads, T, head_dim]``.
            B is 1 for packed sequences, and T is 1 for a decoding step.
        seqlens, cu_seqlens: see `data.Batch`. None in a decoding step.
        kv_cache: keeps the keys and values of a prefill; holds the past of a decoding step.

    Returns:
        ``[B, T, heads, head_dim]``, and None for the attention weights.
    """
    if seqlens is None:
        if kv_cache is None:
            raise TypeError("packed attention needs seqlens, or a kv_cache for a decoding step")
        output = kv_cache.attend(module.layer_idx, query, key, value, scaling)
        return output.transpose(1, 2), None
    if kv_cache is not None:
        kv_cache.write_prompts(module.layer_idx, key, value)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _attend_varlen(query, key, value, scaling, cu_seqlens, max(seqlens)), None
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        for q, k, v in zip(query.split(seqlens, 2), key.split(seqlens, 2), value.split(seqlens, 2), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    """All packed sequences in one FlashAttention kernel; shapes as in `packed_attention`."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (
        tensor[0].repeat_interleave(repeats, dim=0).transpose(0, 1)  # [T, heads, head_dim]
        for tensor, repeats in ((query, 1), (key, groups), (value, groups))
    )
    output = varlen.varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, window_size=(-1, 0)
    )
    return output.unsqueeze(0)


transformers.AttentionInterface.register(ATTENTION, packed_attention)
# Errors end in one line of ours; their warnings on the way, and bars where there is no terminal, are noise.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


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
    """The model in ``folder``, with our attention, in eval mode.

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
        model, report = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
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
    return model.to(device).eval()


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


def checkpoint_activations(model: LlamaForCausalLM) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # its name before Transformers 5.2x
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
    """What tells the models in two folders apart: SHA-256 over the names and contents of their files."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        if file.name != STATE_FILE:
            with file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
