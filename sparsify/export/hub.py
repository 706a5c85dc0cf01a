"""Publishes a bundle on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from sparsify.errors import ExportError


def push_to_hub(bundle: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Uploads a bundle as one commit, so that no partial bundle is ever visible.

    Args:
        bundle: Folder that `export` wrote.
        repository: OWNER/NAME; created if it does not exist.
        private: Whether a new repository is private.
        api: Client with endpoint and token; None for those of the environment.

    Returns:
        The URL of the repository.

    Raises:
        ExportError: With the Hub's reason.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        # Not upload_folder, which splits large folders into several commits.
        api.create_commit(
            repo_id=address.repo_id,
            operations=[
                CommitOperationAdd(path.relative_to(bundle).as_posix(), path)
                for path in sorted(bundle.rglob("*"))
                if path.is_file()
            ],
            commit_message="Add the bundle that `sparsify export` wrote",
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ExportError(
            f"{bundle} was not published as {repository}: {str(error).strip().splitlines()[0]}",
            allowed="OWNER/NAME, with a token that can write there (`hf auth login`, or HF_TOKEN).",
            next_step="The bundle itself is complete; `hf upload REPO FOLDER` also publishes it.",
        ) from error
    return str(address)
