"""What a file system may lack, who may write where, and what a finished run leaves."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import (
    Killed,
    flags,
    flip_a_byte,
    held_by_another_process,
    kill,
    run_folder,
    step_that,
    tree,
)

import evaluate
import perplexity
import train
from engine.decoding import Completion
from grading.dataset import Problem
from grading.predictions import PredictionsFile, graded_row
from run import (
    checkpoint,
    errors,
    files,
    locks,
    manifest,
    model_source,
    new_folder,
    training_json,
)
from run.config import CONFIG_FILE, read_files
from run.evaluation import newest_description
from run.manifest import BEST, FINISHED_FILE, LAST, PREVIOUS

ROOT = Path(train.__file__).parent
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EPERM)
NO_RENAME = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    files.forget_what_was_said()


def fail(
    original: Callable[..., Any], number: int, is_meant: Callable[..., bool]
) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if is_meant(*arguments):
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    return call


def path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def of_folder(descriptor: int, *_: Any) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


# ---------------------------------------------------------------- locks


def test_an_evaluation_into_a_folder_of_another_process_is_refused(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against 251 rows for 150 problems; and it is said before the model is loaded."""
    out = tmp_path / "out"
    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(out)]
    assert call(evaluate, *arguments, "--calculator", "true", "--samples", "2").code == 0
    before = tree(out)
    refusal = "another process is evaluating into it", "wait for it", "--output"
    parts = evaluate.Parts(load_model=lambda *_: 1 / 0)
    with held_by_another_process(out):
        call(evaluate, *arguments, parts=parts).assert_user_error(str(out), *refusal)
        call(evaluate, "--rescore", str(out / "predictions.jsonl")).assert_user_error(
            str(out), *refusal
        )
        assert (
            call(
                evaluate,
                "--rescore",
                str(out / "predictions.jsonl"),
                "--output",
                str(tmp_path / "other"),
            ).code
            == 0
        )
    for name, flag in (("calculator", ("--calculator", "true")), ("samples", ("--samples", "2"))):
        with held_by_another_process(out / name):
            outcome = call(evaluate, *arguments, *flag, parts=parts)
            outcome.assert_user_error(str(out / name), *refusal)
            file = out / name / "predictions.jsonl"
            call(evaluate, "--rescore", str(file)).assert_user_error(str(out / name), *refusal)
    assert tree(out) == before
    assert call(evaluate, *arguments).code == 0


