"""The command line: ``streamprep VERB ...``.

Every verb is a function of one config dataclass; its flags are the dataclass's fields. Only what a verb needs is
imported, and only after its flags are understood: ``streamprep encode --help`` must not wait for torch.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from streamprep import __version__
from streamprep import config as configs
from streamprep.errors import LatentMismatch, OutOfMemory, Stopped, TooManyBadSamples, UnitsSetAside, UserError
from streamprep.launch import launch, wants_launching
from streamprep.ranks import LAUNCHER, NO_ANSWER, SETTLED, end_with_the_launcher
from streamprep.settings_file import with_file_defaults
from streamprep.signals import ends_in_time, signals_raise_stopped
from streamprep.storage import StoreError, check_spool_dir, is_remote

DONE, FAILED, WRONG_USAGE, TOO_MANY_BAD, STOPPED = range(5)
"""Exit codes."""


@dataclass(frozen=True)
class Verb:
    """One command."""

    config: type
    """Its flags."""
    run: str
    """``module:function`` that takes the config and returns the exit code."""
    summary: str
    resumable: bool = True
    """Whether it goes on where it was stopped."""


VERBS = {
    "pack": Verb(configs.PackConfig, "streamprep.verbs:pack", "raw videos and captions -> tar shards"),
    "plan": Verb(
        configs.PlanConfig, "streamprep.verbs:plan", "what encode would do: sizes, drops with reasons", resumable=False
    ),
    "index": Verb(configs.IndexConfig, "streamprep.verbs:index", "tar shards of other programs -> shards to encode"),
    "encode": Verb(configs.EncodeConfig, "streamprep.verbs:encode", "shards -> latents and embeddings"),
    "run": Verb(configs.RunConfig, "streamprep.verbs:run", "pack + encode"),
    "retry": Verb(configs.RetryConfig, "streamprep.verbs:retry", "encode again what was bad"),
    "convert": Verb(configs.ConvertConfig, "streamprep.verbs:convert", "a finished output -> another format"),
    "status": Verb(configs.StatusConfig, "streamprep.verbs:status", "how far a job is", resumable=False),
    "verify": Verb(
        configs.VerifyConfig,
        "streamprep.verbs:verify",
        "check an output, or shards, against its records",
        resumable=False,
    ),
    "finalize": Verb(configs.FinalizeConfig, "streamprep.verbs:finalize", "finish a job by hand"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, 1 failed, 2 wrong usage, 3 too many bad samples, 4 stopped by a signal and resumable.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return DONE if arguments else WRONG_USAGE
    if arguments[0] == "--version":
        print(f"streamprep {__version__}")
        return DONE
    verb = VERBS.get(arguments[0])
    if verb is None:
        return complain(f"there is no verb {arguments[0]!r}\n\n{_overview()}", WRONG_USAGE)
    config: object = None
    try:
        config = parse(arguments[0], arguments[1:])
        then = "the same command goes on from here" if verb.resumable else "nothing is kept"
        with signals_raise_stopped(then=then):
            if wants_launching(config):
                return launch(config, arguments)
            end_with_the_launcher()
            check_spool_dir(getattr(config, "spool_dir", None))  # not a launcher's: ranks are where it must be
            module, _, function = verb.run.partition(":")
            with ends_in_time(code=STOPPED, then=then):
                return int(getattr(importlib.import_module(module), function)(config))
    except UserError as error:
        return complain(str(error), WRONG_USAGE)
    except TooManyBadSamples as error:
        return complain(str(error), TOO_MANY_BAD)
    except Stopped as error:
        return complain(str(error), STOPPED)
    except (LatentMismatch, UnitsSetAside) as error:
        return complain(str(error), SETTLED if LAUNCHER in os.environ else FAILED)
    except OutOfMemory as error:
        return complain(str(error), FAILED)
    except BrokenPipeError:  # the reader of our output, a pager say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except StoreError as error:
        return complain(str(error), NO_ANSWER if error.passing and LAUNCHER in os.environ else FAILED)
    except OSError as error:
        full = error.errno == errno.ENOSPC and (verb.resumable or _in_the_spool(config))
        then = "the same command goes on from here" if verb.resumable else "the same command will do"
        return complain(f"{error}{f'; with more room{_in_the_spool(config)}, {then}' if full else ''}", FAILED)


def _in_the_spool(config: object) -> str:
    """Where room is needed, if what is written goes to a bucket."""
    target = getattr(config, "out", None) or getattr(config, "shards", None)
    return " in the spool folder (--spool-dir)" if is_remote(target) else ""


def parse(verb: str, arguments: Sequence[str]) -> object:
    """A verb's config from its part of the command line.

    Raises:
        UserError: if ``--config`` cannot be used.
        SystemExit: for ``--help``, or with 2 after saying what is wrong.
    """
    config = VERBS[verb].config
    prog = f"streamprep {verb}"
    parsed: object = tyro.cli(config, prog=prog, args=with_file_defaults(config, arguments))
    return parsed


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        (
            "usage: streamprep VERB ... ; `streamprep VERB --help` explains one",
            "",
            *lines,
            "",
            "example: streamprep run my_dataset out --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        )
    )


def complain(message: str, code: int) -> int:
    """Say what went wrong, and in which rank; the exit code."""
    rank = os.environ.get("RANK", "0")
    who = "streamprep" if rank == "0" else f"streamprep (rank {rank})"
    print(f"{who}: {message}", file=sys.stderr)
    return code
