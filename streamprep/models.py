"""Finding a model's files and telling models apart, without loading weights."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprep import canonical
from streamprep.errors import UserError

_ENDS_BYTES = 4096
_MAX_HEADER_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A diffusers model's files on this machine."""

    path: Path
    name: str
    """Hub id, or the folder's name."""
    revision: str | None
    """The hub's commit; None for a local folder."""

    def config(self, file: str) -> dict[str, Any]:
        """A JSON file of the model.

        Raises:
            UserError: if it is missing or no JSON object.
        """
        try:
            value = json.loads((self.path / file).read_bytes())
        except FileNotFoundError:
            raise UserError(f"{self.path} has no {file}: a diffusers model folder is needed") from None
        except ValueError as error:
            raise UserError(f"{self.path / file} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.path / file} must hold an object")
        return value

    def fetch(self, components: Sequence[str]) -> None:
        """Download the files of some components; nothing to do for a local folder.

        Raises:
            UserError: if the hub does not give them.
        """
        if self.revision is not None:
            _download(self.name, [f"{component}/*" for component in components], revision=self.revision)


def find_model(model_path: str) -> ModelFolder:
    """A local folder, or a hub model, of which only the configs are downloaded: see `ModelFolder.fetch`.

    Args:
        model_path: A folder, or a hub id of the form ``org/name``.

    Raises:
        UserError: if there is no such folder and no such model on the hub.
    """
    local = Path(model_path)
    if local.is_dir():
        return ModelFolder(path=local, name=local.resolve().name, revision=None)
    if model_path.startswith((".", "/", "~")) or model_path.count("/") != 1:
        raise UserError(f"--model-path {model_path}: there is no such folder, and a hub id has the form org/name")
    path = _download(model_path, ["model_index.json", "*/config.json", "*/preprocessor_config.json"], revision=None)
    return ModelFolder(path=path, name=model_path, revision=path.name)


def _download(hub_id: str, files: Sequence[str], *, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    unused = ["*.bin", "*.msgpack", "*.onnx*", "*.fp16.safetensors", "*.gguf"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files), ignore_patterns=unused))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise UserError(f"--model-path {hub_id}: not a local folder, and the hub says: {error}") from error


def component_digest(folder: Path, *, full: bool) -> str:
    """Tell one component's files from any other's, in hex.

    Configs and tokenizer files count with all bytes. Of a safetensors file the header counts and the first and last
    4 KiB of every tensor, unless ``full``: a fine-tune changes every tensor, and reading 22 GB to learn it would take
    longer than many jobs.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise UserError(f"{folder} is missing or empty: the model needs it")
    for path in files:
        ends = _ends_digest(path) if path.suffix == ".safetensors" else None  # refuses a broken file, if full too
        content = ends if ends and not full else canonical.file_digest(path)
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _ends_digest(path: Path) -> str:
    """Of a safetensors file: 8 bytes of header size, the header (JSON with every tensor's offsets), the data."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= size <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise UserError(f"{path} is not a safetensors file (a Git LFS pointer, or cut off?)")
        header = file.read(size)
        digest.update(header)
        try:
            tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
            offsets = sorted(tuple(tensor["data_offsets"]) for tensor in tensors)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a safetensors file: its header cannot be read ({error})") from error
        for begin, end in offsets:
            for start in sorted({begin, max(begin, end - _ENDS_BYTES)}):
                file.seek(8 + size + start)
                digest.update(file.read(min(_ENDS_BYTES, end - start)))
        if offsets and path.stat().st_size != 8 + size + max(end for _, end in offsets):
            raise UserError(f"{path} is cut off: its header promises more bytes than it has")
    return digest.hexdigest()