def test_a_refused_evaluation_leaves_no_folder(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    arguments = [
        "--ckpt",
        settings["model"],
        *flags(settings | {"max_new_tokens": "5000"}),
        "--output",
        str(out),
    ]
    call(evaluate, *arguments, "--samples", "2").assert_user_error("1024 positions")
    call(evaluate, "--rescore", str(tmp_path / "no" / "predictions.jsonl")).assert_user_error(
        "can't be read"
    )
    assert not out.parent.exists() and not (tmp_path / "no").exists()
    (tmp_path / "file").touch()
    call(evaluate, "--rescore", str(tmp_path / "file" / "x")).assert_user_error(
        "can't be read (Not a directory)"
    )


@pytest.mark.parametrize(
    "number", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL]
)
def test_where_a_folder_can_not_be_locked_a_file_in_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on NFS. The one that is refused, and the one that made the folder, leave nothing in it."""
    monkeypatch.setattr(fcntl, "flock", fail(fcntl.flock, number, of_folder))
    folder = tmp_path / "a" / "b"
    with locks.locked(folder, "held") as is_held:
        assert is_held and (folder / locks.LOCK_FILE).is_file()
        with pytest.raises(errors.UserError, match="held"), locks.locked(folder, "held"):
            pass
        assert folder.exists()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_work_goes_on_and_it_is_said_once(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", fail(fcntl.flock, number, lambda *_: True))
    outcome = call(train, *flags(settings | {"epochs": "1"}))
    assert outcome.code == 0 and outcome.out.count("this file system has no locks") == 1
    files.forget_what_was_said()
    outcome = call(
        evaluate, "--ckpt", str(run_folder(settings) / BEST), "--samples", "2", "--limit", "3"
    )
    assert outcome.code == 0 and outcome.out.count("this file system has no locks") == 1


def test_a_lock_is_of_the_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against two processes of which one has locked a folder that the other has removed."""
    original, folder, seen = fcntl.flock, tmp_path / "out", []

    def flock(*arguments: Any) -> None:
        if not seen:
            seen.append(folder.stat().st_ino)
            folder.rename(tmp_path / "removed")
        original(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.locked(folder, "held"):
        monkeypatch.undo()
        assert folder.stat().st_ino != seen[0]
        with pytest.raises(errors.UserError, match="held"), locks.locked(folder, "held"):
            pass


def test_two_writers_of_one_small_file_do_not_collide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a traceback where the other has renamed the staged file.

    And what a kill leaves is removed.
    """
    file, original = tmp_path / "scores.json", Path.replace

    def replace(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        files.replace_file(file, "the other's")  # just before
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    files.replace_file(file, "mine")
    assert file.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == [
        "scores.json"
    ]
    for name in (".scores.json.0123abcd.staged", ".mine.staged", ".last.staged"):
        (tmp_path / name).touch()
    with locks.locked(tmp_path, "held"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        "scores.json",
        ".mine.staged",
        ".last.staged",
    }


def test_a_file_is_written_while_another_process_locks_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a report that is missing, since its staged file was removed as an old one.

    An evaluation of another split locks the run's folder, or a training that starts.
    """
    file, original = tmp_path / "report.html", Path.replace

    def replace(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        with locks.locked(tmp_path, "held"):
            assert [*tmp_path.iterdir()] == []
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    files.replace_file(file, "mine")
    assert file.read_text() == "mine" and [*tmp_path.iterdir()] == [file]
    with pytest.raises(FileNotFoundError):
        files.replace_file(tmp_path / "nowhere" / "report.html", "mine")


# ---------------------------------------------------------------- what two writers left


def doubled(lines: list[bytes]) -> bytes:
    return b"".join(
        [*lines, lines[2], lines[0], lines[2].replace(b'"completion": "', b'"completion": "later')]
    )


def interleaved(lines: list[bytes]) -> bytes:
    return b"".join(
        [lines[0], lines[1][:40], lines[3], *lines[2:], lines[1][40:], b"\n", b"\x00" * 50 + b"\n"]
    )


def all_cut(lines: list[bytes]) -> bytes:
    return lines[0][:20] + lines[1][:-20] + b"\n"


@pytest.mark.parametrize(
    ("damage", "said", "kept"),
    [
        (doubled, "dropped 3 duplicate lines,", 12),
        (interleaved, "dropped 4 invalid lines,", 11),
        (
            lambda lines: doubled(lines[:-1]) + lines[4][:9],
            "dropped 3 duplicate lines,",
            11,
        ),
        (
            lambda lines: interleaved(lines) + lines[5],
            "1 duplicate line and 4 invalid lines",
            11,
        ),
        (
            lambda lines: b"".join(lines) + lines[3].replace(b'"id": ', b'"id": -', 1),
            "1 invalid line",
            12,
        ),
        (all_cut, "dropped 1 invalid line,", 0),
    ],
)
def test_evaluating_again_mends_what_two_writers_left(
    call, settings: dict[str, str], tmp_path: Path, damage, said: str, kept: int
) -> None:
    """Guards against two commands of which each names the other as the cure."""
    arguments = [
        "--ckpt",
        settings["model"],
        *flags(settings),
        "--output",
        str(tmp_path),
        "--verify-batching",
        "0",
    ]
    assert call(evaluate, *arguments).code == 0
    file = tmp_path / "predictions.jsonl"
    whole, scores = file.read_bytes(), json.loads((tmp_path / "scores.json").read_bytes())
    file.write_bytes(damage(sorted(whole.splitlines(keepends=True))))
    (tmp_path / "scores.json").write_bytes(b'{"exact_')
    assert call(evaluate, "--rescore", str(file)).code == 2
    outcome = call(evaluate, *arguments)
    assert outcome.code == 0, outcome.err
    assert said in outcome.out and (f"resuming: {kept} of 12" in outcome.out) == (kept > 0)
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert call(evaluate, "--rescore", str(file)).code == 0
    again = json.loads((tmp_path / "scores.json").read_bytes())
    assert again["num_correct"] == scores["num_correct"] and again["num_problems"] == 12
    assert "dropped" not in call(evaluate, *arguments).out


def test_doubled_samples_are_mended(call, settings: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path)]
    arguments += ["--samples", "2"]
    assert call(evaluate, *arguments).code == 0
    file = tmp_path / "samples" / "predictions.jsonl"
    whole = file.read_bytes()
    first = whole[: whole.index(b"\n") + 1]
    file.write_bytes(whole + first + first.replace(b'"sample": ', b'"sample": -1'))
    assert "dropped 1 duplicate line and 1 invalid line" in call(evaluate, *arguments).out
    assert file.read_bytes() == whole


@pytest.mark.parametrize("content", [b"precious\n", b"precious\nlines\n"])
def test_what_is_not_of_this_evaluation_is_not_mended(
    call, settings: dict[str, str], tmp_path: Path, content: bytes
) -> None:
    arguments = ["--ckpt", settings["model"], *flags(settings), "--output", str(tmp_path)]
    assert call(evaluate, *arguments).code == 0
    file = tmp_path / "predictions.jsonl"
    whole = file.read_bytes()
    file.write_bytes(content)
    call(evaluate, *arguments).assert_user_error(
        "is not a predictions.jsonl of this program", "--output"
    )
    assert file.read_bytes() == content
    last = sorted(whole.splitlines(keepends=True), key=lambda line: json.loads(line)["id"])[-4:]
    file.write_bytes(doubled(last))  # as an evaluation ends whose last problems were short
    before = tree(tmp_path)
    other = [*arguments, "--prompt", "{question}"]
    call(evaluate, *other).assert_user_error("belongs to another evaluation", "prompt was")
    call(evaluate, *arguments, "--limit", "5").assert_user_error(
        "contains 12 problems, but 5 are asked for now"
    )
    assert tree(tmp_path) == before
    (tmp_path / "evaluation.json").write_bytes(b"{")
    call(evaluate, *arguments).assert_user_error(
        "evaluation.json: is damaged", "choose another --output, or move"
    )


# ---------------------------------------------------------------- metrics.jsonl during training


def test_an_evaluation_only_appends_to_the_metrics_of_a_run_that_trains(
    call,
    settings: dict[str, str],
    stopped: Path,
) -> None:
    """Guards against taking a line that training is just writing for a cut one.

    Training's next lines would be lost with the old file.
    """
    file, best = stopped / "metrics.jsonl", str(stopped / BEST)
    before = file.read_bytes() + b'{"step": 9, "train/lo'
    file.write_bytes(before)
    with file.open("ab") as training, held_by_another_process(stopped):
        assert call(evaluate, "--ckpt", best).code == 0
        training.write(b'{"step": 10}\n')
    lines = file.read_bytes().removeprefix(before + b"\n").splitlines()
    assert "eval/exact_match" in json.loads(lines[0]) and lines[1:] == [b'{"step": 10}']
    assert (
        call(evaluate, "--ckpt", best, "--split", "validation").code == 0
    )  # nobody trains: it is mended
    assert all(json.loads(line) for line in file.read_bytes().splitlines())
    assert call(train, *flags(settings)).code == 0


# ---------------------------------------------------------------- no syncs or no renames


@pytest.mark.parametrize("number", NO_SYNC)
def test_a_file_is_replaced_where_nothing_can_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", fail(os.fsync, number, lambda *_: True))
    for content in ("one", "two"):
        files.replace_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_text() == content
    assert capsys.readouterr().out.count("this file system can't sync") == 1


@pytest.mark.parametrize(("number", "what"), [(errno.EINVAL, "folders"), (errno.EINVAL, "all")])
def test_where_nothing_can_be_synced_work_goes_on_and_it_is_said_once(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int, what: str
) -> None:
    """As on some CIFS and WSL mounts, and of the files under a run as well."""
    is_meant = of_folder if what == "folders" else lambda *_: True
    monkeypatch.setattr(os, "fsync", fail(os.fsync, number, is_meant))
    outcome = call(train, *flags(settings | {"epochs": "1"}))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("a power cut may lose what was just saved") == 1
    if what == "all":
        outcome = call(evaluate, "--ckpt", str(run_folder(settings) / BEST), "--limit", "2")
        assert outcome.code == 0 and "power cut" not in outcome.out


def test_a_folder_that_can_not_be_opened_is_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(
        os, "open", fail(os.open, errno.EACCES, lambda path, *_: Path(path).is_dir())
    )
    files.replace_file(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"
    assert (
        f"{tmp_path}: this file system can't sync folders (Permission denied)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_fault_of_the_disk_is_not_taken_for_what_it_lacks(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", fail(os.fsync, number, of_folder))
    call(train, *flags(settings)).assert_user_error(os.strerror(number))


def test_a_file_that_can_not_be_replaced_is_what_it_was_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against what fills a full disk further, under a name that nothing removes."""
    files.replace_file(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", fail(os.fsync, errno.EIO, lambda *_: True))
    with pytest.raises(OSError, match="Input/output error"):
        files.replace_file(tmp_path / "file", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_of_small_files_appears_whole_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against rows that a power cut empties, and files that came there in the meantime."""
    folder, synced = tmp_path / "rows", []

    def sync(path: Path) -> None:
        synced.append((path.name.partition(".rows.")[1] or path.name, folder.exists()))

    monkeypatch.setattr(new_folder, "sync", sync)
    new_folder.write_folder(folder, {"train": b"1", "test": b"2"})
    before = [("train", False), ("test", False), (".rows.", False)]
    assert synced == [*before, (tmp_path.name, True)]
    with pytest.raises(OSError, match="not empty"):
        new_folder.write_folder(folder, {"train": b"3"})
    assert tree(tmp_path) == {"rows/train": b"1", "rows/test": b"2"}


MOUNT = [
    "EIO",
    "EROFS",
    "EACCES",
    "EPERM",
    "EBUSY",
    "ENXIO",
    "ENODEV",
    "EREMOTEIO",
    "EUCLEAN",
    "ENAMETOOLONG",
]
NETWORK = ["ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ECONNRESET"]
FULL = ["EDQUOT", "ENOSPC", "EFBIG"]


def script_that_raises(error: Exception) -> SimpleNamespace:
    def main() -> None:
        raise error

    return SimpleNamespace(read_arguments=lambda argv: (), main=main)


def said_of(outcome, name: str) -> None:
    outcome.assert_user_error(os.strerror(getattr(errno, name)))
    assert ("make room" in outcome.err) == (name in FULL), outcome.err


@pytest.mark.parametrize("name", [*MOUNT, *NETWORK, *FULL])
def test_a_fault_of_disk_or_mount_is_one_line(call, name: str) -> None:
    number = getattr(errno, name)
    outcome = call(script_that_raises(OSError(number, os.strerror(number), "some/file")))
    said_of(outcome, name)
    assert outcome.err.startswith("error: some/file: ")


@pytest.mark.parametrize(
    "fault", [OSError(number, "x") for number in (errno.EBADF, errno.EINVAL)] + [KeyError("x")]
)
def test_a_fault_of_the_program_is_a_traceback(call, fault: Exception) -> None:
    with pytest.raises(type(fault)):
        call(script_that_raises(fault))


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ENOSPC"])
@pytest.mark.parametrize("file", ["predictions.jsonl", ".scores.json.", ".evaluation.json."])
def test_a_fault_while_evaluating_names_the_file(
    call,
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    name: str,
) -> None:
    """An error of fsync has a number and no name."""
    out = tmp_path / "out"

    def is_meant(descriptor: int) -> bool:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(out / file))

    parts = evaluate.Parts(decode=lambda *_, **__: [Completion(0, 1, [5], "eos")])
    monkeypatch.setattr(os, "fsync", fail(os.fsync, getattr(errno, name), is_meant))
    arguments = ["--limit", "1", "--verify-batching", "0", "--output", str(out)]
    arguments += ["--ckpt", settings["model"], *flags(settings)]
    outcome = call(evaluate, *arguments, parts=parts)
    if "evaluation" in file:  # found out before anything is decoded
        outcome.assert_user_error(f"{out}: can't be written ({os.strerror(getattr(errno, name))}")
        return
    said_of(outcome, name)
    assert outcome.err.startswith(f"error: {out / file}")


def test_a_full_disk_under_a_prediction_names_the_file(
    tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.open

    def full(path: Path, mode: str = "r", **settings: Any) -> Any:
        return original(Path("/dev/full") if mode == "a" else path, mode, **settings)

    monkeypatch.setattr(Path, "open", full)
    with (
        pytest.raises(OSError, match="No space") as error,
        PredictionsFile(tmp_path, {}, 1) as file,
    ):
        file.write(graded_row(0, None, Problem("1?", "#### 1"), "1", "eos", 1))
    assert error.value.filename == str(tmp_path / "predictions.jsonl")


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EPERM", "ENOSPC"])
def test_a_save_that_fails_says_what_helps(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And does not call earlier checkpoints intact where there are none."""
    number = getattr(errno, name)
    with monkeypatch.context() as patch:
        of_staged = fail(Path.rename, number, lambda path, _: path.suffix == ".staged")
        patch.setattr(Path, "rename", of_staged)
        patch.setattr(shutil, "copyfile", fail(shutil.copyfile, number, lambda *_: True))
        outcome = call(train, *flags(settings))
    said_of(outcome, name)
    assert "intact" not in outcome.err
    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            "replace",
            fail(os.replace, number, lambda _, target: Path(target).name == "config.yaml"),
        )
        said_of(call(train, *flags(settings)), name)


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EROFS", "ELOOP", "ESTALE", "EDQUOT"])
@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_fault_is_not_taken_for_a_file_system_without_locks(
    call,
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    where: str,
) -> None:
    """Of the folder, or of the file that is locked where a folder can't be."""
    number, original = getattr(errno, name), os.open
    if where == "folder":
        monkeypatch.setattr(fcntl, "flock", fail(fcntl.flock, number, lambda *_: True))
    else:
        monkeypatch.setattr(fcntl, "flock", fail(fcntl.flock, errno.ENOLCK, of_folder))
        monkeypatch.setattr(
            os, "open", fail(original, number, lambda path, *_: Path(path).name == locks.LOCK_FILE)
        )
    for outcome in (
        call(train, *flags(settings)),
        call(
            evaluate,
            "--ckpt",
            settings["model"],
            *flags(settings),
            "--output",
            str(tmp_path / "out"),
        ),
    ):
        outcome.assert_user_error("can't be written", os.strerror(number))
        assert "no locks" not in outcome.out


@pytest.mark.parametrize("number", NO_RENAME)
def test_a_folder_that_can_not_be_renamed_is_copied_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("content")
    (source / "manifest.json").write_text("{}")
    (source / "link").symlink_to("nowhere")
    os.mkfifo(source / "pipe")
    before = tree(source)
    monkeypatch.setattr(Path, "rename", fail(Path.rename, number, lambda *_: True))
    files.move(source, target, "manifest.json")
    assert (
        tree(target) == before and os.readlink(target / "link") == "nowhere" and not source.exists()
    )


def test_what_says_that_a_folder_is_whole_is_copied_last_and_removed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a complete-looking copy of empty files after a power cut.

    No kill would show it.
    """
    source, target, synced = tmp_path / "source", tmp_path / "target", []
    (source / "sub").mkdir(parents=True)
    for name in ("a", "manifest.json", "sub/b", "z"):
        (source / name).touch()
    fsync, rmtree = os.fsync, shutil.rmtree

    def remove(folder: Path) -> None:
        assert folder == source and {path.name for path in folder.iterdir()} == {"a", "sub", "z"}
        rmtree(folder)

    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(path_of(number)), fsync(number)))
    monkeypatch.setattr(shutil, "rmtree", remove)
    monkeypatch.setattr(Path, "rename", fail(Path.rename, errno.EXDEV, lambda *_: True))
    files.move(source, target, "manifest.json")
    before = [target / "a", target / "sub" / "b", target / "z", target, target / "sub"]
    assert (
        synced[:5] == before
        and synced[5].name.startswith(".manifest.json.")
        and synced[6:] == [target, tmp_path]
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_fault_is_not_taken_for_a_mount_without_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "source").mkdir()
    monkeypatch.setattr(Path, "rename", fail(Path.rename, number, lambda *_: True))
    with pytest.raises(OSError, match=os.strerror(number)):
        files.move(tmp_path / "source", tmp_path / "target", "manifest.json")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_where_folders_can_not_be_renamed_they_are_copied(
    call,
    settings: dict[str, str],
    stopped: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """As on overlayfs. The run ends as any other, with a damaged last set aside whole."""
    if number == errno.EXDEV:
        flip_a_byte(stopped / LAST / "model.safetensors")
        damaged = tree(stopped / LAST)
    monkeypatch.setattr(Path, "rename", fail(Path.rename, number, lambda self, *_: self.is_dir()))
    outcome = call(train, *flags(settings))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("they are copied into place") == 1
    assert list(stopped.glob(".*")) == []
    for name in (BEST, LAST, PREVIOUS):
        assert manifest.fault_of(stopped / name) is None
        for file in (stopped / name).glob("*.safetensors"):
            assert file.read_bytes() == (whole / name / file.name).read_bytes()
    if number == errno.EXDEV:
        assert tree(stopped / "last.damaged") == damaged


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_fills_up_under_a_copy_leaves_what_was_whole(
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    before = tree(stopped / LAST)
    shutil.copytree(stopped / LAST, staged := checkpoint.staged_beside(stopped / LAST))
    monkeypatch.setattr(Path, "rename", fail(Path.rename, errno.EXDEV, lambda *_: True))
    monkeypatch.setattr(
        shutil,
        "copyfile",
        fail(shutil.copyfile, number, lambda file, _: "state" in Path(file).name),
    )
    with pytest.raises(OSError, match=os.strerror(number)):
        checkpoint.put_in_place(staged, stopped / LAST)
    assert tree(stopped / LAST) == before and not (stopped / PREVIOUS).exists()


KILLS = """
import errno, json, os, pathlib, shutil, sys

from run import checkpoint, locks, manifest, retention
from run.manifest import BEST, FINISHED_FILE, LAST, MANIFEST_FILE, PREVIOUS, fault_of

WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"}
os.fsync = lambda _: None  # kills, not power cuts
place, what, can_rename = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "rename"
if not can_rename:
    def rename(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")
    pathlib.Path.rename = rename

def make(folder, step):
    (folder / "sub").mkdir(parents=True)
    for name in ("model.safetensors", "state-00001.safetensors", "sub/file"):
        (folder / name).write_text(f"{name} of step {step}")
    (folder / "training.json").write_text(json.dumps({"step": step}))
    with manifest.Seal(folder) as seal:
        seal.add_new_files()

def act(run):
    if what == "save":
        checkpoint.put_in_place(checkpoint.staged_beside(run / LAST), run / LAST)
        checkpoint.remove_remains(run / LAST)
    else:
        retention.remove_state(run, {"step": 3})

def step_of(folder):
    return json.loads((folder / "training.json").read_text())["step"]

def check(run, number):
    with locks.locked(run, "held"):  # as every start does
        pass
    whole = [name for name in (LAST, PREVIOUS, ".last.staged") if fault_of(run / name) is None]
    if what == "save":
        assert whole, f"nothing is whole after a kill at {number}"
        assert checkpoint.newest_intact(run) == run / LAST and fault_of(run / LAST) is None
        assert (step_of(run / LAST), step_of(run / PREVIOUS)) == (3, 2), number
    else:
        assert fault_of(run / BEST) is None
        resumable = LAST in whole or (run / FINISHED_FILE).is_file()
        assert resumable, f"neither finished nor to be resumed at {number}"
        if (start := checkpoint.newest_intact(run)):
            assert start == run / LAST and fault_of(start) is None, number
            retention.remove_state(run, {"step": 3})
        assert not (run / LAST).exists() and not (run / PREVIOUS).exists(), number
    assert not list(run.glob(".*")), (number, list(run.glob(".*")))

number, killed = 0, True
while killed:
    run = place / str(number)
    names = {PREVIOUS: 2, LAST: 3, BEST: 2}
    if what == "save":
        names = {PREVIOUS: 1, LAST: 2, ".last.staged": 3, BEST: 2}
    for name, step in names.items():
        make(run / name, step)
    if not (process := os.fork()):
        left = iter(range(number))
        def audit(event, arguments):
            if event in WATCHED and next(left, None) is None:
                os._exit(9)
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(audit)
        act(run)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9), code
    killed = code == 9
    check(run, number)
    shutil.rmtree(run)
    number += 1
print("kills:", number - 1)
"""


@pytest.mark.parametrize(
    ("what", "how", "kills"),
    [("save", "copy", 60), ("remove", "copy", 20), ("remove", "rename", 20)],
)
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, what: str, how: str, kills: int
) -> None:
    """Of a save on a mount without renames, and of the removal of a finished run's state."""
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), what, how],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split("kills:")[1]) >= kills


