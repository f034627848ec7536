"""Model folders, local or from the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from engine.refusals import adapter_found
from engine.tokenizer_files import FILES
from run.errors import UserError, cause_of, one_line
from run.paths import is_hub_id, local_path

# No *.bin: it is pickled, and loading it could run code. Llama-2's repository has both formats.
DOWNLOADED = ("*.safetensors", "*.json", *FILES)


def fetch(name: str, files: Sequence[str] = DOWNLOADED) -> Path:
    """The local folder of a model: ``name`` itself, or the hub's files, downloaded if necessary.

    Args:
        files: the names or patterns of those to download.

    Raises:
        UserError: there is no such folder, or the hub can't be reached, does not know the model, or
            requires its licence to be accepted first.
    """
    folder = local_path(name)
    if folder.is_dir():
        _check_is_a_model(name, folder)
        return folder
    if folder.exists():
        raise UserError(f"model {name!r} is a file: name the Hugging Face model folder around it")
    if not is_hub_id(name):
        raise UserError(
            f"model {name!r} is neither a folder here nor a hub id such as meta-llama/Llama-2-7b-hf"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*files]))
    except HfHubHTTPError as error:
        raise _refused_by_hub(name, error) from None
    except Exception as error:  # the hub's client and its HTTP library raise many types
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"model {name!r} can't be loaded from the hub{offline} ({cause_of(error)}): check the "
            "network, or name a local folder"
        ) from None


def _check_is_a_model(name: str, folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise adapter_found(folder)
    raise UserError(
        f"model {name!r}: this folder has no config.json: name a checkpoint or a Hugging Face "
        "model folder"
    )


def _refused_by_hub(name: str, error: HfHubHTTPError) -> UserError:
    status = error.response.status_code
    log_in = "log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return UserError(f"model {name!r} is not on the hub, or is private: check the id, {log_in}")
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return UserError(
            f"model {name!r} is gated: accept its licence at huggingface.co/{name}, then {log_in}"
        )
    return UserError(
        f"model {name!r}: the hub responds with {status} ({one_line(error)[:120]}): try again later"
    )
