"""Checkpoints are complete or absent.

Damage is named, the newest intact one is used, and nothing else is touched.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Killed,
    flags,
    flip_a_byte,
    held_by_another_process,
    kill,
    run_folder,
    seal,
    step_that,
    tree,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import evaluate
import perplexity
import train
from engine import optimizer
from engine.loading import load_tokenizer
from engine.measure import Measurement
from run import checkpoint, manifest, training_json
from run.manifest import BEST, LAST, MANIFEST_FILE, PREVIOUS

ROOT = Path(train.__file__).parent


# ---------------------------------------------------------------- the manifest


def test_the_manifest_names_every_file_with_size_and_hash(stopped: Path) -> None:
    for name in (BEST, LAST, PREVIOUS):
        folder = stopped / name
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        assert files.keys() == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
        for file, entry in files.items():
            assert entry == {
                "size": (folder / file).stat().st_size,
                "xxh3_128": manifest.hash_file(folder / file),
            }
        assert manifest.fault_of(folder) is None


def test_the_hash_is_xxh3(tmp_path: Path) -> None:
    """The published XXH3 128-bit hash of nothing; and a long file is hashed as one piece."""
    (tmp_path / "empty").touch()
    assert manifest.hash_file(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"
    import xxhash

    content = os.urandom(2**24 + 5)
    (tmp_path / "long").write_bytes(content)
    assert manifest.hash_file(tmp_path / "long") == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda f: flip_a_byte(f / "model.safetensors"),
            "the content of model.safetensors is not what was saved",
        ),
        (
            lambda f: flip_a_byte(f / "state-00001.safetensors"),
            "the content of state-00001.safetensors is not what",
        ),
        (
            lambda f: flip_a_byte(f / "training.json"),
            "the content of training.json is not what was saved",
        ),
        (
            lambda f: os.truncate(f / "model.safetensors", 999),
            "model.safetensors has 999 bytes, and manifest.json",
        ),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            "'tokenizer.json' can't be read: [Errno 2] No such file",
        ),
        (lambda f: be_a_pipe(f / "tokenizer.json"), "tokenizer.json is not a regular file"),
        (
            lambda f: (f / MANIFEST_FILE).unlink(),
            "it has no manifest.json, which a save writes last",
        ),
        (lambda f: (f / MANIFEST_FILE).write_text("{"), "its manifest.json can't be read"),
        (lambda f: (f / MANIFEST_FILE).write_bytes(b"\xff\xfe"), "its manifest.json can't be read"),
        (
            lambda f: (f / MANIFEST_FILE).write_text("[" * 100_000),
            "its manifest.json can't be read",
        ),
        (
            lambda f: (f / MANIFEST_FILE).write_text('{"files": {}}'),
            "its manifest.json does not name training.json",
        ),
        (
            lambda f: (f / MANIFEST_FILE).write_text('{"files": 7}'),
            "its manifest.json can't be read",
        ),
        (
            lambda f: add_to_manifest(f, "../outside"),
            "its manifest.json names '../outside', which is outside the folder",
        ),
        (
            lambda f: add_to_manifest(f, "/etc/passwd"),
            "its manifest.json names '/etc/passwd', which is outside the folder",
        ),
    ],
)
def test_a_damaged_last_is_named_and_its_predecessor_used(
    call,
    settings: dict[str, str],
    stopped: Path,
    whole: Path,
    damage: Callable[[Path], Any],
    fault: str,
) -> None:
    """And the run ends as if nothing had happened."""
    damage(stopped / LAST)
    damaged = tree(stopped / LAST)
    outcome = call(train, *flags(settings))
    assert outcome.code == 0, outcome.err
    assert f"{stopped / LAST}: is damaged ({fault}" in outcome.out
    assert f"resuming from {stopped / PREVIOUS}" in outcome.out and "at step 7 of 14" in outcome.out
    assert "set aside as last.damaged" in outcome.out
    assert tree(stopped / "last.damaged") == damaged
    for name in (BEST, LAST, PREVIOUS):
        assert manifest.fault_of(stopped / name) is None
        for file in (stopped / name).glob("*.safetensors"):
            assert file.read_bytes() == (whole / name / file.name).read_bytes()


def path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def be_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def add_to_manifest(folder: Path, name: str) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["files"][name] = {"size": 0, "xxh3_128": ""}
    (folder / MANIFEST_FILE).write_text(json.dumps(content))


def test_nothing_is_changed_where_both_are_damaged(
    call, settings: dict[str, str], stopped: Path
) -> None:
    """Guards against a run that starts again over the remains of another."""
    flip_a_byte(stopped / LAST / "model.safetensors")
    flip_a_byte(stopped / PREVIOUS / "state-00001.safetensors")
    before = tree(stopped)
    outcome = call(train, *flags(settings))
    outcome.assert_user_error(
        "last: is damaged", "previous: is damaged", "state-00001", "--run_name"
    )
    assert tree(stopped) == before


def test_damaged_folders_are_set_aside_one_beside_the_other(
    call, settings: dict[str, str], stopped: Path
) -> None:
    (stopped / "last.damaged").mkdir()
    flip_a_byte(stopped / LAST / "model.safetensors")
    assert call(train, *flags(settings)).code == 0
    assert {path.name for path in stopped.glob("last*")} == {
        "last",
        "last.damaged",
        "last.damaged-2",
    }


@pytest.mark.parametrize("script", [evaluate, perplexity])
def test_a_damaged_checkpoint_is_not_evaluated(call, stopped: Path, script) -> None:
    """Guards against a score of weights that nobody trained."""
    flip_a_byte(stopped / BEST / "model.safetensors")
    before = tree(stopped)
    outcome = call(script, "--ckpt", str(stopped / BEST))
    outcome.assert_user_error(
        "best: is damaged (the content of model.safetensors is not what was saved)"
    )
    (stopped / BEST / MANIFEST_FILE).unlink()
    before.pop(f"best/{MANIFEST_FILE}")
    call(script, "--ckpt", str(stopped / BEST)).assert_user_error(
        "best: is damaged (it has no manifest.json"
    )
    assert tree(stopped) == before


def test_what_a_user_puts_beside_the_files_is_no_damage(call, stopped: Path) -> None:
    (stopped / BEST / "README.md").write_text("mine")
    assert call(perplexity, "--ckpt", str(stopped / BEST), "--limit", "4").code == 0


# ---------------------------------------------------------------- complete or absent


def save_in_parts(folder: Path, part_bytes: int) -> None:
    """Save a checkpoint again, in files of at most ``part_bytes``."""
    state: dict[str, torch.Tensor] = {}
    for file in folder.glob(manifest.STATE_FILES):
        state |= load_file(file)
    checkpoint.save_checkpoint(
        folder,
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        load_tokenizer(folder, training_json.tokenizer_record(folder)),
        training_json.read_description(folder),
        state,
        part_bytes=part_bytes,
    )


def test_large_states_are_written_in_parts_and_read_back(
    call, settings: dict[str, str], stopped: Path, whole: Path
) -> None:
    """Guards against a second copy of all tensors on the way from a GPU, and an unread part."""
    one = load_file(stopped / LAST / "state-00001.safetensors")
    for name in (BEST, LAST):
        save_in_parts(stopped / name, 50_000)
    parts, weights = (
        sorted((stopped / LAST).glob(name)) for name in (manifest.STATE_FILES, "model*.safetensors")
    )
    assert len(parts) > 2 and len(weights) > 1
    read = [load_file(file) for file in parts]
    assert sum(map(len, read)) == len(one) and all(read)
    for tensors in read:
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 50_000
        assert all(torch.equal(one[name], tensor) for name, tensor in tensors.items())
    assert call(evaluate, "--ckpt", str(stopped / BEST), "--limit", "2").code == 0
    assert call(train, *flags(settings)).code == 0
    for file in (whole / LAST).glob("*.safetensors"):
        assert file.read_bytes() == (stopped / LAST / file.name).read_bytes()


def test_a_file_is_hashed_while_the_disk_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a disk that waits for each hash, and against a manifest before all syncs."""
    hashed, synced, hash_file = threading.Event(), [], manifest.hash_file
    (tmp_path / "state").mkdir()  # as several processes write
    for name in ("model.safetensors", "state/part", "training.json"):
        (tmp_path / name).write_text(name)

    def sync(path: Path) -> None:
        if path.suffix == ".safetensors":
            assert hashed.wait(10), "its hash has waited for this"
            time.sleep(0.1)
        assert not (tmp_path / manifest.MANIFEST_FILE).exists()
        synced.append(path.name)

    def hash_and_tell(file: Path) -> str:
        hashed.set()
        return hash_file(file)

    monkeypatch.setattr(manifest, "sync", sync)
    monkeypatch.setattr(manifest, "hash_file", hash_and_tell)
    with manifest.Seal(tmp_path) as seal:
        seal.add_new_files()
    assert synced == ["model.safetensors", "part", "training.json", "state"]
    assert manifest.fault_of(tmp_path) is None


