"""Reads rows of GSM8K, from files in several formats or from the hub, and checks them."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from grading import rules
from run.errors import UserError, counted, first_few, one_line
from run.files import LFS_POINTER
from run.paths import is_hub_id, local_path

LINE_FORMS, TABLE_FORM = ("{split}.jsonl", "{split}.json"), "{split}.parquet"

# What follows the name of the split, such as "-00000-of-00001.parquet".
SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.parquet")


@dataclass(frozen=True)
class Problem:
    """One row of GSM8K: ``answer`` contains the reasoning and ends in ``#### NUMBER``.

    Attributes:
        line: its position, counted from 1: the line in its file, or the row in an array, in Parquet
            files or on the hub.
    """

    question: str
    answer: str
    line: int = field(default=0, compare=False)

    @cached_property
    def gold(self) -> str:
        """The final number as the data set writes it, commas included."""
        return rules.gold_answer(self.answer)


def load_problems(dataset: str, split: str) -> list[Problem]:
    """Load and check every row of ``split`` (``train`` or ``test``).

    Args:
        dataset: a hub id, or a local folder that contains each split in one format.

    Raises:
        UserError: there is no such data set, or a row is not valid. The message names the file and
            the line.
    """
    folder = local_path(dataset)
    if folder.is_dir():
        problems = _read_folder(folder, split)
    elif folder.exists():
        raise UserError(
            f"dataset {dataset!r} is a file: name the folder that contains it; {_forms('train')}"
        )
    elif not is_hub_id(dataset):
        raise UserError(
            f"dataset {dataset!r} is neither a folder here nor a hub id such as openai/gsm8k: "
            "check the path"
        )
    else:
        problems = _download(dataset, split)
    golds = {f"row {problem.line}": problem.gold for problem in problems}
    rules.say_odd_golds(golds, f"{dataset}, {split}")
    return problems


def check_disjoint(train: Iterable[Problem], test: Iterable[Problem]) -> None:
    """Raises UserError if a test question is in ``train``, which would make the score worthless.

    Spaces and capitals do not make it another question.
    """
    of_test = {_essence(problem.question) for problem in test}
    shared = {problem.question for problem in train if _essence(problem.question) in of_test}
    if shared:
        raise UserError(
            f"train and test share {counted(len(shared), 'question')}, such as "
            f"{one_line(min(shared))[:80]!r}: remove them from train"
        )


def _essence(question: str) -> str:
    return " ".join(question.casefold().split())


def _download(dataset: str, split: str) -> list[Problem]:
    import datasets
    import huggingface_hub

    # Suppress its messages about retries, which would precede our error message.
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(dataset, "main", split=split)
    except Exception as error:  # the hub's client raises many types
        raise UserError(
            f"dataset {dataset!r}: is not a folder here, and can't be loaded from the hub "
            f"({type(error).__name__}: {one_line(error)[:200]}): "
            f"check the id and the network, or name a local folder: {_forms(split)}"
        ) from None
    return _check_rows(rows, f"{dataset}, {split} row")


# ---------------------------------------------------------------- the files of a folder


def _forms(split: str) -> str:
    """Describes the files in which a folder may contain a split."""
    other = "test" if split == "train" else "train"
    return (
        f"a data set folder contains {split}.jsonl (one object per line), {split}.json (or one "
        f"array of all), {split}.parquet or {split}-00000-of-00001.parquet (these two also in its "
        f"folder main or data), and the same of {other}"
    )


def _read_folder(folder: Path, split: str) -> list[Problem]:
    """The rows of ``split``, in whichever format the folder has them.

    Raises:
        UserError: the folder has the split in no format or in several, or a row is not valid.
    """
    found = _find_forms(folder, split)
    if len(found) > 1:
        names = ", ".join(str(files[0].relative_to(folder)) for files in found)
        raise UserError(
            f"{folder}: contains {split} in {len(found)} forms ({names}): leave only the right one"
        )
    files = found[0] if found else [folder / f"{split}.jsonl"]
    problems: list[Problem] = []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: can't be read ({error.strerror}): {_forms(split)}") from None
        if content.startswith(LFS_POINTER):
            raise UserError(
                f"{file}: is a pointer to a file that git has not fetched: run git lfs pull in its "
                "folder"
            )
        if file.suffix == ".parquet":
            problems += _parse_parquet(content, file, len(problems))
        else:
            problems += _parse_json(content, file)
    if not problems:
        raise UserError(f"{files[0]}: is empty: it needs rows with question and answer")
    return problems


def _find_forms(folder: Path, split: str) -> list[list[Path]]:
    """The files of each format in which the folder has ``split``, shards in their order."""
    found: list[list[Path]] = []
    # A clone of a hub repository has main or data, and may have other configurations too.
    for place in (folder, folder / "main", folder / "data"):
        try:
            names = {file.name for file in place.iterdir()} if place.is_dir() else set()
        except OSError as error:
            raise UserError(f"{place}: can't be read ({error.strerror}): {_forms(split)}") from None
        single = [TABLE_FORM] if place != folder else [*LINE_FORMS, TABLE_FORM]
        found += [[place / name] for form in single if (name := form.format(split=split)) in names]
        shards = sorted(
            name for name in names if name.startswith(split) and SHARD.fullmatch(name[len(split) :])
        )
        if shards:
            _check_shards(place, split, shards)
            found.append([place / name for name in shards])
    return found


def _check_shards(place: Path, split: str, shards: Sequence[str]) -> None:
    """Raises UserError if a shard is missing, or belongs to a different number of shards."""
    total = int(shards[-1].rpartition("-of-")[2].removesuffix(".parquet"))
    expected = {f"{split}-{number:05}-of-{total:05}.parquet" for number in range(min(total, 10**5))}
    missing, foreign = sorted(expected - set(shards)), sorted(set(shards) - expected)
    if missing or foreign:
        lacks = f"lacks {first_few(missing)}"
        has_more = f"has {first_few(foreign)} in addition to {total} others"
        raise UserError(
            f"{place}: {lacks if missing else has_more}: fetch all parts of one {split}, and "
            "remove the parts of any other"
        )


# ---------------------------------------------------------------- the rows of a file


def _parse_json(content: bytes, file: Path) -> list[Problem]:
    """Rows from one JSON object per line, or from one array of objects."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        return _parse_array(content, file)
    if keys := _keys_of_arrays(content):
        raise UserError(
            f"{file}, line 1: 'question' is missing: the file is one object, with its rows under "
            f"{first_few(keys)}: write that array alone, or one object per line"
        )
    # Split as bytes, at \n only, since str.splitlines() would also split at GSM8K's U+2028.
    lines = content.removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        return []
    return [_parse_line(line, file, number) for number, line in enumerate(lines, start=1)]


