"""Text to token ids and back, by the vocabulary file that a model folder brings.

What a ``tokenizer.model`` says is what SentencePiece makes of it, what a ``tokenizer.json`` says is
what the ``tokenizers`` library makes of it, and nothing else counts: Transformers 5 builds a Llama
tokenizer anew from either, without the scores of the one and without the rules of the other, and
gives other ids for a quarter of GSM8K's rows. So that other programs read the same ids from a
checkpoint, it gets the base model's own files, and a ``tokenizer.json`` where there was none.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from engine.sentencepiece_bpe import BLANK, convert_sentencepiece
from run.errors import UserError, one_line

VOCABULARY_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"


CONFIG_FILE = "tokenizer_config.json"


SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"


# All that tokenizers of the Llama family come in; a checkpoint gets each as it came.
FILES = (
    *(VOCABULARY_FILE, SENTENCEPIECE_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt"),
)


# Classes that Transformers 4 and 5 both know: the one that takes tokenizer.json as it is, and Llama's.
GENERIC_CLASS = "PreTrainedTokenizerFast"


LLAMA_CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
)


# Where two readings of one vocabulary part, if they do: runs of blanks, line ends, digits, signs that are not ASCII,
# GSM8K's annotations, and what looks like a special token. No blank at the beginning: see `Tokenizer._disagreement`.
PROBES = (
    "Question: How many  are there?\nAnswer: 3 + 4 = <<3+4=7>>7\n#### 7",
    "week.  How   much    is it,     or      not?\n\n\nNo\n \n  1,450,000.50 and 007 at 12%\t\t$5 -10",
    "It’s 3 – 2 × €5 − ½, 七加八 é e\u0301 \U0001f600 \u00a0\u200b\u2028 \uff21\uff22 \ufb01 \r\n",
    "a </s> or <s> or <unk> or <pad> or <0x0A> in [INST] text [/INST]",
    "x" * 40 + " " * 40 + "x" + "\n" * 20 + "." * 20 + "=" * 20,
)


class Tokenizer:
    """The tokenizer of one model folder.

    Attributes:
        name: of the model, for messages.
        bos_token_id, eos_token_id: what begins and ends a sequence.
        unk_token_id: what stands for what the vocabulary lacks; None where it lacks nothing.
        other_ids: the ids are not, or may not be, those of the base's own vocabulary file, and are
            kept since the model was trained with them.
    """

    bos_token_id: int
    eos_token_id: int
    unk_token_id: int | None

    def __init__(self, files: Mapping[str, bytes], name: str, keep_ids: bool = False):
        """Read a tokenizer from the contents of its files, by their names (see `FILES`).

        Args:
            keep_ids: for what a model was trained with already: where its two vocabulary files
                disagree, the ids of its tokenizer.json are kept, and that is said.

        Raises:
            UserError: a file is damaged, the two vocabulary files disagree, BOS or EOS are missing,
                or the ids of the tokenizer.model can't be had.
        """
        self.name = name
        self._files = dict(files)
        self._vocabulary = VOCABULARY_FILE if VOCABULARY_FILE in files else SENTENCEPIECE_FILE
        self._exportable = False
        self._keep_ids = keep_ids
        self.other_ids = False
        self._config = self._read_json(CONFIG_FILE)
        self._reference = self._load_sentencepiece() if SENTENCEPIECE_FILE in files else None
        if VOCABULARY_FILE in files:
            self._backend = self._load_vocabulary()
        elif self._reference is not None:
            self._backend = self._convert_sentencepiece()
        else:
            raise UserError(
                f"model {name}: has neither {VOCABULARY_FILE} nor {SENTENCEPIECE_FILE}: copy its tokenizer files too"
            )
        self._backend.encode_special_tokens = True  # a "</s>" that stands in a row's text is text
        self._backend.no_truncation()
        self._backend.no_padding()
        for token in ("bos", "eos", "unk"):
            setattr(self, f"{token}_token_id", self._special_id(f"{token}_token"))
        if self._vocabulary == SENTENCEPIECE_FILE:
            self._add_borders()
        self._check_files_agree()

    def __len__(self) -> int:
        """How many tokens there are; ids are below that, unless the vocabulary has gaps."""
        return self._backend.get_vocab_size()

    def encode(self, texts: Sequence[str], lines: Sequence[int] = ()) -> list[list[int]]:
        """The ids of each text, without BOS and EOS.

        Args:
            lines: where in its file each text stands, for messages.

        Raises:
            UserError: a text is not what its ids say, holds what becomes a special token, or
                SentencePiece has other ids for it.
        """
        ids = self.ids_of(texts)
        special = {self.bos_token_id, self.eos_token_id}  # never for text, not even for "</s>"
        written = self._backend.decode_batch(ids, skip_special_tokens=False)
        for number, (text, its_ids, decoded) in enumerate(zip(texts, ids, written, strict=True)):
            where = f" in line {lines[number]}" if lines else ""
            if found := sorted(special & set(its_ids)):
                raise UserError(
                    f"model {self.name}: its tokenizer reads text{where} as its special token {self.piece(found[0])!r} "
                    f"({text[:60]!r}): use the tokenizer files that the model was made with"
                )
            # Apart from the first blank: Llama's tokenizers put one there, or take one away.
            if self.unk_token_id in its_ids or decoded not in (
                text,
                text.removeprefix(" "),
                f" {text}",
            ):
                raise UserError(
                    f"model {self.name}: its tokenizer loses text{where}: {_first_difference(text, decoded)}; use the "
                    "tokenizer files that the model was made with, all of them, or take what they can't hold out of "
                    "the row"
                )
        self._refuse_or_keep(self._disagreement(texts, ids))
        return ids

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for texts that hold no row of data: nothing is checked."""
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without special tokens, every blank as it is."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str | None:
        """How the vocabulary writes a token; None where it has no such id."""
        return self._backend.id_to_token(token_id)

    @property
    def identity(self) -> str:
        """From which file the ids are read, and its hash."""
        return f"{self._vocabulary} {hashlib.sha256(self._files[self._vocabulary]).hexdigest()}"

    def describe(self) -> dict[str, Any]:
        """What training.json says of it."""
        vocabulary, sha256 = self.identity.split()
        return {"vocabulary": vocabulary, "sha256": sha256, "other_ids": self.other_ids}

    def save(self, folder: Path) -> None:
        """Write files from which this program, Transformers 4 and Transformers 5 read the same ids."""
        if VOCABULARY_FILE not in self._files:
            self._files[VOCABULARY_FILE] = self._backend.to_str(pretty=True).encode()
        for name, content in self._files.items():
            (folder / name).write_bytes(content)
        if not self._exportable:
            self._make_exportable(folder)

    # ------------------------------------------------------------ reading

    def _read_json(self, name: str) -> dict[str, Any]:
        if name not in self._files:
            return {}
        try:
            content = json.loads(self._files[name])
            if not isinstance(content, dict):
                raise ValueError("no object")
            return content
        except (ValueError, RecursionError) as error:
            raise self._damaged(name, error) from None

    def _damaged(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"model {self.name}: its tokenizer can't be read ({name}: {one_line(error)[:160]}): damaged or incomplete, "
            "copy it anew"
        )

    def _load_vocabulary(self) -> tokenizers.Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_str(self._files[VOCABULARY_FILE].decode())
        except Exception as error:  # tokenizers has no type of its own
            raise self._damaged(VOCABULARY_FILE, error) from None
        if dropout := getattr(backend.model, "dropout", None):
            raise UserError(
                f"model {self.name}: its {VOCABULARY_FILE} has a dropout of {dropout:g}, with which no text has the "
                "same ids twice: set it to null there"
            )
        return backend

    def _special_id(self, token: str) -> int | None:
        """The id of ``bos_token``, ``eos_token`` or ``unk_token``: as a file says, or as the vocabulary does."""
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        if self._reference is not None:
            index = getattr(self._reference, f"{token.removesuffix('_token')}_id")()
            defaults[token] = self._reference.id_to_piece(index) if index >= 0 else None
        files = (
            (CONFIG_FILE, self._config),
            (SPECIAL_TOKENS_FILE, self._read_json(SPECIAL_TOKENS_FILE)),
        )
        said = [(content[token], f"its {name}") for name, content in files if token in content]
        said.sort(
            key=lambda one: one[0] is None
        )  # null is for what the other file does not say either
        content, said_by = said[0] if said else (defaults[token], "its vocabulary")
        if isinstance(content, dict):
            content = content.get("content")
        if content == "":
            raise UserError(
                f"model {self.name}: {said_by} has an empty {token}, as LLaMA-1's first copies have: write the token "
                f"that the model knows, {json.dumps({token: defaults[token]})[1:-1]}"
            )
        index = self._backend.token_to_id(content) if isinstance(content, str) else None
        if index is None and token != "unk_token":
            shown = (
                "there is none"
                if content is None
                else f"{said_by} says {content!r}, which it does not hold"
            )
            raise UserError(
                f"model {self.name}: its tokenizer has no {token} ({shown}): use one of the Llama family"
            )
        return index

    # ------------------------------------------------------------ SentencePiece

    def _load_sentencepiece(self) -> Any:
        """A SentencePieceProcessor; None for the file of OpenAI's tiktoken that goes by the same name."""
        import sentencepiece

        content = self._files[SENTENCEPIECE_FILE]
        if _is_tiktoken(content):
            if VOCABULARY_FILE in self._files:
                return None  # Llama-3's, beside the tokenizer.json that was made of it
            raise UserError(
                f"model {self.name}: its {SENTENCEPIECE_FILE} is tiktoken's, not SentencePiece's: add the "
                f"{VOCABULARY_FILE} that the model's repository in Hugging Face format has"
            )
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
        except Exception as error:  # sentencepiece raises many types
            raise self._damaged(SENTENCEPIECE_FILE, error) from None
        return processor

    def _convert_sentencepiece(self) -> tokenizers.Tokenizer:
        """The ``tokenizers`` library's form of the tokenizer.model, with the tokens that other files add."""
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(self._files[SENTENCEPIECE_FILE])
        try:
            backend = convert_sentencepiece(proto)
        except Exception as error:  # tokenizers has no type of its own
            raise UserError(self._refusal(one_line(error)[:160])) from None
        for token, index in self._added_tokens():
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
            if backend.token_to_id(token.content) != index:
                raise UserError(
                    f"model {self.name}: its added token {token.content!r} has the id {index}, and is number "
                    f"{backend.token_to_id(token.content)} of its {SENTENCEPIECE_FILE}: copy its tokenizer files anew"
                )
        return backend

    def _added_tokens(self) -> list[tuple[AddedToken, int]]:
        """What other files add to a tokenizer.model, with the ids, in their order."""
        said: dict[int, dict[str, Any]] = {}
        name = ADDED_TOKENS_FILE
        try:
            said |= {
                int(index): {"content": token} for token, index in self._read_json(name).items()
            }
            name = CONFIG_FILE
            said |= {
                int(index): flags
                for index, flags in (self._config.get("added_tokens_decoder") or {}).items()
            }
            kinds = ("single_word", "lstrip", "rstrip", "normalized")
            return [
                (
                    AddedToken(
                        flags["content"],
                        special=flags.get("special", True),
                        **{kind: flags[kind] for kind in kinds if kind in flags},
                    ),
                    index,
                )
                for index, flags in sorted(said.items())
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(name, error) from None

    def _add_borders(self) -> None:
        """Let a converted tokenizer put BOS before a text, as other programs that call it expect of Llama's."""
        borders = {
            "bos": self._config.get("add_bos_token", True),
            "eos": self._config.get("add_eos_token", False),
        }
        ids = {
            name: getattr(self, f"{name}_token_id") for name, wanted in borders.items() if wanted
        }
        tokens = [(self.piece(index), index) for index in ids.values()]
        first, last = ([self.piece(ids[name])] if name in ids else [] for name in ("bos", "eos"))
        self._backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[
                *first,
                "$A",
                *last,
                *(f"{token}:1" for token in first),
                "$B:1",
                *(f"{token}:1" for token in last),
            ],
            special_tokens=tokens,
        )

    def _check_files_agree(self) -> None:
        """Compare what tokenizers makes of its file with what SentencePiece makes of its own."""
        if self._reference is None:
            return
        count = self._reference.get_piece_size()
        pieces = [self._reference.id_to_piece(index) for index in range(count)]
        others = [
            index
            for index, piece in enumerate(pieces)
            if self.piece(index) != piece and not self._reference.is_unused(index)
        ]
        if others:
            shown = f"token {others[0]} is {pieces[others[0]]!r} and {self.piece(others[0])!r}"
            difference = f"{len(others)} of its {count} tokens, the first: {shown}"
        else:
            texts = [*PROBES, *_probes_of(pieces)]
            difference = self._disagreement(texts, self.ids_of(texts))
        self._refuse_or_keep(difference)

    def _refuse_or_keep(self, difference: str) -> None:
        if difference and self._keep_ids:
            print(
                f"model {self.name}: was trained on other ids than its {SENTENCEPIECE_FILE} gives; they are kept"
            )
            self._reference, self.other_ids = None, True  # said once
        elif difference:
            raise UserError(self._refusal(difference))

    def _refusal(self, difference: str) -> str:
        if VOCABULARY_FILE in self._files:
            return (
                f"model {self.name}: its {VOCABULARY_FILE} and its {SENTENCEPIECE_FILE} disagree ({difference}): "
                "remove the one that the model was not trained with, or copy both anew"
            )
        return (
            f"model {self.name}: the tokenizers library can't write the ids of its {SENTENCEPIECE_FILE} ({difference}):"
            f" add the {VOCABULARY_FILE} that was made for it"
        )

    def _disagreement(self, texts: Sequence[str], ids: Sequence[list[int]]) -> str:
        """Where ``ids`` are not those of SentencePiece; empty where they are.

        Not compared is a text with a token that other files add, of which SentencePiece knows nothing.
        """
        if self._reference is None:
            return ""
        size = self._reference.get_piece_size()
        for text, ours, theirs in zip(texts, ids, self._reference.encode(list(texts)), strict=True):
            if ours != theirs and max(ours, default=0) < size:
                position = _first_mismatch(ours, theirs)
                shown = [
                    [self._reference.id_to_piece(index) for index in some]
                    for some in (ours, theirs)
                ]
                near = [pieces[max(position - 2, 0) : position + 4] for pieces in shown]
                return f"in {text[:60]!r} one reads {near[0]} and SentencePiece {near[1]}"
        return ""

    # ------------------------------------------------------------ for other programs

    def _make_exportable(self, folder: Path) -> None:
        """Change in the saved files what another program can't read, or would read other ids from."""
        config = dict(self._config)
        if isinstance(
            more := config.get("extra_special_tokens"), list
        ):  # Transformers 4 wants a dictionary
            config["additional_special_tokens"] = [
                *config.get("additional_special_tokens", []),
                *more,
            ]
            del config["extra_special_tokens"]
        kind = config.get("tokenizer_class")
        if kind != GENERIC_CLASS and not (kind in LLAMA_CLASSES and self._is_read_alike(folder)):
            config["tokenizer_class"] = (
                GENERIC_CLASS  # it takes tokenizer.json as it is, and knows no defaults
            )
            for token in ("bos", "eos", "unk"):
                if (index := getattr(self, f"{token}_token_id")) is not None:
                    config.setdefault(f"{token}_token", self.piece(index))
        if config != self._config:
            self._write(folder, CONFIG_FILE, config)
        if {"add_bos_token", "add_eos_token"} & config.keys() and not self._has_its_borders(folder):
            self._add_borders()
            content = self._read_json(VOCABULARY_FILE)
            content["post_processor"] = json.loads(self._backend.to_str())["post_processor"]
            self._write(folder, VOCABULARY_FILE, content)
        self._exportable = True

    def _write(self, folder: Path, name: str, content: Mapping[str, Any]) -> None:
        self._files[name] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        (folder / name).write_bytes(self._files[name])

    def _is_read_alike(self, folder: Path) -> bool:
        """Whether Transformers' AutoTokenizer has the same ids for the probes."""
        other = _read_by_transformers(folder)
        if other is None:
            return False
        return other(
            list(PROBES), add_special_tokens=False, split_special_tokens=True
        ).input_ids == self.ids_of(PROBES)

    def _has_its_borders(self, folder: Path) -> bool:
        """Whether AutoTokenizer, called with a text, puts BOS and EOS around it as the config says."""
        other, text = _read_by_transformers(folder), PROBES[0]
        before = [self.bos_token_id] if self._config.get("add_bos_token", True) else []
        after = [self.eos_token_id] if self._config.get("add_eos_token", False) else []
        return other is None or other(text).input_ids == [*before, *self.ids_of([text])[0], *after]


