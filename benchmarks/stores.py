"""Buckets: how much of the raw client's speed streamprep leaves, how soon there is a clip, how much memory it takes.

Against SeaweedFS, which is started on free ports and works on the same cores. The raw client is obstore by itself.

  pack          a local dataset into shards in a bucket, against obstore uploading the finished tars by as many
                processes in the same parts
  pack-bucket   a dataset in a bucket into shards in a bucket; obstore also downloads the videos
  read          the videos that encoding reads. "streamprep, reading" is `streamprep.stream.decode_units` with a decoder
                that decodes nothing; "streamprep encode" the whole job from bucket to bucket, with an encoder that
                costs nothing and one small frame of each video, from its first batch until the last byte is read.
                Against obstore reading the same members over N connections
  latency       the same behind a proxy that holds every request back for 50 ms
  first-clip    from opening the store to the first decoded clip: folder, bucket, bucket with latency
  memory        of the encoding process and its children (PSS), with a store much faster than the encoder, with one
                much slower, and for a job of two videos, which reads next to nothing ahead

Goals: packing, reading and encoding at least 0.8 of the raw client's MB/s; memory at most what may be read ahead (and a
tenth of that) above a job of two videos.

Example: python benchmarks/stores.py
         python benchmarks/stores.py --parts read latency --connections 16
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Processes that pack or decode import this file once more, as multiprocessing has it: so nothing heavy up here.
from _measure import cpu_seconds, environment, goal, markdown, parser, report, say, spread, work_folder
from _standin import StandIn
from _stores import (
    Watch,
    bucket,
    delayed,
    environment_of,
    object_server,
    read_members,
    tree_pss_bytes,
    upload_folder,
    upload_in_processes,
)

if TYPE_CHECKING:
    from servers import Server

    from streamprep.decoder import Decoded, DecodeTask
    from streamprep.manifest import Shards
    from streamprep.plan import SamplingRules, UnitPlan
    from streamprep.shards import ShardIndex

LATENCY_SECONDS = 0.05
SLOW_BYTES_PER_SECOND = 40e6
FRAMES, HEIGHT, WIDTH, FPS = 1, 32, 48, 16.0
SECONDS_BETWEEN_LOOKS = 0.1
SMOKE = {"num_videos": 8, "video_mb": 0.3, "shard_mb": 1, "rounds": 1, "seconds_per_clip": 0.05}

Numbers = dict[str, Any]
"""What a job measured."""


def main() -> None:
    args = _arguments()
    if args.job is not None:
        what = json.loads(args.job)
        print(json.dumps(JOBS[what.pop("do")](**what)))
        return
    env = environment()
    with work_folder(args.work) as work, object_server(work, quick=args.smoke) as server:
        bench = Bench(args, work, server)
        lines = [line for part in args.parts for line in ("", f"### {part}", "", *PARTS[part](bench))]
    report(
        args,
        env,
        lines=[
            f"{server.name}; {args.num_videos} videos, {bench.size_bytes / 1e6:.0f} MB, shards of {args.shard_mb} MiB, "
            f"{args.num_workers} packing processes, {args.connections} reading connections of the raw client; "
            f"median (lowest-highest) of {args.rounds} interleaved rounds.",
            *lines,
        ],
        results=bench.results,
    )


def _arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    made = parser(__doc__, rounds=3, num_videos=160, video_mb=4.0, shard_mb=64, connections=12, seconds_per_clip=0.1)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    made.add_argument("--num-videos", type=int, help="default: 160")
    made.add_argument("--video-mb", type=float, help="size of a video, in MB (default: 4)")
    made.add_argument("--shard-mb", type=int, help="size of a shard, in MiB (default: 64)")
    made.add_argument("--num-workers", type=int, default=cores, help="packing processes (default: one for each core)")
    made.add_argument(
        "--connections", type=int, help="of the raw client when it reads (default: 12, as many as streamprep)"
    )
    made.add_argument("--seconds-per-clip", type=float, help="of the slow encoder, for `memory` (default: 0.1)")
    made.add_argument("--smoke", action="store_true", help="whether it works: moto, a few MB, numbers without meaning")
    made.add_argument("--job", help=argparse.SUPPRESS)
    if "--smoke" in sys.argv:
        made.set_defaults(**SMOKE)
    return made.parse_args()


@dataclass
class Bench:
    """Where all parts measure: one server, one dataset, one set of shards."""

    args: argparse.Namespace
    work: Path
    server: Server
    results: dict[str, Any] = field(default_factory=dict)
    size_bytes: int = 0

    def __post_init__(self) -> None:
        from _videos import make_dataset

        size_bytes = round(self.args.video_mb * 1e6)
        say(f"making and packing {self.args.num_videos} videos")
        self.size_bytes = make_dataset(
            self.work / "dataset", num_videos=self.args.num_videos, size_bytes=(size_bytes, size_bytes), seconds=1.0
        )
        (self.work / "spool").mkdir()
        self.job("pack", dataset=str(self.work / "dataset"), shards=str(self.shards), **self.packing)

    @property
    def shards(self) -> Path:
        """Packed here, the bytes that all methods move."""
        return self.work / "shards"

    @property
    def packing(self) -> dict[str, Any]:
        """How."""
        workers: int = self.args.num_workers
        return {"shard_mb": self.args.shard_mb, "num_workers": workers, "spool_dir": self.spool}

    @property
    def spool(self) -> str:
        """On the disk that is measured."""
        return str(self.work / "spool")

    def job(self, do: str, server: Server | None = None, **what: Any) -> Numbers:
        """One of `JOBS`, in a process of its own that knows the server."""
        process = self.start(do, server, **what)
        printed, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"{do} {what} failed:\n{said}")
        numbers: Numbers = json.loads(printed)
        return numbers

    def start(self, do: str, server: Server | None = None, **what: Any) -> subprocess.Popen[str]:
        """The same, and do not wait for it."""
        return subprocess.Popen(
            [sys.executable, __file__, "--job", json.dumps({"do": do, **what})],
            env=environment_of(server or self.server),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rounds(self, part: str, methods: Mapping[str, Callable[[], Numbers]]) -> dict[str, list[Numbers]]:
        """Run all methods in turn, so many times; one round more before, unless this is a smoke test."""
        found: dict[str, list[Numbers]] = {name: [] for name in methods}
        for number in range(0 if self.args.smoke else -1, self.args.rounds):
            for name, run in methods.items():
                os.sync()  # what earlier runs left to be written must not be written now
                numbers = run()
                shown = ", ".join(f"{what} {n:.4g}" for what, n in numbers.items() if isinstance(n, int | float))
                say(f"{part}, {f'round {number + 1}' if number >= 0 else 'warm-up'}: {name}: {shown}")
                if number >= 0:
                    found[name].append(numbers)
        self.results[part] = found
        return found


# --- pack


def pack_from_folder(bench: Bench) -> list[str]:
    return _pack_part(bench, "pack", str(bench.work / "dataset"), from_bucket=False)


def pack_from_bucket(bench: Bench) -> list[str]:
    with bucket(bench.server) as url:
        bench.job("upload", folder=str(bench.work / "dataset"), url=f"{url}/dataset")
        return _pack_part(bench, "pack-bucket", f"{url}/dataset", from_bucket=True)


def _pack_part(bench: Bench, part: str, dataset: str, *, from_bucket: bool) -> list[str]:
    def raw() -> Numbers:
        with bucket(bench.server) as url:
            what = {"packed": str(bench.shards), "url": url, "dataset": dataset if from_bucket else None}
            return bench.job("raw_pack", num_processes=bench.args.num_workers, **what)

    def ours() -> Numbers:
        with bucket(bench.server) as url:
            return bench.job("pack", dataset=dataset, shards=f"{url}/shards", **bench.packing)

    found = bench.rounds(part, {"raw client": raw, "streamprep": ours})
    rates = _over(found, "raw client", "mb_per_second")
    cpus = _over(found, "raw client", "cpu_seconds")
    rows = [
        [
            name,
            _median(runs, "mb_per_second", 0),
            _median(runs, "cpu_seconds", 2),
            spread(rates[name]),
            spread(cpus[name]),
        ]
        for name, runs in found.items()
    ]
    return [
        markdown(["method", "MB/s", "CPU s", "MB/s / raw", "CPU / raw"], rows),
        "",
        goal(f"{part}: MB/s / raw", rates["streamprep"], at_least=0.8),
    ]


# --- read and encode


def read_and_encode(bench: Bench) -> list[str]:
    return _read_part(bench, "read", bench.server)


def read_and_encode_with_latency(bench: Bench) -> list[str]:
    with delayed(bench.server, seconds=LATENCY_SECONDS) as server:
        return _read_part(bench, "latency", server)


def _read_part(bench: Bench, part: str, server: Server) -> list[str]:
    many = f"raw client, {bench.args.connections} connections"
    with bucket(bench.server) as url:
        bench.job("upload", folder=str(bench.shards), url=url)

        def raw(connections: int) -> Callable[[], Numbers]:
            return lambda: bench.job("raw_read", server, packed=str(bench.shards), url=url, connections=connections)

        def encode() -> Numbers:
            with bucket(bench.server) as out:
                what = {"shards": url, "out": out, "spool_dir": bench.spool, "seconds_per_clip": 0.0}
                return bench.job("encode", server, **what)

        found = bench.rounds(
            part,
            {
                "raw client, 1 connection": raw(1),
                many: raw(bench.args.connections),
                "streamprep, reading": lambda: bench.job("read", server, shards=url),
                "streamprep encode": encode,
            },
        )
    rates = _over(found, many, "mb_per_second")
    rows = [
        [
            name,
            _median(runs, "mb_per_second", 0),
            _median(runs, "cpu_seconds", 2),
            spread(rates[name]) if rates[name] else "-",
        ]
        for name, runs in found.items()
    ]
    return [
        markdown(["method", "MB/s", "CPU s", "MB/s / raw"], rows),
        "",
        f"- streamprep encode, last round, {found['streamprep encode'][-1]['stages']}",
        *(
            goal(f"{part}: {name}, MB/s / raw", rates[name], at_least=0.8)
            for name in ("streamprep, reading", "streamprep encode")
            if rates[name]
        ),
    ]


# --- the first clip


def first_clip(bench: Bench) -> list[str]:
    with ExitStack() as stack:
        url = stack.enter_context(bucket(bench.server))
        bench.job("upload", folder=str(bench.shards), url=url)
        late = stack.enter_context(delayed(bench.server, seconds=LATENCY_SECONDS))
        proxied = stack.enter_context(delayed(bench.server))
        places = {
            "folder": (str(bench.shards), bench.server),
            "bucket": (url, bench.server),
            "bucket, proxy without latency": (url, proxied),
            f"bucket, {1e3 * LATENCY_SECONDS:.0f} ms for each request": (url, late),
        }
        found = bench.rounds(
            "first-clip",
            {
                name: lambda where=where, server=server: bench.job("first_clip", server, shards=where)
                for name, (where, server) in places.items()
            },
        )
    rows = [
        [
            name,
            spread([1e3 * run["opening_seconds"] for run in runs], 0),
            spread([1e3 * run["seconds"] for run in runs], 0),
            spread([run["stream_seconds"] for run in runs]),
            str(runs[0]["requests"]),
        ]
        for name, runs in found.items()
    ]
    head = [
        "shards in",
        "ms until the indexes are read",
        "ms to the first clip",
        "s, ClipStream with its process",
        "requests until then",
    ]
    return [markdown(head, rows)]


# --- memory


def memory(bench: Bench) -> list[str]:
    slow = SLOW_BYTES_PER_SECOND / bench.args.connections
    with ExitStack() as stack:
        url = stack.enter_context(bucket(bench.server))
        bench.job("upload", folder=str(bench.shards), url=url)
        behind = stack.enter_context(delayed(bench.server, bytes_per_second=slow))

        def peak(server: Server, seconds_per_clip: float, max_samples: int | None = None) -> Numbers:
            with bucket(bench.server) as out:
                how = {"seconds_per_clip": seconds_per_clip, "max_samples": max_samples}
                what = {"shards": url, "out": out, "spool_dir": bench.spool, **how}
                return _peak(bench.start("encode", server, **what))

        found = bench.rounds(
            "memory",
            {
                "two videos": lambda: peak(bench.server, 0.0, max_samples=2),
                "slow store": lambda: peak(behind, 0.0),
                "fast store": lambda: peak(bench.server, bench.args.seconds_per_clip),
            },
        )
    bound = _most_read_ahead() / 1e6
    rows = [
        [name, _median(runs, "mb_per_second", 0), spread([run["peak_mb"] for run in runs], 0)]
        for name, runs in found.items()
    ]
    return [
        markdown(["job", "MB/s", "peak PSS, MB"], rows),
        "",
        f"- all videos {bench.size_bytes / 1e6:.0f} MB; at most {bound:.0f} MB of them may be read ahead",
        *(
            goal(f"{name} above two videos, MB", _above(found, name, "two videos"), at_most=round(1.1 * bound))
            for name in ("slow store", "fast store")
        ),
    ]


def _above(found: Mapping[str, Sequence[Numbers]], name: str, base: str) -> list[float]:
    return [run["peak_mb"] - other["peak_mb"] for run, other in zip(found[name], found[base], strict=True)]


def _peak(process: subprocess.Popen[str]) -> Numbers:
    most = 0
    while process.poll() is None:
        most = max(most, tree_pss_bytes(process.pid))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    printed, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"encoding failed:\n{said}")
    return {**json.loads(printed), "peak_mb": most / 1e6}


def _most_read_ahead() -> int:
    """What reading and `DecodePool` document, one behind the other."""
    import inspect

    from streamprep.decode_pool import DecodePool
    from streamprep.read import READ_AHEAD_BYTES

    most: int = inspect.signature(DecodePool).parameters["max_ahead_bytes"].default
    return READ_AHEAD_BYTES + most


# --- jobs: what runs in a process of its own; imports are not timed


def _job_pack(dataset: str, shards: str, shard_mb: int, num_workers: int, spool_dir: str) -> Numbers:
    from streamprep.config import PackConfig
    from streamprep.pack import pack

    config = PackConfig(
        dataset=dataset, shards=shards, shard_size_mb=shard_mb, num_workers=num_workers, spool_dir=spool_dir
    )
    return _timed(lambda: pack(config).size_bytes)


def _job_raw_pack(packed: str, url: str, dataset: str | None, num_processes: int) -> Numbers:
    import obstore  # noqa: F401

    shards = [(Path(packed, index.name), _videos(index) if dataset else ()) for index in _indexes(packed)]

    def run() -> int:
        upload_in_processes(shards, url, dataset, num_processes)
        return sum(tar.stat().st_size for tar, _ in shards)

    return _timed(run)


def _videos(index: ShardIndex) -> list[str]:
    return [f"videos/{sample.metadata['file_name']}" for sample in index.samples]


def _job_upload(folder: str, url: str) -> Numbers:
    upload_folder(Path(folder), url)
    return {}


def _job_raw_read(packed: str, url: str, connections: int) -> Numbers:
    """Reads the videos of all shards, in the order in which encoding does."""
    import obstore  # noqa: F401

    members = [
        (index.name, member.offset, member.size)
        for index in _indexes(packed)
        for sample in index.samples
        for member in [sample.members[sample.metadata["extension"]]]
    ]
    return _timed(lambda: read_members(url, members, connections))


def _job_read(shards: str) -> Numbers:
    from streamprep.manifest import open_shards
    from streamprep.stream import decode_units

    def run() -> int:
        opened, decoder = open_shards(shards), NoDecoder()
        for _ in decode_units(opened.store, _units(opened), decoder):
            pass
        return decoder.size_bytes

    return _timed(run)


def _job_encode(
    shards: str, out: str, seconds_per_clip: float, spool_dir: str, max_samples: int | None = None
) -> Numbers:
    """The whole job; bytes count from the first batch on: before, decoding processes load torch."""
    from streamprep.config import EncodeConfig
    from streamprep.encode import run
    from streamprep.manifest import open_shards
    from streamprep.settle import settle
    from streamprep.storage import open_store

    config = EncodeConfig(
        shards=shards,
        out=out,
        spool_dir=spool_dir,
        model_path="a stand-in",
        num_frames=FRAMES,
        max_height=HEIGHT,
        max_width=WIDTH,
        train_fps=FPS,
        encode_threads=1,
        max_samples=max_samples,
    )
    encoder = StandIn(seconds_per_clip, num_frames=FRAMES, text_shape=(8, 64))
    opened, target = open_shards(shards), open_store(out, spool_dir=spool_dir)
    cpu_before = cpu_seconds()
    with Watch(opened.store.stats) as watch, redirect_stderr(io.StringIO()) as log:
        began = time.perf_counter()
        run(settle(config, target), opened, target, encoder)
        ended = time.perf_counter()
    assert encoder.first_batch is not None
    rate = watch.rate_from(encoder.first_batch)
    return {
        "mb_per_second": rate / 1e6 if rate is not None else None,
        "job_seconds": ended - began,
        "first_batch_seconds": encoder.first_batch - began,
        "cpu_seconds": cpu_seconds() - cpu_before,
        "num_clips": encoder.num_clips,
        "stages": next(line for line in log.getvalue().splitlines() if line.startswith("busy:")),
    }


def _job_first_clip(shards: str) -> Numbers:
    """Once to load FFmpeg and all else; then with a store that has never been asked anything."""
    from streamprep.stream import ClipStream

    _to_the_first_clip(shards)
    numbers = _to_the_first_clip(shards)
    began = time.perf_counter()
    clips = iter(ClipStream(shards, _rules()))
    next(clips)
    numbers["stream_seconds"] = time.perf_counter() - began
    clips.close()  # type: ignore[attr-defined]
    return numbers


def _to_the_first_clip(shards: str) -> Numbers:
    from streamprep.decoder import InlineDecoder
    from streamprep.manifest import open_shards
    from streamprep.stream import decode_units

    began = time.perf_counter()
    opened = open_shards(shards)
    first = next(_units(opened))
    planned = time.perf_counter()
    before = opened.store.stats.requests.total()
    clips = decode_units(opened.store, iter([first]), InlineDecoder())
    _, _, decoded = next(clips)
    ended = time.perf_counter()
    assert decoded.frames is not None, decoded.bad
    clips.close()  # type: ignore[attr-defined]
    return {"opening_seconds": planned - began, "seconds": ended - began, "requests": before}


class NoDecoder:
    """A `streamprep.decoder.Decoder` that takes each video and returns one black pixel."""

    def __init__(self) -> None:
        import torch

        from streamprep.decoder import DecodeStats

        self.stats = DecodeStats()
        self.size_bytes = 0
        self._black = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)

    def map(self, tasks: Iterable[DecodeTask]) -> Iterator[Decoded]:
        """Look at the bytes, decode nothing."""
        from streamprep.decoder import Decoded
        from streamprep.errors import BadSample

        for task in tasks:
            if isinstance(task.video, BadSample):
                raise task.video
            self.size_bytes += len(task.video)
            yield Decoded(key=task.key, tag=task.tag, frames=self._black, bad=None, seconds=0.0)

    def close(self) -> None:
        """Nothing to stop."""

    def __enter__(self) -> NoDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _units(shards: Shards) -> Iterator[UnitPlan]:
    from streamprep.manifest import load_index
    from streamprep.plan import plan_unit

    for number, shard in enumerate(shards.manifest.shards):
        yield plan_unit(f"{number:06d}", load_index(shards.store, shard), _rules())


def _indexes(packed: str) -> list[ShardIndex]:
    from streamprep.manifest import load_index, open_shards

    shards = open_shards(packed)
    return [load_index(shards.store, shard) for shard in shards.manifest.shards]


def _rules() -> SamplingRules:
    from streamprep.plan import SamplingRules

    return SamplingRules(
        max_height=HEIGHT,
        max_width=WIDTH,
        num_frames=FRAMES,
        train_fps=FPS,
        video_length_tolerance_range=None,
        speed_factor=1.0,
        max_pixels=2**26,
    )


def _timed(run: Callable[[], int]) -> Numbers:
    """MB/s of what it says it has moved, and CPU time, of its child processes too."""
    cpu_before, began = cpu_seconds(), time.perf_counter()
    size_bytes = run()
    seconds = time.perf_counter() - began
    return {
        "mb_per_second": size_bytes / 1e6 / seconds,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu_before,
    }


# --- numbers


def _over(found: Mapping[str, Sequence[Numbers]], reference: str, what: str) -> dict[str, list[float]]:
    """Each method's over the reference's of the same round; nothing where a run was too short to have it."""
    return {
        name: [run[what] / other[what] for run, other in zip(runs, found[reference], strict=True) if run[what]]
        for name, runs in found.items()
    }


def _median(runs: Sequence[Numbers], what: str, digits: int) -> str:
    values = [run[what] for run in runs if run[what] is not None]
    return f"{statistics.median(values):.{digits}f}" if values else "-"


JOBS: dict[str, Callable[..., Numbers]] = {
    "pack": _job_pack,
    "raw_pack": _job_raw_pack,
    "upload": _job_upload,
    "raw_read": _job_raw_read,
    "read": _job_read,
    "encode": _job_encode,
    "first_clip": _job_first_clip,
}
PARTS: dict[str, Callable[[Bench], list[str]]] = {
    "pack": pack_from_folder,
    "pack-bucket": pack_from_bucket,
    "read": read_and_encode,
    "latency": read_and_encode_with_latency,
    "first-clip": first_clip,
    "memory": memory,
}

if __name__ == "__main__":
    sys.exit(main())
