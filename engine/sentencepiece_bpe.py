"""A SentencePiece BPE model in the form of the `tokenizers` library."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

BLANK = "▁"  # SentencePiece's sign for a blank


def convert_sentencepiece(proto: Any) -> tokenizers.Tokenizer:
    """A tokenizer of the ``tokenizers`` library with the ids of a SentencePiece model of type BPE.

    SentencePiece merges the neighbours whose union has the highest score, the leftmost first
    (bpe_model.cc), which a list of merges ordered by that score comes to.

    Args:
        proto: the model as sentencepiece_model_pb2's ModelProto.
    """
    kinds = {
        name: number
        for number, name in enumerate(
            ("", "normal", "unknown", "control", "user", "unused", "byte")
        )
    }
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    bpe = (
        2  # of TrainerSpec.ModelType; unigram's ties are broken otherwise by the tokenizers library
    )
    if proto.trainer_spec.model_type != bpe:
        raise ValueError("not of type BPE, as Llama's are")
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(proto, kinds),
        unk_token=next(piece.piece for piece in proto.pieces if piece.type == kinds["unknown"]),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    backend = tokenizers.Tokenizer(model)
    spec = proto.normalizer_spec
    # Tokens that are found in the text before anything else is done to it: a blank put before what follows each of
    # them would be one too many. Without them it is put by the normalizer, which does so before a blank too.
    user = [piece.piece for piece in proto.pieces if piece.type == kinds["user"]]
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and user:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="first", split=False)
    elif spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    first_blank = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *first_blank]
    )
    special = (kinds["unknown"], kinds["control"])
    backend.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in proto.pieces
            if piece.type in special
        ]
    )
    backend.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in user])
    return backend


def _merges(proto: Any, kinds: Mapping[str, int]) -> list[tuple[str, str]]:
    scores = {
        piece.piece: piece.score
        for piece in proto.pieces
        if piece.type in (kinds["normal"], kinds["user"])
    }
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, -len(left), -len(right), left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]
