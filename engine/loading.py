"""A model folder in Hugging Face format: fetched, refused where it is none that can be trained, and loaded."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from engine import packing
from engine.cpu.onednn import use_fast_products
from engine.tokenizer import Tokenizer, made_without_scores, read_files
from run.errors import UserError, cause_of
from run.files import LFS_POINTER
from run.manifest import DESCRIPTION_FILE
from run.training_json import is_of_an_older_version, read_description

# Errors end in one line of ours; their warnings on the way, and bars where there is no terminal, are noise.
transformers.utils.logging.disable_progress_bar()


transformers.utils.logging.set_verbosity_error()


# What quantised weights are accompanied by, where no config.json says that they are: GPTQ's and AWQ's zeros,
# bitsandbytes' maxima, FP8's scales.
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


# Weights in formats that are not read, and what to do with each.
OTHER_WEIGHTS = {
    "*.bin": "pickled weights only (.bin), which are not read: convert to safetensors",
    "*.pth": "weights in Meta's own format only (.pth), which are not read: name the repository whose name ends in -hf",
    "*.gguf": "weights in GGUF only, which are quantised: name the model that they were made from",
}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in ``folder``: its ids are those of its vocabulary file, or it is refused.

    A checkpoint of ours keeps the ids that it was trained on, whatever its files say; where they
    are others, that is said.
    """
    refuse_code(folder)
    try:
        files = read_files(folder)
    except OSError as error:
        raise UserError(
            f"model {folder}: its tokenizer can't be read ({error.strerror}): copy it anew"
        ) from None
    for name, content in files.items():
        _refuse_pointer(folder / name, content)
    description = read_description(folder) if (folder / DESCRIPTION_FILE).is_file() else None
    tokenizer = Tokenizer(files, str(folder), keep_ids=description is not None)
    if description is None or tokenizer.other_ids:
        return tokenizer
    older = is_of_an_older_version(description) and made_without_scores(files)
    if older or description.get("tokenizer", {}).get("other_ids"):
        tokenizer.other_ids = True
        print(
            f"model {folder}: was trained, by an older version, on ids that may not be SentencePiece's (it passed over "
            "the scores in its base's tokenizer.model); they are kept"
        )
    return tokenizer


def _refuse_pointer(file: Path, content: bytes) -> None:
    if content.startswith(LFS_POINTER):
        raise UserError(
            f"model {file}: is a pointer to a file that git has not fetched: run git lfs pull in its folder"
        )


def refuse_code(folder: Path) -> None:
    """Raises UserError where Transformers would offer to run Python code that comes with the model."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.exists() and "auto_map" in read_json(file):
            raise UserError(
                f"model {folder}: its {file.name} asks to run code of its own (auto_map): that is never done"
            )


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The model in ``folder``, in eval mode.

    Raises:
        UserError: it can't be read, is no Llama with full weights, or its files lack weights
            (Transformers would fill them at random with no more than a warning).
    """
    refuse_code(folder)
    _refuse_other_kinds(folder, read_json(folder / "config.json"))
    if (folder / "generation_config.json").exists():
        read_json(
            folder / "generation_config.json"
        )  # a damaged one would be passed over, with its EOS tokens
    config, shapes = _read_config(folder)
    try:
        _check_shapes(folder, shapes)
        model, report = LlamaForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # Transformers, safetensors and torch raise many types
        raise _damaged(folder, "weights", error) from None
    _check_report(folder, report)
    if (
        model.config.tie_word_embeddings
        and model.lm_head.weight is not model.model.embed_tokens.weight
    ):
        # Transformers 5 keeps a head that is not the embedding; 4, opening what is saved of it, would go by this alone.
        model.config.tie_word_embeddings = False
        print(
            f"model {folder}: has a head of its own, though its config.json says tie_word_embeddings: it is kept"
        )
    # Llama-2's own generation_config carries sampling settings: here decoding is greedy, and an
    # inconsistent one would make save_pretrained raise after the last epoch.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
        do_sample=False,
    )
    if device.type == "cpu":
        use_fast_products(model)
    return model.to(device).eval()


