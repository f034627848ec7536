"""Rejects model folders that can't be trained or measured, naming the cause and the cure."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from run.errors import UserError, cause_of
from run.files import LFS_POINTER

# Name parts of tensors that accompany quantised weights, to recognise them even if config.json does
# not mention quantisation: zeros of GPTQ and AWQ, maxima of bitsandbytes, scales of FP8.
QUANTISED = (
    "qweight",
    "qzeros",
    "g_idx",
    "absmax",
    "quant_map",
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
)

# Weight formats that are not read, and what to do about each.
OTHER_WEIGHTS = {
    "*.bin": "pickled weights only (.bin), which are not read: convert them to safetensors",
    "*.pth": "weights in Meta's own format only (.pth), which are not read: "
    "name the repository whose name ends in -hf",
    "*.gguf": "weights in GGUF only, which are quantised: name the model that they were made from",
}

Shape = tuple[int, ...]


# ---------------------------------------------------------------- what the folder contains


def check_folder(folder: Path) -> None:
    """Raises UserError if the folder is not an unquantised Llama in safetensors."""
    check_config(folder)
    if (folder / "adapter_config.json").is_file():
        raise adapter_found(folder)
    _check_weight_files(folder)
    if (folder / "generation_config.json").exists():
        # Transformers would ignore a damaged one.
        _check_generation(folder, read_json(folder / "generation_config.json"))


def _check_generation(folder: Path, settings: Mapping[str, Any]) -> None:
    ids = settings.get("eos_token_id")
    if not all(isinstance(each, int) for each in each_of(ids)):
        raise UserError(
            f"model {folder}: its generation_config.json has eos_token_id {ids!r}: it must be the "
            "id of a token, or a list of ids"
        )


def each_of(ids: Any) -> list[Any]:
    """The ids of an ``eos_token_id``, which may be one, a list, or None."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def check_config(folder: Path) -> None:
    """Raises UserError if config.json does not describe an unquantised Llama."""
    refuse_code(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "llama":
        raise UserError(
            f"model {folder} is of type {config.get('model_type')!r}: only 'llama' is supported"
        )
    if quantisation := config.get("quantization_config"):
        is_mapping = isinstance(quantisation, dict)
        method = quantisation.get("quant_method", "unknown") if is_mapping else quantisation
        raise quantised(folder, f"its config.json says {method}")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"model {folder}: its hidden_act is {config['hidden_act']!r}: only 'silu' is supported"
        )
    for part in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        rotated = part.get("partial_rotary_factor", 1) if isinstance(part, dict) else 1
        if rotated not in (None, 1):
            raise UserError(
                f"model {folder}: its config.json has partial_rotary_factor {rotated!r}: only 1 is "
                "supported, since a Llama rotates all of each head"
            )
    dropout = config.get("attention_dropout", 0.0)
    if isinstance(dropout, int | float) and not 0 <= dropout <= 1:
        raise UserError(
            f"model {folder}: its config.json has attention_dropout {dropout}: it must be from 0 "
            "to 1"
        )
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        raise UserError(
            f"model {folder}: its config.json has pad_token_id {pad} with vocab_size {rows}: set "
            "pad_token_id to null there; no pad token is needed here"
        )


def refuse_code(folder: Path) -> None:
    """Raises UserError if Transformers would offer to run Python code that comes with the model."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.exists() and "auto_map" in read_json(file):
            raise UserError(
                f"model {folder}: its {file.name} refers to code of its own (auto_map), which is "
                "never run: name a model that needs none"
            )


def refuse_pointer(file: Path, content: bytes) -> None:
    """Raises UserError if a file is a Git LFS pointer."""
    if content.startswith(LFS_POINTER):
        raise UserError(
            f"model {file}: is a pointer to a file that git has not fetched: run git lfs pull in "
            "its folder"
        )


def _check_weight_files(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if not found:
        raise _no_weights(folder)
    if names & {"model.safetensors", "model.safetensors.index.json"}:
        return
    if "adapter_model.safetensors" in found:
        raise adapter_found(folder)
    raise UserError(
        f"model {folder}: has {found[0]}, but neither model.safetensors nor the "
        "model.safetensors.index.json that names its parts: copy the index too, or rename the file"
    )


def _no_weights(folder: Path) -> UserError:
    has_index_of_bin = (folder / "pytorch_model.bin.index.json").is_file()
    for pattern, what in OTHER_WEIGHTS.items():
        if list(folder.glob(pattern)) or (pattern == "*.bin" and has_index_of_bin):
            return UserError(f"model {folder}: has {what}")
    return UserError(
        f"model {folder}: has no weights in safetensors: copy its *.safetensors too, or convert "
        "what there is (a repository may have pickled .bin files only, which are not read)"
    )


def adapter_found(folder: Path) -> UserError:
    has_weights = bool(list(folder.glob("model*.safetensors")))
    where = "alongside its weights" if has_weights else "but not the weights themselves"
    return UserError(
        f"model {folder}: contains a PEFT adapter (adapter_config.json) {where}: merge the adapter "
        "into its base (for one of this program: python merge.py), or name a folder without it"
    )


def quantised(folder: Path, why: str) -> UserError:
    return UserError(
        f"model {folder}: its weights are quantised ({why}), so they can't be trained or measured "
        "exactly: name the model that they were made from"
    )


def damaged(folder: Path, what: str, error: BaseException) -> UserError:
    return UserError(
        f"model {folder}: its {what} can't be read ({cause_of(error)}): damaged or incomplete, "
        "copy it again"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises UserError if it can't be read."""
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file.parent, file.name, error) from None


