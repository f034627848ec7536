"""The files of a tokenizer: their names, and functions that read or reject each."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from run.errors import UserError, first_few, one_line
from run.files import say_once

VOCABULARY_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"

# Every file that a tokenizer of the Llama family may have; a checkpoint gets a copy of each.
FILES = (
    VOCABULARY_FILE,
    SENTENCEPIECE_FILE,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


def read_files(folder: Path) -> dict[str, bytes]:
    """The contents of the tokenizer files in ``folder``, by name."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


# In all functions below, ``files`` maps names to contents, and ``model`` is for messages.


def read_object(files: Mapping[str, bytes], name: str, model: str) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (ValueError, RecursionError) as error:
        raise damaged(model, name, error) from None


def damaged(model: str, name: str, error: Exception) -> UserError:
    return UserError(
        f"model {model}: its tokenizer can't be read ({name}: {one_line(error)[:160]}): "
        "damaged or incomplete, copy it again"
    )


def read_vocabulary(files: Mapping[str, bytes], model: str) -> tokenizers.Tokenizer:
    """The tokenizer.json, as the ``tokenizers`` library reads it."""
    try:
        backend = tokenizers.Tokenizer.from_str(files[VOCABULARY_FILE].decode())
    except Exception as error:  # tokenizers has no exception type of its own
        raise damaged(model, VOCABULARY_FILE, error) from None
    if dropout := getattr(backend.model, "dropout", None):
        raise UserError(
            f"model {model}: its {VOCABULARY_FILE} has a dropout of {dropout:g}, which gives a "
            "text different ids each time: set it to null there"
        )
    return backend


def read_sentencepiece(files: Mapping[str, bytes], model: str) -> Any:
    """The tokenizer.model as a SentencePieceProcessor; None if there is none.

    Llama-3's repositories have a file of this name in the format of OpenAI's tiktoken. It is
    ignored if there is also a tokenizer.json, which was made from it.
    """
    import sentencepiece

    if SENTENCEPIECE_FILE not in files:
        return None
    if _is_tiktoken(files[SENTENCEPIECE_FILE]):
        if VOCABULARY_FILE in files:
            return None
        raise UserError(
            f"model {model}: its {SENTENCEPIECE_FILE} is tiktoken's, not SentencePiece's: add the "
            f"{VOCABULARY_FILE} from the model's repository in Hugging Face format"
        )
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(files[SENTENCEPIECE_FILE])
    except Exception as error:  # sentencepiece raises many types
        raise damaged(model, SENTENCEPIECE_FILE, error) from None
    return processor


def _is_tiktoken(content: bytes) -> bool:
    """Whether the first line is a token in base64 and its rank, such as ``IQ== 0``."""
    token, _, rank = content.partition(b"\n")[0].strip().partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
    except ValueError:
        return False


def added_tokens(files: Mapping[str, bytes], model: str) -> list[tuple[AddedToken, int]]:
    """The tokens that other files add to a tokenizer.model, with their ids, in order of id."""
    flags_of: dict[int, dict[str, Any]] = {}
    name = ADDED_TOKENS_FILE
    try:
        for content, index in read_object(files, name, model).items():
            flags_of[int(index)] = {"content": content}
        name = CONFIG_FILE
        decoder = read_object(files, name, model).get("added_tokens_decoder") or {}
        for index, flags in decoder.items():
            flags_of[int(index)] = flags
        return [(_added_token(flags), index) for index, flags in sorted(flags_of.items())]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(model, name, error) from None


def _added_token(flags: Mapping[str, Any]) -> AddedToken:
    kinds = ("single_word", "lstrip", "rstrip", "normalized")
    return AddedToken(
        flags["content"],
        special=flags.get("special", True),
        **{kind: flags[kind] for kind in kinds if kind in flags},
    )


def say_special(backend: tokenizers.Tokenizer, prompt: str, bos_token_id: int, model: str) -> None:
    """Print, once, where special tokens are read or added otherwise than in other programs.

    `engine.tokenizer.Tokenizer` reads those in ``prompt`` as text. In a chat template they are
    meant as tokens. It adds BOS in any case, which the tokenizer of Yi or SmolLM2 does not.
    """
    if backend.encode("").ids[:1] != [bos_token_id]:
        say_once(
            "BOS",
            f"model {model}: here each sequence begins with {backend.id_to_token(bos_token_id)!r}, "
            "which the model's own tokenizer does not add",
        )
    added = backend.get_added_tokens_decoder().values()
    found = [token.content for token in added if token.special and token.content in prompt]
    if found:
        say_once(
            "special tokens",
            f"prompt: read as plain text, though special tokens of model {model}: "
            f"{first_few(map(repr, found))} (BOS and EOS are added in any case)",
        )


def special_token(
    files: Mapping[str, bytes], token: str, default: str | None, model: str
) -> tuple[Any, str]:
    """The value of ``bos_token``, ``eos_token`` or ``unk_token``, and the name of its source.

    The first file that names a token wins. A null is used only if no file names one.

    Args:
        default: the vocabulary's own token, used if no file mentions ``token``; None if it has
            none.
    """
    sources = [
        (content[token], f"its {name}")
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE)
        if token in (content := read_object(files, name, model))
    ]
    named = [(content, source) for content, source in sources if content is not None]
    content, source = (named or sources or [(default, "its vocabulary")])[0]
    if isinstance(content, dict):
        content = content.get("content")
    if content == "":
        known = f", {json.dumps({token: default})[1:-1]}" if default else ""
        raise UserError(
            f"model {model}: {source} has an empty {token}, as LLaMA-1's first copies have: write "
            f"the token that the model knows{known}"
        )
    return content, source


def made_without_scores(files: Mapping[str, bytes]) -> bool:
    """Whether Transformers 5 made a tokenizer.json from a tokenizer.model, ignoring its scores.

    If so, its merges follow the order of the vocabulary, each piece's shortest left part first.
    """
    if VOCABULARY_FILE not in files or SENTENCEPIECE_FILE in files:
        return False
    try:
        model = json.loads(files[VOCABULARY_FILE])["model"]
        vocabulary, merges = model["vocab"], model["merges"]
        if not model["byte_fallback"]:
            return False
        order = [(vocabulary["".join(merge)], len(merge[0])) for merge in merges]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    merged = [index for index, _ in order]
    return order == sorted(order) and len(set(merged)) < len(merged)
