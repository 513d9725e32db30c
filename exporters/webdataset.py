"""Latents as WebDataset: ustar shards that webdataset, Hugging Face's ``datasets`` and plain ``tar`` read.

``latent_shards/UNIT-NNNNN-SHA256.tar`` holds for each clip, one after the other and sorted, ``KEY.json`` (ids,
captions, what the latents were made from, further columns) and a member for each tensor: see
`streamprep.tensor_members`. The member ``__streamprep__/contract`` comes first: it has no extension, so that those
readers pass over it.

A clip with several captions is one sample: its latent is there once, its first caption's embedding has the name of one
that is alone, the others are ``KEY.text_embedding.01.safetensors``, ``.02``, ...; the record and the index count a row
for each caption all the same. (``datasets`` knows only columns that its first samples have: all samples have that one.)
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from streamprep import canonical, tensor_members
from streamprep.errors import UserError
from streamprep.keys import short_key
from streamprep.shards import fits_ustar
from streamprep.storage import Store
from streamprep.tensor_members import EncodedTensor, cast, decode_member, encode_tensor
from streamprep.types import EncodedClip, EncodedSample, TensorLocation, TextLocation, WrittenFile, WrittenRow
from streamprep.unit_tars import UnitTar, UnitTars, read_members

FOLDER = "latent_shards"
CONTRACT = "__streamprep__/contract"
WORKLOADS = ("t2v", "i2v", "text")
POSTERIORS = ("mean", "moments")
OPTIONS = {
    "latent_dtype": ("bfloat16", "float16", "float32"),
    "latent_format": tensor_members.FORMATS,
    "latent_compression": tensor_members.COMPRESSIONS,
}
"""What can be chosen, the default first."""
ROWS_SHARE_TENSORS = True
"""All rows of a clip have one latent between them."""
_TEXT = "text_embedding"


def option_problem(options: Mapping[str, str]) -> str | None:
    """Why some options do not go together, None if they do."""
    dtype, compression = options["latent_dtype"], options["latent_compression"]
    if options["latent_format"] == "npy" and dtype == "bfloat16":
        return "--latent-format npy: NumPy's format has no bfloat16; add --latent-dtype float16 or float32"
    if options["latent_format"] == "npy" and compression != "none":
        return f"--latent-compression {compression}: only safetensors are compressed; leave --latent-format npy out"
    return None


def column_problem(name: str, *, workload: str) -> str | None:
    """Any further column can be called anything: they are fields of their own object in ``KEY.json``."""
    return None


def open_shard(
    store: Store,
    name: str,
    *,
    workload: str,
    samples_per_file: int,
    contract: Mapping[str, Any],
    options: Mapping[str, str],
    columns: Mapping[str, str] | None = None,
) -> LatentShardWriter:
    """A writer of one unit.

    Args:
        store: The output.
        name: The unit; files are ``latent_shards/NAME-NNNNN-SHA256.tar``.
        workload: Makes no difference.
        samples_per_file: Most rows in a file, unless one clip has more; a file also ends at 512 MB.
        contract: Goes into every file.
        options: Each of `OPTIONS`.
        columns: Makes no difference: what a sample has of them is written.
    """
    return LatentShardWriter(store, name, contract, options, samples_per_file=samples_per_file)


class LatentShardWriter:
    """Writes samples, a clip at a time; nothing is visible before `close`."""

    def __init__(
        self,
        store: Store,
        name: str,
        contract: Mapping[str, Any],
        options: Mapping[str, str],
        *,
        samples_per_file: int,
    ) -> None:
        begin_with = {CONTRACT: canonical.to_json(contract)}
        self._tars = UnitTars(store, folder=FOLDER, unit=name, samples_per_file=samples_per_file, begin_with=begin_with)
        self._options = options
        self._tar: UnitTar | None = None
        self._num_samples = 0
        self._keys: set[str] = set()
        """Of the samples in the tar at hand."""
        self._clip: list[EncodedSample] = []

    def write(self, sample: EncodedSample) -> None:
        """Add one row.

        Raises:
            UserError: if a tensor of the clip before holds what its dtype cannot.
        """
        if self._clip and not _of_one_clip(self._clip[-1], sample):
            self._write_clip()
        self._clip.append(sample)

    def close(self) -> list[WrittenFile]:
        """Publish the files."""
        self._write_clip()
        return self._tars.publish()

    def __enter__(self) -> LatentShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._tars.__exit__(*error)

    def _write_clip(self) -> None:
        """Write the rows of the clip at hand as one sample."""
        clip, self._clip = self._clip, []
        if not clip:
            return
        tar = self._tars.tar_for(len(clip))
        if tar is not self._tar:
            self._tar, self._num_samples, self._keys = tar, 0, set()
        self._tars.wrote(self._write_sample(tar, clip))
        self._num_samples += 1

    def _write_sample(self, tar: UnitTar, clip: Sequence[EncodedSample]) -> list[WrittenRow]:
        members = _encode(clip, self._options)
        contents = {f"{name}.{one.extension}": (one.chunks, one.size_bytes) for name, one in members.items()}
        described = _describe(clip)
        contents["json"] = ((described,), len(described))
        key = self._free_key(clip[0], contents)
        begins = {
            extension: tar.append(f"{key}.{extension}", chunks, size=size)
            for extension, (chunks, size) in sorted(contents.items())
        }
        where = {name: _location(one, begins[f"{name}.{one.extension}"]) for name, one in members.items()}
        text = TextLocation(offset=begins["json"], size=len(described), form="json")
        return [
            WrittenRow(
                key=row.key,
                bucket=row.bucket,
                row_group=self._num_samples,
                tensors={name: where[_text_member(clip, row) if name == _TEXT else name] for name in row.tensors},
                texts={"id": text, "caption": text},
            )
            for row in clip
        ]

    def _free_key(self, first: EncodedSample, contents: Mapping[str, Any]) -> str:
        """The clip's, unless a row before is of the same clip, but with something of its own."""
        own = (f"{first.key}~{number:02d}" for number in itertools.count(2))
        keys = (_member_key(key, contents) for key in itertools.chain((_clip_key(first), first.key), own))
        key = next(key for key in keys if key not in self._keys)
        self._keys.add(key)
        return key


