"""Rows of GSM8K: read from files of several forms or from the hub, and checked."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grading import rules
from run.errors import UserError, one_line
from run.files import LFS_POINTER
from run.paths import is_hub_id, local_path


@dataclass(frozen=True)
class Problem:
    """One row of GSM8K: ``answer`` holds the reasoning and ends in ``#### NUMBER``.

    Attributes:
        line: where it stands, from 1: the line of its file, or the row of an array, of Parquet files or of the hub.
    """

    question: str
    answer: str
    line: int = field(default=0, compare=False)

    @property
    def gold(self) -> str:
        """The final number as the data set writes it, commas included."""
        return rules.gold_answer(self.answer)


def load_problems(dataset: str, split: str) -> list[Problem]:
    """Load and check every row of ``split`` (``train`` or ``test``).

    Args:
        dataset: a local folder that holds each split in one of `FORMS`, or a hub id.

    Raises:
        UserError: there is no such data set, or a row is not valid; names the file and the line.
    """
    folder = local_path(dataset)
    if folder.is_dir():
        problems = _read_folder(folder, split)
    elif folder.exists():
        raise UserError(
            f"dataset {dataset!r} is a file: name the folder that holds it; {_forms('train')}"
        )
    elif not is_hub_id(dataset):
        raise UserError(
            f"dataset {dataset!r} is no folder here and no hub id such as openai/gsm8k: check the path"
        )
    else:
        problems = _download(dataset, split)
    rules.say_odd_golds(
        {f"row {problem.line}": problem.gold for problem in problems}, f"{dataset}, {split}"
    )
    return problems


LINE_FORMS, TABLE_FORM = ("{split}.jsonl", "{split}.json"), "{split}.parquet"


SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.parquet")


def _forms(split: str) -> str:
    """What a folder may hold a split as, for people."""
    return (
        f"a data set folder holds {split}.jsonl (one object a line), {split}.json (or one array of all), "
        f"{split}.parquet or {split}-00000-of-00001.parquet (these two also in its folder main or data), and the same "
        f"of {'test' if split == 'train' else 'train'}"
    )


def _read_folder(folder: Path, split: str) -> list[Problem]:
    """The rows of ``split``, in whichever form it is there.

    Raises:
        UserError: it is there in no form or in several, or a row is not valid.
    """
    found = _find_forms(folder, split)
    if len(found) > 1:
        names = ", ".join(str(files[0].relative_to(folder)) for files in found)
        raise UserError(
            f"{folder}: holds {split} in {len(found)} forms ({names}): leave the one that is meant"
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
                f"{file}: is a pointer to a file that git has not fetched: run git lfs pull in its folder"
            )
        if file.suffix == ".parquet":
            problems += _parse_parquet(content, file, len(problems))
        else:
            problems += _parse_json(content, file)
    if not problems:
        raise UserError(f"{files[0]}: is empty: it needs rows with question and answer")
    return problems


def _find_forms(folder: Path, split: str) -> list[list[Path]]:
    """The files of each form in which ``split`` is there; those of a form with several in their order."""
    found: list[list[Path]] = []
    # main or data: of a clone of a hub's repository, which may hold another configuration beside it.
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
    """Raises UserError where they are not all of one whole."""
    total = int(shards[-1].rpartition("-of-")[2].removesuffix(".parquet"))
    expected = {f"{split}-{number:05}-of-{total:05}.parquet" for number in range(min(total, 10**5))}
    missing, foreign = sorted(expected - set(shards)), sorted(set(shards) - expected)
    if missing or foreign:
        what = (
            f"lacks {rules.some(missing)}"
            if missing
            else f"holds {rules.some(foreign)} beside {total} others"
        )
        raise UserError(
            f"{place}: {what}: fetch every part of one {split}, and leave no part of another"
        )


def _parse_json(content: bytes, file: Path) -> list[Problem]:
    """Rows from one JSON object a line, or from one array of objects."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        return _parse_array(content, file)
    if keys := _keys_of_arrays(content):
        raise UserError(
            f"{file}, line 1: 'question' is missing: the file is one object, and its rows stand under {keys}: write "
            "that array alone, or one object a line"
        )
    # Bytes, and split at \n alone: U+2028, which GSM8K holds, would break str.splitlines().
    lines = content.removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        return []
    return [_parse_line(line, file, number) for number, line in enumerate(lines, start=1)]


def _keys_of_arrays(content: bytes) -> str:
    """Under which keys a file that is one JSON object, and no row, holds arrays; empty where it is none."""
    try:
        whole = json.loads(content.decode())
    except (ValueError, RecursionError):  # as of one object a line
        return ""
    if not isinstance(whole, dict) or "question" in whole:
        return ""
    return rules.some(
        json.dumps(key)[:40] for key, value in whole.items() if isinstance(value, list)
    )


def _parse_line(line: bytes, file: Path, number: int) -> Problem:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))  # of bytes json would guess the encoding
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: is no JSON ({one_line(error)[:120]}): write one object a line"
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
            f"{file}, line {line}: is no JSON ({one_line(error)[:120]}): write one array of objects, or one object a "
            "line without brackets around them"
        ) from None
    return [
        _check_row(row, f"{file}, row {number}", number) for number, row in enumerate(rows, start=1)
    ]


def _parse_parquet(content: bytes, file: Path, rows_before: int) -> list[Problem]:
    import pyarrow
    import pyarrow.parquet

    types = pyarrow.types
    try:
        table = pyarrow.parquet.ParquetFile(
            pyarrow.BufferReader(content), page_checksum_verification=True
        )
        for name in ("question", "answer"):
            if (count := table.schema_arrow.names.count(name)) != 1:
                raise UserError(f"{file}: has {count} columns {name!r}: it must have one, of text")
            kind = table.schema_arrow.field(name).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (
                types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
            ):
                raise UserError(
                    f"{file}: its column {name!r} is of type {one_line(kind)[:60]}: it must be of text"
                )
        rows = table.read(columns=["question", "answer"]).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{file}: is damaged, or no Parquet file ({one_line(error)[:120]}): fetch it again, or name a whole one"
        ) from None
    return [
        _check_row(row, f"{file}, row {n}", rows_before + n) for n, row in enumerate(rows, start=1)
    ]


def _check_row(row: Any, where: str, number: int) -> Problem:
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no JSON object: write {{'question': ..., 'answer': ...}}")
    for name in ("question", "answer"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            shown = "is missing" if name not in row else f"is {json.dumps(value)[:60]}"
            raise UserError(f"{where}: {name!r} {shown}: it must be a text that is not empty")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: {name!r} holds half a surrogate pair: write it as valid Unicode"
            ) from None
    try:
        rules.gold_answer(row["answer"])
    except ValueError as error:
        raise UserError(f"{where}: the answer {error}") from None
    return Problem(row["question"], row["answer"], number)


def _download(dataset: str, split: str) -> list[Problem]:
    import datasets
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # its retries would be lines before our one line
    try:
        rows = datasets.load_dataset(dataset, "main", split=split)
    except (
        Exception
    ) as error:  # the hub's client raises many types: all mean that the rows can't be had
        raise UserError(
            f"dataset {dataset!r}: is no folder here, and can't be loaded from the hub "
            f"({type(error).__name__}: {one_line(error)[:200]}): "
            f"check the id and the network, or name a local folder: {_forms(split)}"
        ) from None
    return [
        _check_row(row, f"{dataset}, {split} row {number}", number)
        for number, row in enumerate(rows, start=1)
    ]
