"""Make small videos with true captions, in FastVideo's "merged" layout, for tests, demos and smoke runs.

``OUT/videos/*.mp4`` and ``OUT/videos2caption.json``: what FastVideo's preprocessing and ``streamprep pack`` both read.

1. ``scenes`` picks what each video shows: a shape, its colour, its motion, a background, a size, a rate, a length.
2. ``caption`` says exactly that, so that a trained model can be judged by whether its video does what the caption says.
3. ``draw`` turns a scene into RGB frames with numpy.
4. ``write_video`` encodes them with PyAV, on one thread: x264 gives other bytes with other numbers of threads.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from numpy.typing import NDArray

Frame = NDArray[np.uint8]  # (H, W, 3) RGB
Plane = NDArray[np.float64]  # (H, W)
Mask = NDArray[np.bool_]  # (H, W)

# The lists below have 5, 7, 8, 9 and 11 entries. No two of these share a factor, so walking all of them at once gives
# every size with every shape, and 7 * 8 * 9 * 11 = 5544 captions before one repeats.
SIZES = ((320, 180), (256, 256), (180, 320), (384, 216), (240, 180))
"""Width and height, in pixels: landscape, square and portrait."""
RATES = (Fraction(24), Fraction(25), Fraction(30), Fraction(30000, 1001))

# Shapes and backgrounds share no colour, so that a shape can always be seen.
COLOURS = {
    "red": (220, 30, 30),
    "green": (40, 170, 60),
    "yellow": (250, 215, 0),
    "orange": (255, 130, 0),
    "purple": (150, 20, 160),
    "pink": (255, 120, 190),
    "turquoise": (0, 200, 190),
}
WHITE, GREY, BLACK, BLUE, BROWN = (245, 245, 245), (125, 125, 125), (15, 15, 15), (40, 80, 210), (95, 60, 30)


def _inside_star(u: Plane, v: Plane) -> Mask:
    """Fold the plane onto half a point of a five-pointed star, where its outline is one straight line."""
    angle = abs((np.arctan2(u, -v) + math.pi / 5) % (math.tau / 5) - math.pi / 5)
    inside: Mask = np.hypot(u, v) * (np.cos(angle) + 2.67 * np.sin(angle)) < 1
    return inside


SHAPES: dict[str, Callable[[Plane, Plane], Mask]] = {
    "circle": lambda u, v: np.hypot(u, v) < 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.85,
    "triangle": lambda u, v: (v < 0.8) & (v > 2 * abs(u) - 1),
    "diamond": lambda u, v: 1.4 * abs(u) + abs(v) < 1,
    "ring": lambda u, v: (np.hypot(u, v) < 1) & (np.hypot(u, v) > 0.55),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1),
    "star": _inside_star,
    "hexagon": lambda u, v: np.maximum(abs(v), abs(v) / 2 + abs(u) * 0.866) < 0.866,
}
"""Whether a point is inside, with ``u`` to the right and ``v`` down from the centre, in units of the radius."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """How a shape moves, in words and as a path."""

    verb: str
    """What the shape does, after its name."""
    detail: str
    """A further true sentence for the longer captions."""
    path: Callable[[float], tuple[float, float, float]]
    """Time from 0 to 1 -> the centre, as fractions of width and height, and the radius of a shape of usual size 1."""


MOTIONS = (
    Motion(
        verb="moves from left to right",
        detail="It starts near the left edge and ends near the right edge, at the same height all the way",
        path=lambda t: (0.2 + 0.6 * t, 0.5, 1),
    ),
    Motion(
        verb="moves from right to left",
        detail="It starts near the right edge and ends near the left edge, at the same height all the way",
        path=lambda t: (0.8 - 0.6 * t, 0.5, 1),
    ),
    Motion(
        verb="falls from the top to the bottom",
        detail="It starts near the top edge and gets faster on its way straight down",
        path=lambda t: (0.5, 0.2 + 0.6 * t * t, 1),
    ),
    Motion(
        verb="rises from the bottom to the top",
        detail="It starts near the bottom edge and goes straight up at a steady speed",
        path=lambda t: (0.5, 0.8 - 0.6 * t, 1),
    ),
    Motion(
        verb="moves diagonally from the top left to the bottom right",
        detail="It starts near the top left corner and crosses the middle on a straight line",
        path=lambda t: (0.2 + 0.6 * t, 0.2 + 0.6 * t, 1),
    ),
    Motion(
        verb="circles clockwise around the middle",
        detail="It starts at the top and goes round exactly once",
        path=lambda t: (0.5 + 0.3 * math.sin(math.tau * t), 0.5 - 0.3 * math.cos(math.tau * t), 1),
    ),
    Motion(
        verb="grows in the middle",
        detail="It is small at first, about five times as large at the end, and never leaves its place",
        path=lambda t: (0.5, 0.5, 0.45 + 1.8 * t),
    ),
    Motion(
        verb="shrinks in the middle",
        detail="It is large at first, about a fifth of that at the end, and never leaves its place",
        path=lambda t: (0.5, 0.5, 2.25 - 1.8 * t),
    ),
    Motion(
        verb="bounces up and down",
        detail="It starts at the bottom and jumps up twice on the same spot",
        path=lambda t: (0.5, 0.8 - 0.55 * abs(math.sin(math.tau * t)), 1),
    ),
)


def _two_colours(where: Mask | Plane, first: tuple[int, int, int], second: tuple[int, int, int]) -> Frame:
    """Blend from ``first`` where ``where`` is 0 to ``second`` where it is 1."""
    share = np.asarray(where, dtype=np.float64)[..., None]
    blend: Plane = (1 - share) * np.array(first) + share * np.array(second)
    return np.round(blend).astype(np.uint8)


BACKGROUNDS: dict[str, Callable[[Plane, Plane], Frame]] = {
    "a plain white background": lambda x, y: _two_colours(0 * x, WHITE, WHITE),
    "a plain black background": lambda x, y: _two_colours(0 * x, BLACK, BLACK),
    "a plain blue background": lambda x, y: _two_colours(0 * x, BLUE, BLUE),
    "a plain grey background": lambda x, y: _two_colours(0 * x, GREY, GREY),
    "a gradient from black on the left to blue on the right": lambda x, y: _two_colours(x / x.max(), BLACK, BLUE),
    "a gradient from white at the top to grey at the bottom": lambda x, y: _two_colours(y / y.max(), WHITE, GREY),
    "a blue and white checkerboard": lambda x, y: _two_colours((x // 32 + y // 32) % 2, BLUE, WHITE),
    "a black and grey checkerboard": lambda x, y: _two_colours((x // 32 + y // 32) % 2, BLACK, GREY),
    "blue and white horizontal stripes": lambda x, y: _two_colours(y // 24 % 2, BLUE, WHITE),
    "grey and white vertical stripes": lambda x, y: _two_colours(x // 24 % 2, GREY, WHITE),
    "black and brown diagonal stripes": lambda x, y: _two_colours((x + y) // 34 % 2, BLACK, BROWN),
}
"""Words -> the picture, from each pixel's column ``x`` and row ``y``."""