def test_the_same_weights_are_known_beside_a_state_and_from_the_manifest(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against another identity of the same model, and a second reading of 13 GB."""
    monkeypatch.setattr(manifest, "hash_file", lambda file: pytest.fail(f"{file} is read"))
    best, last, previous = (
        manifest.weights_identity(stopped / name) for name in (BEST, LAST, PREVIOUS)
    )
    assert best == previous != last  # of steps 7, 7 and 8


@pytest.mark.parametrize("step", ["sync", "hash_file"])
def test_a_file_that_is_not_on_the_disk_is_in_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Guards against a thread whose error nobody asks for."""
    for name in ("model.safetensors", "training.json"):
        (tmp_path / name).write_text(name)
    original = getattr(manifest, step)

    def fail(path: Path) -> Any:
        if path.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return original(path)

    monkeypatch.setattr(manifest, step, fail)
    with pytest.raises(OSError, match="Input/output error"), manifest.Seal(tmp_path) as seal:
        seal.add_new_files()
    assert not (tmp_path / manifest.MANIFEST_FILE).exists()


def test_files_are_verified_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a disk that waits for each hash, and a fault that differs from call to call.

    As before, it is the first in the manifest's order.
    """
    names = ["a", "b", "c", "d", "training.json"]
    for name in names:
        (tmp_path / name).write_text(name)
    with manifest.Seal(tmp_path) as seal:
        seal.add_new_files()
    together, hash_file = threading.Barrier(2, timeout=10), manifest.hash_file

    def hash_two(file: Path) -> str:
        if file.name in "ab":
            together.wait()
        time.sleep(0.1 * (file.name == "b"))
        return hash_file(file)

    monkeypatch.setattr(manifest, "hash_file", hash_two)
    assert manifest.fault_of(tmp_path) is None
    for name in "dcb":
        (tmp_path / name).write_text("x")
        assert manifest.fault_of(tmp_path) == f"the content of {name} is not what was saved"


def test_everything_is_on_the_disk_before_it_is_renamed_into_place(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a complete-looking checkpoint of empty files after a power cut.

    No kill would show it.
    """
    events: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda number: (events.append(("sync", path_of(number))), fsync(number))
    )
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (events.append(("rename", self)), rename(self, to))[1]
    )
    assert call(train, *flags(settings)).code == 0
    saves = [
        number
        for number, (what, path) in enumerate(events)
        if what == "rename" and path.suffix == ".staged"
    ]
    assert len(saves) == 5  # last at steps 0, 7 and 14, best at 7 and 14
    for first, number in zip([0, *saves], saves, strict=False):
        staged = events[number][1]
        synced = [path for what, path in events[first:number] if what == "sync"]
        names = json.loads(
            (staged.with_name(staged.stem.removeprefix(".")) / MANIFEST_FILE).read_text()
        )["files"]
        assert {staged / name for name in names} <= set(synced)
        assert synced[-1] == staged and set(synced[:-2]) >= {staged / name for name in names}
        assert re.fullmatch(
            rf"\.{MANIFEST_FILE}\.[0-9a-f]+\.staged", synced[-2].name
        )  # last, then the folder
        assert events[number + 1] == ("sync", staged.parent)


