"""Dataset repositories of the Hugging Face hub, as local folders."""

from __future__ import annotations

import re
from pathlib import Path

from streamprep.errors import UserError

_URL = re.compile(r"hf://datasets/(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<folder>.*))?")


def fetch_folder(url: str) -> tuple[Path, Path]:
    """Download a dataset repository, or a folder of one, into the hub's cache; what is there is not fetched again.

    Args:
        url: ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]``.

    Returns:
        (the folder, the folder its links lead to).

    Raises:
        UserError: if it is no such URL, or there is no such repository, revision or folder, or it is not ours to see.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise UserError(f"{url}: a dataset of the hub is hf://datasets/ORG/NAME, with @REVISION or /FOLDER after it")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    folder = (found["folder"] or "").strip("/")
    if ".." in Path(folder).parts:
        raise UserError(f"{url}: a folder of the repository is named without '..'")
    try:
        snapshot = Path(
            snapshot_download(
                found["id"],
                repo_type="dataset",
                revision=found["revision"],
                allow_patterns=[folder, f"{folder}/*"] if folder else None,
            )
        )
    except RepositoryNotFoundError as error:  # also what a gated one raises
        raise UserError(
            f"{url}: the hub has no such dataset, or it needs a login: check the name, or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{url}: the dataset has no revision {found['revision']!r}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            raise UserError(f"{url}: the hub answers {status}: {str(error).splitlines()[0]}") from error
        raise OSError(f"{url}: {error}") from error
    except LocalEntryNotFoundError as error:
        raise OSError(f"{url}: the hub cannot be reached: {error}") from error
    root = snapshot / folder
    if root.is_file():  # a manifest: what it lists lies in its folder
        parent = str(Path(folder).parent)
        return fetch_folder(url.removesuffix(folder) + ("" if parent == "." else parent))[0] / root.name, (
            snapshot.parents[1] / "blobs"
        )
    if not root.exists():
        raise UserError(f"{url}: the repository has no {folder!r}")
    return root, snapshot.parents[1] / "blobs"
