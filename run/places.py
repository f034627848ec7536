"""Pins the folders of model and data set, so that a later command can be typed elsewhere."""

import os
from dataclasses import replace
from pathlib import Path

from run.config import Config
from run.paths import is_same_place, local_path, with_tilde
from run.setting_types import PLACES, check_text
from run.training_json import read_description, saved_settings


def anchored(config: Config, resume_from: Path | None = None) -> Config:
    """``config`` with the folders of model and data set as absolute paths without symbolic links.

    A name that is a folder now keeps referring to that folder, wherever the run's next command is
    typed. It never turns into a hub id of the same spelling.

    Args:
        resume_from: the checkpoint to resume from. Its hub ids remain hub ids. A relative path that
            does not exist here is taken to mean the folder that it names.
    """
    saved = resume_from and saved_settings(resume_from, read_description(resume_from))
    places: dict[str, str] = {}
    for key in PLACES:
        typed, before = getattr(config, key), None if saved is None else saved.get(key)
        if typed == before:
            continue
        if local_path(typed).is_dir():
            places[key] = _absolute(key, typed)
        elif before is not None and is_same_place(typed, before):
            places[key] = before
    return replace(config, **places)


def _absolute(key: str, typed: str) -> str:
    absolute = os.path.realpath(local_path(typed))
    try:
        return with_tilde(check_text(absolute))
    except ValueError as error:
        print(f"{key} {typed!r} stays relative to this folder, whose own path {error}")
        return typed


def has_moved(before: str, now: str) -> bool:
    """Whether the folder ``before`` no longer exists, and ``now`` is a folder of the same name.

    No more need be checked for the base model, since a resumed run no longer reads it.
    """
    old, new = local_path(before), local_path(now)
    return old.is_absolute() and not old.exists() and new.is_dir() and old.name == new.name
