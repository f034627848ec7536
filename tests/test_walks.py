"""The two walks of docs/walks.md are short, and are those that the code takes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"One micro-batch through one layer": (10, 6), "One problem to its line": (20, 9)}


@pytest.fixture(scope="module")
def walks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("walks", ROOT / "benchmarks" / "walks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_walks_are_short_and_documented(walks: ModuleType) -> None:
    """Guards against a detour through another file, and a document that shows the old way."""
    found = walks.trace()
    assert found.keys() == LIMITS.keys()
    document = (ROOT / "docs" / "walks.md").read_text(encoding="utf-8")
    for title, steps in found.items():
        borders, files = LIMITS[title]
        assert walks.crossings(steps) <= borders, title
        assert len({file for file, _ in steps}) <= files, title
        assert walks.report((title, steps)) in document, title


def test_a_detour_is_counted(walks: ModuleType) -> None:
    steps = [("a.py", "f"), ("a.py", "g"), ("b.py", "h"), ("a.py", "i"), ("c.py", "j")]
    assert walks.crossings(steps) == 3
