"""A dataset of the ``datasets`` library: ``ORG/NAME[@REVISION]`` of the Hugging Face hub, or a local folder of one.

Columns go by convention, ``video`` and ``caption`` first, or by ``--video-column`` and ``--caption-column``; the split
is ``--split``. Rows are streamed, never decoded: one pass lists how large each video is, which decides the cut into
shards; packing then reads each once more. Nothing but the video at work is held. Videos whose bytes are in the table
have their row number for a key; videos that are files of their own have their path.
"""

from __future__ import annotations

import io
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from streamprep import canonical
from streamprep.errors import UserError
from streamprep.keys import key_of
from streamprep.sources._bytes import add_bytes, cell_bytes
from streamprep.sources._files import (
    CAPTION_COLUMNS,
    VIDEO_COLUMNS,
    Listing,
    OpenFile,
    SourceOptions,
    choose_column,
    split_columns,
)
from streamprep.sources._tree import LocalTree, Tree
from streamprep.types import RawSample

T = TypeVar("T")

OPTIONS = ("video_column", "caption_column", "split")
_SPOOL_BYTES = 2**26
_SECONDS_BETWEEN_LINES = 10.0
_DECODED = ("Video", "Image", "Audio")


def matches(tree: Tree) -> bool:
    """Whether the folder was written by ``save_to_disk``; other folders may be datasets too, if the user says so."""
    return tree.is_file("dataset_dict.json") or (tree.is_file("state.json") and tree.is_file("dataset_info.json"))


def read_samples(tree: Tree, options: SourceOptions) -> Listing:
    """List the dataset's videos.

    Raises:
        UserError: if ``datasets`` is not installed, there is no such dataset, split or column, or a row is no sample.
    """
    root = tree.local_path()
    if root is None:
        raise UserError(
            f"{tree.where()}: the library datasets reads folders and the hub, no buckets: download it, or export it to "
            "Parquet for --dataset-type manifest"
        )
    table = HfTable.open(root, options.split or "train")
    listing = Listing(tree)
    first = next(iter(table.rows(0)), None)
    if first is None:
        raise UserError(f"{root} lists no videos: the split {table.split!r} has no rows")
    video = choose_column(
        first, wanted=options.video_column, among=VIDEO_COLUMNS, flag="--video-column", where=str(root)
    )
    caption = choose_column(
        [name for name in first if name != video],
        wanted=options.caption_column,
        among=CAPTION_COLUMNS,
        flag="--caption-column",
        where=str(root),
    )
    listing.open_video = OpenHfRow(table, video, OpenFile(tree))
    places = (
        (shard, position, row) for shard in range(table.num_shards) for position, row in enumerate(table.rows(shard))
    )
    for number, (shard, position, row) in enumerate(_reported(places)):
        _add(listing, table, row, video, caption, shard=shard, position=position, number=number)
    return listing


