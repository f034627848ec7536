"""A model folder in Hugging Face format: fetched, refused where it is none that can be trained, and loaded."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import safe_open
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from checkpoint import DESCRIPTION_FILE, STATE_FILES, hash_file, read_description, verified_hashes
from config import local_path
from data import is_hub_id
from errors import UserError, cause_of, one_line
from linear import use_fast_products
from tokenizer import FILES, Tokenizer, made_without_scores, read_files

# Errors end in one line of ours; their warnings on the way, and bars where there is no terminal, are noise.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

# What quantised weights are accompanied by, where no config.json says that they are: GPTQ's and AWQ's zeros,
# bitsandbytes' maxima, FP8's scales.
QUANTISED = ("qweight", "qzeros", "g_idx", "absmax", "quant_map", "weight_scale", "weight_scale_inv", "weight_packed")
# Weights in formats that are not read, and what to do with each.
OTHER_WEIGHTS = {
    "*.bin": "pickled weights only (.bin), which are not read: convert to safetensors",
    "*.pth": "weights in Meta's own format only (.pth), which are not read: name the repository whose name ends in -hf",
    "*.gguf": "weights in GGUF only, which are quantised: name the model that they were made from",
}


# ---------------------------------------------------------------- fetching


def fetch(name: str) -> Path:
    """The local folder of a model: ``name`` itself, or the hub's files, downloaded where they are not yet.

    Raises:
        UserError: there is no such folder, or the hub can't be reached, does not know it, or wants a
            licence accepted first.
    """
    folder = local_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise _adapter(folder)
            raise UserError(
                f"model {name!r}: this folder has no config.json: name a checkpoint or a Hugging Face model folder"
            )
        return folder
    if folder.exists():
        raise UserError(f"model {name!r} is a file: name the Hugging Face model folder around it")
    if not is_hub_id(name):
        raise UserError(f"model {name!r} is no folder here and no hub id such as meta-llama/Llama-2-7b-hf")
    try:
        # safetensors only: what is pickled in a .bin would be executed, and Llama-2's repository holds both.
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", *FILES]))
    except HfHubHTTPError as error:
        raise _refused(name, error) from None
    except Exception as error:  # the hub's client and its HTTP library raise many types
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"model {name!r} can't be loaded from the hub{offline} ({cause_of(error)}): check the network, or name a "
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


# ---------------------------------------------------------------- the tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in ``folder``: its ids are those of its vocabulary file, or it is refused.

    A checkpoint of ours keeps the ids that it was trained on, whatever its files say; where they
    are others, that is said.
    """
    refuse_code(folder)
    try:
        files = read_files(folder)
    except OSError as error:
        raise UserError(f"model {folder}: its tokenizer can't be read ({error.strerror}): copy it anew") from None
    description = read_description(folder) if (folder / DESCRIPTION_FILE).is_file() else None
    tokenizer = Tokenizer(files, str(folder), keep_ids=description is not None)
    if description is not None and "tokenizer" not in description and made_without_scores(files):
        print(
            f"model {folder}: was trained, by an older version, on ids that may not be SentencePiece's (it passed over "
            "the scores in its base's tokenizer.model); they are kept"
        )
    return tokenizer


def refuse_code(folder: Path) -> None:
    """Raises UserError where Transformers would offer to run Python code that comes with the model."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.exists() and "auto_map" in read_json(file):
            raise UserError(
                f"model {folder}: its {file.name} asks to run code of its own (auto_map): that is never done"
            )


# ---------------------------------------------------------------- the model


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The model in ``folder``, in eval mode.

    Raises:
        UserError: it can't be read, is no Llama with full weights, or its files lack weights
            (Transformers would fill them at random with no more than a warning).
    """
    refuse_code(folder)
    _refuse_other_kinds(folder, read_json(folder / "config.json"))
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")  # a damaged one would be passed over, with its EOS tokens
    try:
        config = LlamaConfig.from_pretrained(folder)
        _check_shapes(folder, config)
        model, report = LlamaForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # Transformers, safetensors and torch raise many types
        raise _damaged(folder, "weights", error) from None
    _check_report(folder, report)
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


