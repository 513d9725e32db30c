"""A drop-in for FastVideo's preprocessing: its command line, done by ``streamprep run``.

``torchrun ... -m streamprep.fastvideo FLAGS`` takes the flags of both of its entry points, ``v1_preprocessing_new``
(``--workload_type t2v --preprocess.dataset_path ...``) and ``v1_preprocess`` (``--data_merge_path ...``), so a script
changes by its module's name only. They become a command line of ``streamprep run``, which is shown:

1. Cut the words into flags. Dashes and underscores, ``--flag value`` and ``--flag=value`` are the same, as there.
2. Translate each: some have the same name, some another, some do nothing here and a line says why; what would give
   other latents than asked for is refused. Flags of ``streamprep run`` are taken, too.
3. Put FastVideo's defaults before them, where these decide what is encoded or dropped.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from streamprep import cli
from streamprep.config import RunConfig
from streamprep.errors import UserError
from streamprep.fastvideo_flags import HABITS, IDLE, IDLE_GROUPS, PRECISIONS, REFUSED, SAME, TASKS
from streamprep.ranks import this_rank
from streamprep.settings_file import with_file_defaults
from streamprep.sources._files import read_text
from streamprep.sources._tree import open_tree
from streamprep.storage import is_remote

PROG = "streamprep.fastvideo"
_PREFIXES = ("preprocess.", "preprocess_config.")
_LEGACY_ONLY = ("data_merge_path", "preprocess_task", "output_dir")
_SHORT = {
    "height": "max_height",
    "width": "max_width",
    "fps": "train_fps",
    "batch_size": "preprocess_video_batch_size",
    "num_workers": "dataloader_num_workers",
}
OWN = frozenset(
    {field.name for field in fields(RunConfig) if field.name not in RunConfig.POSITIONAL}
    | {f"no_{field.name}" for field in fields(RunConfig) if field.type == "bool"}
    | set(_SHORT)
)
"""Flags of ``streamprep run``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag as it was given."""

    shown: str
    """As the user wrote it."""
    name: str
    """With underscores, without FastVideo's prefix."""
    prefixed: bool
    words: tuple[str, ...]
    """What follows it."""

    def value(self) -> str:
        """Its one value."""
        if len(self.words) != 1:
            got = f"got {shlex.join(self.words)}" if self.words else "got none"
            raise UserError(f"{self.shown} takes one value, {got}: an unset variable, or a blank too many?")
        return self.words[0]

    def is_true(self) -> bool:
        """Of a switch, which FastVideo's new workflow lets follow by true or false."""
        word = self.value().lower() if self.words else "true"
        if word not in ("true", "false"):
            raise UserError(f"{self.shown} is true or false, got {word!r}")
        return word == "true"