# The first one this build of FFmpeg has. libx264 comes with PyAV's wheels; mpeg4 is in every build.
# x264 without its macroblock tree: with it, the same frames at widths of 240 and 320 gave up to four different files in
# eight runs, on one thread too (core 165 in PyAV 18.1). Neither asm=0 nor mbtree=0 ever did.
ENCODERS = {
    "libx264": {"preset": "veryfast", "crf": "20", "mbtree": "0"},
    "libopenh264": {"b": "800k"},
    "mpeg4": {"b": "800k"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one video shows."""

    shape: str
    colour: str
    motion: Motion
    background: str
    width: int
    height: int
    fps: Fraction
    num_frames: int
    long_caption: bool


def main() -> None:
    """Read the command line, make the clips, and say what was made."""
    parser = argparse.ArgumentParser(
        description="Make small videos with true captions: OUT/videos/*.mp4 and OUT/videos2caption.json.",
        epilog="example: python tools/make_clips.py /tmp/clips --num-clips 24 --seed 0",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--num-clips", type=int, default=24, help="how many videos (default: 24)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same files on the same machine (default: 0)"
    )
    parser.add_argument("--seconds", type=float, help="length of every video (default: varied, from 1.5 to 3)")
    parser.add_argument(
        "--bare", action="store_true", help="write only path and cap to the JSON, no fps, num_frames and so on"
    )
    args = parser.parse_args()
    try:
        summary = make_clips(args.out, num_clips=args.num_clips, seed=args.seed, seconds=args.seconds, bare=args.bare)
    except ValueError as error:
        parser.error(str(error))
    print(summary)


def make_clips(
    out: Path, *, num_clips: int = 24, seed: int = 0, seconds: float | None = None, bare: bool = False
) -> str:
    """Write the videos, then the JSON that lists them; return one line that says what was made."""
    if num_clips < 1 or (seconds is not None and seconds <= 0):
        raise ValueError(f"there must be something to show, got {num_clips} clips of {seconds} seconds")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: delete it, or name another")
    encoder = find_encoder()
    (out / "videos").mkdir(parents=True, exist_ok=True)
    entries = []
    for index, scene in enumerate(scenes(num_clips, seed=seed, seconds=seconds)):
        path = out / "videos" / f"clip_{index:04d}.mp4"
        write_video(path, draw(scene), fps=scene.fps, encoder=encoder)
        entries.append(entry(path.name, scene, bare=bare))
    # Last, so that a folder with a JSON is a complete one.
    (out / "videos2caption.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    size_bytes = sum(path.stat().st_size for path in (out / "videos").iterdir())
    return f"made {num_clips} clips ({size_bytes / 1e6:.1f} MB, encoded by {encoder}, seed {seed}) in {out}"


def scenes(num_clips: int, *, seed: int, seconds: float | None) -> Iterator[Scene]:
    """Walk all lists at once, each in an order shuffled by the seed, so that few clips already show much variety."""
    rng = np.random.default_rng(seed)
    shapes, colours, backgrounds = (list(rng.permutation(list(names))) for names in (SHAPES, COLOURS, BACKGROUNDS))
    motions = [MOTIONS[index] for index in rng.permutation(len(MOTIONS))]
    for index in range(num_clips):
        width, height = SIZES[index % len(SIZES)]
        fps = RATES[index % len(RATES)]
        yield Scene(
            shape=str(shapes[index % len(shapes)]),
            colour=str(colours[index % len(colours)]),
            motion=motions[index % len(motions)],
            background=str(backgrounds[index % len(backgrounds)]),
            width=width,
            height=height,
            fps=fps,
            num_frames=max(1, round((seconds or rng.uniform(1.5, 3)) * fps)),
            long_caption=index % 3 == 2,
        )


def caption(scene: Scene) -> str:
    """Say what the video shows, and nothing that it does not."""
    article = "An" if scene.colour == "orange" else "A"
    text = f"{article} {scene.colour} {scene.shape} {scene.motion.verb} over {scene.background}."
    if scene.long_caption:
        text += (
            f" {scene.motion.detail}. The {scene.shape} keeps its colour, the background does not change, the camera"
            " stays still, and nothing else is to be seen."
        )
    return text


def entry(name: str, scene: Scene, *, bare: bool) -> dict[str, Any]:
    """One row of ``videos2caption.json``."""
    required = {"path": name, "cap": [caption(scene)]}
    if bare:
        return required
    return required | {
        "fps": float(scene.fps),
        "num_frames": scene.num_frames,
        "duration": float(scene.num_frames / scene.fps),
        "resolution": {"width": scene.width, "height": scene.height},
    }


def draw(scene: Scene) -> Iterator[Frame]:
    """Yield the frames of a scene."""
    y, x = np.mgrid[: scene.height, : scene.width].astype(np.float64)
    background = BACKGROUNDS[scene.background](x, y)
    colour = np.array(COLOURS[scene.colour], dtype=np.uint8)
    for index in range(scene.num_frames):
        x_share, y_share, size = scene.motion.path(index / max(1, scene.num_frames - 1))
        radius = size * 0.18 * min(scene.width, scene.height)
        u, v = (x - x_share * scene.width) / radius, (y - y_share * scene.height) / radius
        yield np.where(SHAPES[scene.shape](u, v)[..., None], colour, background)


def find_encoder() -> str:
    """Name the first of ``ENCODERS`` that this PyAV can use."""
    for name in ENCODERS:
        try:
            av.Codec(name, "w")
        except UnknownCodecError:
            continue
        return name
    raise ValueError(f"PyAV {av.__version__} has none of {', '.join(ENCODERS)}: install its wheel from PyPI")


def write_video(path: Path, frames: Iterator[Frame], *, fps: Fraction, encoder: str) -> None:
    """Encode ``(H, W, 3)`` uint8 RGB frames of one size to an MP4."""
    first = next(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=fps, options=ENCODERS[encoder])
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in (first, *frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main()
