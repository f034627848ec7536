"""Reads metrics.jsonl, also while it is being written."""

import json
from pathlib import Path
from typing import Any

from run.manifest import METRICS_FILE


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of the run's ``metrics.jsonl`` without those that a kill cut short.

    Empty if there is no such file, or it can't be read.
    """
    try:
        lines = (folder / METRICS_FILE).read_bytes().splitlines()
    except OSError:
        return []
    return [content for line in lines if (content := parsed_line(line))]


def parsed_line(line: bytes) -> dict[str, Any]:
    """A line of ``metrics.jsonl``; empty if a kill cut it short."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
