"""Upload an export to the hub. What would stand in the way is found before any work is done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from qlora_train.errors import MachineError, RecipeError, first_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_push(repository: str) -> None:
    """RecipeError for what is no name, MachineError where the hub is out of reach or the token may not write there."""
    if not _REPOSITORY.fullmatch(repository):
        raise RecipeError(f"--push {repository}: this is no name on the hub", fix="write ORG/NAME")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RecipeError(
            f"--push {repository}: this is no name on the hub: {first_line(error)}", fix="choose another"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise MachineError("--push needs the hub, and HF_HUB_OFFLINE is set", fix="unset it, or leave --push away")
    if get_token() is None:
        raise MachineError("--push needs a token of the hub, and there is none", fix="run `hf auth login` first")
    try:
        known = HfApi().whoami()
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise MachineError(
            f"--push: the hub does not take the token: {first_line(error)}", fix="run `hf auth login`"
        ) from error
    access = (known.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise MachineError(
            "--push: the token may read from the hub, and not write there",
            fix="make one that may write at https://huggingface.co/settings/tokens, then run `hf auth login`",
        )
    owner = repository.partition("/")[0]
    names = {known.get("name"), *(org.get("name") for org in known.get("orgs") or ())}
    if owner not in names:
        raise MachineError(
            f"--push {repository}: the token is of {known.get('name')}, which is no member of {owner}",
            fix="name another owner, or log in as one that may write there",
        )


def push(folder: Path, repository: str, what: str = "the merged model") -> str:
    """Upload a published export into a repository, made private where there is none; its address.

    `what` it is goes into the message of the commit.

    MachineError when the hub refuses; the folder stays as it is, and the message says how to try again.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {what}")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise MachineError(
            f"the upload to {repository} failed: {first_line(error)}",
            # --private: where there is no repository yet, the command would make a public one.
            fix=f"the export is whole in {folder}; try again with: "
            f"hf upload {repository} {shlex.quote(str(folder))} --private",
        ) from error
    return str(done.commit_url)
