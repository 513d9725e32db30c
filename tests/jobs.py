"""Fixtures for tests of whole jobs: packed shards, a tiny model, and `EncodeJob`, a command on an output folder.

A test module says ``pytest_plugins = ["jobs"]``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np
import pytest
from forks import Forks, Process

from streamprep.crashpoints import VARIABLE
from streamprep.job import Job, open_job
from streamprep.session import LOGS
from streamprep.storage import open_store
from streamprep.verify import verify_job

NUM_FRAMES, TRAIN_FPS = 5, 1
FLAGS = {
    "max_height": 32,
    "max_width": 48,
    "num_frames": NUM_FRAMES,
    "train_fps": TRAIN_FPS,
    "samples_per_file": 2,
    "encode_threads": 1,  # layers so small lose 20x by a second thread on a busy machine
}
THIRD_OF_A_SHARD = 330_000


class EncodeJob:
    """One output folder and the command that fills it."""

    def __init__(self, forks: Forks, shards: Path, model: Path, out: Path) -> None:
        self._forks, self._shards, self._model = forks, shards, model
        self.out = out

    def start(
        self,
        *,
        crash_at: str | None = None,
        shards: Path | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        **flags: object,
    ) -> Process:
        """Start ``streamprep encode``; a flag is given as its field, ``serial=True`` or ``num_frames=9``."""
        environment = {**environment, **({VARIABLE: crash_at} if crash_at else {})}
        _, _, *arguments = self.command(shards=shards, **flags)
        return self._forks.start(*arguments, environment=environment)

    def command(self, *, shards: Path | None = None, **flags: object) -> list[object]:
        """The same as Python's arguments, for other ways to start it."""
        flags = {"model_path": self._model, **FLAGS, **flags}
        return ["-m", "streamprep", "encode", shards or self._shards, self.out, *_flags(flags)]

    def run(self, **how: object) -> Process:
        """The same, and wait until it has ended."""
        process = self.start(**how)  # type: ignore[arg-type]
        process.wait()
        return process

    def start_retry(
        self,
        *,
        crash_at: str | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        **flags: object,
    ) -> Process:
        """Start ``streamprep retry``."""
        environment = {**environment, **({VARIABLE: crash_at} if crash_at else {})}
        return self._forks.start("retry", self.out, *_flags(flags), environment=environment)

    def retry(self, **how: object) -> Process:
        """The same, and wait until it has ended."""
        process = self.start_retry(**how)  # type: ignore[arg-type]
        process.wait()
        return process

    @property
    def job(self) -> Job:
        """As the commands see it."""
        return open_job(open_store(self.out))

    def begin_with_an_orphan(self, **flags: object) -> None:
        """A command is killed when the plan is there, and another one may have left this: `finalize` deletes it."""
        assert self.run(serial=True, crash_at="plan.after", **flags).code == 137
        leave_an_orphan(self.out, self.job.plan.data_folder)

    def num_records(self) -> int:
        """Units that are committed."""
        return len(list((self.out / "_streamprep/records").glob("*.json")))

    def result(self) -> dict[str, str]:
        """Every file with its content's digest, leaving out what may differ between two runs: paths, seconds, logs."""
        return without_what_differs({name: digest for name, (_, digest) in self.files().items()}, self.job)

    def files(self) -> dict[str, tuple[int, str]]:
        """Every file's modification time and digest."""
        return {
            str(path.relative_to(self.out)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in self.out.rglob("*")
            if path.is_file()
        }

    def problems(self) -> list[str]:
        """What ``streamprep verify`` finds."""
        return verify_job(self.job).problems


def without_what_differs(digests: Mapping[str, str], of: Job) -> dict[str, str]:
    """The files of an output, but for what may be another in every run: paths, seconds, logs."""
    result = {name: digest for name, digest in digests.items() if not name.startswith(LOGS)}
    del result["_streamprep/plan.json"]
    for record in of.records():
        value = json.loads(record.to_json())
        del value["seconds"]
        result[f"_streamprep/records/{record.unit}.json"] = json.dumps(value)
    return result


def leave_an_orphan(out: Path, data_folder: str) -> None:
    """Put a file into an output that a killed process might have left."""
    (out / data_folder).mkdir(parents=True)
    (out / data_folder / "000000-00000-0123abcd.parquet").write_bytes(b"half of something")


@pytest.fixture(scope="session")
def forks(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where commands are started."""
    with Forks(repo_root, tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="session")
def make_model(forks: Forks, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``make_model(seed)``: a tiny Wan model."""

    def make(seed: int) -> Path:
        out = tmp_path_factory.mktemp("models") / "tiny"
        assert forks.run(repo_root / "tools/make_tiny_model.py", out, "--seed", seed).code == 0
        return out

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[[int], Path]) -> Path:
    """The model of all jobs."""
    return make_model(0)


@pytest.fixture(scope="session")
def make_shards(
    forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Mapping[str, Callable[[Path], object]]], Path]:
    """``make_shards({name: write_it})``: packed in shards of 1 MiB."""

    def make(videos: Mapping[str, Callable[[Path], object]]) -> Path:
        root = tmp_path_factory.mktemp("shards")
        for name, write in videos.items():
            (root / "videos").mkdir(exist_ok=True)
            write(root / "videos" / name)
        rows = [{"path": name, "cap": f"The video is called {name}."} for name in videos]
        (root / "videos2caption.json").write_text(json.dumps(rows))
        packed = forks.run("pack", root, root / "shards", "--shard-size-mb", 1, "--num-workers", 1)
        assert packed.code == 0, packed.output
        return root / "shards"

    return make