def _keys_of_arrays(content: bytes) -> list[str]:
    """The keys of arrays if the file is a single JSON object that is not a row; otherwise empty."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError):  # such as one object per line
        return []
    if not isinstance(value, dict) or "question" in value:
        return []
    return [json.dumps(key)[:40] for key, item in value.items() if isinstance(item, list)]


def _parse_line(line: bytes, file: Path, number: int) -> Problem:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))  # given bytes, json would guess the encoding
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: is not valid JSON ({one_line(error)[:120]}): write one object per line"
        ) from None
    return _check_row(row, where, number)


def _parse_array(content: bytes, file: Path) -> list[Problem]:
    try:
        rows = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        if isinstance(error, UnicodeDecodeError):
            line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file}, line {line}: is not valid JSON ({one_line(error)[:120]}): write one array of "
            "objects, or one object per line without brackets around them"
        ) from None
    return _check_rows(rows, f"{file}, row")


def _parse_parquet(content: bytes, file: Path, rows_before: int) -> list[Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(
            pyarrow.BufferReader(content), page_checksum_verification=True
        )
        for name in ("question", "answer"):
            _check_column(table.schema_arrow, name, file)
        rows = table.read(columns=["question", "answer"]).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{file}: is damaged or not a Parquet file ({one_line(error)[:120]}): fetch it again, "
            "or name an intact one"
        ) from None
    return _check_rows(rows, f"{file}, row", rows_before)


def _check_column(schema: Any, name: str, file: Path) -> None:
    from pyarrow import types

    count = schema.names.count(name)
    if count != 1:
        raise UserError(f"{file}: has {count} columns {name!r}: it must have one, of text")
    kind = schema.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(
            f"{file}: its column {name!r} is of type {one_line(kind)[:60]}: it must be of text"
        )


def _check_rows(rows: Iterable[Any], where: str, rows_before: int = 0) -> list[Problem]:
    """Check the rows of one file or of the hub. Messages name a row by ``where`` and its number."""
    return [
        _check_row(row, f"{where} {number}", rows_before + number)
        for number, row in enumerate(rows, start=1)
    ]


def _check_row(row: Any, where: str, line: int) -> Problem:
    if not isinstance(row, dict):
        raise UserError(f"{where}: is not a JSON object: write {{'question': ..., 'answer': ...}}")
    for name in ("question", "answer"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            shown = "is missing" if name not in row else f"is {json.dumps(value)[:60]}"
            raise UserError(f"{where}: {name!r} {shown}: it must be a non-empty string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: {name!r} contains an unpaired surrogate: write it as valid Unicode"
            ) from None
    try:
        rules.gold_answer(row["answer"])
    except ValueError as error:
        raise UserError(f"{where}: the answer {error}") from None
    return Problem(row["question"], row["answer"], line)