# ---------------------------------------------------------------- keep_state


def test_a_finished_run_gives_its_state_back_when_asked(call, settings: dict[str, str]) -> None:
    """Not before it is finished, not by default; and the same command never trains it again."""
    folder = run_folder(settings)
    outcome = call(train, *flags(settings | {"keep_state": "false"}))
    assert outcome.code == 0 and "removed: " in outcome.out
    assert {path.name for path in folder.iterdir()} == {
        BEST,
        "config.yaml",
        "metrics.jsonl",
        FINISHED_FILE,
    }
    description = training_json.read_description(folder, FINISHED_FILE)
    assert description["step"] == 14 and "state" not in description
    source = model_source.resolve_source(str(folder / BEST), read_files(CONFIG_FILE), {})
    assert newest_description(folder) == description != source.description
    before = tree(folder)
    for again in (
        ("--resume", "auto"),
        ("--resume", "never"),
        ("--keep_state", "false"),
        ("--seed", "7"),
    ):
        call(train, *flags(settings), *again).assert_user_error(
            "this run is finished", "--run_name"
        )
    assert tree(folder) == before
    assert call(perplexity, "--ckpt", str(folder / BEST), "--limit", "2").code == 0
    assert call(evaluate, "--ckpt", str(folder / BEST)).code == 0
    assert "eval/exact_match" in (folder / "metrics.jsonl").read_text()


