"""The nouns: what travels between the stages.

``RawSample`` (encoded file + captions) -> ``Clip`` (pixels) -> ``ClipBatch`` -> ``EncodedSample`` (latent and
embeddings).

Letters in shapes: B batch, T frames, C channels, H height, W width, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a container's headers say about its first video stream; nothing was decoded."""

    num_frames: int
    """Frames that are shown (frames cut off by an edit list are not counted)."""
    fps: float
    """Mean frames per second."""
    width: int
    """Pixels, as displayed: after rotation."""
    height: int
    """Pixels, as displayed: after rotation."""
    duration_seconds: float
    start_seconds: float
    """Presentation time of the first shown frame."""
    rotation: int
    """Clockwise degrees a player turns the picture by: 0, 90, 180 or 270."""
    codec: str
    """FFmpeg's name: ``h264``, ``hevc``, ``vp9``, ``av1``, ..."""
    variable_frame_rate: bool
    """Whether any frame is shown more than half a frame away from ``start + index / fps``."""
    media_type: Literal["video", "image"] = "video"
    """An image is one frame that lasts a second."""

    def __post_init__(self) -> None:
        if self.num_frames <= 0 or self.width <= 0 or self.height <= 0 or not 0 < self.fps < float("inf"):
            raise ValueError(
                f"not a video: {self.num_frames} frames of {self.width}x{self.height} pixels at {self.fps} fps"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSample:
    """One encoded video and its captions, as a source lists it; the bytes are read when it is packed."""

    key: str
    """Unique in the dataset; the WebDataset ``__key__``."""
    file_name: str
    """The path the dataset knows the video by, with extension; becomes the output's ``id``."""
    path: str
    """The file that has the bytes, relative to the dataset's root."""
    position: int | None = None
    """Where in that file they are, for the source to find: an offset in a tar, a row; None if the file is the video."""
    size_bytes: int
    version: str
    """Changes when the bytes do: the modification time in ns, or an object store's etag."""
    captions: tuple[str, ...]
    declared: Mapping[str, Any] = field(default_factory=dict)
    """What the dataset itself says of the video: any of fps, num_frames, duration, resolution."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further columns, kept as they are."""
    has_video: bool = True
    """Not where only captions are packed, or where there are only captions."""


VideoLoader = Literal["torchcodec", "pyav"]
"""How frames are decoded: FastVideo's pixels bit for bit, or faster and nearly those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """Which frames of a video, and how large."""

    sha256: str
    """Of the encoded bytes, in hex."""
    timestamps: tuple[float, ...]
    """Presentation time of each wanted frame in seconds; for a variable frame rate, a moment at which it is on show."""
    indices: tuple[int, ...] | None
    """Number of each wanted frame in presentation order, rising; None takes the frames on show at ``timestamps``."""
    tolerance_seconds: float
    """How far from ``timestamps`` the frame found by index may be."""
    height: int
    """Pixels of the result."""
    width: int
    max_pixels: int
    """Larger source frames are refused before one is decoded."""
    loader: VideoLoader = "torchcodec"

    def __post_init__(self) -> None:
        if self.indices is not None and len(self.indices) != len(self.timestamps):
            raise ValueError(f"{len(self.indices)} indices but {len(self.timestamps)} timestamps")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the result: (T, C, H, W)."""
        return (len(self.timestamps), 3, self.height, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A decoded video clip."""

    key: str
    """Unique in the job; a video's key, with ``#NN`` where a video gives several clips."""
    frames: Tensor
    """``(T, C, H, W)`` uint8 RGB, on the CPU."""
    caption: str

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[1] != 3 or str(self.frames.dtype) != "torch.uint8":
            raise ValueError(
                f"frames of {self.key!r} must be (T, 3, H, W) uint8, got {tuple(self.frames.shape)} {self.frames.dtype}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipBatch:
    """Clips of one size, to be encoded together."""

    keys: tuple[str, ...]
    frames: Tensor
    """``(B, T, C, H, W)`` uint8 RGB, on the CPU."""

    def __post_init__(self) -> None:
        if self.frames.ndim != 5 or str(self.frames.dtype) != "torch.uint8" or len(self.keys) != len(self.frames):
            raise ValueError(
                f"frames must be (B, T, C, H, W) uint8 with B = {len(self.keys)}, "
                f"got {tuple(self.frames.shape)} {self.frames.dtype}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedClip:
    """What the latents of a sample were made from."""

    width: int
    """Pixels of the encoded frames."""
    height: int
    num_frames: int
    """Frames that were encoded (not latent frames)."""
    train_fps: float
    """Rate the frames were sampled at."""
    source_fps: float
    """Rate of the source video."""
    media_type: str = "video"
    """What the source is: ``video`` or ``image``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSample:
    """One row: what a trainer reads, named tensors and what they were made from."""

    key: str
    id: str
    """``file_name``, with ``#NN`` for one of several clips of a video and ``@NN`` for a further caption."""
    tensors: Mapping[str, Tensor]
    """On the CPU, contiguous: ``text_embedding`` (L, D), and of a clip ``vae_latent`` (C, T, H, W); for image-to-video
    also ``first_frame_latent`` (C, T, H, W) and ``clip_feature`` (L, D) where the model takes them. Samples of one clip
    may share them."""
    file_name: str
    caption: str
    """As the dataset has it, not as the tokenizer saw it."""
    clip: EncodedClip | None
    """None where only the caption was encoded."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What ``--keep-columns`` keeps of the dataset's further columns: booleans, integers, floats, text or None, each
    column of one type."""

    @property
    def bucket(self) -> str:
        """Samples of one bucket have latents of one shape."""
        clip = self.clip
        return f"{clip.num_frames}x{clip.height}x{clip.width}" if clip else "text"

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(f"{name} of {self.key!r} must be contiguous on the CPU, got {tensor.device}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLocation:
    """Where a tensor's bytes lie in a file: little-endian, C order."""

    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    codec: str = "raw"
    """What `streamprep.tensor_members.decode_bytes` makes a tensor of them by; ``raw`` are the values themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLocation:
    """Where a row's id or caption lies in a file."""

    offset: int
    size: int
    form: str
    """``utf8``: the text itself; ``json``: an object with the lists ``keys``, ``ids`` and ``captions`` of a clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRow:
    """One sample in an output file."""

    key: str
    bucket: str
    """Rows of one bucket have latents of one shape: ``TxHxW`` of the encoded frames, or ``text``."""
    row_group: int
    """Number of the Parquet row group, or of the sample in other formats, where rows of one clip may share one."""
    tensors: Mapping[str, TensorLocation]
    texts: Mapping[str, TextLocation] = field(default_factory=dict)
    """Where ``id`` and ``caption`` lie: both, or none where an exporter does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """One output file, whole and visible."""

    name: str
    """Relative to the output."""
    size_bytes: int
    sha256: str
    rows: tuple[WrittenRow, ...]


class ShardWriter(Protocol):
    """What an exporter gives to write one unit with; a context manager.

    Nothing is visible before `close`, and nothing ever is if the block is left without it.
    """

    def write(self, sample: EncodedSample) -> None:
        """Add one sample."""

    def close(self) -> list[WrittenFile]:
        """Publish everything."""

    def __enter__(self) -> ShardWriter:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """Drop what was not published."""
