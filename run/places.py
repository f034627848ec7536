"""Pins the folders of model and data set, so that a later command can be typed elsewhere."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from run.config import PLACES, Config
from run.paths import is_same_place, local_path, with_tilde
from run.setting_types import check_text


def anchored(config: Config, saved: Mapping[str, Any] | None = None) -> Config:
    """``config`` with the folders of model and data set as absolute paths without symbolic links.

    A name that is a folder now keeps referring to that folder, wherever the run's next command is
    typed. It never turns into a hub id of the same spelling.

    Args:
        saved: the settings of the run that is resumed. Its hub ids remain hub ids. A relative path
            that does not exist here is taken to mean the saved folder.
    """
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
