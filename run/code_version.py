"""Which commit of this program runs."""

import os
import subprocess
from pathlib import Path

CODE = Path(__file__).resolve().parents[1]
GIT_SECONDS = 5  # how long to wait, as for a repository on a slow network


def code_commit(folder: Path = CODE) -> str | None:
    """The commit that is checked out, ending in ``-dirty`` if tracked files differ from it.

    None without git, or without a repository around ``folder``.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(
            [*command, "--exclude=*"],  # no tag in place of the hash
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # it changes no file
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
