"""Settings + shards + model -> the job: its fingerprint, and its units with what is decided about them.

Only indexes and configs are read; no tar is opened, no weight loaded.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from streamprep import canonical, exporting
from streamprep.buckets import parse_buckets
from streamprep.columns import ColumnTypes
from streamprep.config import EncodeConfig
from streamprep.contract import LatentContract
from streamprep.errors import UserError
from streamprep.filters import Filters
from streamprep.job_plan import Fingerprint, JobPlan, Unit, installed_versions, keys_digest
from streamprep.manifest import Manifest, ShardInfo, Shards, load_indexes, read_index
from streamprep.plan import SamplingRules, UnitPlan, explain, held_out_by, plan_unit, where_of
from streamprep.progress import count, size
from streamprep.settings import EncodeSettings, LatentSettings
from streamprep.shards import ShardIndex, ShardSample
from streamprep.storage import Store


def plan_job(config: EncodeConfig, shards: Shards, out: Store, contract: LatentContract, filters: Filters) -> JobPlan:
    """Decide what is to be encoded; nothing is written.

    Raises:
        UserError: if nothing would be encoded, the exporter cannot hold it, or the disk is too small.
    """
    exporter, manifest, rules = load_exporter(config), shards.manifest, rules_of(config, contract)
    options = exporter_options(exporter, config)
    exporting.check_contract(exporter, config.exporter, contract.to_json())
    units, reasons, columns = [], Counter[str](), ColumnTypes(config.keep_columns)
    for shard in plan_shards(shards, rules, filters, config.max_samples):
        units.append(_unit(shard, contract, exporter, options))
        columns.see(shard.index.samples)
        reasons.update(item.reason for item in shard.plan.dropped + shard.plan.bad)
    plan = JobPlan(
        shards=shards.url,
        fingerprint=fingerprint(config, contract, manifest),
        config={field.name: getattr(config, field.name) for field in fields(EncodeSettings)} | options,
        contract=exporting.rounded(contract.to_json(), exporting.dtype_of(options)),
        data_folder=exporter.FOLDER,
        units=tuple(sorted(units, key=lambda unit: (-unit.num_clips, unit.id))),
        versions=installed_versions(),
        columns=columns.types(problem=column_problem(config)),
    )
    if not plan.num_clips:
        why = "; ".join(f"{n} {reason} ({explain(reason)})" for reason, n in reasons.most_common())
        raise UserError(f"{shards.url}: none of {count(manifest.num_samples, 'sample')} would be encoded: {why}")
    free = out.free_bytes()
    if free is not None and plan.size_bytes > free:
        raise UserError(f"{out.url} has {size(free)} free, the output needs more than {size(plan.size_bytes)}")
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """One shard, and what is decided about it."""

    info: ShardInfo
    index: ShardIndex
    plan: UnitPlan
    limit: int | None
    """The number of clips that has cut it short, None if nothing has."""


def plan_shards(
    shards: Shards, rules: SamplingRules, filters: Filters, max_samples: int | None
) -> Iterator[PlannedShard]:
    """Decide about every shard, in the manifest's order.

    Raises:
        UserError: if ``rules.where`` names a column that no sample has.
    """
    where_of.cache_clear()  # it remembers the columns of the shards that were planned before
    left = max_samples
    for number, (info, index) in enumerate(load_indexes(shards.store, shards.manifest.shards)):
        if left == 0:
            break
        plan = plan_unit(f"{number:06d}", index, rules, filters, limit=left)
        yield PlannedShard(info=info, index=index, plan=plan, limit=left if len(plan.samples) == left else None)
        left = None if left is None else left - len(plan.samples)
    if rules.where:
        where = where_of(rules)
        if where.unknown:  # the limit may have left out those that have the column
            for _, index in load_indexes(shards.store, shards.manifest.shards):
                where.keys_of(index.samples)
                if not where.unknown:
                    break
        where.check_known()


def open_filters(shards: Shards, rules: SamplingRules) -> Filters:
    """The filters of the rules; those that must see all samples read every index.

    Raises:
        UserError: if there is no such filter.
    """

    def samples_left_by(filters: Filters) -> Iterator[ShardSample]:
        for _, index in load_indexes(shards.store, shards.manifest.shards):
            planned = {sample.key.partition("#")[0] for sample in plan_unit("", index, rules, filters).samples}
            yield from (sample for sample in index.samples if sample.key in planned)

    filters = Filters(rules.filters, held_out_by(rules))
    filters.survey(samples_left_by)
    return filters


def load_exporter(config: EncodeSettings) -> Any:
    """The exporter's module.

    Raises:
        UserError: if there is none of that name, or it cannot hold what is asked for.
    """
    exporter = exporting.open_exporter(config.exporter)
    exporting.check_able(exporter, config.exporter, workload=config.workload_type, posterior=config.posterior)
    exporter_options(exporter, config)
    return exporter


def exporter_options(exporter: Any, config: EncodeSettings) -> dict[str, str]:
    """How the exporter is to store tensors.

    Raises:
        UserError: if it cannot.
    """
    asked = {field.name: getattr(config, field.name) for field in fields(LatentSettings)}
    return exporting.settle_options(exporter, config.exporter, asked)


def column_problem(config: EncodeSettings) -> Callable[[str], str | None]:
    """What the exporter has against a further column of a name, if anything."""
    return functools.partial(load_exporter(config).column_problem, workload=config.workload_type)


def replan(shards: Store, unit: Unit, rules: SamplingRules, filters: Filters) -> UnitPlan:
    """The decisions about one unit, which follow from its index (and what the filters saw) again and again."""
    index = read_index(shards, unit.shard, sha256=unit.index_sha256)
    plan = plan_unit(unit.id, index, rules, filters, limit=unit.limit)
    if unit.keys is not None:
        plan = plan.only(frozenset(unit.keys), unit.retried)
    assert keys_digest(row.key for row in plan.rows) == unit.rows_sha256, f"unit {unit.id} is planned otherwise"
    return plan


def _unit(shard: PlannedShard, contract: LatentContract, exporter: Any, options: Mapping[str, str]) -> Unit:
    plan = shard.plan
    keys = [row.key for row in plan.rows]
    width, num_bytes = exporting.DTYPE_BYTES[exporting.dtype_of(options)], 0
    for clip in plan.clips:
        b = clip.bucket
        one = contract.row_bytes(num_frames=b.num_frames, height=b.height, width=b.width, value_bytes=width)
        num_bytes += one * (1 if exporting.rows_share(exporter) else len(clip.rows))
    return Unit(
        id=plan.id,
        shard=shard.info.name,
        index_sha256=shard.info.index_sha256,
        num_clips=len(plan.samples),
        num_rows=len(keys),
        num_dropped=len(plan.dropped),
        num_bad=len(plan.bad),
        size_bytes=num_bytes,
        limit=shard.limit,
        rows_sha256=keys_digest(keys),
    )


def rules_of(config: EncodeSettings, contract: LatentContract) -> SamplingRules:
    """What the settings say about choosing clips and captions.

    Raises:
        UserError: if a size is one that the model cannot encode whole, or ``--where`` or ``--filters`` are wrong.
    """
    video = contract.video
    given = {rule.name: getattr(config, rule.name) for rule in fields(SamplingRules) if hasattr(config, rule.name)}
    if config.do_temporal_sample:
        given["window"] = "random"
    if video is not None:
        given["frame_step"] = video.temporal_factor
        given["buckets"] = parse_buckets(
            config.buckets,
            height=config.max_height,
            width=config.max_width,
            num_frames=config.num_frames,
            multiple=video.spatial_multiple,
        )
        for bucket in given["buckets"]:
            contract.check_geometry(
                height=bucket.height,
                width=bucket.width,
                num_frames=bucket.num_frames,
                bucket=str(bucket) if config.buckets else None,
            )
    else:
        given["buckets"] = ()
    rules = SamplingRules(**given)
    frame_filters = Filters(rules.filters).frame_filters
    if frame_filters and video is None:
        raise UserError(f"--filters {frame_filters[0]} looks at frames, --workload-type {contract.workload} at none")
    if rules.where:
        where_of(rules)
    return rules


def fingerprint(config: EncodeConfig, contract: LatentContract, manifest: Manifest) -> Fingerprint:
    """Everything that decides the output's bytes."""
    c = contract.to_json()
    rules = asdict(rules_of(config, contract))
    if config.buckets is None:
        del rules["buckets"]  # the one size says it
    captions = {name: rules.pop(name) for name in ("caption", "training_cfg_rate")}
    video = c["video"]
    if video is None:
        sampling = {name: rules[name] for name in ("workload_type", "where", "filters", "validation_split", "seed")}
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
        "export": _export_part(config),
        "inputs": {
            "num_shards": len(manifest.shards),
            "shards_sha256": canonical.digest([[shard.name, shard.index_sha256] for shard in manifest.shards]),
        },
    }


def _export_part(config: EncodeConfig) -> dict[str, Any]:
    exporter = load_exporter(config)
    return {
        "exporter": config.exporter,
        "samples_per_file": config.samples_per_file,
        "keep_columns": config.keep_columns,
        **exporting.choices_made(exporter, exporter_options(exporter, config)),
    }


def _device(config: EncodeConfig) -> dict[str, Any]:
    """On a CPU, the number of threads may change the last bits."""
    if config.device == "cpu":
        return {"device": "cpu", "encode_threads": config.encode_threads}
    return {"device": "cuda"}
