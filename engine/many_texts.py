"""Encodes many texts, such as the 100,000 rows of augmented data, in little memory."""

from collections.abc import Iterator, Sequence

import tokenizers

# Texts in one call of a library: enough to keep all processors busy. What it returns of each takes
# up to 20 kilobytes, so that of all texts at once would be gigabytes.
AT_ONCE = 4096


def parts_of(texts: Sequence[str]) -> Iterator[list[str]]:
    """``texts`` in parts of at most `AT_ONCE`."""
    for start in range(0, len(texts), AT_ONCE):
        yield list(texts[start : start + AT_ONCE])


def ids_of_each(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens at its borders.

    Equal texts, such as the prompts of augmented data, are encoded once and get the same list.
    """
    ids: dict[str, list[int]] = {}
    numbers: dict[int, int] = {}  # one object for each id, and not one for each token
    for some in parts_of(list(dict.fromkeys(texts))):
        encodings = backend.encode_batch_fast(some, add_special_tokens=False)
        for text, encoding in zip(some, encodings, strict=True):
            found = encoding.ids
            ids[text] = list(map(numbers.setdefault, found, found))
    return [ids[text] for text in texts]


def starts_of_each(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The position in its text of the first character that each of its ids writes."""
    return [
        _starts(encoding.offsets)
        for some in parts_of(texts)
        for encoding in backend.encode_batch(some, add_special_tokens=False)
    ]


def _starts(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The first of each pair, or the end before it where a tokenizer trims spaces off its pairs."""
    starts, end_before = [], 0
    for start, end in offsets:
        starts.append(min(start, end_before))
        end_before = end
    return starts
