"""Saved models go to the model hub, by its own client."""

import logging
from pathlib import Path

log = logging.getLogger(__name__)

OF_THE_MODEL = "model*.safetensors*"
"""Weights and their index: those of an earlier model, in other parts, would be loaded in place of the new ones."""


def check_can_push(name: str) -> None:
    """Refuse what cannot be pushed, before hours are spent on it.

    Args:
        name: Of the repository on the hub, such as ``me/model``; it need not exist.

    Raises:
        ValueError: If that is no name, there is no token that the hub takes, or its client was told to stay offline.
        ConnectionError: If the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub must be a name such as me/my-model, got {name!r}: {error}") from None
    if get_token() is None:
        raise ValueError(
            f"push_to_hub={name!r} needs a token that may write: log in with `hf auth login`, or set HF_TOKEN"
        )
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push_to_hub={name!r} needs the hub, and HF_HUB_OFFLINE is set")
    try:
        HfApi().whoami()
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise ValueError(f"push_to_hub={name!r}: the hub does not take the token ({error})") from error
        raise ConnectionError(
            f"push_to_hub={name!r}: the hub cannot be reached ({error}). Leave it out, and push the model later"
        ) from error


def push(folder: Path, name: str) -> str | None:
    """Push the folder of a saved model, its card with it; a failure is said and loses nothing.

    A repository that does not exist is made, one that does gets a commit.

    Args:
        folder: What :func:`wanda_lightning.save_pretrained` wrote.
        name: Of the repository, such as ``me/model``.

    Returns:
        Where it is on the hub; None if it is not.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="Pruned with wanda-lightning",
            delete_patterns=OF_THE_MODEL,
        )
    except Exception as error:  # whatever the network or the hub's policies bring: the model is on disk
        log.error(
            "the model is saved in %s, but it was not pushed (%s). To push it: hf upload %s %s .",
            folder, " ".join(str(error).split()) or type(error).__name__, name, folder,
        )  # fmt: skip
        return None
    return repository.url