def _of_one_clip(row: EncodedSample, other: EncodedSample) -> bool:
    """Whether two rows are one clip with two captions, and have all but those in common."""
    if _clip_key(row) != _clip_key(other) or set(row.tensors) != set(other.tensors):
        return False
    if (row.file_name, row.clip, row.columns) != (other.file_name, other.clip, other.columns):
        return False
    return all(tensor is other.tensors[name] for name, tensor in row.tensors.items() if name != _TEXT)


def _clip_key(row: EncodedSample) -> str:
    return row.key.partition("@")[0]


def _text_member(clip: Sequence[EncodedSample], row: EncodedSample) -> str:
    """``text_embedding``, of the clip's further captions with their number."""
    return _TEXT if row is clip[0] else f"{_TEXT}.{row.key.partition('@')[2] or '00'}"


def _encode(clip: Sequence[EncodedSample], options: Mapping[str, str]) -> dict[str, EncodedTensor]:
    """The members of a clip's tensors, by their names."""
    named = {name: (name, tensor, clip[0].key) for name, tensor in clip[0].tensors.items() if name != _TEXT}
    named |= {_text_member(clip, row): (_TEXT, row.tensors[_TEXT], row.key) for row in clip if _TEXT in row.tensors}
    return {member: _encode_one(*what, options) for member, what in named.items()}


def _encode_one(name: str, tensor: Tensor, key: str, options: Mapping[str, str]) -> EncodedTensor:
    dtype = options["latent_dtype"]
    try:
        stored = cast(tensor, dtype)
    except OverflowError as error:
        raise UserError(
            f"{name} of {key!r} cannot be stored as {dtype}: {error}: use --latent-dtype bfloat16 or float32, and a "
            "new output folder"
        ) from error
    return encode_tensor(name, stored, format=options["latent_format"], compression=options["latent_compression"])