@pytest.mark.parametrize(
    "when", ["before the first rename", "after it", "between the two", "after the last"]
)
def test_a_save_that_was_cut_among_its_renames_is_ended(
    call, settings: dict[str, str], stopped: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The run resumes from the newest complete checkpoint, and no half of one is left."""
    renames = ["before the first rename", "after it", "between the two", "after the last"].index(
        when
    )
    left = iter(range(renames))
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt("killed")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    source = checkpoint.staged_beside(stopped / LAST)
    shutil.copytree(stopped / LAST, source)
    description = json.loads((source / "training.json").read_text())
    (source / "training.json").write_text(json.dumps(description | {"step": 9}))
    seal(source)
    try:
        checkpoint.put_in_place(source, stopped / LAST)
    except KeyboardInterrupt:
        assert renames < 3
    monkeypatch.undo()
    found = checkpoint.newest_intact(stopped)
    assert found == stopped / LAST and training_json.read_description(found)["step"] == 9
    assert training_json.read_description(stopped / PREVIOUS)["step"] == 8
    assert not list(stopped.glob(".*"))


def test_a_save_that_was_cut_before_its_manifest_is_removed(stopped: Path) -> None:
    staged = checkpoint.staged_beside(stopped / LAST)
    shutil.copytree(stopped / LAST, staged)
    (staged / MANIFEST_FILE).unlink()
    before = tree(stopped / LAST)
    assert checkpoint.newest_intact(stopped) == stopped / LAST
    assert tree(stopped / LAST) == before and not staged.exists()


def test_a_save_begins_without_the_remains_of_another(
    tmp_path: Path, model_folder: Path, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    """Guards against a merge that was killed, and can never be repeated."""
    staged = checkpoint.staged_beside(tmp_path / "merged")
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"cut off")
    (staged / "old.json").touch()
    tokenizer = load_tokenizer(model_folder)
    checkpoint.save_checkpoint(tmp_path / "merged", make_llama(len(tokenizer)), tokenizer, {})
    assert manifest.fault_of(tmp_path / "merged") is None
    assert not (tmp_path / "merged" / "old.json").exists() and not staged.exists()


def test_a_damaged_last_never_becomes_the_predecessor(
    call, settings: dict[str, str], stopped: Path
) -> None:
    """Guards against a retention that counts incomplete checkpoints."""
    (stopped / LAST / "tokenizer.json").unlink()
    before = tree(stopped / PREVIOUS)
    shutil.copytree(stopped / BEST, staged := checkpoint.staged_beside(stopped / LAST))
    checkpoint.put_in_place(staged, stopped / LAST)
    assert tree(stopped / PREVIOUS) == before


def test_a_best_that_is_replaced_never_becomes_the_predecessor(stopped: Path) -> None:
    """Guards against a run that goes on from a best without state if its last is damaged."""
    before = tree(stopped / PREVIOUS)
    shutil.copytree(stopped / BEST, staged := checkpoint.staged_beside(stopped / BEST))
    checkpoint.put_in_place(staged, stopped / BEST)
    assert tree(stopped / PREVIOUS) == before


def test_retention_touches_nothing_else(call, settings: dict[str, str], stopped: Path) -> None:
    """Guards against names that are matched by their beginnings."""
    others = [
        stopped.parent / "test2" / LAST,
        stopped / "last-of-mine",
        stopped / "best2",
        stopped.parent / "tes" / BEST,
    ]
    for folder in others:
        shutil.copytree(stopped / BEST, folder)
    before = [tree(folder) for folder in others]
    (stopped / manifest.FITTING_FILE).write_text("{}")  # of a job that ran out of memory
    assert call(train, *flags(settings)).code == 0
    assert [tree(folder) for folder in others] == before
    kept = {"best", "last", "previous", "config.yaml", "metrics.jsonl", "last-of-mine", "best2"}
    assert {path.name for path in stopped.iterdir()} == kept


@pytest.mark.parametrize("name", ["lora (1)", "lora[1]", "lora(", "*", "c++", "v1.0"])
def test_remains_are_told_apart_by_any_name(tmp_path: Path, name: str) -> None:
    """Guards against a folder's name, which merge.py gets from the user, as a pattern."""
    others = [f".{other}.staged" for other in ("lora 1", "lora1", "c", "v1x0", "")]
    for each in (f".{name}.staged", f".{name}.removed", f".{name}.removed-2", *others):
        (tmp_path / each).mkdir()
    checkpoint.remove_remains(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


# ---------------------------------------------------------------- disk


def test_space_for_all_checkpoints_is_checked_before_training(
    call, settings: dict[str, str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the folder and how much is missing; what a resumed run has there counts."""
    usage = shutil.disk_usage("/")
    weights = sum(
        tensor.nbytes for tensor in load_file(whole / BEST / "model.safetensors").values()
    )
    needed = weights + 3 * (weights + 2 * weights)

    def with_free(free: float, **parts: Any) -> Any:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(free)))
        return call(train, *flags(settings), **parts)

    with_free(0.5 * needed).assert_user_error(
        f"test: its checkpoints need {needed / 1e6:.1f} MB", "are available", "--output_dir"
    )
    assert not (run_folder(settings) / LAST).exists()
    with pytest.raises(Killed):
        with_free(needed, step=step_that(kill, at=1))
    there = sum(len(content) for content in tree(run_folder(settings) / LAST).values())
    with_free(needed - there - 1).assert_user_error("its checkpoints need")
    assert with_free(needed - there).code == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_space_that_is_checked_is_the_one_that_is_taken(make_llama, dtype: torch.dtype) -> None:
    model = make_llama(420).to(dtype)
    built = optimizer.build_optimizer(
        model.parameters(), learning_rate=1e-3, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.0
    )
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    built.step()
    weights, state = optimizer.checkpoint_bytes(model.parameters())
    assert weights == sum(parameter.nbytes for parameter in model.parameters())
    held = [
        value
        for entry in built.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    ]
    assert state <= sum(value.nbytes for value in held) < state + 10_000  # step counters beside it


def test_a_disk_that_fills_up_in_a_later_save_leaves_the_earlier_ones(
    call, settings: dict[str, str], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file of the save, with the real writer's error."""
    names = (BEST, LAST, PREVIOUS)
    for fails in range(1, 1 + len(list((stopped / LAST).iterdir()))):
        before = {name: tree(stopped / name) for name in names}
        syncs = iter(range(1, 1000))
        original = os.fsync

        def fsync(
            number: int, syncs: Any = syncs, fails: int = fails, original: Any = original
        ) -> None:
            if path_of(number).parent.suffix == ".staged" and next(syncs) == fails:
                raise OSError(28, "No space left on device")
            original(number)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            outcome = call(train, *flags(settings | {"checkpoint_steps": "1"}))
        outcome.assert_user_error(
            "can't be written (", "No space left on device", "earlier ones are intact"
        )
        assert {name: tree(stopped / name) for name in names} == before
        assert not list(stopped.glob(".*"))


# ---------------------------------------------------------------- whose folder it is


def test_two_processes_do_not_train_the_same_run(
    call, settings: dict[str, str], stopped: Path
) -> None:
    """Guards against the same command typed twice: each would move the other's folders away."""
    with held_by_another_process(stopped, "claimed(folder, 'auto')"):
        before = tree(stopped)
        call(train, *flags(settings)).assert_user_error(
            "another process is training this run", "--run_name"
        )
        assert tree(stopped) == before
    # A lock that outlived its process would be worse than none.
    assert call(train, *flags(settings)).code == 0


@pytest.mark.parametrize(
    "name", ["", LAST, BEST, PREVIOUS, "metrics.jsonl", "config.yaml", ".last.staged", "wandb"]
)
def test_no_symbolic_link_leads_out_of_the_folder(
    call, settings: dict[str, str], stopped: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    if (stopped / name).exists():
        (stopped / name).rename(outside)
    else:
        outside.mkdir()
    (stopped / name).symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else tree(outside)
    call(train, *flags(settings)).assert_user_error("is a symbolic link", "move it away")
    assert (outside.read_bytes() if outside.is_file() else tree(outside)) == before


@pytest.mark.parametrize("name", ["eval", "eval/test", "metrics.jsonl"])
def test_evaluation_writes_through_no_symbolic_link(
    call, stopped: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (stopped / name).parent.mkdir(exist_ok=True)
    if (stopped / name).exists():
        outside.rmdir()
        (stopped / name).rename(outside)
    before = tree(tmp_path / "outside"), outside.stat().st_size
    (stopped / name).symlink_to(outside)
    call(evaluate, "--ckpt", str(stopped / BEST), "--limit", "2").assert_user_error(
        "is a symbolic link"
    )
    assert (tree(tmp_path / "outside"), outside.stat().st_size) == before


def test_a_file_system_without_locks_is_trained_on(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert call(train, *flags(settings | {"epochs": "1"})).code == 0


def test_an_error_of_another_kind_is_not_taken_for_a_lock(call, settings: dict[str, str]) -> None:
    """Such as the error of a terminal that does not wait."""

    def fail(*_: Any) -> None:
        raise BlockingIOError("terminal")

    with pytest.raises(BlockingIOError, match="terminal"):
        call(train, *flags(settings), step=fail)


def test_a_refused_resume_changes_nothing(call, settings: dict[str, str], stopped: Path) -> None:
    """Guards against a damaged last that is set aside for a run that then does not go on."""
    flip_a_byte(stopped / LAST / "model.safetensors")
    before = tree(stopped)
    for _ in range(2):
        outcome = call(train, *flags(settings | {"seed": "3"}))
        outcome.assert_user_error("seed was 0 and is 3")
        assert "last: is damaged" in outcome.out
    assert tree(stopped) == before


# ---------------------------------------------------------------- resuming beside other checkpoints


@pytest.mark.parametrize("lost", ["damaged", "gone"])
def test_a_best_that_is_damaged_or_gone_is_chosen_again(
    call, settings: dict[str, str], stopped: Path, lost: str
) -> None:
    """Guards against a run that ends by naming a best that is missing, since no epoch beat it."""
    if lost == "damaged":
        flip_a_byte(stopped / BEST / "model.safetensors")
    else:
        shutil.rmtree(stopped / BEST)
    worse = Measurement(99.0, 1e43, 1)
    outcome = call(train, *flags(settings), measure=lambda *_: worse)
    assert outcome.code == 0, outcome.err
    missing = "missing; the best will be chosen among the remaining epochs"
    assert f"{stopped / BEST}: {missing}" in outcome.out
    assert (stopped / "best.damaged").exists() == (lost == "damaged")
    assert manifest.fault_of(stopped / BEST) is None
    assert training_json.read_description(stopped / BEST)["validation_loss"] == 99.0


def test_a_resumed_run_maps_none_of_its_files(
    call, settings: dict[str, str], stopped: Path
) -> None:
    """Guards against a checkpoint that was removed and keeps its room on the disk all the same."""
    mapped = []

    def step(*arguments: Any) -> train.StepResult:
        mapped.append(
            [
                line
                for line in Path("/proc/self/maps").read_text().splitlines()
                if str(stopped) in line
            ]
        )
        return train.train_step(*arguments)

    assert call(train, *flags(settings), step=step).code == 0
    assert mapped == [[]] * 6


def test_a_damaged_checkpoint_is_no_base_model(
    call, settings: dict[str, str], stopped: Path
) -> None:
    flip_a_byte(stopped / BEST / "model.safetensors")
    changed = settings | {"model": str(stopped / BEST), "run_name": "next"}
    call(train, *flags(changed)).assert_user_error(
        "best: is damaged (the content of model.safetensors is not what"
    )


def test_a_manifest_of_another_program_is_none(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)
    (base / MANIFEST_FILE).write_text('{"assets": []}')
    assert call(train, *flags(settings | {"model": str(base), "epochs": "1"})).code == 0
    assert call(perplexity, "--ckpt", str(base), *flags(settings)).code == 0


@pytest.mark.parametrize("script", [evaluate, perplexity])
def test_a_checkpoint_that_is_replaced_while_it_is_loaded_is_not_evaluated(
    call, stopped: Path, monkeypatch: pytest.MonkeyPatch, script
) -> None:
    """Guards against a score of one checkpoint under the name of another."""
    original = LlamaForCausalLM.from_pretrained

    def from_pretrained(*arguments: Any, **keywords: Any) -> Any:
        model = original(*arguments, **keywords)
        shutil.rmtree(stopped / LAST)
        shutil.copytree(stopped / PREVIOUS, stopped / LAST)  # as training would
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", from_pretrained)
    outcome = call(script, "--ckpt", str(stopped / LAST), "--limit", "2")
    outcome.assert_user_error("last: training has just saved another one in its place: start again")
    assert not (stopped / "eval").exists()


@pytest.mark.parametrize(
    ("name", "fails", "step"),
    [(BEST, 1, 14), (BEST, 2, 14), (LAST, 1, 7), (LAST, 2, 7), (LAST, 3, 14)],
)
def test_a_rename_that_fails_loses_nothing(
    call,
    settings: dict[str, str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fails: int,
    step: int,
) -> None:
    """Guards against deleting a complete staged checkpoint, and the previous one with it."""
    with monkeypatch.context() as patch:
        original, seen = Path.rename, []

        def rename(self: Path, target: Path) -> Path:
            kept = {BEST: {".best.staged", "best"}, LAST: {".last.staged", "last", "previous"}}[
                name
            ]
            if self.name in kept and (seen or (run_folder(settings) / BEST).exists()):
                seen.append(self)
                if len(seen) == fails:
                    raise OSError(5, "Input/output error")
            return original(self, target)

        patch.setattr(Path, "rename", rename)
        outcome = call(train, *flags(settings))
    outcome.assert_user_error(
        "the checkpoint can't be written", "Input/output error", "earlier ones are intact"
    )
    assert checkpoint.newest_intact(run_folder(settings)) == run_folder(settings) / LAST
    # And it is the new one, which was whole.
    assert training_json.read_description(run_folder(settings) / name)["step"] == step
    outcome = call(train, *flags(settings))
    assert outcome.code == 0 or "this run is finished" in outcome.err
    for folder in (BEST, LAST):
        assert manifest.fault_of(run_folder(settings) / folder) is None
        for file in (run_folder(settings) / folder).glob("*.safetensors"):
            assert file.read_bytes() == (whole / folder / file.name).read_bytes()


def test_a_full_disk_under_the_tokenizer_is_one_line(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.write_bytes

    def write_bytes(file: Path, content: bytes) -> int:
        if file.name == "tokenizer.json" and "staged" in file.parent.name:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return original(file, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    call(train, *flags(settings)).assert_user_error(
        "the checkpoint can't be written ([Errno 27] File too large)"
    )
    assert not list(run_folder(settings).iterdir())


def test_what_can_not_be_removed_is_left_and_said_nothing_of(
    call, settings: dict[str, str], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system leaves what another process has open."""
    (stopped / ".previous.removed" / "open").mkdir(parents=True)
    original = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if not (Path(path) / "open").exists():
            original(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert call(train, *flags(settings)).code == 0
    assert {path.name for path in stopped.glob(".*")} == {".previous.removed"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_folder_in_the_place_of_a_file_is_one_line(
    call, settings: dict[str, str], stopped: Path, name: str
) -> None:
    (stopped / name).unlink()
    (stopped / name).mkdir()
    before = tree(stopped / LAST)
    call(train, *flags(settings)).assert_user_error(name, "Is a directory")
    assert tree(stopped / LAST) == before


def test_a_disk_that_fills_up_under_the_metrics_is_one_line(
    call, settings: dict[str, str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run goes on from its last save when there is room again."""
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        original = os.fsync

        def fsync(number: int) -> None:
            if (
                os.readlink(f"/proc/self/fd/{number}").endswith("metrics.jsonl")
                and next(calls) == 11
            ):
                raise OSError(28, "No space left on device")
            original(number)

        patch.setattr(os, "fsync", fsync)
        outcome = call(train, *flags(settings))
    outcome.assert_user_error(
        "metrics.jsonl: can't be written (No space left on device)", "from the last save"
    )
    assert call(train, *flags(settings)).code == 0
    for file in (run_folder(settings) / LAST).glob("*.safetensors"):
        assert file.read_bytes() == (whole / LAST / file.name).read_bytes()
    steps = [
        json.loads(line)["step"]
        for line in (run_folder(settings) / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 14]