def _refuse_other_kinds(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError, with its own cause and cure, for each kind of folder that is no Llama with full weights."""
    if config.get("model_type") != "llama":
        raise UserError(f"model {folder} is of type {config.get('model_type')!r}: only 'llama' is supported")
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise _quantised(folder, f"its config.json says {method}")
    if (folder / "adapter_config.json").is_file():
        raise _adapter(folder)
    if not list(folder.glob("*.safetensors")):
        raise _no_weights(folder)
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"model {folder}: its hidden_act is {config['hidden_act']!r}: only 'silu' is supported")
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        raise UserError(
            f"model {folder}: its config.json has pad_token_id {pad} with vocab_size {rows}: set pad_token_id to null "
            "there, since nothing is padded here"
        )


def _no_weights(folder: Path) -> UserError:
    index = folder / "pytorch_model.bin.index.json"  # of a .bin that was not downloaded
    for pattern, what in OTHER_WEIGHTS.items():
        if list(folder.glob(pattern)) or (pattern == "*.bin" and index.is_file()):
            return UserError(f"model {folder}: has {what}")
    return UserError(
        f"model {folder}: has no weights in safetensors: copy its *.safetensors too, or convert what there is (a "
        "repository may hold pickled .bin files only, which are not read)"
    )


def _adapter(folder: Path) -> UserError:
    weights = "beside its weights" if list(folder.glob("model*.safetensors")) else "and not the weights themselves"
    return UserError(
        f"model {folder}: holds a PEFT adapter (adapter_config.json) {weights}: merge the adapter into its base, or "
        "name a folder without it"
    )


def _quantised(folder: Path, why: str) -> UserError:
    return UserError(
        f"model {folder}: its weights are quantised ({why}), and are no weights to train or to measure exactly: name "
        "the model that they were made from"
    )


def _check_shapes(folder: Path, config: LlamaConfig) -> None:
    """Raises UserError where a weight in the files has another shape than ``config`` gives it."""
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).state_dict().items()}
    for name, shape, dtype in _stored_weights(folder):
        if dtype.startswith("F8") or dtype in ("U8", "I8", "I32"):
            raise _quantised(folder, f"{name} is stored as {dtype}")
        if name not in expected or shape == expected[name]:
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight") and shape[1:] == expected[name][1:]:
            cure = f"if its tokenizer has up to {shape[0]} tokens, set vocab_size to {shape[0]} there"
            raise UserError(
                f"model {folder}: its {name} has {shape[0]} rows, and its config.json says vocab_size "
                f"{expected[name][0]}: {cure}, else copy both anew"
            )
        raise UserError(
            f"model {folder}: its {name} has the shape {shape}, and its config.json asks for {expected[name]}: the two "
            "do not belong together, copy them anew"
        )


def _stored_weights(folder: Path) -> Iterable[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each weight, from the headers of the files that Transformers would read."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        files = {folder / "model.safetensors"}
    else:
        files = {folder / str(name) for name in read_json(index).get("weight_map", {}).values()}
    for file in sorted(files):
        if file.is_file():  # one that is not there is said when the weights are loaded
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    part = tensors.get_slice(name)
                    yield name, tuple(part.get_shape()), part.get_dtype()


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Raises UserError where files and config.json do not name the same weights."""
    unknown = sorted(key for key in report["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq"))
    if odd := [key for key in unknown if any(part in QUANTISED for part in key.split("."))]:
        raise _quantised(folder, f"they come with {odd[0]}")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model {folder}: its files lack {len(missing)} weights, the first is {missing[0]}: copy it anew"
        )
    if unknown:
        raise UserError(
            f"model {folder}: its files hold {len(unknown)} weights that its config.json has no place for, the "
            f"first is {unknown[0]}: the two do not belong together, copy them anew"
        )


def own_memory(model: LlamaForCausalLM) -> None:
    """Copy the weights into memory of their own, where they are those of a mapped file.

    For a file that will be removed: it would keep its room on the disk as long as it is mapped.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UserError where it is none."""
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file.parent, file.name, error) from None


def _damaged(folder: Path, what: str, error: BaseException) -> UserError:
    return UserError(
        f"model {folder}: its {what} can't be read ({cause_of(error)}): damaged or incomplete, copy it anew"
    )


# ---------------------------------------------------------------- does it fit what it is used for


def check_positions(model: LlamaForCausalLM, longest: int, what: str, cure: str) -> None:
    """Raises UserError where a sequence of ``longest`` tokens is more than the model has positions for."""
    positions = model.config.max_position_embeddings
    if longest > positions:
        raise UserError(f"{what} has {longest} tokens, over the model's {positions} positions: {cure}")


def check_ids(model: LlamaForCausalLM, sequences: Iterable[list[int]], name: str) -> None:
    """Raises UserError where a sequence holds an id that the embedding has no row for.

    A tokenizer may have more tokens than that, such as a pad token, as long as no text needs them.
    """
    rows = model.get_input_embeddings().num_embeddings
    largest = max((max(ids) for ids in sequences if ids), default=0)
    if largest >= rows:
        raise UserError(
            f"model {name!r}: its tokenizer writes the id {largest}, and its embedding has {rows} rows: use the "
            "tokenizer that the model was made with"
        )


def eos_token_ids(model: LlamaForCausalLM, tokenizer: Tokenizer) -> frozenset[int]:
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