def _refuse_other_kinds(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError, with its own cause and cure, for each kind of folder that is no Llama with full weights."""
    if config.get("model_type") != "llama":
        raise UserError(
            f"model {folder} is of type {config.get('model_type')!r}: only 'llama' is supported"
        )
    if quantised := config.get("quantization_config"):
        method = (
            quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        )
        raise _quantised(folder, f"its config.json says {method}")
    if (folder / "adapter_config.json").is_file():
        raise adapter_refused(folder)
    there = sorted(file.name for file in folder.glob("*.safetensors"))
    if not there:
        raise _no_weights(folder)
    if not {"model.safetensors", "model.safetensors.index.json"} & {
        file.name for file in folder.iterdir()
    }:
        if "adapter_model.safetensors" in there:
            raise adapter_refused(folder)
        raise UserError(
            f"model {folder}: has {there[0]}, and neither a model.safetensors nor a model.safetensors.index.json that "
            "names its parts: copy the index too, or rename the file"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"model {folder}: its hidden_act is {config['hidden_act']!r}: only 'silu' is supported"
        )
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


def adapter_refused(folder: Path) -> UserError:
    weights = (
        "beside its weights"
        if list(folder.glob("model*.safetensors"))
        else "and not the weights themselves"
    )
    return UserError(
        f"model {folder}: holds a PEFT adapter (adapter_config.json) {weights}: merge the adapter into its base, or "
        "name a folder without it"
    )


def _quantised(folder: Path, why: str) -> UserError:
    return UserError(
        f"model {folder}: its weights are quantised ({why}), and are no weights to train or to measure exactly: name "
        "the model that they were made from"
    )


def _read_config(folder: Path) -> tuple[LlamaConfig, dict[str, tuple[int, ...]]]:
    """The ``config.json``, and the shape that it gives each weight."""
    try:
        config = LlamaConfig.from_pretrained(folder)
        if not getattr(config, "quantization_config", True):
            del config.quantization_config  # an empty one
        with torch.device("meta"):
            return config, {
                name: tuple(w.shape) for name, w in LlamaForCausalLM(config).state_dict().items()
            }
    except Exception as error:  # Transformers, its validation and torch raise many types
        raise UserError(
            f"model {folder}: no Llama can be made of its config.json ({cause_of(error)}): correct that setting, or "
            "take the config.json that belongs to its weights"
        ) from None


def _check_shapes(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError where a weight in the files has another shape than ``expected``."""
    rows: dict[str, int] = {}
    for name, shape, dtype in _stored_weights(folder):
        if dtype.startswith("F8") or dtype in ("U8", "I8", "I32"):
            raise _quantised(folder, f"{name} is stored as {dtype}")
        if (
            name in ("model.embed_tokens.weight", "lm_head.weight")
            and shape[1:] == expected[name][1:]
        ):
            rows[name] = shape[0]
        elif name in expected and shape != expected[name]:
            raise UserError(
                f"model {folder}: its {name} has the shape {shape}, and its config.json asks for {expected[name]}: the "
                "two do not belong together, copy them anew"
            )
    shown = " and ".join(f"{name} has {count} rows" for name, count in rows.items())
    vocab_size = expected["lm_head.weight"][0]
    if len(set(rows.values())) > 1:
        raise UserError(
            f"model {folder}: its {shown}: they do not belong together, copy its weights anew"
        )
    if rows and vocab_size not in rows.values():
        [count] = set(rows.values())
        raise UserError(
            f"model {folder}: its {shown}, and its config.json says vocab_size {vocab_size}: if its tokenizer has up "
            f"to {count} tokens, set vocab_size to {count} there, else copy both anew"
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
            with file.open("rb") as stream:
                _refuse_pointer(file, stream.read(len(LFS_POINTER)))
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    part = tensors.get_slice(name)
                    yield name, tuple(part.get_shape()), part.get_dtype()


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Raises UserError where files and config.json do not name the same weights."""
    unknown = sorted(
        key for key in report["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")
    )
    if odd := [key for key in unknown if any(part in QUANTISED for part in key.split("."))]:
        raise _quantised(folder, f"they come with {odd[0]}")
    if found := [key for key in unknown if "lora_" in key or key.startswith("base_model.")]:
        raise UserError(
            f"model {folder}: its files hold a PEFT adapter among the weights ({found[0]}): merge it into the model, "
            "and save that"
        )
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


def check_positions(model: LlamaForCausalLM, longest: int, what: str, cure: str) -> None:
    """Raises UserError where a sequence of ``longest`` tokens is more than the model has positions for."""
    positions = model.config.max_position_embeddings
    if longest > positions:
        raise UserError(
            f"{what} has {longest} tokens, over the model's {positions} positions: {cure}"
        )


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


def check_lengths(
    model: LlamaForCausalLM,
    examples: Sequence[packing.Example],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
) -> None:
    """Raises UserError where a row, or a prompt and its completion, has more tokens than the model positions."""
    longest = max(len(example.input_ids) for example in examples)
    check_positions(model, longest, "the longest row", "set a smaller max_length")
    prompt = max(
        *(example.labels.count(packing.IGNORE) for example in examples), *map(len, prompts)
    )
    check_positions(
        model,
        prompt + max_new_tokens,
        "a prompt with max_new_tokens",
        "set a smaller max_new_tokens",
    )