def _read_by_transformers(folder: Path) -> Any:
    """The tokenizer in ``folder`` as other programs get it; None where they can't read it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception:  # it raises many types
        return None


def _is_tiktoken(content: bytes) -> bool:
    """Whether it is lines of a token in base64 and its rank."""
    token, _, rank = content.partition(b"\n")[0].strip().partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
    except ValueError:
        return False


def _first_difference(text: str, decoded: str) -> str:
    if not decoded.strip():
        return f"{text[:60]!r} becomes {decoded[:60]!r}"
    text, decoded = text.removeprefix(" "), decoded.removeprefix(" ")
    place = _first_mismatch(text, decoded)
    start = max(place - 20, 0)
    return f"{text[start : place + 20]!r} becomes {decoded[start : place + 20]!r}"


def _probes_of(pieces: Sequence[str]) -> list[str]:
    """Texts in which every piece stands alone, and among eight others, where merges compete.

    Each begins with a sign that keeps a blank from being the text's first: what becomes of that one
    differs even between files that Transformers itself made of one another.
    """
    pieces = [piece.replace(BLANK, " ") for piece in pieces]
    stride = max(len(pieces) // 8, 1)
    return [
        f".{text}"
        for text in (*pieces, *("".join(pieces[first::stride]) for first in range(stride)))
    ]


def _first_mismatch(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first position at which the two differ, or at which the shorter has ended."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(one), len(other)))


def read_files(folder: Path) -> dict[str, bytes]:
    """The contents of the tokenizer files in ``folder``, by name."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def made_without_scores(files: Mapping[str, bytes]) -> bool:
    """Whether a tokenizer.json is what Transformers 5 makes of a tokenizer.model, whose scores it passes over.

    Its merges then follow the order of the vocabulary alone, each piece's shortest left part first.
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
    parts = [number for number, _ in order]
    return order == sorted(order) and len(set(parts)) < len(parts)