def _location(one: EncodedTensor, begin: int) -> TensorLocation:
    return TensorLocation(offset=begin + one.offset, size=one.size, dtype=one.dtype, shape=one.shape, codec=one.codec)


def _member_key(key: str, extensions: Mapping[str, Any]) -> str:
    """The key, or a short one in its place if a ustar header does not hold its members' names."""
    return key if all(fits_ustar(f"{key}.{extension}") for extension in extensions) else short_key(key)


def _describe(clip: Sequence[EncodedSample]) -> bytes:
    """``KEY.json``; a list has an entry for each caption."""
    first = clip[0]
    value: dict[str, Any] = {
        "keys": [row.key for row in clip],
        "ids": [row.id for row in clip],
        "captions": [row.caption for row in clip],
        "file_name": first.file_name,
        "bucket": first.bucket,
    }
    if (made_from := first.clip) is not None:
        value |= {
            "width": made_from.width,
            "height": made_from.height,
            "num_frames": made_from.num_frames,
            "train_fps": made_from.train_fps,
            "source_fps": made_from.source_fps,
            "media_type": made_from.media_type,
        }
    if first.columns:
        value["columns"] = dict(first.columns)
    return canonical.to_json(value)


def read_file(store: Store, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The rows of a file as a stranger's tar reader sees them: (id, tensors by name)."""
    for described, tensors in _read_samples(store, name):
        for key, id in zip(described["keys"], described["ids"], strict=True):
            yield id, _of_row(tensors, key)


def read_samples(
    store: Store, file: WrittenFile, *, workload: str, train_fps: float, columns: Mapping[str, str]
) -> Iterator[EncodedSample]:
    """The rows of a file as they were written; those of one clip share its tensors.

    Args:
        store: Of the output.
        file: As its record has it.
        workload: Shows in what is there.
        train_fps: Is written beside each clip here.
        columns: The further columns, in their order.
    """
    for described, tensors in _read_samples(store, file.name):
        clip = None
        if "num_frames" in described:
            clip = EncodedClip(
                width=described["width"],
                height=described["height"],
                num_frames=described["num_frames"],
                train_fps=described["train_fps"],
                source_fps=described["source_fps"],
                media_type=described["media_type"],
            )
        kept = {name: described["columns"][name] for name in columns}
        for key, id, caption in zip(described["keys"], described["ids"], described["captions"], strict=True):
            yield EncodedSample(
                key=key,
                id=id,
                tensors=_of_row(tensors, key),
                file_name=described["file_name"],
                caption=caption,
                clip=clip,
                columns=kept,
            )


def _read_samples(store: Store, name: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """For each sample the content of its ``KEY.json``, and its tensors by their members' names without the format."""
    for _, members in itertools.groupby(_read_members(store, name), key=lambda member: member[0]):
        yield _decode({extension: data for _, extension, data in members})


def _read_members(store: Store, name: str) -> Iterator[tuple[str, str, bytes]]:
    """(key, all of its extension, content) of each member that has an extension."""
    for member, content in read_members(store, name):
        folder, slash, base = member.rpartition("/")
        stem, dot, extension = base.partition(".")
        if dot:
            yield folder + slash + stem, extension, content


def _decode(members: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {}
    for extension, data in members.items():
        tensor = decode_member(extension, data)
        if tensor is not None:
            name, _, rest = extension.partition(".")
            number = rest.partition(".")[0]
            tensors[f"{name}.{number}" if number.isdecimal() else name] = tensor
    return json.loads(members["json"]), tensors


def _of_row(tensors: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """A row's tensors of all of its clip's."""
    mine = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{_TEXT}.")}
    numbered = f"{_TEXT}.{key.partition('@')[2] or '00'}"
    return mine | ({_TEXT: tensors[numbered]} if numbered in tensors else {})
