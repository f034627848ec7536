"""Converts SentencePiece's BPE models to the `tokenizers` library, and compares the ids."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from engine.many_texts import parts_of

BLANK = "▁"  # SentencePiece's symbol for a space

# Values from sentencepiece_model.proto: TrainerSpec.ModelType and SentencePiece.Type.
BPE = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# Texts that reveal whether two tokenizers disagree: runs of spaces, line ends, digits, non-ASCII
# characters, GSM8K's annotations, and text that looks like a special token. None begins with a
# space, since even equivalent files made by Transformers treat that differently.
PROBES = (
    "Question: How many  are there?\nAnswer: 3 + 4 = <<3+4=7>>7\n#### 7",
    "week.  How   much    is it,     or      not?\n\n\nNo\n \n  "
    "1,450,000.50 and 007 at 12%\t\t$5 -10",
    "It’s 3 – 2 × €5 − ½, 七加八 é e\u0301 \U0001f600 \u00a0\u200b\u2028 \uff21\uff22 \ufb01 \r\n",
    "a </s> or <s> or <unk> or <pad> or <0x0A> in [INST] text [/INST]",
    "x" * 40 + " " * 40 + "x" + "\n" * 20 + "." * 20 + "=" * 20,
)


# ---------------------------------------------------------------- conversion


def convert_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
    """A tokenizer of the ``tokenizers`` library with the ids of a SentencePiece model.

    SentencePiece merges the neighbours whose union has the highest score, the leftmost first
    (bpe_model.cc). A list of merges sorted by that score has the same effect.

    Args:
        content: of a valid tokenizer.model.

    Raises:
        ValueError: the model is not of type BPE. The library breaks a unigram model's ties
            differently, so its ids could differ.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(content)
    if proto.trainer_spec.model_type != BPE:
        raise ValueError("not of type BPE, as Llama's are")
    pieces = proto.pieces
    model = models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(pieces)},
        merges=_merges(pieces),
        unk_token=next(piece.piece for piece in pieces if piece.type == UNKNOWN),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    backend = tokenizers.Tokenizer(model)
    user_defined = [piece.piece for piece in pieces if piece.type == USER_DEFINED]
    _set_normalizer(backend, proto.normalizer_spec, bool(user_defined))
    first_blank = [decoders.Strip(content=" ", left=1)]
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *(first_blank if proto.normalizer_spec.add_dummy_prefix else []),
        ]
    )
    special = [piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL)]
    backend.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in special]
    )
    backend.add_tokens(
        [AddedToken(piece, normalized=False, special=False) for piece in user_defined]
    )
    return backend


def _merges(pieces: Sequence[Any]) -> list[tuple[str, str]]:
    scores = {piece.piece: piece.score for piece in pieces if piece.type in (NORMAL, USER_DEFINED)}
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                ranked.append((-score, -len(left), -len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in ranked]


def _set_normalizer(backend: tokenizers.Tokenizer, spec: Any, has_user_defined: bool) -> None:
    """Set how a text is normalised before it is split, and how its first space is added.

    User-defined pieces are matched before normalisation, and the normaliser would add a space after
    each of them. If there are any, the pre-tokenizer adds the first space instead. Otherwise the
    normaliser does, since only it also adds one to a text that begins with a space.
    """
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and has_user_defined:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="first", split=False)
    elif spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])


# ---------------------------------------------------------------- agreement


def differing_tokens(reference: Any, piece_of: Callable[[int], str | None]) -> str:
    """Describes the tokens that differ from SentencePiece's; empty if none do.

    Args:
        reference: the SentencePieceProcessor.
        piece_of: returns the other tokenizer's piece for an id.
    """
    count = reference.get_piece_size()
    differing = [
        index
        for index in range(count)
        if piece_of(index) != reference.id_to_piece(index) and not reference.is_unused(index)
    ]
    if not differing:
        return ""
    first = differing[0]
    shown = f"token {first} is {reference.id_to_piece(first)!r} and {piece_of(first)!r}"
    return f"{len(differing)} of its {count} tokens, the first: {shown}"


def probes_of(reference: Any) -> list[str]:
    """`PROBES`, each piece by itself, and the pieces in rows of about eight, where merges compete.

    Each text of pieces begins with a full stop, so that none begins with a space (see `PROBES`).
    """
    count = reference.get_piece_size()
    pieces = [reference.id_to_piece(index).replace(BLANK, " ") for index in range(count)]
    stride = max(count // 8, 1)
    rows = ["".join(pieces[first::stride]) for first in range(stride)]
    return [*PROBES, *(f".{text}" for text in (*pieces, *rows))]


def disagreement(reference: Any, texts: Sequence[str], ids: Sequence[list[int]]) -> str:
    """Describes the first text whose ``ids`` are not SentencePiece's; empty if none differ.

    A text with a token that other files add is skipped, since SentencePiece does not know it.
    """
    size = reference.get_piece_size()
    theirs_of_each = chain.from_iterable(map(reference.encode, parts_of(texts)))
    for text, ours, theirs in zip(texts, ids, theirs_of_each, strict=True):
        if ours != theirs and max(ours, default=0) < size:
            start = max(first_mismatch(ours, theirs) - 2, 0)
            near = [
                [reference.id_to_piece(index) for index in sequence[start : start + 6]]
                for sequence in (ours, theirs)
            ]
            return f"in {text[:60]!r} one reads {near[0]} and SentencePiece {near[1]}"
    return ""


def first_mismatch(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first position at which the two differ, or the length of the shorter one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(one), len(other)))
