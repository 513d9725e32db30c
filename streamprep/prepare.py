"""Settings + shards + model -> the job: its fingerprint, and its units with what is decided about them.

Only indexes and configs are read; no tar is opened, no weight loaded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields
from typing import Any

from streamprep import canonical, job, plugins
from streamprep.config import EncodeConfig
from streamprep.contract import LatentContract
from streamprep.errors import BAD_REASONS, UserError
from streamprep.job import Fingerprint, JobPlan, Unit
from streamprep.manifest import Manifest, load_index, load_manifest, read_index
from streamprep.plan import DROP_REASONS, SamplingRules, UnitPlan, plan_unit
from streamprep.progress import count, size
from streamprep.storage import Store


def plan_job(config: EncodeConfig, shards: Store, out: Store, contract: LatentContract) -> JobPlan:
    """Decide what is to be encoded; nothing is written.

    Raises:
        UserError: if nothing would be encoded, the exporter cannot hold it, or the disk is too small.
    """
    exporter = load_exporter(config)
    manifest = load_manifest(shards)
    units = _plan_units(shards, manifest, rules_of(config), config.max_samples)
    plan = JobPlan(
        shards=shards.url,
        fingerprint=fingerprint(config, contract, manifest),
        config=asdict(config),
        contract=contract.to_json(),
        data_folder=exporter.FOLDER,
        units=tuple(sorted(units, key=lambda unit: (-unit.num_clips, unit.id))),
        versions=job.installed_versions(),
    )
    if not plan.num_clips:
        raise UserError(
            f"{shards.url}: none of {count(manifest.num_samples, 'sample')} would be encoded: "
            f"{_why(shards, manifest, rules_of(config))}"
        )
    if (needed := size_bytes(plan, config, contract)) > out.free_bytes():
        raise UserError(f"{out.url} has {size(out.free_bytes())} free, the output needs more than {size(needed)}")
    return plan


def load_exporter(config: EncodeConfig) -> Any:
    """The exporter's module.

    Raises:
        UserError: if there is none of that name, or it cannot hold what is asked for.
    """
    exporter = plugins.load("streamprep.exporters", config.exporter)
    for name in ("FOLDER", "WORKLOADS", "POSTERIORS", "read_file"):
        if not hasattr(exporter, name):
            raise UserError(
                f"the exporter {config.exporter} lacks {name}: see CONTRIBUTING.md, Adding an output format"
            )
    for flag, asked, able in (
        ("--workload-type", config.workload_type, exporter.WORKLOADS),
        ("--posterior", config.posterior, exporter.POSTERIORS),
    ):
        if asked not in able:
            raise UserError(f"{flag} {asked}: the exporter {config.exporter} holds only {', '.join(able)}")
    return exporter


def size_bytes(plan: JobPlan, config: EncodeConfig, contract: LatentContract) -> int:
    """Of the planned output without its text embeddings, whose lengths nobody knows yet."""
    return plan.num_rows * contract.row_bytes(
        num_frames=config.num_frames, height=config.max_height, width=config.max_width
    )


def replan(shards: Store, unit: Unit, config: EncodeConfig) -> UnitPlan:
    """The decisions about one unit, which follow from its index again and again."""
    index = read_index(shards, unit.shard, sha256=unit.index_sha256)
    plan = plan_unit(unit.id, index, rules_of(config), limit=unit.limit)
    assert job.keys_digest(row.key for row in plan.rows) == unit.rows_sha256, f"unit {unit.id} is planned otherwise"
    return plan


def _plan_units(shards: Store, manifest: Manifest, rules: SamplingRules, max_samples: int | None) -> list[Unit]:
    units, left = [], max_samples
    for number, info in enumerate(manifest.shards):
        if left == 0:
            break
        unit = plan_unit(f"{number:06d}", load_index(shards, info), rules, limit=left)
        num_clips, keys = len(unit.samples), [row.key for row in unit.rows]
        cut = left is not None and num_clips == left
        units.append(
            Unit(
                id=unit.id,
                shard=info.name,
                index_sha256=info.index_sha256,
                num_clips=num_clips,
                num_dropped=len(unit.dropped),
                num_bad=len(unit.bad),
                limit=left if cut else None,
                num_rows=len(keys),
                rows_sha256=job.keys_digest(keys),
            )
        )
        left = None if left is None else left - num_clips
    return units


def rules_of(config: EncodeConfig) -> SamplingRules:
    """What the settings say about choosing clips and captions."""
    names = [rule.name for rule in fields(SamplingRules)]
    return SamplingRules(**{name: getattr(config, name) for name in names})


def fingerprint(config: EncodeConfig, contract: LatentContract, manifest: Manifest) -> Fingerprint:
    """Everything that decides the output's bytes."""
    c = contract.to_json()
    rules = asdict(rules_of(config))
    captions = {name: rules.pop(name) for name in ("caption", "training_cfg_rate")}
    video = c["video"]
    if video is None:
        sampling = {name: rules[name] for name in ("workload_type", "seed")}
    else:
        video |= {"preprocess_video_batch_size": config.preprocess_video_batch_size}
        sampling = rules | {"video_loader_type": config.video_loader_type}
    return {
        "model": {"family": contract.family, "variant": contract.variant} | _device(config),
        "video": video or {},
        "text": {
            **c["text"],
            **captions,
            "text_batch_size": config.text_batch_size,
            "negative_prompt": config.negative_prompt,
        },
        "image": c["image"] or {},
        "sampling": sampling | {"max_samples": config.max_samples},
        "export": {"exporter": config.exporter, "samples_per_file": config.samples_per_file},
        "inputs": {
            "num_shards": len(manifest.shards),
            "shards_sha256": canonical.digest([[shard.name, shard.index_sha256] for shard in manifest.shards]),
        },
    }


def _device(config: EncodeConfig) -> dict[str, Any]:
    """On a CPU, the number of threads may change the last bits."""
    if config.device == "cpu":
        return {"device": "cpu", "encode_threads": config.encode_threads}
    return {"device": "cuda"}


def _why(shards: Store, manifest: Manifest, rules: SamplingRules) -> str:
    reasons: Counter[str] = Counter()
    for number, info in enumerate(manifest.shards):
        unit = plan_unit(f"{number:06d}", load_index(shards, info), rules)
        reasons.update(
            f"{item.reason} ({(DROP_REASONS | BAD_REASONS)[item.reason]})" for item in unit.dropped + unit.bad
        )
    return "; ".join(f"{number} {reason}" for reason, number in reasons.most_common())
