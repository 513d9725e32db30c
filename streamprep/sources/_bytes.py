"""Videos that are cells of a table: listed by their size and first bytes, opened again by their row."""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from streamprep.errors import UserError
from streamprep.images import sniff_image
from streamprep.keys import extension_of
from streamprep.probe import sniff_container
from streamprep.sources._files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Listing
from streamprep.sources._tree import Tree
from streamprep.types import RawSample

_EXTENSIONS = {"matroska": "mkv", "mpegts": "ts", "mpegps": "mpg", "ogg": "ogv", "asf": "wmv", "jpeg": "jpg"}


def add_bytes(
    listing: Listing,
    video: Any,
    *,
    path: str,
    position: int,
    number: int,
    version: str,
    captions: tuple[str, ...],
    declared: Mapping[str, Any],
    extra: Mapping[str, Any],
    where: str,
) -> None:
    """List the video of a table's cell. Its key is its row: names inside tables repeat, and rows are read in order.

    Args:
        listing: To add it to.
        video: The cell: bytes, or ``datasets``' pair of ``bytes`` and ``path``.
        path: Of the table, as the source will find it again.
        position: Row number in the table.
        number: Row number in the dataset.
        version: Changes when the table does.
        captions: Of the video.
        declared: What the table says of it.
        extra: Further columns; the pair's path becomes one more, ``path``.
        where: File and row, for messages.

    Raises:
        UserError: if the cell holds something else.
    """
    data, name = cell_bytes(video, where=where)
    key = f"{number:08d}"
    if not data:
        listing.skip(name or key, "no_video")
        return
    listing.add_sample(
        RawSample(
            key=key,
            file_name=f"{key}.{_extension(data, name)}",
            path=path,
            position=position,
            size_bytes=len(data),
            version=version,
            captions=captions,
            declared=declared,
            extra={**({"path": name} if name else {}), **extra},
        ),
        where=where,
    )


def cell_bytes(video: Any, *, where: str) -> tuple[bytes | None, str | None]:
    """(the encoded video, what it was called) of a cell."""
    if isinstance(video, Mapping) and {"bytes", "path"} >= set(video) and "bytes" in video:
        video, name = video["bytes"], video.get("path")
    else:
        name = None
    if not isinstance(video, (bytes, type(None))) or not isinstance(name, (str, type(None))):
        raise UserError(f"{where}: a video is bytes, or a pair of bytes and path, got {video!r:.100}")
    return video, name


def _extension(data: bytes, name: str | None) -> str:
    named = extension_of(name or "")
    if named in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
        return named
    found = sniff_container(data[:4096]) or sniff_image(data[:4096]) or "bin"
    return _EXTENSIONS.get(found, found)


@dataclass(slots=True)
class OpenParquetRow:
    """Opens samples that are cells of a Parquet file; holds the place it has read to, as rows come in order."""

    tree: Tree
    column: str
    _path: str = field(default="", init=False, repr=False)
    _next: int = field(default=0, init=False, repr=False)
    _cells: Iterator[Any] | None = field(default=None, init=False, repr=False)

    def __call__(self, sample: RawSample) -> BinaryIO:
        """The cell's bytes."""
        assert sample.position is not None
        if self._cells is None or sample.path != self._path or sample.position < self._next:
            self._cells = self._open_at(sample.path, sample.position, sample.version)
        cell = next(itertools.islice(self._cells, sample.position - self._next, None), None)
        self._next = sample.position + 1
        data, _ = cell_bytes(cell, where=f"{sample.path}, row {sample.position}")
        return io.BytesIO(data or b"")

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenParquetRow, (self.tree, self.column)

    def _open_at(self, path: str, position: int, version: str) -> Iterator[Any]:
        """The cells from the start of the row group on that has the row."""
        table = open_parquet(self.tree, path, version=version)
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        starts = [0, *itertools.accumulate(sizes)]
        group = max(0, min(bisect.bisect_right(starts, position) - 1, len(sizes) - 1))
        self._path, self._next = path, starts[group]
        groups = range(group, len(sizes))
        batches = table.iter_batches(1, row_groups=groups, columns=[self.column], use_threads=False)
        return (cell for batch in batches for cell in batch.column(0).to_pylist())


def open_parquet(tree: Tree, name: str, *, version: str | None = None) -> Any:
    """A Parquet file of which a part at a time is read, not whole row groups.

    Read it with ``use_threads=False``: pyarrow's threads may hold Python's bytes when the process ends, and abort it.
    """
    import pyarrow.parquet as pq

    folder = tree.local_path()
    if folder is not None:
        return pq.ParquetFile(folder / name, pre_buffer=False, buffer_size=2**20)
    return pq.ParquetFile(tree.open(name, version=version), pre_buffer=False, buffer_size=2**23)