@dataclass(slots=True)
class Translation:
    """What a command line of FastVideo's means here."""

    places: dict[str, str] = field(default_factory=dict)
    """Where it reads and writes, by FastVideo's names."""
    task: str | None = None
    workload: str | None = None
    dataset_type: str | None = None
    num_gpus: int = 1
    given: list[str] = field(default_factory=list)
    """Flags of ``streamprep run``."""
    notes: list[str] = field(default_factory=list)

    @property
    def is_legacy(self) -> bool:
        """Whether it is one of ``v1_preprocess``."""
        return self.task is not None or not self.places.keys().isdisjoint(_LEGACY_ONLY)

    def idle(self, flag: Flag, why: str) -> None:
        """A flag that does nothing."""
        self.notes.append(f"{flag.shown} does nothing here: {why}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line of FastVideo's.

    Returns:
        As ``streamprep run`` does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or any(word in ("-h", "--help") for word in words):
        sys.stdout.write(_help())
        return cli.DONE if words else cli.WRONG_USAGE
    try:
        arguments, notes = translate(words)
    except UserError as error:
        return cli.complain(str(error), cli.WRONG_USAGE)
    if this_rank().number == 0:
        for note in notes:
            sys.stderr.write(f"{note}\n")
        sys.stderr.write(f"this is: streamprep {shlex.join(arguments)}\n")
    return cli.main(arguments)


def translate(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """FastVideo's command line as one of ours.

    Returns:
        (the verb and its arguments, what a user must know).

    Raises:
        UserError: for flags that neither knows, or that ask for what is not done here.
    """
    done = Translation()
    flags = list(cut_into_flags(words))
    legacy = any(flag.name in _LEGACY_ONLY for flag in flags)
    for flag in flags:
        _translate(flag, done, legacy=legacy)
    workload = _workload(done)
    dataset, layout = _dataset(done, workload)
    given = [*_for_text(done.given), *layout] if workload == "text" else [*done.given, *layout]
    if done.workload or done.task:
        given.append(f"--workload-type={workload}")
    ours = with_file_defaults(RunConfig, [*_ranks(done), *given])  # of a TOML file first, then what was given
    said = {_said(flag) for flag in ours}
    defaults = [_as_flag(name, value) for name, value in _habits(done, workload).items() if name not in said]
    out = _output(done)
    if not any(flag.startswith("--exporter=") and flag != "--exporter=fastvideo" for flag in ours):
        done.notes.append(f"FastVideo's trainers read {out.rstrip('/')}/combined_parquet_dataset")
    return ["run", dataset, out, *defaults, *ours], done.notes


def cut_into_flags(words: Sequence[str]) -> Iterator[Flag]:
    """Flags with the words that follow each; first those in the YAML or JSON file of ``--config``.

    Raises:
        UserError: for a word before the first flag, or a file that cannot be read.
    """
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            shown, equals, value = word.partition("=")
            flags.append((shown, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise UserError(f"{word!r}: FastVideo's preprocessing takes flags only; see python -m {PROG} --help")
    cut = [_flag(shown, values) for shown, values in flags]
    files = [flag for flag in cut if flag.name == "config" and not flag.value().endswith(".toml")]  # that is ours
    for file in files:
        words_of_file = _words_of_file(Path(file.value()))
        if any(_flag(word.partition("=")[0], ()).name == "config" for word in words_of_file if word.startswith("--")):
            raise UserError(f"--config {file.value()}: it names a further file, which is not read")
        yield from cut_into_flags(words_of_file)
    yield from (flag for flag in cut if flag not in files)


def _flag(shown: str, words: Sequence[str]) -> Flag:
    name = shown.removeprefix("--").replace("-", "_").lower()
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    name = name.removeprefix(prefix).removeprefix("pipeline_config.")
    return Flag(shown=shown, name=name, prefixed=bool(prefix), words=tuple(words))


def _words_of_file(path: Path) -> list[str]:
    """A YAML or JSON file as FastVideo takes it: names with dots for what is nested."""
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"--config {path}: .yaml, .yml or .json with FastVideo's flags, or .toml with ours")
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold names with values, got a {type(values).__name__}")
    return list(_flatten(values, ""))


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"--{prefix}{name}"
            yield from map(str, value)
        elif value is not None:
            yield f"--{prefix}{name}={str(value).lower() if isinstance(value, bool) else value}"


def _translate(flag: Flag, done: Translation, *, legacy: bool) -> None:
    """Note what one flag means."""
    name = flag.name
    if name in _SPECIAL:
        _SPECIAL[name](flag, done)
    elif name == "cache_dir" and (legacy or flag.prefixed):
        done.idle(flag, "models are kept in the Hugging Face cache, see HF_HOME (ours for videos: --config job.toml)")
    elif name in SAME:
        done.given.append(_as_flag(name, flag.value()))
    elif (why := _why_idle(name)) is not None:
        done.idle(flag, why)
    elif name in REFUSED:
        raise UserError(f"{flag.shown}: {REFUSED[name]}")
    elif (name in OWN or name == "config") and not flag.prefixed:
        done.given += _own(flag)
    else:
        raise UserError(
            f"{flag.shown}: neither FastVideo's preprocessing nor streamprep has such a flag{_nearest(flag)}"
        )


def _why_idle(name: str) -> str | None:
    of_group = next((why for prefix, why in IDLE_GROUPS.items() if name.startswith(prefix)), None)
    return IDLE.get(name, of_group)


def _own(flag: Flag) -> list[str]:
    written = f"--{flag.name.replace('_', '-')}"
    if flag.name in _SWITCHES:
        return [_as_flag(flag.name, str(flag.is_true()).lower())]
    return [f"{written}={flag.words[0]}"] if len(flag.words) == 1 and flag.name != "filters" else [written, *flag.words]


def _nearest(flag: Flag) -> str:
    theirs = {*_SPECIAL, *SAME, *IDLE, *REFUSED}
    near = difflib.get_close_matches(flag.name, {*theirs, *OWN}, n=1)
    prefix = "preprocess." if flag.prefixed and near and near[0] in theirs else ""
    return f"; did you mean --{prefix}{near[0]}?" if near else f"; see python -m {PROG} --help"


def _as_flag(name: str, value: str) -> str:
    flag = name.replace("_", "-")
    if name in _SWITCHES:
        return f"--{flag}" if value == "true" else f"--no-{flag}"
    return f"--{flag}={value}"


_SWITCHES = frozenset(field.name for field in fields(RunConfig) if field.type == "bool")


# --- flags of another name or meaning


def _place(flag: Flag, done: Translation) -> None:
    if not flag.value().strip():
        raise UserError(f"{flag.shown} is empty: an unset variable?")
    done.places[flag.name] = flag.value()


def _take_model(flag: Flag, done: Translation) -> None:
    place = 0 if flag.prefixed else len(done.given)  # where both are given, FastVideo heeds the one without the prefix
    done.given.insert(place, f"--model-path={flag.value()}")


def _take_task(flag: Flag, done: Translation) -> None:
    done.task = flag.value()
    if done.task not in TASKS:
        raise UserError(
            f"{flag.shown} {done.task}: only {', '.join(TASKS)} are made here; trajectories and game data need the "
            "transformer or inputs of their own: use FastVideo's own preprocessing for them"
        )


def _take_workload(flag: Flag, done: Translation) -> None:
    done.workload = flag.value().lower()
    if done.workload not in TASKS.values():
        raise UserError(
            f"{flag.shown} {flag.value()}: FastVideo preprocesses t2v and i2v, and so does this (and text: captions "
            "alone)"
        )


def _take_dataset_type(flag: Flag, done: Translation) -> None:
    done.dataset_type = flag.value().lower()


def _take_loader(flag: Flag, done: Translation) -> None:
    loader = flag.value().lower()
    if loader == "torchvision":
        done.notes.append(
            f"{flag.shown} torchvision: torchcodec decodes instead, frame by frame; torchvision decodes whole videos, "
            "and in its newer versions none"
        )
        loader = "torchcodec"
    done.given.append(f"--video-loader-type={loader}")


def _take_audio(flag: Flag, done: Translation) -> None:
    if flag.is_true():
        raise UserError(f"{flag.shown}: audio is not encoded here; leave it out, or use FastVideo's own preprocessing")


def _take_temporal_sample(flag: Flag, done: Translation) -> None:
    done.given.append(_as_flag("do_temporal_sample", str(flag.is_true()).lower()))


def _take_num_gpus(flag: Flag, done: Translation) -> None:
    if not flag.value().isdecimal() or int(flag.value()) < 1:
        raise UserError(f"{flag.shown} must be a number from 1, got {flag.value()!r}")
    done.num_gpus = int(flag.value())
    if this_rank().launched:
        done.idle(flag, "the launcher says how many ranks there are")


def _take_vae_precision(flag: Flag, done: Translation) -> None:
    done.given.append(f"--vae-dtype={_dtype(flag)}")


def _take_text_precision(flag: Flag, done: Translation) -> None:
    done.given.append(f"--text-dtype={_dtype(flag)}")


def _dtype(flag: Flag) -> str:
    word = re.sub(r"[\[\]()'\", ]", "", flag.value())  # ("fp32",) is one for each text encoder
    if word not in PRECISIONS:
        raise UserError(f"{flag.shown} {flag.value()}: use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[word]


def _take_text_offload(flag: Flag, done: Translation) -> None:
    done.given.append(_as_flag("offload_text_encoder", str(flag.is_true()).lower()))


_SPECIAL: Mapping[str, Callable[[Flag, Translation], None]] = {
    "model_path": _take_model,
    "dataset_path": _place,
    "dataset_output_dir": _place,
    "data_merge_path": _place,
    "output_dir": _place,
    "preprocess_task": _take_task,
    "workload_type": _take_workload,
    "dataset_type": _take_dataset_type,
    "video_loader_type": _take_loader,
    "with_audio": _take_audio,
    "do_temporal_sample": _take_temporal_sample,
    "num_gpus": _take_num_gpus,
    "vae_precision": _take_vae_precision,
    "text_encoder_precisions": _take_text_precision,
    "text_encoder_cpu_offload": _take_text_offload,
}


# --- what they say together


def _workload(done: Translation) -> str:
    from_task = TASKS[done.task] if done.task else None
    if from_task and done.workload and from_task != done.workload:
        raise UserError(f"--preprocess_task {done.task} and --workload_type {done.workload} contradict each other")
    return from_task or done.workload or "t2v"


def _ranks(done: Translation) -> list[str]:
    asked = any(flag.startswith("--nproc") for flag in done.given)
    return [] if done.num_gpus == 1 or asked or this_rank().launched else [f"--nproc={done.num_gpus}"]


def _output(done: Translation) -> str:
    places = done.places
    if "output_dir" in places and "dataset_output_dir" in places:
        raise UserError("--output_dir and --preprocess.dataset_output_dir name two outputs: leave one out")
    if done.is_legacy and not {"output_dir", "dataset_output_dir"} & places.keys():
        raise UserError("--output_dir is missing: where the latents go")
    return places.get("output_dir") or places.get("dataset_output_dir") or "./output"


def _habits(done: Translation, workload: str) -> dict[str, str]:
    """FastVideo's defaults, of this entry point."""
    habits = {**HABITS, "workload_type": workload}
    if done.dataset_type is None and "data_merge_path" not in done.places:
        habits["dataset_type"] = "auto" if workload == "text" else "hf"
    if done.is_legacy and workload != "text":
        habits["caption"] = "random"  # of a list; ours by seed and key
    return habits


def _said(flag: str) -> str:
    """The setting that a flag of ours is about."""
    name = flag.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
    return _SHORT.get(name, name)


def _for_text(given: Sequence[str]) -> list[str]:
    """Where there are captions only, FastVideo's batch is one of captions."""
    of_videos, of_captions = "--preprocess-video-batch-size=", "--text-batch-size="
    return [flag.replace(of_videos, of_captions) if flag.startswith(of_videos) else flag for flag in given]


def _dataset(done: Translation, workload: str) -> tuple[str, list[str]]:
    """(what is packed, the flags that say how it is laid out)."""
    places, kind = done.places, done.dataset_type
    if "data_merge_path" in places and "dataset_path" in places:
        raise UserError("--data_merge_path and --preprocess.dataset_path name two datasets: leave one out")
    if "data_merge_path" in places:
        path = places["data_merge_path"]
        if workload == "text":
            return path, ["--dataset-type=prompts"]
        videos, annotations = read_merge_file(path)
        return videos, ["--dataset-type=merged", f"--annotations={annotations}"]
    if "dataset_path" not in places:
        missing = "--data_merge_path" if done.is_legacy else "--preprocess.dataset_path"
        raise UserError(f"{missing} is missing: which dataset?")
    path = places["dataset_path"]
    videos_folder = Path(path) / "videos"
    if kind == "merged" and not is_remote(path) and videos_folder.is_symlink():  # as its script for Mixkit makes one
        annotations = str(Path(path) / "videos2caption.json")
        return str(videos_folder), ["--dataset-type=merged", f"--annotations={annotations}"]
    return path, [f"--dataset-type={kind}"] if kind else []


def read_merge_file(path: str) -> tuple[str, str]:
    """What a ``merge.txt`` says: one line, ``FOLDER_OF_VIDEOS,ANNOTATIONS.json``.

    Its paths are those of the folder where the command is given, as for FastVideo, or else of the file's own.

    Args:
        path: Of the file, or its URL.

    Returns:
        (the folder, the JSON file).

    Raises:
        UserError: if it is missing or says something else.
    """
    tree = open_tree(path)
    if tree.file is None:
        raise UserError(f"--data_merge_path {path}: there is no such file")
    lines = [line.strip() for line in read_text(tree, tree.file).splitlines() if line.strip()]
    if len(lines) != 1 or lines[0].count(",") != 1:
        raise UserError(
            f"{path} must hold one line, FOLDER_OF_VIDEOS,ANNOTATIONS.json, got {len(lines)}, the first "
            f"{lines[0] if lines else '(none)'!r:.200}; prompts without videos are --preprocess_task text_only; of "
            "several datasets, run one after the other, each into an output of its own"
        )
    videos, annotations = (place.strip() for place in lines[0].split(","))
    return _beside(path, videos), _beside(path, annotations)


def _beside(path: str, place: str) -> str:
    if is_remote(place) or Path(place).is_absolute() or (not is_remote(path) and Path(place).exists()):
        return place
    if is_remote(path):
        return f"{path.rpartition('/')[0]}/{place}"
    other = Path(path).parent / place
    return str(other) if other.exists() else place


def _help() -> str:
    idle = ", ".join(f"--{name}" for name in sorted(IDLE))
    groups = ", ".join(f"--{prefix}..." for prefix in IDLE_GROUPS)
    return f"""\
usage: torchrun --nproc-per-node N -m {PROG} FLAGS
       python -m {PROG} FLAGS

FastVideo's preprocessing, done by `streamprep run`: FLAGS are those of its v1_preprocessing_new
(--model_path --workload_type --preprocess.dataset_path --preprocess.dataset_type --preprocess.dataset_output_dir
--preprocess.max_height ...) or of its v1_preprocess (--model_path --preprocess_task --data_merge_path --output_dir
--max_height ...), with dashes or underscores. FastVideo's defaults hold: {_shown(HABITS)}.

Flags of `streamprep run` are taken, too: --shards, --validation-split, --where, --filters, --device, ...; see
`streamprep run --help`. Running the same command again goes on where it was stopped.

These do nothing here, and a line says why: {idle}, {groups}

example: torchrun --nproc-per-node 8 -m {PROG} --model_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --workload_type t2v \\
    --preprocess.dataset_type merged --preprocess.dataset_path data/crush-smol \\
    --preprocess.dataset_output_dir data/crush-smol_processed --preprocess.num_frames 77 --preprocess.train_fps 16
"""


def _shown(habits: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in habits.items())


if __name__ == "__main__":
    sys.exit(main())
