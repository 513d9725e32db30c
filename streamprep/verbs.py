"""What each verb does and prints: results on stdout, everything else on stderr."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from streamprep.board import Board, open_board
from streamprep.config import (
    ConvertConfig,
    EncodeConfig,
    FinalizeConfig,
    IndexConfig,
    PackConfig,
    PlanConfig,
    RetryConfig,
    RunConfig,
    StatusConfig,
    VerifyConfig,
)
from streamprep.contract import describe
from streamprep.job import PLAN, open_job
from streamprep.manifest import MANIFEST, open_shards
from streamprep.pack import pack as pack_dataset
from streamprep.progress import by_reason, count, size
from streamprep.ranks import this_rank
from streamprep.session import check_worth_a_restart
from streamprep.settings import EncodeSettings, LaunchSettings, PackSettings
from streamprep.storage import open_spool, open_store

if TYPE_CHECKING:
    from streamprep.finalize import Totals


def pack(config: PackConfig, board: Board | None = None) -> int:
    """Pack and print the totals."""
    manifest = pack_dataset(config, board=board)
    if this_rank().number != 0:
        return 0
    print(
        f"{count(manifest.num_samples, 'caption' if config.captions_only else 'video')}, "
        f"{count(len(manifest.shards), 'shard')}, {size(manifest.size_bytes)} in {config.shards}"
    )
    return 0


def plan(config: PlanConfig) -> int:
    """Print what would be encoded."""
    from streamprep import forecast
    from streamprep.prepare import load_exporter
    from streamprep.settle import describe_model

    load_exporter(config)
    contract = describe_model(config)
    result = forecast.forecast(open_shards(config.shards), config, contract, with_decisions=config.out is not None)
    if config.out is not None:
        forecast.write_table(result, config.out)
    print("\n".join(forecast.describe(result, config, contract)))
    return 0


def index(config: IndexConfig) -> int:
    """Index tars of another program and print the totals."""
    from streamprep.index import index as index_tars

    manifest = index_tars(config)
    print(
        f"{count(manifest.num_samples, 'video')}, {count(len(manifest.shards), 'shard')}, "
        f"{size(manifest.size_bytes)} indexed in {config.to or config.shards}"
    )
    return 0


def encode(config: EncodeConfig, board: Board | None = None) -> int:
    """Encode and print the totals."""
    check_worth_a_restart(config)
    from streamprep.encode import encode as encode_shards

    totals = encode_shards(config, board)
    if this_rank().number == 0:
        _print_totals(totals, config.out)
    return 0


def run(config: RunConfig, board: Board | None = None) -> int:
    """Pack, encode, print the totals."""
    _check_before_packing(config)
    shards = config.shards or f"{config.out.rstrip('/')}/_streamprep/shards"
    board = board or open_board(this_rank())  # one for both: rank 0 may be the one that holds it
    pack_dataset(
        PackConfig(
            dataset=config.dataset,
            shards=shards,
            captions_only=config.workload_type == "text",
            **_settings(config, PackSettings),
        ),
        board=board,
        stale_seconds=config.stale_seconds,
    )
    settings = _settings(config, EncodeSettings) | _settings(config, LaunchSettings)
    return encode(EncodeConfig(shards=shards, out=config.out, **settings), board)


def _check_before_packing(config: RunConfig) -> None:
    """Refuse at once what `encode` would refuse when all is packed."""
    from streamprep.prepare import load_exporter, rules_of
    from streamprep.settle import describe_model

    load_exporter(config)
    rules_of(config, describe_model(config))


def _settings(
    config: RunConfig, kind: type[EncodeSettings] | type[PackSettings] | type[LaunchSettings]
) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(kind)}


def retry(config: RetryConfig) -> int:
    """Encode bad samples again, and print what became of them and the totals."""
    from streamprep.retry import retry as retry_job
    from streamprep.status import describe_round

    result = retry_job(config)
    if this_rank().number:
        return 4 if result.unfinished else 0
    if result.round is None:
        print(f"nothing to retry{' for that' if config.reason else ''}")
    else:
        print(describe_round(result.job, result.round))
    if result.hopeless:
        print(f"bad from their headers, for good unless they are packed again: {by_reason(result.hopeless)}")
    _print_totals(result.totals, config.out)
    if result.stopped is not None:
        raise result.stopped
    if result.unfinished:
        print(f"{count(result.unfinished, 'unit')} not encoded yet: run the same `streamprep encode` again to go on")
    return 4 if result.unfinished else 0


def convert(config: ConvertConfig) -> int:
    """Write a finished output again in another format, and print the totals."""
    from streamprep.convert import convert as convert_output

    totals = convert_output(config)
    if this_rank().number == 0:
        _print_totals(totals, config.out)
    return 0


def status(config: StatusConfig) -> int:
    """Print how far the job is; the exit code is the job's."""
    from streamprep import status as job_status

    current = open_job(open_store(config.out, spool_dir=config.spool_dir))
    print("\n".join(describe(current.plan.contract) if config.contract else job_status.describe(current)))
    return job_status.exit_code(current)


def verify(config: VerifyConfig) -> int:
    """Check an output, or packed shards, and print what is wrong."""
    from streamprep.verify import describe_remedies, verify_job, verify_shards

    store = open_store(config.out, spool_dir=config.spool_dir)
    is_shards = store.exists(MANIFEST) and not store.exists(PLAN)
    if is_shards:
        verdict = verify_shards(store)
        what = f"{count(verdict.num_rows, 'video')} in {count(verdict.num_files, 'shard')}"
    else:
        verdict = verify_job(open_job(store), spool=open_spool(config.spool_dir))
        what = f"{count(verdict.num_rows, 'row')} in {count(verdict.num_files, 'file')}"
    for problem in verdict.problems:
        print(f"WRONG {problem}")
    for unread in verdict.unread:
        print(f"UNREAD {unread}")
    for uncompared in verdict.uncompared:
        print(f"NOTE {uncompared}")
    not_read = f", {count(len(verdict.unread), 'file')} could not be read" if verdict.unread else ""
    print(f"{what}, {size(verdict.size_bytes)}: {count(len(verdict.problems), 'problem')}{not_read}")
    if verdict.gave_up:
        print("the rest was not looked at: this store does not give what is asked of it")
    for line in describe_remedies(verdict, store):
        print(line)
    return 1 if verdict.problems or verdict.unread else 0


def finalize(config: FinalizeConfig) -> int:
    """Finalize a job whose units are all done, and print the totals."""
    from streamprep.finalize import finalize as finalize_job

    _print_totals(finalize_job(open_job(open_store(config.out, spool_dir=config.spool_dir))), config.out)
    return 0


def _print_totals(totals: Totals, out: str) -> None:
    print(f"{count(totals.num_rows, 'row')}, {count(totals.num_files, 'file')}, {size(totals.size_bytes)} in {out}")
    for what, reasons in (("dropped", totals.dropped), ("bad", totals.bad)):
        if reasons:
            print(f"{what} {sum(reasons.values())}: {by_reason(reasons)}")