# ---------------------------------------------------------------- the weights


def check_shapes(folder: Path, expected: Mapping[str, Shape]) -> None:
    """Raises UserError if a weight in the files is quantised or has an unexpected shape.

    Transformers' own errors for these name neither the cause nor the cure.
    """
    vocabulary_rows: dict[str, int] = {}
    for name, shape, dtype in _stored_weights(folder):
        if dtype.startswith("F8") or dtype in ("U8", "I8", "I32"):
            raise quantised(folder, f"{name} is stored as {dtype}")
        is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
        if is_vocabulary and shape[1:] == expected[name][1:]:
            vocabulary_rows[name] = shape[0]
        elif name in expected and shape != expected[name]:
            raise UserError(
                f"model {folder}: its {name} has the shape {shape}, but its config.json asks for "
                f"{expected[name]}: these files do not belong together, copy both again"
            )
    _check_vocabulary_rows(folder, vocabulary_rows, expected["lm_head.weight"][0])


def _check_vocabulary_rows(folder: Path, rows: Mapping[str, int], vocab_size: int) -> None:
    shown = " and ".join(f"{name} has {count} rows" for name, count in rows.items())
    if len(set(rows.values())) > 1:
        raise UserError(
            f"model {folder}: its {shown}: they do not belong together, copy its weights again"
        )
    if rows and vocab_size not in rows.values():
        [count] = set(rows.values())
        raise UserError(
            f"model {folder}: its {shown}, but its config.json says vocab_size {vocab_size}: if "
            f"its tokenizer has up to {count} tokens, set vocab_size to {count} there, else copy "
            "both again"
        )


def _stored_weights(folder: Path) -> Iterable[tuple[str, Shape, str]]:
    """Name, shape and dtype of each weight, from the headers of the files to be loaded."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        files = {folder / "model.safetensors"}
    else:
        files = {folder / str(name) for name in read_json(index).get("weight_map", {}).values()}
    for file in sorted(files):
        if file.is_file():  # a missing one is reported when the weights are loaded
            with file.open("rb") as stream:
                refuse_pointer(file, stream.read(len(LFS_POINTER)))
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    part = tensors.get_slice(name)
                    yield name, tuple(part.get_shape()), part.get_dtype()


def check_names(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises UserError if the files and config.json do not name the same weights.

    Transformers would initialise missing weights at random, with only a warning.

    Args:
        missing: weights of the model that the files lack.
        unexpected: tensors in the files that the model lacks.
    """
    missing = sorted(missing)
    unknown = sorted(key for key in unexpected if not key.endswith("rotary_emb.inv_freq"))
    for key in unknown:
        if set(key.split(".")) & set(QUANTISED):
            raise quantised(folder, f"they come with {key}")
    for key in unknown:
        if "lora_" in key or key.startswith("base_model."):
            raise UserError(
                f"model {folder}: its files contain a PEFT adapter among the weights ({key}): "
                "merge it into the model, and save the result"
            )
    if missing and unknown:
        raise UserError(
            f"model {folder}: its files lack {len(missing)} weights, the first is {missing[0]}, "
            f"and contain {len(unknown)} that its config.json has no place for, the first is "
            f"{unknown[0]}: save it again under the names of the former, or copy both again"
        )
    if missing:
        raise UserError(
            f"model {folder}: its files lack {len(missing)} weights, the first is {missing[0]}: "
            "copy it again"
        )
    if unknown:
        raise UserError(
            f"model {folder}: its files contain {len(unknown)} weights that its config.json "
            f"has no place for, the first is {unknown[0]}: they do not belong together, copy both "
            "again"
        )
