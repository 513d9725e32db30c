"""``OUT/validation/validation.json``: what ``--validation-split`` holds out, as FastVideo's trainers take it.

They read ``{"data": [{"caption", "height", "width", "num_frames", "num_inference_steps", ...}]}`` and generate a video
for each entry. For image-to-video an entry has the first frame of the clip, cut and resized as it would be encoded, as
PNG: by ``image_path``, and by ``video_path`` too, because that is where FastVideo's Wan trainers look for it; a path is
one beside the JSON. Text-to-video entries have none: the trainers of models that can do both would take it for a start.

The JSON is written after all images: where it is, it is whole. Everything in it follows from the plan, so it does not
matter who writes it, or how often.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from streamprep import canonical, job
from streamprep.cache import open_cache
from streamprep.config import EncodeConfig
from streamprep.decoder import Decoder
from streamprep.errors import BadSample
from streamprep.filters import Filters
from streamprep.manifest import Shards, load_indexes
from streamprep.plan import ClipPlan, SamplingRules, TextPlan, UnitPlan, plan_unit
from streamprep.sealed import seal_validation
from streamprep.storage import Store
from streamprep.stream import decode_units

NUM_INFERENCE_STEPS = 40
"""What FastVideo's own script writes."""


def write_validation(
    out: Store,
    shards: Shards,
    config: EncodeConfig,
    rules: SamplingRules,
    filters: Filters,
    open_decoder: Callable[[], AbstractContextManager[Decoder]],
) -> tuple[int, int]:
    """Write what is held out.

    Args:
        out: The job's output.
        shards: Where the videos are.
        config: The settings.
        rules: What they say about choosing clips.
        filters: Which know who is held out.
        open_decoder: Is called if there is anything to decode.

    Returns:
        How many entries were written, and how many left out because their first frame cannot be decoded.
    """
    units = _held_out(shards, rules, filters)
    names = _names(units) if config.workload_type == "i2v" else {}
    images, bad = _write_images(out, shards, config, units, names, open_decoder) if names else ({}, {})
    chosen = [plan for unit in units for plan in unit.held_out if plan.key not in bad]
    value = {
        "data": [_entry(plan, config, names.get(plan.key)) for plan in chosen],
        "images": images,
        "left_out": bad,
    }
    out.put(job.VALIDATION, seal_validation(value), step="validation")
    return len(chosen), len(bad)


def _held_out(shards: Shards, rules: SamplingRules, filters: Filters) -> list[UnitPlan]:
    """The shards that have any, whatever ``--max-samples`` says."""
    units = []
    for number, (_, index) in enumerate(load_indexes(shards.store, shards.manifest.shards)):
        unit = plan_unit(f"{number:06d}", index, rules, filters)
        if unit.held_out:
            units.append(dataclasses.replace(unit, clips=(), texts=(), dropped=(), bad=()))
    return units


def _names(units: Sequence[UnitPlan]) -> dict[str, str]:
    """Of the images, by key; beside the JSON."""
    keys = (plan.key for unit in units for plan in unit.held_out)
    return {key: f"images/{number:05d}.png" for number, key in enumerate(keys)}


def _write_images(
    out: Store,
    shards: Shards,
    config: EncodeConfig,
    units: Sequence[UnitPlan],
    names: dict[str, str],
    open_decoder: Callable[[], AbstractContextManager[Decoder]],
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """({name: sha256}, {key: why it has none}); those that an earlier process has written are kept."""
    there = {
        entry.path.removeprefix(f"{job.VALIDATION_FOLDER}/") for entry in out.list(f"{job.VALIDATION_FOLDER}/images")
    }
    digests = {
        name: canonical.bytes_digest(out.read(f"{job.VALIDATION_FOLDER}/{name}"))
        for name in names.values()
        if name in there
    }
    bad: dict[str, BadSample] = {}
    first_frames = [_first_frames(unit, [key for key, name in names.items() if name not in there]) for unit in units]
    with open_decoder() as decoder:
        decoded = decode_units(shards.store, first_frames, decoder, open_cache(config.cache_dir, config.cache_gb))
        for _, clip, result in decoded:
            if result.frames is None:
                assert result.bad is not None
                bad[clip.key] = result.bad
                continue
            data = _png(result.frames[0])
            out.put(f"{job.VALIDATION_FOLDER}/{names[clip.key]}", data, step="validation")
            digests[names[clip.key]] = canonical.bytes_digest(data)
    reasons = {key: {"reason": error.reason, "exception": error.message} for key, error in bad.items()}
    return dict(sorted(digests.items())), reasons


def _first_frames(unit: UnitPlan, keys: Sequence[str]) -> UnitPlan:
    """Of the held-out clips of a unit that are still to be decoded."""
    wanted = frozenset(keys)
    clips = (plan for plan in unit.held_out if isinstance(plan, ClipPlan) and plan.key in wanted)
    return dataclasses.replace(unit, clips=tuple(_first_frame(clip) for clip in clips))


def _first_frame(clip: ClipPlan) -> ClipPlan:
    request, indices = clip.request, clip.request.indices
    one = dataclasses.replace(
        request, timestamps=request.timestamps[:1], indices=None if indices is None else indices[:1]
    )
    return dataclasses.replace(clip, request=one)


def _png(frame: Any) -> bytes:
    """Of (C, H, W) uint8 RGB."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(sink, "PNG")
    return sink.getvalue()


def _entry(plan: TextPlan, config: EncodeConfig, image: str | None) -> dict[str, Any]:
    bucket = plan.bucket if isinstance(plan, ClipPlan) else None
    entry: dict[str, Any] = {
        "caption": plan.rows[0].caption,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "height": bucket.height if bucket else config.max_height,
        "width": bucket.width if bucket else config.max_width,
        "num_frames": bucket.num_frames if bucket else config.num_frames,
    }
    return entry if image is None else {**entry, "image_path": image, "video_path": image}