def _reported(rows: Iterator[T]) -> Iterator[T]:
    """The same, saying now and then how many there were: it may take hours."""
    said = time.monotonic()
    for number, row in enumerate(rows):
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            sys.stderr.write(f"listing: {number} rows so far\n")
        yield row


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTable:
    """One split of a dataset, as it was when it was opened."""

    dataset: str
    revision: str | None
    """The commit, of a dataset of the hub."""
    split: str
    version: str
    """Changes when anything in it does."""
    num_shards: int
    """Files that its rows are in, each of which can be read by itself."""

    @classmethod
    def open(cls, root: Path, split: str) -> HfTable:
        """Find it.

        Raises:
            UserError: if it is not there.
        """
        _import_datasets()
        name, revision, version = str(root), None, ""
        if root.exists():
            version = _folder_version(root)
        else:
            name, _, wanted = name.partition("@")
            revision = version = _commit(name, wanted or None)
        table = cls(dataset=name, revision=revision, split=split, version=version, num_shards=1)
        loaded = _load(table)
        return table if _has_rows(loaded) else replace(table, num_shards=max(1, loaded.num_shards))

    def rows(self, shard: int, *, start: int = 0, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of one file, from one of them on."""
        loaded = _load(self)
        if columns is not None:
            loaded = loaded.select_columns(columns)
        if _has_rows(loaded):
            return (loaded[row] for row in range(start, len(loaded)))
        if self.num_shards > 1:
            loaded = loaded.shard(self.num_shards, shard)
        return iter(loaded.skip(start) if start else loaded)


@dataclass(slots=True)
class OpenHfRow:
    """Opens samples that are rows; holds the place it has read to, as rows come in order."""

    table: HfTable
    column: str
    open_file: OpenFile
    _shard: str = field(default="", init=False, repr=False)
    _next: int = field(default=0, init=False, repr=False)
    _rows: Iterator[dict[str, Any]] | None = field(default=None, init=False, repr=False)

    def __call__(self, sample: RawSample) -> BinaryIO:
        """The row's bytes, or the file it names."""
        if sample.path.startswith("hf://"):
            return _download(sample.path)
        if sample.position is None:
            return self.open_file(sample)
        row = self._row(sample.path, sample.position)
        data, _ = cell_bytes(row[self.column], where=f"{self.table.dataset}, row {sample.key}")
        return io.BytesIO(data or b"")

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenHfRow, (self.table, self.column, self.open_file)

    def _row(self, shard: str, position: int) -> dict[str, Any]:
        if self._rows is None or shard != self._shard or position < self._next:
            number = int(shard.rpartition("/")[2])
            self._rows = self.table.rows(number, start=position, columns=[self.column])
            self._shard, self._next = shard, position
        row = next(itertools.islice(self._rows, position - self._next, None), None)
        self._next = position + 1
        if row is None:
            raise OSError(f"{self.table.dataset} changed while it was packed: {shard} has no row {position}")
        return row


def _add(
    listing: Listing,
    table: HfTable,
    row: dict[str, Any],
    video_column: str,
    caption_column: str,
    *,
    shard: int,
    position: int,
    number: int,
) -> None:
    where = f"{table.dataset}, split {table.split}, row {number}"
    row = {**row, caption_column: [] if row.get(caption_column) is None else row[caption_column]}
    captions, declared, extra = split_columns(
        row, where=where, video_column=video_column, caption_column=caption_column
    )
    assert captions is not None
    cell = row.get(video_column)
    path = cell.get("path") if isinstance(cell, dict) and cell.get("bytes") is None else cell
    if not isinstance(path, str):
        listing.in_order = True
        add_bytes(
            listing,
            cell,
            path=f"{table.split}/{shard:05d}",
            position=position,
            number=number,
            version=table.version,
            captions=captions,
            declared=declared,
            extra=extra,
            where=where,
        )
    elif path.startswith("hf://datasets/"):
        _add_hub_file(listing, table, path, captions, declared, extra, where=where)
    else:
        root = Path(table.dataset)
        path = str(Path(path).relative_to(root.resolve())) if _inside(path, root) else path
        listing.add(path, file_name=path, captions=captions, declared=declared, extra=extra, where=where)


def _inside(path: str, root: Path) -> bool:
    return Path(path).is_absolute() and Path(path).is_relative_to(root.resolve())


def _add_hub_file(
    listing: Listing,
    table: HfTable,
    url: str,
    captions: tuple[str, ...],
    declared: dict[str, Any],
    extra: dict[str, Any],
    *,
    where: str,
) -> None:
    from huggingface_hub import HfFileSystem

    file_name = url.removeprefix("hf://datasets/").split("/", 2)[2]
    listing.add_sample(
        RawSample(
            key=key_of(file_name),
            file_name=file_name,
            path=url,
            size_bytes=HfFileSystem().info(url.removeprefix("hf://"))["size"],
            version=table.version,
            captions=captions,
            declared=declared,
            extra=extra,
        ),
        where=where,
    )


def _download(url: str) -> BinaryIO:
    """A file of the hub, whole: it is read three times, to hash, to probe and to copy."""
    from huggingface_hub import HfFileSystem

    target = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115 - closed when it is copied
    with HfFileSystem().open(url.removeprefix("hf://"), "rb") as source:
        shutil.copyfileobj(source, target, 2**20)
    target.seek(0)
    return target  # type: ignore[return-value]


@lru_cache(maxsize=2)  # a hub is asked a dozen things each time, and lists all files of the dataset
def _load(table: HfTable) -> Any:
    """The library's object, which gives encoded bytes."""
    datasets = _import_datasets()
    try:
        loaded = _load_any(datasets, table)
    except (ValueError, KeyError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{table.dataset}, split {table.split!r}: {str(error).strip()[:500]}") from error
    if not _has_rows(loaded):
        return loaded.decode(False)
    for name, feature in loaded.features.items():
        if type(feature).__name__ in _DECODED:
            loaded = loaded.cast_column(name, type(feature)(decode=False))
    return loaded


def _load_any(datasets: Any, table: HfTable) -> Any:
    if not matches(LocalTree(Path(table.dataset))):
        return datasets.load_dataset(table.dataset, split=table.split, revision=table.revision, streaming=True)
    loaded = datasets.load_from_disk(table.dataset)
    return loaded[table.split] if isinstance(loaded, datasets.DatasetDict) else loaded


def _has_rows(loaded: Any) -> bool:
    """Whether any row can be read at once, as of what ``save_to_disk`` wrote; else they are streamed."""
    return isinstance(loaded, _import_datasets().Dataset)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--dataset-type hf needs the library datasets ({error}): pip install streamprep[hf]"
        ) from error
    return datasets


def _commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except HFValidationError as error:
        raise UserError(f"{name} is neither a folder nor the name of a dataset: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            raise UserError(
                f"the hub has no dataset {name}{f' at {revision}' if revision else ''}, or it needs a login "
                f"(`hf auth login`): {str(error).splitlines()[0]}"
            ) from error
        raise OSError(f"{name}: {error}") from error
    except HTTPError as error:  # no network is none of the class above
        raise OSError(f"{name}: the hub cannot be reached: {error}") from error


def _folder_version(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return canonical.digest(
        [[str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    )
