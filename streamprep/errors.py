"""What can go wrong: the user's mistake, one bad sample, too many of them.

Trouble of the machine (network, disk, driver) keeps the exception it came with; anything else is a bug.
"""

from __future__ import annotations

BAD_REASONS = {
    "read_error": "the shard's bytes of this sample could not be read back as the index describes them",
    "digest_mismatch": "the video's bytes are not those that were packed (sha256 differs)",
    "probe_failed": "packing could not read the container's header",
    "not_a_video": "the bytes do not begin like any video container we open",
    "no_video_stream": "the container holds no video",
    "metadata_mismatch": "the declared fps or num_frames disagree with the file",
    "too_large": "a frame has more pixels than --max-pixels",
    "decode_error": "the decoder refused the file",
    "truncated": "the file holds fewer frames than its header promises",
    "timestamps": "the decoder returned frames of other times than those asked for",
    "resolution_change": "its frames change size midway",
    "decoder_timeout": "decoding took longer than --decode-timeout, twice",
    "decoder_crash": "the decoding process died, twice",
    "decoder_memory": "decoding needed more than --decode-memory-mb",
    "non_finite": "an encoded tensor holds NaN or infinity",
}
"""Why a sample can be bad: the closed list that quarantine files and ``status`` use."""


class UserError(ValueError):
    """The request is wrong; nothing has been done. Says what was got, what was expected, what to do next."""


class BadSample(Exception):
    """One sample cannot be used; it is skipped, counted and recorded, and the job goes on.

    Args:
        reason: A key of `BAD_REASONS`.
        message: What exactly was seen.
        stage: Where: ``read``, ``decode`` or ``encode``.
    """

    def __init__(self, reason: str, message: str, *, stage: str = "decode") -> None:
        if reason not in BAD_REASONS:
            raise ValueError(f"{reason!r} is not a reason; one of {', '.join(BAD_REASONS)}")
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.stage = stage


class TooManyBadSamples(Exception):
    """More samples are bad than the job allows: then the settings are wrong, not the data."""


class OutOfMemory(MemoryError):
    """The machine's memory does not hold the model, or not even one clip or caption beside it; says what to do."""


class LatentMismatch(Exception):
    """Two tensors of a sample contradict each other: what is encoded is wrong, so nothing more is.

    See `streamprep.selfcheck`.
    """


class UnitsSetAside(Exception):
    """All is done but some units that kill every process that tries them: see `streamprep.attempts`."""


class Stopped(BaseException):
    """A signal asked the job to stop; what is committed stays, the same command resumes it.

    Like `KeyboardInterrupt` no `Exception`: libraries swallow those while they are imported.
    """


_OUT_OF_MEMORY = ("bad_alloc", "not enough memory", "allocate memory", "aten::empty")  # what C++, torch, torchcodec say


def says_out_of_memory(error: Exception) -> bool:
    """Whether this is about the machine and not about the video."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def first_line(error: Exception) -> str:
    """What it says, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
