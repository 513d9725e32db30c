"""What exporters say of themselves: whether one can hold what is asked for, and how it stores tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamprep import plugins
from streamprep.errors import UserError
from streamprep.types import WrittenFile

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DEFAULT_DTYPE = "float32"
"""Of an exporter that says nothing of it; and the encoders' own."""
ROUNDING = {
    "bfloat16": "relative error at most 2^-8",
    "float16": "relative error at most 2^-11, below 2^-14 an error of at most 2^-25",
}
"""What a dtype makes of a float32 number, at worst; that of a number too large for float16 is refused."""
_OF_BFLOAT16_IN_FLOAT16 = "exact from 2^-14 on, below an error of at most 2^-25"
LARGEST_FLOAT16 = 65504
_NEEDED = ("FOLDER", "WORKLOADS", "POSTERIORS", "OPTIONS", "read_file", "column_problem")


def open_exporter(name: str) -> Any:
    """An exporter's module.

    Raises:
        UserError: if there is none of that name, or it says too little of itself.
    """
    exporter = plugins.load("streamprep.exporters", name)
    for attribute in _NEEDED:
        if not hasattr(exporter, attribute):
            raise UserError(f"the exporter {name} lacks {attribute}: see CONTRIBUTING.md, Adding an output format")
    return exporter


def check_able(exporter: Any, name: str, *, workload: str, posterior: str) -> None:
    """Refuse what an exporter has no place for.

    Raises:
        UserError: with what it has.
    """
    for flag, asked, able in (
        ("--workload-type", workload, exporter.WORKLOADS),
        ("--posterior", posterior, exporter.POSTERIORS),
    ):
        if asked not in able:
            raise UserError(f"{flag} {asked}: the exporter {name} holds only {', '.join(able)}")


def check_contract(exporter: Any, name: str, contract: Mapping[str, Any]) -> None:
    """Refuse latents that the trainers of an exporter's files would take for something else.

    Raises:
        UserError: with what they are.
    """
    problem = exporter.contract_problem(contract) if hasattr(exporter, "contract_problem") else None
    if problem is not None:
        raise UserError(f"the exporter {name} cannot hold these: {problem}")


def settle_options(exporter: Any, name: str, asked: Mapping[str, str | None]) -> dict[str, str]:
    """How an exporter is to store tensors: as asked for, else by its defaults.

    Args:
        exporter: It.
        name: Of it.
        asked: By name; None for what it does not matter.

    Raises:
        UserError: if it cannot, with what it can.
    """
    able: Mapping[str, Sequence[str]] = exporter.OPTIONS
    given = {option: value for option, value in asked.items() if value is not None}
    for option, value in given.items():
        flag = f"--{option.replace('_', '-')} {value}"
        if option not in able:
            raise UserError(f"{flag}: the exporter {name} leaves no such choice: leave the flag out")
        if value not in able[option]:
            raise UserError(f"{flag}: the exporter {name} takes only {', '.join(able[option])}")
    options = {option: choices[0] for option, choices in able.items()} | given
    problem = exporter.option_problem(options) if hasattr(exporter, "option_problem") else None
    if problem is not None:
        raise UserError(problem)
    return options


def choices_made(exporter: Any, options: Mapping[str, str]) -> dict[str, str]:
    """Those of the settled options that could have been others: they are part of a job's fingerprint."""
    return {option: value for option, value in options.items() if len(exporter.OPTIONS[option]) > 1}


def dtype_of(options: Mapping[str, str]) -> str:
    """What tensors are stored as."""
    return options.get("latent_dtype", DEFAULT_DTYPE)


def describe_loss(source: str, target: str) -> str:
    """What becomes of numbers of one dtype that are stored as another, at worst."""
    if target == source or target not in ROUNDING:
        return f"{source} -> {target}: exact"
    loss = _OF_BFLOAT16_IN_FLOAT16 if (source, target) == ("bfloat16", "float16") else ROUNDING[target]
    refused = f"; a number beyond {LARGEST_FLOAT16} is refused" if target == "float16" else ""
    return f"{source} -> {target}: {loss}{refused}"


def rounded(contract: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A contract that says what its numbers have lost by being stored as a dtype, if they have."""
    if dtype not in ROUNDING:
        return dict(contract)
    return {**contract, "rounded": {**contract.get("rounded", {}), dtype: ROUNDING[dtype]}}


def check_rows(name: str, unit: str, given: Iterable[str], files: Iterable[WrittenFile]) -> None:
    """Compare the keys of the rows that an exporter was given with those that it says it has written.

    Raises:
        UserError: if one is missing, or there is one too many: then the unit must not be committed.
    """
    wanted, found = Counter(given), Counter(row.key for file in files for row in file.rows)
    if wanted == found:
        return
    wrong = {"lacks": wanted - found, "has too many": found - wanted}
    which = ", and ".join(
        f"{what} {sum(keys.values())} (the first: {min(keys)})" for what, keys in wrong.items() if keys
    )
    raise UserError(
        f"the exporter {name} has a mistake: of the {sum(wanted.values())} rows of unit {unit} that it was given, what "
        f"it wrote {which}, so the unit is not committed; `streamprep.testing.ExporterContract` finds such mistakes"
    )


def rows_share(exporter: Any) -> bool:
    """Whether rows of one clip have one latent between them."""
    return getattr(exporter, "ROWS_SHARE_TENSORS", False)
