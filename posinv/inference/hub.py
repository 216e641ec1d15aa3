"""Upload of an exported model to the Hugging Face hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from posinv.errors import InputError

# What the hub's answer means for one who uploads.
MEANINGS = {
    401: "the hub does not accept the token: log in again (hf auth login)",
    403: "the token has no right to write there: take a name of your own, or a token with write "
    "access (https://huggingface.co/settings/tokens)",
    409: "exists already: take another name, or upload into it with hf upload",
}


def check_hub(name: str) -> None:
    """Check, without the network, what an upload needs.

    Args:
        name: of the repository: ``name`` or ``namespace/name``.

    Raises:
        InputError: no name for a repository, or no token.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push {name}: no name for a repository of the hub: {error}") from error
    if not get_token():
        raise InputError(
            f"--push {name}: no token for the Hugging Face hub: log in (hf auth login), or put a "
            "token with write access into the variable HF_TOKEN"
        )


def push_folder(folder: Path, name: str, public: bool = False) -> str:
    """Upload a folder into a new repository of the Hugging Face hub.

    The token is that of ``hf auth login`` or of ``HF_TOKEN``. The folder's ``README.md`` is the
    model's card there.

    Args:
        folder: the folder.
        name: of the repository: ``name``, in your own namespace, or ``namespace/name``.
        public: everyone may read it; else it is private.

    Returns:
        The repository's address.

    Raises:
        InputError: see :func:`check_hub`; the repository exists, the token has no right to make it,
            or the hub cannot be reached. The folder stays as it is.
    """
    check_hub(name)
    api = HfApi(library_name="posinv")
    try:
        address = api.create_repo(name, private=not public)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Export by posinv"
        )
    # ValueError: the hub does not accept the card's metadata.
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise InputError(
            f"--push {name}: {_meaning(error)}. The export is complete in {folder}; to upload it "
            f"later: {shlex.join(['hf', 'upload', name, str(folder)])}"
        ) from error
    return str(address)


def _meaning(error: Exception) -> str:
    """Say what is wrong; never an error's whole text, which can hold the token."""
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is switched off by HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = _without_token(error.server_message or error.response.reason_phrase)
        return MEANINGS.get(status, f"the hub answers {status}: {said}")
    if isinstance(error, ValueError):
        return _without_token(str(error))
    return f"the hub cannot be reached ({type(error).__name__}): check the network"


def _without_token(text: str) -> str:
    return text.replace(get_token() or "\0", "<token>")
