"""Settings + shards + model -> the job: its fingerprint, and its units with what is decided about them.

Only indexes and configs are read; no tar is opened, no weight loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

from streamprep import canonical, job, plugins
from streamprep.config import EncodeConfig
from streamprep.contract import LatentContract
from streamprep.errors import UserError
from streamprep.job import Job, JobPlan, Unit
from streamprep.manifest import Manifest, load_index, load_manifest, read_index
from streamprep.plan import SamplingRules, UnitPlan, plan_unit
from streamprep.progress import count, size
from streamprep.storage import Store


def prepare_job(config: EncodeConfig, shards: Store, out: Store, contract: LatentContract, device: torch.device) -> Job:
    """Create the job, or join it if it is there and the same.

    Raises:
        UserError: if nothing would be encoded, the disk is too small, or the output belongs to another job.
    """
    exporter = plugins.load("streamprep.exporters", config.exporter)
    manifest = load_manifest(shards)
    fingerprint = _fingerprint(config, contract, manifest, device)
    if out.exists(job.PLAN):
        present = job.open_job(out)
        job.check_same(out, present.plan.fingerprint, fingerprint)
        return present
    if next(out.list(job.RECORDS), None) is not None:
        raise UserError(f"{out.url} has records of a job whose {job.PLAN} is lost: use a new output folder")
    units = _plan_units(shards, manifest, _rules(config), config.max_samples)
    plan = JobPlan(
        shards=shards.url,
        fingerprint=fingerprint,
        config=asdict(config),
        contract=contract.to_json(),
        data_folder=exporter.FOLDER,
        units=tuple(sorted(units, key=lambda unit: (-unit.num_clips, unit.id))),
        versions=job.installed_versions(),
    )
    if not plan.num_clips:
        raise UserError(
            f"{shards.url}: none of {count(manifest.num_samples, 'sample')} would be encoded: {_why(units)}"
        )
    needed = plan.num_clips * contract.latent_bytes(
        num_frames=config.num_frames, height=config.max_height, width=config.max_width
    )
    if needed > out.free_bytes():
        raise UserError(f"{out.url} has {size(out.free_bytes())} free, the latents alone need {size(needed)}")
    return job.start_or_join(out, plan)


def replan(shards: Store, unit: Unit, config: EncodeConfig) -> UnitPlan:
    """The decisions about one unit, which follow from its index again and again."""
    index = read_index(shards, unit.shard, sha256=unit.index_sha256)
    plan = plan_unit(unit.id, index, _rules(config), limit=unit.limit)
    assert job.keys_digest(clip.key for clip in plan.clips) == unit.clips_sha256, f"unit {unit.id} is planned otherwise"
    return plan


def _plan_units(shards: Store, manifest: Manifest, rules: SamplingRules, max_samples: int | None) -> list[Unit]:
    units, left = [], max_samples
    for number, info in enumerate(manifest.shards):
        if left == 0:
            break
        unit = plan_unit(f"{number:06d}", load_index(shards, info), rules, limit=left)
        cut = left is not None and len(unit.clips) == left
        units.append(
            Unit(
                id=unit.id,
                shard=info.name,
                index_sha256=info.index_sha256,
                num_clips=len(unit.clips),
                num_dropped=len(unit.dropped),
                num_bad=len(unit.bad),
                limit=left if cut else None,
                clips_sha256=job.keys_digest(clip.key for clip in unit.clips),
            )
        )
        left = None if left is None else left - len(unit.clips)
    return units


def _rules(config: EncodeConfig) -> SamplingRules:
    names = [rule.name for rule in fields(SamplingRules)]
    return SamplingRules(**{name: getattr(config, name) for name in names})


def _fingerprint(
    config: EncodeConfig, contract: LatentContract, manifest: Manifest, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Everything that decides the output's bytes."""
    c = contract.to_json()
    where = {"device": device.type} | ({"encode_threads": torch.get_num_threads()} if device.type == "cpu" else {})
    return {
        "video": {name: c[name] for name in ("family", "vae_class", "vae_dtype", "vae_sha256", "posterior", "space")}
        | {"preprocess_video_batch_size": config.preprocess_video_batch_size}
        | where,
        "text": {name: c[name] for name in c if name.startswith("text_")}
        | {
            "captions_cleaned": contract.captions_cleaned,
            "text_batch_size": config.text_batch_size,
            "negative_prompt": config.negative_prompt,
        },
        "sampling": asdict(_rules(config))
        | {
            "workload_type": config.workload_type,
            "video_loader_type": config.video_loader_type,
            "max_samples": config.max_samples,
            "seed": config.seed,
        },
        "export": {"exporter": config.exporter, "samples_per_file": config.samples_per_file},
        "inputs": {
            "num_shards": len(manifest.shards),
            "shards_sha256": canonical.digest([[shard.name, shard.index_sha256] for shard in manifest.shards]),
        },
    }


def _why(units: Sequence[Unit]) -> str:
    dropped, bad = sum(unit.num_dropped for unit in units), sum(unit.num_bad for unit in units)
    return f"{dropped} are dropped by the settings (too short? no caption?), {bad} have an unreadable header"
