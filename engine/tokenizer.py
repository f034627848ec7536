"""Text to token ids and back, using the vocabulary file in a model folder.

A ``tokenizer.model`` gives the same ids as SentencePiece, and a ``tokenizer.json`` the same ids as
the ``tokenizers`` library. Transformers 5 reads neither for us. It builds a Llama tokenizer from
the file's vocabulary, ignores the scores of a ``tokenizer.model`` and the rules of a
``tokenizer.json``, and produces different ids for a quarter of GSM8K's rows. A checkpoint contains
the base model's own files, plus a ``tokenizer.json`` if there was none, so that other programs
produce the same ids.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.many_texts import ids_of_each, starts_of_each
from engine.sentencepiece_bpe import (
    PROBES,
    convert_sentencepiece,
    differing_tokens,
    disagreement,
    first_mismatch,
    probes_of,
)
from engine.tokenizer_export import SpecialTokens, boundaries, export, stop_at, write_files
from engine.tokenizer_files import (
    CONFIG_FILE,
    SENTENCEPIECE_FILE,
    VOCABULARY_FILE,
    added_tokens,
    read_object,
    read_sentencepiece,
    read_vocabulary,
    say_special,
    special_token,
)
from run.errors import UserError, one_line


class Tokenizer:
    """The tokenizer of one model folder.

    Attributes:
        name: of the model, for messages.
        bos_token_id, eos_token_id: of the tokens that begin and end a sequence.
        unk_token_id: of the token for unknown text; None if the vocabulary can represent any text.
        other_ids: whether the ids differ, or may differ, from the base's own vocabulary file. They
            are kept because the model was trained with them.
    """

    bos_token_id: int
    eos_token_id: int
    unk_token_id: int | None

    def __init__(self, files: Mapping[str, bytes], name: str, keep_ids: bool = False):
        """Read a tokenizer from the contents of its files, by name (`tokenizer_files.FILES`).

        Args:
            keep_ids: true for a model that we trained. If its two vocabulary files disagree, the
                ids of its tokenizer.json are kept, with a warning.

        Raises:
            UserError: a file is damaged, the two vocabulary files disagree, BOS or EOS is missing,
                or the ``tokenizers`` library can't reproduce the ids of the tokenizer.model.
        """
        self.name = name
        self.other_ids = False
        self._keep_ids = keep_ids
        self._files = dict(files)
        self._exported: dict[str, bytes] = {}
        config = read_object(files, CONFIG_FILE, name)
        self._reference = read_sentencepiece(files, name)
        if VOCABULARY_FILE in files:
            self._vocabulary_file = VOCABULARY_FILE
            self._backend = read_vocabulary(files, name)
        elif SENTENCEPIECE_FILE in files:
            self._vocabulary_file = SENTENCEPIECE_FILE
            self._backend = self._convert()
        else:
            raise UserError(
                f"model {name}: has neither {VOCABULARY_FILE} nor {SENTENCEPIECE_FILE}: copy its "
                "tokenizer files too"
            )
        self._backend.encode_special_tokens = True  # "</s>" in a row is ordinary text, not EOS
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_token_id = self._required_id("bos_token")
        self.eos_token_id = self._required_id("eos_token")
        self.unk_token_id = self._special_id("unk_token")[0]
        if self._vocabulary_file == SENTENCEPIECE_FILE:
            self._backend.post_processor = boundaries(config, self._special_tokens())
        self._compare_with_sentencepiece()

    def __len__(self) -> int:
        """The number of tokens. All ids are below it, unless the vocabulary has gaps."""
        return self._backend.get_vocab_size()

    @property
    def base_size(self) -> int:
        """The number of tokens without those that were added to the vocabulary later."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    # ------------------------------------------------------------ text and ids

    def encode(self, texts: Sequence[str], lines: Sequence[int] = ()) -> list[list[int]]:
        """The ids of each text, without BOS and EOS.

        Args:
            lines: the line of each text in its file, for messages.

        Raises:
            UserError: the ids of a text do not decode to that text, contain BOS or EOS, or differ
                from SentencePiece's.
        """
        ids = self.ids_of(texts)
        decoded = self._backend.decode_batch(ids, skip_special_tokens=False)
        for number, text in enumerate(texts):
            where = f" in line {lines[number]}" if lines else ""
            self._check_nothing_lost(text, ids[number], decoded[number], where)
        if self._reference is not None:
            self._refuse_or_keep(disagreement(self._reference, texts, ids))
        return ids

    def _check_nothing_lost(self, text: str, ids: list[int], decoded: str, where: str) -> None:
        # Not even the text "</s>" may become EOS, which would end the sequence there.
        if found := sorted({self.bos_token_id, self.eos_token_id} & set(ids)):
            raise UserError(
                f"model {self.name}: its tokenizer reads text{where} as its special token "
                f"{self.piece(found[0])!r} ({text[:60]!r}): use the tokenizer files that the model "
                "was made with"
            )
        # Llama's tokenizers add or remove one space at the beginning.
        intact = decoded in (text, text.removeprefix(" "), f" {text}")
        if not intact or self.unk_token_id in ids:
            raise UserError(
                f"model {self.name}: its tokenizer loses text{where}: "
                f"{_first_difference(text, decoded)}; use all the tokenizer files that the model "
                "was made with, or remove what they can't represent from the row"
            )

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` without its checks, for texts that the model never reads."""
        return ids_of_each(self._backend, texts)

    def starts_of(self, texts: Sequence[str]) -> list[list[int]]:
        """The position in its text of the first character that each of `ids_of` writes.

        A character of several bytes, each a token of its own, is the first of all of these.
        """
        return starts_of_each(self._backend, texts)

    def say_special(self, prompt: str) -> None:
        """Print, once, where special tokens are read or added otherwise than in other programs."""
        say_special(self._backend, prompt, self.bos_token_id, self.name)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without special tokens and with every space unchanged."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str | None:
        """The token with this id, as the vocabulary spells it; None if there is none."""
        return self._backend.id_to_token(token_id)

    def id_of(self, token: str) -> int | None:
        """The id of a token, spelled as in the vocabulary; None if there is none."""
        return self._backend.token_to_id(token)

    # ------------------------------------------------------------ saving

    @property
    def identity(self) -> str:
        """The name of the file that the ids are read from, and its hash."""
        content = self._files[self._vocabulary_file]
        return f"{self._vocabulary_file} {hashlib.sha256(content).hexdigest()}"

    def describe(self) -> dict[str, Any]:
        """The record of this tokenizer for training.json."""
        vocabulary, sha256 = self.identity.split()
        return {"vocabulary": vocabulary, "sha256": sha256, "other_ids": self.other_ids}

    def save(self, folder: Path) -> None:
        """Write files from which this program and Transformers 4 and 5 produce the same ids."""
        stop_at(folder, self.eos_token_id)
        if self._exported:
            write_files(folder, self._exported)
            return
        files = dict(self._files)
        if VOCABULARY_FILE not in files:
            files[VOCABULARY_FILE] = self._backend.to_str(pretty=True).encode()
        self._exported = export(folder, files, self._special_tokens(), self.ids_of(PROBES))

    # ------------------------------------------------------------ reading

    def _convert(self) -> tokenizers.Tokenizer:
        """Convert the tokenizer.model, and add the tokens from the other files."""
        try:
            backend = convert_sentencepiece(self._files[SENTENCEPIECE_FILE])
        except Exception as error:  # tokenizers has no exception type of its own
            raise self._refusal(one_line(error)[:160]) from None
        for token, index in added_tokens(self._files, self.name):
            if token.special:
                backend.add_special_tokens([token])
            else:
                backend.add_tokens([token])
            actual = backend.token_to_id(token.content)
            if actual != index:
                raise UserError(
                    f"model {self.name}: its added token {token.content!r} has the id {index}, but "
                    f"is number {actual} of its {SENTENCEPIECE_FILE}: copy its tokenizer files "
                    "again"
                )
        return backend

    def _required_id(self, token: str) -> int:
        index, problem = self._special_id(token)
        if index is None:
            is_lone = CONFIG_FILE not in self._files
            cure = (
                f"copy its {CONFIG_FILE} too" if is_lone else "use a tokenizer of the Llama family"
            )
            raise UserError(f"model {self.name}: its tokenizer has no {token} ({problem}): {cure}")
        return index

    def _special_id(self, token: str) -> tuple[int | None, str]:
        """The id of ``bos_token``, ``eos_token`` or ``unk_token``; or None, and the reason."""
        default = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}[token]
        if self._reference is not None:
            index = getattr(self._reference, token.replace("token", "id"))()
            default = self._reference.id_to_piece(index) if index >= 0 else None
        elif self.id_of(default) is None:
            default = None
        content, source = special_token(self._files, token, default, self.name)
        if content is None:
            return None, "no file names one"
        index = self._backend.token_to_id(content) if isinstance(content, str) else None
        return index, f"{source} says {content!r}, which its vocabulary does not contain"

    def _special_tokens(self) -> SpecialTokens:
        ids = {
            "bos_token": self.bos_token_id,
            "eos_token": self.eos_token_id,
            "unk_token": self.unk_token_id,
        }
        return {name: (self.piece(i), i) for name, i in ids.items() if i is not None}

    # ------------------------------------------------------------ agreement with SentencePiece

    def _compare_with_sentencepiece(self) -> None:
        if self._reference is None:
            return
        difference = differing_tokens(self._reference, self.piece)
        if not difference:
            probes = probes_of(self._reference)
            difference = disagreement(self._reference, probes, self.ids_of(probes))
        self._refuse_or_keep(difference)

    def _refuse_or_keep(self, difference: str) -> None:
        if difference and not self._keep_ids:
            raise self._refusal(difference)
        if difference:
            print(
                f"model {self.name}: was trained with ids other than its {SENTENCEPIECE_FILE}'s; "
                "they are kept"
            )
            self.other_ids = True
            self._reference = None  # stops comparing, since one warning is enough

    def _refusal(self, difference: str) -> UserError:
        if VOCABULARY_FILE in self._files:
            return UserError(
                f"model {self.name}: its {VOCABULARY_FILE} and its {SENTENCEPIECE_FILE} disagree "
                f"({difference}): remove the one that the model was not trained with, or copy both "
                "again"
            )
        return UserError(
            f"model {self.name}: the tokenizers library can't reproduce the ids of its "
            f"{SENTENCEPIECE_FILE} ({difference}): add the {VOCABULARY_FILE} that was made for it"
        )


def _first_difference(text: str, decoded: str) -> str:
    if not decoded.strip():
        return f"{text[:60]!r} becomes {decoded[:60]!r}"
    text, decoded = text.removeprefix(" "), decoded.removeprefix(" ")
    place = first_mismatch(text, decoded)
    start = max(place - 20, 0)
    return f"{text[start : place + 20]!r} becomes {decoded[start : place + 20]!r}"
