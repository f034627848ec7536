"""What was a folder once is that folder for a run for ever, wherever its next command is typed."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from conftest import flags, seal, write_rows

import evaluate
import perplexity
import train
from grading import dataset
from grading.dataset import Problem
from run.paths import is_same_folder, is_same_place
from run.places import has_moved
from run.training_json import saved_settings


@pytest.fixture
def here(settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start in, with model and data set in it under names that could be hub ids.

    There is no hub.
    """
    folder = tmp_path / "here"
    shutil.copytree(settings["model"], folder / "base" / "llama")
    shutil.copytree(settings["dataset"], folder / "demo" / "data")
    settings |= {"model": "base/llama", "dataset": "demo/data"}
    settings |= {"epochs": "1", "batch_size": "26"}  # one step an epoch

    def hub(*_: object, **__: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def best_of(settings: dict[str, str], folder: Path) -> Path:
    return folder / settings["output_dir"] / "test" / "best"


def settings_of(checkpoint: Path) -> dict[str, str]:
    return json.loads((checkpoint / "training.json").read_text())["settings"]


def test_a_relative_folder_is_found_from_everywhere(
    call, settings: dict[str, str], here: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against half a minute of asking the hub, and another data set of that name."""
    settings["output_dir"] = "runs"
    assert call(train, *flags(settings)).code == 0
    best = best_of(settings, here)
    expected = call(perplexity, "--ckpt", str(best)).out.splitlines()[-1]
    assert settings_of(best)["dataset"] == str(here / "demo" / "data")
    assert settings_of(best)["model"] == str(here / "base" / "llama")
    assert f"dataset: {here / 'demo' / 'data'}\n" in (best.parent / "config.yaml").read_text()
    monkeypatch.chdir(elsewhere)
    assert call(perplexity, "--ckpt", str(best)).out.splitlines()[-1] == expected
    assert call(evaluate, "--ckpt", str(best)).code == 0
    # A folder of that name that is another one changes nothing.
    (elsewhere / "demo" / "data").mkdir(parents=True)
    assert call(perplexity, "--ckpt", str(best)).out.splitlines()[-1] == expected
    # A flag is of the folder in which it is typed.
    call(perplexity, "--ckpt", str(best), "--dataset", "demo/data").assert_user_error(
        "demo/data", "test.jsonl"
    )


@pytest.fixture
def more(
    call, settings: dict[str, str], here: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Flags of a second epoch, to be typed elsewhere, of a run whose first is finished."""
    settings |= {"output_dir": str(here / "runs"), "lr_schedule": "constant", "warmup_ratio": "0"}
    assert call(train, *flags(settings)).code == 0
    monkeypatch.chdir(elsewhere)
    return flags(settings | {"epochs": "2"})


def test_the_same_command_goes_on_from_everywhere(
    call, settings: dict[str, str], here: Path, more: list[str]
) -> None:
    outcome = call(train, *more)
    assert outcome.code == 0, outcome.err
    assert "dataset was" not in outcome.out and "model was" not in outcome.out
    assert settings_of(best_of(settings, here))["dataset"] == str(here / "demo" / "data")


def test_another_folder_of_that_name_is_not_taken_for_it(
    call, here: Path, elsewhere: Path, more: list[str]
) -> None:
    shutil.copytree(here / "demo", elsewhere / "demo")
    lines = (elsewhere / "demo" / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (elsewhere / "demo" / "data" / "train.jsonl").write_text("".join(lines[:-1]))
    call(train, *more).assert_user_error("the rows of the data set are not the same")
    shutil.rmtree(elsewhere / "demo")
    shutil.copytree(here / "base", elsewhere / "base")
    call(train, *more).assert_user_error(f"model was '{here / 'base' / 'llama'}' and is")


def test_folders_that_were_moved_are_said(
    call, settings: dict[str, str], here: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows decide which data set it is; of the model a resumed run reads nothing more."""
    settings |= {"output_dir": str(here / "runs"), "lr_schedule": "constant", "warmup_ratio": "0"}
    assert call(train, *flags(settings)).code == 0
    shutil.move(here / "base", elsewhere / "base")
    shutil.move(here / "demo", elsewhere / "demo")
    monkeypatch.chdir(elsewhere)
    outcome = call(train, *flags(settings | {"epochs": "2"}))
    assert outcome.code == 0, outcome.err
    assert (
        f"dataset was '{here / 'demo' / 'data'}' and is '{elsewhere / 'demo' / 'data'}'"
        in outcome.out
    )
    assert (
        f"model was '{here / 'base' / 'llama'}' and is '{elsewhere / 'base' / 'llama'}'"
        in outcome.out
    )


def test_only_a_folder_of_the_same_name_is_the_moved_one(tmp_path: Path) -> None:
    """Guards against a run that goes on under the name of another model."""
    for name in ("llama", "other"):
        (tmp_path / "new" / name).mkdir(parents=True)
    gone = str(tmp_path / "old" / "llama")
    assert has_moved(gone, str(tmp_path / "new" / "llama"))
    assert not has_moved(gone, str(tmp_path / "new" / "other"))


def test_a_relative_path_is_the_whole_end_of_an_absolute_one(tmp_path: Path) -> None:
    """Guards against another model of the same name, and a traceback where one is gone."""
    (tmp_path / "base" / "llama").mkdir(parents=True)
    absolute, gone = str(tmp_path / "base" / "llama"), str(tmp_path / "gone")
    assert is_same_place("base/llama", absolute) and not is_same_place("other/llama", absolute)
    assert not is_same_place("llama", "base/llama")
    assert is_same_folder("base/llama", absolute, is_older=True)
    assert not is_same_folder("base/llama", absolute, is_older=False)
    assert is_same_folder(absolute, f"{absolute}/../llama", is_older=False)
    assert not is_same_folder(absolute, gone, is_older=False)


def test_a_place_relative_to_an_unknown_folder_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a folder of that name where the command happens to be typed."""
    (tmp_path / "base" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = {"output_dir": str(tmp_path / "runs"), "run_name": "test", "model": "base/llama"}
    found = saved_settings(tmp_path / "runs" / "test" / "last", {"settings": settings})
    assert "model" not in found
    settings["output_dir"] = "runs"  # whose folder is known
    found = saved_settings(tmp_path / "runs" / "test" / "last", {"settings": settings})
    assert found["model"] == str(tmp_path / "base" / "llama")


def make_relative(folder: Path, start: str = "") -> None:
    """As an older version saved it; or absolute, with ``start``."""
    description = json.loads((folder / "training.json").read_text())
    places = {"model": f"{start}base/llama", "dataset": f"{start}demo/data", "output_dir": "runs"}
    description["settings"] |= places
    del description["tokenizer"]
    (folder / "training.json").write_text(json.dumps(description))
    seal(folder)


def test_a_run_of_an_older_version_is_found(
    call, settings: dict[str, str], here: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folders were relative to where it was started, and so was its output_dir."""
    settings |= {"output_dir": "runs", "lr_schedule": "constant", "warmup_ratio": "0"}
    assert call(train, *flags(settings)).code == 0
    best = best_of(settings, here)
    expected = call(perplexity, "--ckpt", str(best)).out.splitlines()[-1]
    for name in ("best", "last"):
        make_relative(best.parent / name)
    outcome = call(train, *flags(settings | {"epochs": "2"}))
    assert (
        outcome.code == 0 and "model was" not in outcome.out and "dataset was" not in outcome.out
    ), outcome.out
    make_relative(best)
    expected = call(perplexity, "--ckpt", str(best)).out.splitlines()[-1]
    monkeypatch.chdir(elsewhere)
    assert call(perplexity, "--ckpt", str(best)).out.splitlines()[-1] == expected


def test_a_folder_that_is_gone_is_no_hub_id(
    call, settings: dict[str, str], here: Path, problems: list[Problem], elsewhere: Path
) -> None:
    settings["output_dir"] = "runs"
    assert call(train, *flags(settings)).code == 0
    shutil.move(here / "demo", elsewhere / "demo")
    best = best_of(settings, here)
    call(evaluate, "--ckpt", str(best)).assert_user_error(f"dataset '{here / 'demo' / 'data'}'")
    assert (
        call(evaluate, "--ckpt", str(best), "--dataset", str(elsewhere / "demo" / "data")).code == 0
    )


def test_a_run_behind_a_link_is_of_the_folder_around_the_link(
    call, settings: dict[str, str], here: Path, tmp_path: Path, problems: list[Problem]
) -> None:
    """As where checkpoints is a link to a larger disk with another folder of that name."""
    settings["output_dir"] = "runs"
    disk = tmp_path / "disk"
    (disk / "runs").mkdir(parents=True)
    (here / "runs").symlink_to(disk / "runs")
    assert call(train, *flags(settings)).code == 0
    best = here / "runs" / "test" / "best"
    expected = call(perplexity, "--ckpt", str(best)).out.splitlines()[-1]
    make_relative(best)
    write_rows(disk / "demo" / "data" / "test.jsonl", problems[20:27])
    assert call(perplexity, "--ckpt", str(best)).out.splitlines()[-1] == expected
    # Found by the link's target alone, it is noticed that those are other rows.
    outcome = call(perplexity, "--ckpt", str(disk / "runs" / "test" / "best"))
    outcome.assert_user_error(
        "the test rows of dataset", "are not the ones that this run used", "--dataset"
    )
    for rows in ("demo/data", str(disk / "demo" / "data")):  # these, or those nevertheless
        assert (
            call(perplexity, "--ckpt", str(disk / "runs" / "test" / "best"), "--dataset", rows).code
            == 0
        )


def test_what_was_the_hubs_stays_the_hubs(
    call,
    settings: dict[str, str],
    here: Path,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a folder that now has the name of the hub id that a run was made from."""
    rows = {
        split: [asdict(problem) for problem in dataset.load_problems("demo/data", split)]
        for split in ("train", "test")
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: rows[split])
    base = str(here / "base" / "llama")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: base)
    settings |= {
        "model": "owner/name",
        "dataset": "owner/rows",
        "lr_schedule": "constant",
        "warmup_ratio": "0",
    }
    assert call(train, *flags(settings)).code == 0
    best = best_of(settings, here)
    shutil.copytree(here / "base" / "llama", here / "owner" / "name")
    assert call(train, *flags(settings | {"epochs": "2"})).code == 0
    for name in ("best", "last"):
        assert {settings_of(best.parent / name)[key] for key in ("model", "dataset")} == {
            "owner/name",
            "owner/rows",
        }
    more = flags(settings | {"epochs": "3", "model": "./owner/name"})
    call(train, *more).assert_user_error("model was 'owner/name' and is '")
    write_rows(here / "owner" / "rows" / "test.jsonl", problems[20:27])
    call(evaluate, "--ckpt", str(best)).assert_user_error(
        "the test rows of dataset 'owner/rows' are not the ones"
    )


def test_one_folder_in_several_spellings_is_one(
    call, settings: dict[str, str], here: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"output_dir": str(here / "runs"), "lr_schedule": "constant", "warmup_ratio": "0"}
    assert call(train, *flags(settings)).code == 0
    (elsewhere / "link").symlink_to(here)
    monkeypatch.chdir(elsewhere)
    for epochs, start in enumerate(("../here", "link", str(elsewhere / "link")), start=2):
        changed = {
            "model": f"{start}/base/llama",
            "dataset": f"{start}/demo/data",
            "epochs": str(epochs),
        }
        outcome = call(train, *flags(settings | changed))
        assert outcome.code == 0 and "model was" not in outcome.out, outcome.err + outcome.out
        assert settings_of(here / "runs" / "test" / "last")["dataset"] == str(
            here / "demo" / "data"
        )


@pytest.mark.parametrize("name", ["home (copy)", "home+x", "home"])
def test_a_neighbour_of_the_home_is_not_in_it(
    call,
    settings: dict[str, str],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Guards against "~ (copy)", which leads nowhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(here, tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    settings["output_dir"] = "runs"
    assert call(train, *flags(settings)).code == 0
    best = best_of(settings, tmp_path / name)
    shown = settings_of(best)["dataset"]
    assert shown == ("~/demo/data" if name == "home" else str(tmp_path / name / "demo" / "data"))
    assert call(perplexity, "--ckpt", str(best)).code == 0


def test_a_folder_whose_path_can_not_be_kept_stays_relative(
    call, settings: dict[str, str], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(here, tmp_path / "a\x01b")
    monkeypatch.chdir(tmp_path / "a\x01b")
    settings["output_dir"] = "runs"
    outcome = call(train, *flags(settings))
    assert outcome.code == 0 and "dataset 'demo/data' stays relative to this folder" in outcome.out
    assert call(perplexity, "--ckpt", "runs/test/best").code == 0


def test_a_run_of_an_older_version_goes_on_from_everywhere(
    call, settings: dict[str, str], here: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"output_dir": "runs", "lr_schedule": "constant", "warmup_ratio": "0"}
    assert call(train, *flags(settings)).code == 0
    for name in ("best", "last"):
        make_relative(here / "runs" / "test" / name)
    monkeypatch.chdir(elsewhere)
    more = settings | {"output_dir": str(here / "runs"), "epochs": "2"}
    assert call(train, *flags(more)).code == 0
    assert settings_of(here / "runs" / "test" / "last")["dataset"] == str(here / "demo" / "data")


def test_a_link_that_an_older_version_kept_is_its_folder(
    call, settings: dict[str, str], here: Path, elsewhere: Path
) -> None:
    settings |= {"output_dir": "runs", "lr_schedule": "constant", "warmup_ratio": "0"}
    assert call(train, *flags(settings)).code == 0
    (elsewhere / "link").symlink_to(here)
    for name in ("best", "last"):
        make_relative(here / "runs" / "test" / name, f"{elsewhere}/link/")
    outcome = call(train, *flags(settings | {"epochs": "2"}))
    assert (
        outcome.code == 0 and "model was" not in outcome.out and "dataset was" not in outcome.out
    ), outcome.err