@pytest.fixture(scope="session")
def good_video(make_video: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a video of a third of a shard, another for every name."""

    def write(path: Path, *, padding_bytes: int = THIRD_OF_A_SHARD) -> Path:
        return make_video(path, fps=1, seed=int.from_bytes(path.stem.encode()), padding_bytes=padding_bytes)

    return write


@pytest.fixture(scope="session")
def undecodable_video(make_video: Callable[..., Path]) -> Callable[[Path], Path]:
    """Writes a video with good headers and only zeros where the pictures should be."""

    def write(path: Path) -> Path:
        data = bytearray(make_video(path, fps=1).read_bytes())
        start = data.index(b"mdat") - 4
        end = start + int.from_bytes(data[start : start + 4], "big")
        data[start + 8 : end] = bytes(end - start - 8)
        path.write_bytes(data)
        return path

    return write


def write_no_video(path: Path) -> None:
    """Something a dataset calls a video and no reader opens."""
    path.write_bytes(b"<html>404</html>")


@pytest.fixture(scope="session")
def shards(
    make_shards: Callable[..., Path],
    make_video: Callable[..., Path],
    good_video: Callable[..., Path],
    undecodable_video: Callable[[Path], Path],
) -> Path:
    """Four units: 3 good clips and every kind of other ones; 3 good; one that is no video; 2 good."""
    return make_shards(
        {
            "a0.mp4": good_video,
            "a1.mp4": undecodable_video,
            "a2.mp4": good_video,
            "a3.mp4": good_video,
            "a4.mp4": write_no_video,
            "a5.mp4": lambda path: make_video(path, fps=1, num_frames=NUM_FRAMES - 1),  # too short
            "b0.mp4": good_video,
            "b1.mp4": good_video,
            "b2.mp4": good_video,
            "c0.mp4": lambda path: path.write_bytes(b"no video" * (3 * THIRD_OF_A_SHARD // 8)),
            "d0.mp4": good_video,
            "d1.mp4": good_video,
        }
    )


@pytest.fixture(scope="session")
def slow_shards(make_shards: Callable[..., Path], good_video: Callable[..., Path]) -> Path:
    """Seven units: 3 clips; one that takes a second or more to decode; five of a clip each."""
    first = {f"a{number}.mp4": good_video for number in range(3)}
    last = {f"c{number}.mp4": functools.partial(good_video, padding_bytes=10**6) for number in range(5)}
    return make_shards({**first, "b.mp4": write_slow_video, **last})


@pytest.fixture
def new_job(forks: Forks, shards: Path, model: Path, tmp_path: Path) -> Callable[..., EncodeJob]:
    """``new_job(shards, out=...)``: a job on an output folder of its own; without arguments it is of `shards`."""

    def make(of: Path = shards, *, out: Path = tmp_path / "out") -> EncodeJob:
        return EncodeJob(forks, of, model, out)

    return make


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], EncodeJob]:
    """``undisturbed(shards)``: the finished job of these shards, in one go and one process."""
    finished: dict[Path, EncodeJob] = {}

    def run(of: Path) -> EncodeJob:
        if of not in finished:
            finished[of] = EncodeJob(forks, of, model, tmp_path_factory.mktemp("undisturbed") / "out")
            process = finished[of].run(serial=True)
            assert process.code == 0, process.output
        return finished[of]

    return run


def _flags(values: Mapping[str, object]) -> Iterator[object]:
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", value)


def write_slow_video(path: Path) -> None:
    """A video of which four seconds of noise must be decoded to get at the last frame that is wanted."""
    width, height, fps = 1280, 720, 30
    noise = np.random.default_rng(0).integers(0, 256, (height * 3 // 8, width // 4), dtype=np.uint8)
    picture = noise.repeat(4, axis=0).repeat(4, axis=1)  # the planes of YUV 4:2:0, one below the other
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "crf": "24", "g": "10000"}  # one key frame, the first
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(NUM_FRAMES * fps):
            frame = np.ascontiguousarray(np.roll(picture, 3 * number, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="yuv420p")))
        container.mux(stream.encode())
