"""Download a repository of the Hugging Face hub to a folder, or one file of it; FastVideo's script with its flags.

    python tools/download_hf.py --repo_id org/name --local_dir my_dataset --repo_type dataset

What is there is not downloaded again, so an interrupted download goes on. `streamprep pack hf://datasets/ORG/NAME`
needs none of this.
"""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 done, 1 failed, 2 wrong usage."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = {"repo_type": arguments.repo_type, "local_dir": arguments.local_dir, "revision": arguments.revision}
    try:
        if arguments.file_name:
            path = hf_hub_download(arguments.repo_id, arguments.file_name, **where)
        else:
            path = snapshot_download(arguments.repo_id, **where)
    except LocalEntryNotFoundError as error:  # also a file not found: the hub could not be asked
        return _complain(f"the hub cannot be reached: {error}", 1)
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        what = f"{arguments.repo_type} {arguments.repo_id}"
        return _complain(f"the hub has no such {what}, or it needs a login (`hf auth login`): {error}", 2)
    except (HTTPError, OSError) as error:
        return _complain(f"{error}", 1)
    print(path)
    return 0


def _complain(message: str, code: int) -> int:
    print(f"download_hf.py: {message}", file=sys.stderr)
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repo_id", "--repo-id", required=True, help="org/name")
    parser.add_argument("--local_dir", "--local-dir", required=True, help="folder to download to")
    parser.add_argument(
        "--repo_type", "--repo-type", choices=("dataset", "model", "space"), default="model", help="default: model"
    )
    parser.add_argument("--file_name", "--file-name", help="one file instead of all")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