def test_the_state_of_a_run_that_finished_with_it_is_removed_later(
    call, settings: dict[str, str]
) -> None:
    folder = run_folder(settings)
    assert call(train, *flags(settings)).code == 0
    (folder / "last.damaged").mkdir()
    before = tree(folder)
    call(train, *flags(settings)).assert_user_error("this run is finished")
    assert tree(folder) == before
    outcome = call(train, *flags(settings | {"keep_state": "false"}))
    assert outcome.code == 0 and f"removed: {folder / LAST} and {folder / PREVIOUS}" in outcome.out
    gone = {name for name in before if name.startswith((f"{LAST}/", f"{PREVIOUS}/"))}
    assert tree(folder).keys() == before.keys() - gone | {FINISHED_FILE}
    assert (folder / "last.damaged").exists()


@pytest.mark.parametrize("lost", ["damaged", "gone"])
def test_the_state_stays_where_best_is_not_whole(call, settings: dict[str, str], lost: str) -> None:
    folder, last_epoch = run_folder(settings), int(settings["epochs"])

    def save(
        target: Path, model: Any, tokenizer: Any, description: Any, *rest: Any, **keywords: Any
    ) -> None:
        checkpoint.save_checkpoint(target, model, tokenizer, description, *rest, **keywords)
        if target.name == LAST and description["epoch"] == last_epoch:
            if lost == "damaged":
                flip_a_byte(folder / BEST / "model.safetensors")
            else:
                shutil.rmtree(folder / BEST)

    outcome = call(train, *flags(settings | {"keep_state": "false"}), save=save)
    assert outcome.code == 0 and f"{folder / BEST}: is damaged or gone" in outcome.out
    for name in (LAST, PREVIOUS):
        assert manifest.fault_of(folder / name) is None
    before = tree(folder)
    call(train, *flags(settings | {"keep_state": "false"})).assert_user_error(
        "best: is damaged or gone", "not removed"
    )
    assert tree(folder) == before


