"""SIGKILL at points of the saves and at random moments, and what train.py --selftest says of this machine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import flags, make_config, write_rows

import selftest
import train
from grading.dataset import Problem, load_problems
from run.errors import UserError

ROOT = Path(train.__file__).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400
    )


def test_kills_lose_nothing() -> None:
    """The short sweep; what it looks for stands in benchmarks/kill_sweep.py."""
    result = run("benchmarks/kill_sweep.py", "--points", "12", "--random", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 losses" in result.stdout
    assert int(re.search(r"^(\d+) kills", result.stdout, re.MULTILINE)[1]) >= 10, result.stdout


# ---------------------------------------------------------------- the self-test


def test_the_self_test_passes(settings: dict[str, str]) -> None:
    """In processes of its own, one of which kills itself; and nothing of it is left."""
    result = run("train.py", "--selftest", *flags(settings))
    assert result.returncode == 0, result.stdout + result.stderr
    for fragment in (
        "trained:   4 steps, validation loss",
        "killed:    SIGKILL in step 4",
        "resumed:   losses, weights and optimizer state are identical, bit for bit",
        "export:    best loads in Transformers",
        "GB can be had",
        "W&B:       off",
        "selftest: passed",
    ):
        assert fragment in result.stdout, result.stdout
    assert list(Path(settings["output_dir"]).iterdir()) == []


@pytest.mark.parametrize(
    ("what", "value", "fragment"),
    [
        (
            "losses",
            [(1, 2.0), (2, 1.5)],
            "losses are not those of the run that was not killed (step 2: 1.0 and 1.5)",
        ),
        (
            "losses",
            [(1, 2.0)],
            "losses are not those of the run that was not killed (another number of them)",
        ),
        ("weights", {"model.safetensors": 2}, "weights are not those .* (model.safetensors)"),
        (
            "optimizer",
            {"state-00001.safetensors": 2},
            "optimizer are not those .* (state-00001.safetensors)",
        ),
    ],
)
def test_the_self_test_sees_what_is_not_identical(
    settings: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    value: object,
    fragment: str,
) -> None:
    whole = {"losses": [(1, 2.0), (2, 1.0)], "weights": {"model.safetensors": 1}}
    whole |= {"optimizer": {"state-00001.safetensors": 1}}
    results = iter([whole, {}, whole | {what: value}])

    def run(config, folder: Path, name: str, kill_in: int | None = None) -> object:
        (folder / name).mkdir(exist_ok=True)
        return next(results)

    monkeypatch.setattr(selftest, "run", run)
    monkeypatch.setattr(selftest, "try_disk", lambda _: "")
    monkeypatch.setattr(selftest, "try_export", lambda _: "")
    pattern = ".*".join(map(re.escape, fragment.split(" .* ")))
    with pytest.raises(UserError, match=pattern):
        selftest.run_selftest(make_config(settings))
    assert list(Path(settings["output_dir"]).iterdir()) == []


def test_the_self_test_says_why_training_fails(call, settings: dict[str, str]) -> None:
    outcome = call(train, *flags(settings | {"model": "nowhere"}), "--selftest")
    outcome.assert_user_error("selftest: training does not work here: error: model 'nowhere'")
    file = Path(settings["output_dir"]) / "file"
    file.touch()
    call(train, *flags(settings | {"output_dir": str(file)}), "--selftest").assert_user_error(
        "file: can't be written"
    )
    file.unlink()
    call(train, *flags(settings | {"dataset": "nowhere"}), "--selftest").assert_user_error(
        "dataset 'nowhere'"
    )
    assert list(Path(settings["output_dir"]).iterdir()) == []


def test_the_self_test_takes_one_row_of_each_question(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """Augmented data has many; on both sides of the validation split they would be refused."""
    write_rows(
        tmp_path / "many" / "train.jsonl",
        [Problem(f"{n // 10}?", f"{n}\n#### 1") for n in range(600)],
    )
    write_rows(tmp_path / "many" / "test.jsonl", [Problem("test?", "#### 1")])
    selftest.write_data(
        make_config(settings | {"dataset": str(tmp_path / "many")}), tmp_path / "data"
    )
    rows = load_problems(str(tmp_path / "data"), "train")
    assert len(rows) == len({row.question for row in rows}) == 2 * 16 + selftest.VALIDATION_ROWS
