"""Tokenizer files from which Transformers 4 and 5 produce the same ids as this program."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from engine.refusals import each_of
from engine.sentencepiece_bpe import PROBES
from engine.tokenizer_files import CONFIG_FILE, VOCABULARY_FILE

# Classes that both Transformers 4 and 5 know: the one that uses tokenizer.json unchanged, and
# Llama's, which may build a different tokenizer from it.
GENERIC_CLASS = "PreTrainedTokenizerFast"
LLAMA_CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
)

# What other programs are to add to a prompt. Each sequence that we train on or decode begins with
# BOS, whatever the base's tokenizer does.
TRAINED_WITH = {"add_bos_token": True, "add_eos_token": False}

# Piece and id of "bos_token", "eos_token" and, if the tokenizer has one, "unk_token".
SpecialTokens = Mapping[str, tuple[str, int]]


def export(
    folder: Path,
    files: Mapping[str, bytes],
    special_tokens: SpecialTokens,
    probe_ids: Sequence[list[int]],
) -> dict[str, bytes]:
    """Write ``files``, changed where another program would fail or produce different ids.

    Args:
        folder: where to write. Its config.json, if there is one, helps Transformers choose a class.
        files: contents by name, including a tokenizer.json.
        probe_ids: the ids of `PROBES`.

    Returns:
        The contents as written.
    """
    exported = dict(files)
    write_files(folder, exported)
    original = json.loads(files.get(CONFIG_FILE, b"{}"))
    config = _rename_list_of_special_tokens(original)
    kind = config.get("tokenizer_class")
    if kind != GENERIC_CLASS and not (kind in LLAMA_CLASSES and _reads(folder, probe_ids)):
        config["tokenizer_class"] = GENERIC_CLASS
        for name, (piece, _) in special_tokens.items():  # the generic class has no defaults
            config.setdefault(name, piece)
    config |= {name: value for name, value in TRAINED_WITH.items() if name in config}
    if config != original:
        exported[CONFIG_FILE] = _json_bytes(config)
        (folder / CONFIG_FILE).write_bytes(exported[CONFIG_FILE])
    if not _adds_boundaries(folder, [special_tokens["bos_token"][1], *probe_ids[0]]):
        vocabulary = json.loads(exported[VOCABULARY_FILE])
        backend = tokenizers.Tokenizer.from_str(exported[VOCABULARY_FILE].decode())
        backend.post_processor = boundaries(config, special_tokens)
        vocabulary["post_processor"] = json.loads(backend.to_str())["post_processor"]
        exported[VOCABULARY_FILE] = _json_bytes(vocabulary)
        (folder / VOCABULARY_FILE).write_bytes(exported[VOCABULARY_FILE])
    return exported


def stop_at(folder: Path, eos_token_id: int) -> None:
    """Add the token to those at which ``generate`` stops with the model in ``folder``.

    A base's generation_config.json may lack the EOS of its tokenizer, or name another token. An
    adapter has none; its base's is used.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return
    config = json.loads(file.read_bytes())
    listed = each_of(config.get("eos_token_id"))
    if eos_token_id not in listed:
        config["eos_token_id"] = [eos_token_id, *listed] if listed else eos_token_id
        file.write_bytes(_json_bytes(config))


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def boundaries(
    config: Mapping[str, Any], special_tokens: SpecialTokens
) -> processors.TemplateProcessing:
    """A post-processor that adds BOS and EOS to a text, as far as ``config`` asks for them.

    This program adds them itself, but other programs expect a Llama tokenizer to do so.
    """
    bos, eos = _boundary_tokens(config, special_tokens)
    first, last = [piece for piece, _ in bos], [piece for piece, _ in eos]
    second = [f"{piece}:1" for piece in first], [f"{piece}:1" for piece in last]
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *second[0], "$B:1", *second[1]],
        special_tokens=[*bos, *eos],
    )


def _boundary_tokens(
    config: Mapping[str, Any], special_tokens: SpecialTokens
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The tokens before and after a text; by default BOS before it and nothing after it."""
    before = [special_tokens["bos_token"]] if config.get("add_bos_token", True) else []
    after = [special_tokens["eos_token"]] if config.get("add_eos_token", False) else []
    return before, after


def _rename_list_of_special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Move a list to the name that Transformers 4 expects; its extra_special_tokens is a dict."""
    config = dict(config)
    if isinstance(config.get("extra_special_tokens"), list):
        extra = config.pop("extra_special_tokens")
        known = config.get("additional_special_tokens", [])
        config["additional_special_tokens"] = [*known, *extra]
    return config


def _reads(folder: Path, probe_ids: Sequence[list[int]]) -> bool:
    """Whether AutoTokenizer encodes the probes as these ids."""
    theirs = _read_by_transformers(folder)
    if theirs is None:
        return False
    encoded = theirs(list(PROBES), add_special_tokens=False, split_special_tokens=True)
    return encoded.input_ids == list(probe_ids)


def _adds_boundaries(folder: Path, bounded: list[int]) -> bool:
    """Whether AutoTokenizer encodes the first probe as these ids, or can't load the folder."""
    theirs = _read_by_transformers(folder)
    return theirs is None or theirs(PROBES[0]).input_ids == bounded


def _read_by_transformers(folder: Path) -> Any:
    """The tokenizer in ``folder`` as other programs load it; None if they fail to."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception:  # it raises many types
        return None


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