@pytest.mark.parametrize("state", ["kept", "removed"])
@pytest.mark.parametrize("lost", ["damaged", "gone"])
def test_a_finished_run_without_best_says_what_can_be_done(
    call, settings: dict[str, str], state: str, lost: str
) -> None:
    """Guards against the advice to evaluate a missing best; the cure that is named works."""
    folder, kept = run_folder(settings), {"keep_state": "true" if state == "kept" else "false"}
    assert call(train, *flags(settings | {"epochs": "1"} | kept)).code == 0
    flip_a_byte(folder / BEST / "model.safetensors") if lost == "damaged" else shutil.rmtree(
        folder / BEST
    )
    before = tree(folder)
    for again in ({}, {"keep_state": "false"}):
        outcome = call(train, *flags(settings | {"epochs": "1"} | again))
        outcome.assert_user_error("best", "is damaged or gone", "restore best from a copy, or ")
        assert "evaluate it" not in outcome.err
        assert (f"evaluate.py --ckpt {folder / LAST}\n" in outcome.err) == (state == "kept")
    assert tree(folder) == before
    if state == "kept":
        assert call(evaluate, "--ckpt", str(folder / LAST), "--limit", "1").code == 0


def test_a_run_that_is_not_finished_keeps_its_state(
    call, settings: dict[str, str], stopped: Path
) -> None:
    """And a setting that is newer than the checkpoint is not said to have changed."""
    for name in (LAST, PREVIOUS):
        description = training_json.read_description(stopped / name)
        del description["settings"]["keep_state"]
        (stopped / name / "training.json").write_text(json.dumps(description))
        (stopped / name / "manifest.json").unlink()
        with manifest.Seal(stopped / name) as seal:
            seal.add_new_files()
    with pytest.raises(Killed):
        call(train, *flags(settings | {"keep_state": "false"}), step=step_that(kill, at=1))
    assert manifest.fault_of(stopped / LAST) is None and not (stopped / FINISHED_FILE).exists()
    outcome = call(train, *flags(settings | {"keep_state": "false"}))
    assert outcome.code == 0 and "keep_state was" not in outcome.out
    assert not (stopped / LAST).exists() and manifest.fault_of(stopped / BEST) is None
