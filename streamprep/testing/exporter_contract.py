"""What every exporter promises, as tests: a class to derive from, whose methods pytest collects.

Each method makes samples as an encoder gives them, writes a unit of them into a folder of its own, and looks at what is
there. The last one runs the command line: pack, encode (killed before the commit, and again), verify.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from streamprep import canonical, exporting
from streamprep.crashpoints import VARIABLE
from streamprep.errors import UserError
from streamprep.job import NOT_AS_WRITTEN, UNIT_FILE, open_job
from streamprep.keys import key_of
from streamprep.record import Record
from streamprep.storage import Store, StoreError, open_store
from streamprep.tensor_members import DTYPES, cast, decode_bytes, dtype_name, same_bytes
from streamprep.testing.samples import TRAIN_FPS, make_contract, make_sample, make_samples
from streamprep.testing.stores import BucketLikeStore
from streamprep.training_batches import decode_text
from streamprep.types import EncodedSample, ShardWriter, WrittenFile, WrittenRow

UNIT = "000007"
NUM_SAMPLES, SAMPLES_PER_FILE = 5, 2
ODD_PATHS = (
    "Zo\u00eb/\u4f60\u597d (1)/\U0001f3a5",
    "a/deep/tree/of/folders/and/a/clip",
    "v1.5/with.dots/in_folders",
    "quotes '\"`$(x)\\n%00&?*[a-z]",
    "k" * 200,
    "d" * 100 + "/" + "k" * 99,
    "/".join(["f" * 60] * 3),
    "-begins-with-a-dash",
    "UPPER/case",
    "upper/case",
    "_",
)
"""Of videos, without their extension; `streamprep.keys.key_of` makes keys of them, which are ASCII."""
ODD_CAPTIONS = (
    "",
    " ",
    "Line one\nline two\r\n\ttab",
    "\u4f60\u597d \U0001f600 e\u0301",
    '"quoted" \\ {"a": 1}',
    "\x00",
    "w " * 5000,
)
COLUMNS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "score": ("float64", (0.5, None, -1e300)),
    "likes": ("int64", (1, 2**62, None)),
    "is_good": ("bool", (True, False, None)),
    "source": ("string", ("Zo\u00eb", "", None)),
    "tags": ("json", ('["a","b"]', None, "{}")),
}
_TOLERANCES = {"float32": (1e-6, 1e-7), "float16": (2.0**-10, 2.0**-24), "bfloat16": (2.0**-8, 2.0**-126)}
_OPTIONS = ("latent_dtype", "latent_format", "latent_compression")
_CLOCK_SECONDS = 2.1  # a zip's clock ticks every two seconds
_TIMEOUT_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One thing that an exporter says it can write."""

    workload: str
    posterior: str
    options: Mapping[str, str]
    """Settled: each of the exporter's ``OPTIONS``."""

    def __str__(self) -> str:
        return "-".join((self.workload, self.posterior, *self.options.values()))


class ExporterContract:
    """Derive from it in a test module; set `exporter`."""

    exporter: str
    """As ``--exporter`` takes it: ``package.module:open_shard``, or an installed one's name."""

    def stored_tensors(self, sample: EncodedSample, kind: Kind) -> Mapping[str, Tensor]:
        """What a sample's row is to hold: the values by name, and of no dtype in particular.

        By default the sample's own tensors. An exporter that stores other numbers (normalised ones, say) stores them
        under other names, because readers go by the contract, and overrides this.
        """
        return sample.tensors

    def contract(self, kind: Kind) -> dict[str, Any]:
        """The latent contract of what is written; by default that of a Wan 2.1."""
        return make_contract(kind.workload, kind.posterior).to_json()

    def streamprep(self, *arguments: object, crash_at: str | None = None) -> tuple[int, str]:
        """Run ``streamprep ARGUMENTS`` in a process of its own.

        Args:
            *arguments: Of the command line.
            crash_at: Where it dies: see `streamprep.crashpoints`.

        Returns:
            Its exit code, and what it wrote.
        """
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | (
            {VARIABLE: crash_at} if crash_at else {}
        )
        done = subprocess.run(
            [sys.executable, "-m", "streamprep", *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
        return done.returncode, done.stdout + done.stderr

    # --- what is tested

    def kinds(self) -> Iterator[Kind]:
        """Every choice of options for the first workload, and every other workload with the default ones."""
        module = exporting.open_exporter(self.exporter)
        contents = itertools.product(module.WORKLOADS, module.POSTERIORS)
        for number, (workload, posterior) in enumerate(contents):
            if workload == "text" and posterior != module.POSTERIORS[0]:
                continue  # it has none
            for options in itertools.islice(self.all_options(), None if number == 0 else 1):
                yield Kind(workload=workload, posterior=posterior, options=options)

    def all_options(self) -> Iterator[dict[str, str]]:
        """Every choice of options that go together, the default ones first."""
        module = exporting.open_exporter(self.exporter)
        for values in itertools.product(*module.OPTIONS.values()):
            try:
                yield exporting.settle_options(module, self.exporter, dict(zip(module.OPTIONS, values, strict=True)))
            except UserError:
                continue

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Give pytest the kinds that a test is run for."""
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", list(self.kinds()), ids=str)
        if "workload" in metafunc.fixturenames:
            metafunc.parametrize("workload", exporting.open_exporter(self.exporter).WORKLOADS)

    # --- what the module says

    def test_the_module_says_what_it_can_hold(self) -> None:
        module = exporting.open_exporter(self.exporter)
        folder = PurePosixPath(module.FOLDER)
        assert not folder.is_absolute() and ".." not in folder.parts and folder.parts, (
            f"FOLDER is {module.FOLDER!r}: it must be a folder in the output"
        )
        assert folder.parts[0] not in ("_streamprep", "validation") and not folder.parts[0].startswith("."), (
            f"FOLDER is {module.FOLDER!r}: that one is streamprep's own"
        )
        for what, values, able in (
            ("WORKLOADS", module.WORKLOADS, ("t2v", "i2v", "text")),
            ("POSTERIORS", module.POSTERIORS, ("mean", "moments")),
        ):
            assert isinstance(values, tuple) and values and set(values) <= set(able), (
                f"{what} is {values!r}: it must be a tuple of some of {', '.join(able)}"
            )
        for option, choices in module.OPTIONS.items():
            assert option in _OPTIONS, f"OPTIONS has {option!r}: those there are are {', '.join(_OPTIONS)}"
            assert isinstance(choices, tuple) and choices and all(isinstance(one, str) for one in choices), (
                f"OPTIONS[{option!r}] is {choices!r}: it must be a tuple of texts, the default first"
            )
        dtypes = module.OPTIONS.get("latent_dtype", (exporting.DEFAULT_DTYPE,))
        assert set(dtypes) <= set(DTYPES), f"latent_dtype is one of {dtypes}: readers know only {', '.join(DTYPES)}"
        for kind in self.kinds():
            for name in COLUMNS:
                problem = module.column_problem(name, workload=kind.workload)
                assert problem is None or isinstance(problem, str), f"column_problem gave {problem!r}"
            exporting.check_able(module, self.exporter, workload=kind.workload, posterior=kind.posterior)
            exporting.check_contract(module, self.exporter, self.contract(kind))

    def test_options_that_it_does_not_know_are_refused(self) -> None:
        module = exporting.open_exporter(self.exporter)
        asked = [{option: "nonsense"} for option in _OPTIONS]
        asked += [{"latent_dtype": dtype} for dtype in DTYPES if dtype not in module.OPTIONS.get("latent_dtype", ())]
        for options in asked:
            try:
                exporting.settle_options(module, self.exporter, options)
            except UserError:
                continue
            raise AssertionError(f"{options} is taken, though OPTIONS is {module.OPTIONS}")

    # --- what is visible, and when

    def test_nothing_is_visible_before_close(self, kind: Kind, tmp_path: Path) -> None:
        with self._open(kind, open_store(tmp_path)) as writer:
            for sample in self._samples(kind):
                writer.write(sample)
                visible = _visible(tmp_path)
                assert not visible, f"{visible} can be seen before close: write to store.new_file(), publish in close"
            written = writer.close()
            visible = _visible(tmp_path)
            assert {file.name for file in written} == set(visible), f"close gave {_names(written)}, {visible} is there"
        assert _files(tmp_path) == _visible(tmp_path), "files that are not published are left when the block is"

    def test_an_error_inside_publishes_nothing(self, kind: Kind, tmp_path: Path) -> None:
        for num_samples in range(SAMPLES_PER_FILE + 2):
            root = tmp_path / str(num_samples)
            try:
                with self._open(kind, open_store(root)) as writer:
                    for sample in self._samples(kind)[:num_samples]:
                        writer.write(sample)
                    raise KeyError("boom")
            except KeyError:
                pass
            else:
                raise AssertionError("an error inside `with` did not come out: __exit__ must not return true")
            assert not _files(root), f"after an error inside `with`, {_files(root)} is there"

    def test_leaving_without_close_publishes_nothing(self, kind: Kind, tmp_path: Path) -> None:
        with self._open(kind, open_store(tmp_path)) as writer:
            for sample in self._samples(kind):
                writer.write(sample)
        assert not _files(tmp_path), f"nobody called close, but {_files(tmp_path)} is there"

    def test_no_samples_make_no_files(self, kind: Kind, tmp_path: Path) -> None:
        written = self._write(kind, open_store(tmp_path), [])
        assert not written and not _files(tmp_path), f"of no samples it made {_names(written)}, {_files(tmp_path)}"

    def test_an_error_of_the_store_is_raised(self, kind: Kind, tmp_path: Path) -> None:
        samples = self._samples(kind)
        num_files = len(self._write(kind, open_store(tmp_path / "whole"), samples))
        assert num_files > 1, f"{len(samples)} samples, {SAMPLES_PER_FILE} a file, are in {num_files} files"
        for failing in (1, num_files):
            root = tmp_path / str(failing)
            store = BucketLikeStore(root, spool=tmp_path / "spool", failing_publish=failing)
            try:
                self._write(kind, store, samples)
            except StoreError:
                pass
            else:
                raise AssertionError("the store failed, and close did not raise that: the unit would be committed")
            for name in _files(root):  # no record names them: finalize deletes them by their names
                assert _is_of_unit(name, UNIT), f"{name} is left: finalize could never delete it"
            assert not _files(tmp_path / "spool"), f"{_files(tmp_path / 'spool')} is left in the spool"

    def test_a_bucket_will_do(self, kind: Kind, tmp_path: Path) -> None:
        samples, module = self._samples(kind), exporting.open_exporter(self.exporter)
        here = self._write(kind, open_store(tmp_path / "folder"), samples)
        bucket = BucketLikeStore(tmp_path / "bucket", spool=tmp_path / "spool")
        there = self._write(kind, bucket, samples)
        assert here == there, f"a folder got {_names(here)}, a bucket {_names(there)}, or rows that differ"
        assert _contents(tmp_path / "folder") == _contents(tmp_path / "bucket"), "a folder and a bucket got other bytes"
        ids = [id for file in there for id, _ in module.read_file(bucket, file.name)]
        assert ids == [sample.id for sample in samples], f"read_file gives {ids} from a bucket"

    # --- files

    def test_files_are_called_as_finalize_expects(self, kind: Kind, tmp_path: Path) -> None:
        folder, seen = exporting.open_exporter(self.exporter).FOLDER, list[str]()
        for unit in (UNIT, f"{UNIT}.r1"):
            for file in self._write(kind, open_store(tmp_path), self._samples(kind), unit=unit):
                assert _is_of_unit(file.name, unit), (
                    f"{file.name} is not UNIT-NNNNN-SHA256.EXTENSION of unit {unit}: finalize could never delete it "
                    "(streamprep.unit_files names files so)"
                )
                assert file.sha256[:8] in file.name, f"{file.name} does not carry its sha256, which is {file.sha256}"
                parent = PurePosixPath(file.name).parent
                assert parent == PurePosixPath(folder), f"{file.name} is not in FOLDER, {folder}"
                seen.append(file.name)
        assert len(set(seen)) == len(seen), f"two files have one name: {seen}"
        assert set(seen) == set(_files(tmp_path)), f"close gave {seen}, {_files(tmp_path)} is there"

    def test_sizes_and_digests_are_true(self, kind: Kind, tmp_path: Path) -> None:
        for file in self._write(kind, open_store(tmp_path), self._samples(kind)):
            content = (tmp_path / file.name).read_bytes()
            found = (len(content), canonical.bytes_digest(content))
            assert (file.size_bytes, file.sha256) == found, (
                f"{file.name} has (bytes, sha256) {found}, close gave {(file.size_bytes, file.sha256)}"
            )

    def test_the_same_samples_give_the_same_bytes(self, kind: Kind, tmp_path: Path) -> None:
        first = self._write(kind, open_store(tmp_path / "a"), self._samples(kind))
        again = self._write(kind, open_store(tmp_path / "b"), self._samples(kind))
        assert first == again, f"the same samples gave {_names(first)}, then {_names(again)}, or rows that differ"
        assert _contents(tmp_path / "a") == _contents(tmp_path / "b"), "the same samples gave other bytes"

    def test_bytes_do_not_depend_on_the_clock(self, tmp_path: Path) -> None:
        kind = next(self.kinds())
        first = self._write(kind, open_store(tmp_path / "a"), self._samples(kind))
        time.sleep(_CLOCK_SECONDS)
        again = self._write(kind, open_store(tmp_path / "b"), self._samples(kind))
        assert first == again, "the same samples gave other bytes a little later: there is a time in them"

    # --- rows

    def test_every_sample_is_one_row_in_order(self, kind: Kind, tmp_path: Path) -> None:
        samples = self._samples(kind)
        rows = _rows(self._write(kind, open_store(tmp_path), samples))
        keys = [row.key for _, row in rows]
        assert keys == [sample.key for sample in samples], f"rows {keys} of samples {[one.key for one in samples]}"
        for (file, row), sample in zip(rows, samples, strict=True):
            assert row.bucket == sample.bucket, f"{row.key} of {file.name} has bucket {row.bucket}, not {sample.bucket}"

    def test_a_file_has_no_more_rows_than_it_may(self, kind: Kind, tmp_path: Path) -> None:
        for most in (1, SAMPLES_PER_FILE, 100):
            written = self._write(kind, open_store(tmp_path / str(most)), self._samples(kind), samples_per_file=most)
            num_rows = [len(file.rows) for file in written]
            assert max(num_rows) <= most, f"with samples_per_file {most} files have {num_rows} rows"
            assert min(num_rows) > 0, f"with samples_per_file {most} files have {num_rows} rows: none may be empty"
            assert sum(num_rows) == NUM_SAMPLES, f"{NUM_SAMPLES} samples are {sum(num_rows)} rows"

    def test_rows_can_be_recorded(self, kind: Kind, tmp_path: Path) -> None:
        written = self._write(kind, open_store(tmp_path), self._samples(kind))
        record = Record(unit=UNIT, files=tuple(written), bad={}, dropped=(), quarantine=None, seconds={})
        try:
            back = Record.from_json(record.to_json())
        except NOT_AS_WRITTEN as error:
            raise AssertionError(f"what close gives is refused by the record: {error!r}") from error
        assert back.files == record.files, f"what close gives comes back from a record as something else: {back.files}"

    def test_every_tensor_lies_where_its_row_says(self, kind: Kind, tmp_path: Path) -> None:
        store, samples = open_store(tmp_path), self._samples(kind)
        for (file, row), sample in zip(_rows(self._write(kind, store, samples)), samples, strict=True):
            self._check_locations(kind, store, file, row, sample)

    def test_ids_and_captions_lie_where_their_rows_say(self, kind: Kind, tmp_path: Path) -> None:
        """If they say: readers that are asked for captions need it."""
        store, samples = open_store(tmp_path), self._samples(kind)
        self._check_texts(store, self._write(kind, store, samples), samples)

    def test_its_own_reader_gives_the_rows(self, kind: Kind, tmp_path: Path) -> None:
        """`verify` compares what `read_file` gives with what lies at the recorded places."""
        store, samples = open_store(tmp_path), self._samples(kind)
        written = self._write(kind, store, samples)
        self._check_reader(store, written, samples)

    def test_odd_keys_and_captions_come_through(self, kind: Kind, tmp_path: Path) -> None:
        store, module = open_store(tmp_path), exporting.open_exporter(self.exporter)
        samples = [
            self._sample(
                kind,
                number,
                key=key_of(f"{path}.mp4") + suffix,
                id=f"{path}.mp4{suffix}",
                file_name=f"{path}.mp4",
                caption=ODD_CAPTIONS[number % len(ODD_CAPTIONS)],
            )
            for number, (path, suffix) in enumerate(itertools.product(ODD_PATHS, ("", "#01@02")))
        ]
        written = self._write(kind, store, samples, samples_per_file=3)
        keys = [row.key for _, row in _rows(written)]
        assert keys == [sample.key for sample in samples], f"rows {keys} of samples {[one.key for one in samples]}"
        self._check_texts(store, written, samples)
        self._check_reader(store, written, samples)
        if hasattr(module, "read_samples"):
            self._check_samples(kind, store, written, samples)

    def test_captions_of_one_clip_are_a_row_each(self, kind: Kind, tmp_path: Path) -> None:
        store, samples = open_store(tmp_path), list[EncodedSample]()
        for clip in self._samples(kind)[:2]:
            for number, suffix in enumerate(("", "@01", "@02")):
                text = {"text_embedding": torch.full((2 + number, 8), float(number + 1))}
                names: dict[str, Any] = {
                    "key": clip.key + suffix,
                    "id": clip.id + suffix,
                    "caption": f"Number {number}.",
                }
                samples.append(replace(clip, tensors={**clip.tensors, **text}, **names))
        written = self._write(kind, store, samples)
        assert [row.key for _, row in _rows(written)] == [sample.key for sample in samples], "a caption has no row"
        for (file, row), sample in zip(_rows(written), samples, strict=True):
            self._check_locations(kind, store, file, row, sample)
        self._check_texts(store, written, samples)
        self._check_reader(store, written, samples)

    def test_tensors_of_every_dtype_are_taken(self, kind: Kind, tmp_path: Path) -> None:
        """Encoders give float32; `convert` gives what the source has."""
        for dtype in DTYPES:
            store = open_store(tmp_path / dtype)
            samples = [
                replace(one, tensors={name: cast(tensor, dtype) for name, tensor in one.tensors.items()})
                for one in self._samples(kind)
            ]
            for (file, row), sample in zip(_rows(self._write(kind, store, samples)), samples, strict=True):
                self._check_locations(kind, store, file, row, sample)

    def test_samples_are_left_as_they_are(self, kind: Kind, tmp_path: Path) -> None:
        """Rows of one clip share their tensors."""
        samples, untouched = self._samples(kind), self._samples(kind)
        self._write(kind, open_store(tmp_path), samples)
        for sample, before in zip(samples, untouched, strict=True):
            for name, tensor in before.tensors.items():
                assert same_bytes(sample.tensors[name], tensor), f"{name} of a sample was changed while it was written"

    def test_a_model_without_image_features_will_do(self, tmp_path: Path) -> None:
        """Wan 2.2's image-to-video takes no ``clip_feature``, its 5B model no ``first_frame_latent`` either."""
        for kind in [kind for kind in self.kinds() if kind.workload == "i2v"]:
            for lacks in (("clip_feature",), ("clip_feature", "first_frame_latent")):
                store = open_store(tmp_path / f"{kind}-{len(lacks)}")
                samples = [_without(sample, lacks) for sample in self._samples(kind)]
                written = self._write(kind, store, samples)
                for (file, row), sample in zip(_rows(written), samples, strict=True):
                    self._check_locations(kind, store, file, row, sample)
                self._check_reader(store, written, samples)

    def test_further_columns_are_taken(self, kind: Kind, tmp_path: Path) -> None:
        module = exporting.open_exporter(self.exporter)
        taken = [name for name in COLUMNS if module.column_problem(name, workload=kind.workload) is None]
        types = {name: COLUMNS[name][0] for name in taken}
        samples = [
            self._sample(kind, number, columns={name: COLUMNS[name][1][number] for name in taken})
            for number in range(3)
        ]
        store = open_store(tmp_path)
        written = self._write(kind, store, samples, columns=types)
        self._check_reader(store, written, samples)
        if hasattr(module, "read_samples"):
            self._check_samples(kind, store, written, samples, columns=types)

    def test_samples_come_back_as_they_were(self, kind: Kind, tmp_path: Path) -> None:
        """For `convert`; an exporter without `read_samples` cannot be its source."""
        if hasattr(exporting.open_exporter(self.exporter), "read_samples"):
            store, samples = open_store(tmp_path), self._samples(kind)
            self._check_samples(kind, store, self._write(kind, store, samples), samples)

    # --- the whole

    def test_the_command_encodes_what_verify_finds_good(self, workload: str, tmp_path: Path) -> None:
        """Killed after the first unit's files are there and before its record is; then again, to the same files."""
        module = exporting.open_exporter(self.exporter)
        num_videos, out = 3, tmp_path / "out"
        _write_dataset(tmp_path / "dataset", num_videos)
        _make_model(tmp_path / "model", workload)
        code, output = self.streamprep("pack", tmp_path / "dataset", tmp_path / "shards", "--num-workers", 1)
        assert code == 0, output
        encode = ["encode", tmp_path / "shards", out, "--model-path", tmp_path / "model", "--exporter", self.exporter]
        encode += ["--workload-type", workload, "--posterior", module.POSTERIORS[0], "--device", "cpu", "--serial"]
        encode += ["--max-height", 32, "--max-width", 48, "--num-frames", 5, "--train-fps", 8, "--encode-threads", 1]
        encode += ["--samples-per-file", 2]
        code, output = self.streamprep(*encode, crash_at="record")
        assert code != 0, f"it was to be killed before its record, but ended well:\n{output}"
        orphans = _files(out / module.FOLDER)
        assert orphans, f"it died before its first file was there:\n{output}"
        code, output = self.streamprep(*encode)
        assert code == 0, output
        records = list(open_job(open_store(out)).records())
        num_rows = sum(record.num_rows for record in records)
        assert num_rows == num_videos, f"{num_videos} videos are {num_rows} rows:\n{output}"
        named = {PurePosixPath(file.name).name for record in records for file in record.files}
        assert set(orphans) <= named, (
            f"two processes wrote the same rows in other bytes, {sorted(orphans)} and {sorted(named)}: nothing of a "
            "process, nor the order of a set, may be in a file"
        )
        code, output = self.streamprep("verify", out)
        assert code == 0, output
        assert named == set(_files(out / module.FOLDER)), f"{module.FOLDER} has files that no record names"

    # --- how

    def _sample(self, kind: Kind, number: int, **how: Any) -> EncodedSample:
        return make_sample(number, workload=kind.workload, posterior=kind.posterior, **how)

    def _samples(self, kind: Kind) -> list[EncodedSample]:
        return make_samples(NUM_SAMPLES, workload=kind.workload, posterior=kind.posterior)

    def _open(
        self,
        kind: Kind,
        store: Any,
        *,
        unit: str = UNIT,
        samples_per_file: int = SAMPLES_PER_FILE,
        columns: Mapping[str, str] | None = None,
    ) -> ShardWriter:
        writer: ShardWriter = exporting.open_exporter(self.exporter).open_shard(
            store,
            unit,
            workload=kind.workload,
            samples_per_file=samples_per_file,
            contract=self.contract(kind),
            options=kind.options,
            columns=columns or {},
        )
        return writer

    def _write(self, kind: Kind, store: Any, samples: Sequence[EncodedSample], **how: Any) -> list[WrittenFile]:
        with self._open(kind, store, **how) as writer:
            for sample in samples:
                writer.write(sample)
            return writer.close()

    def _check_locations(
        self, kind: Kind, store: Store, file: WrittenFile, row: WrittenRow, sample: EncodedSample
    ) -> None:
        expected, dtype = self.stored_tensors(sample, kind), exporting.dtype_of(kind.options)
        assert set(row.tensors) == set(expected), (
            f"{row.key} of {file.name} has the tensors {sorted(row.tensors)}, not {sorted(expected)}"
        )
        for name, tensor in expected.items():
            where, what = row.tensors[name], f"{name} of {row.key} in {file.name}"
            assert where.dtype == dtype, f"{what} is {where.dtype}, not {dtype} as the options say"
            assert where.shape == tuple(tensor.shape), f"{what} has shape {where.shape}, not {tuple(tensor.shape)}"
            try:
                data = store.read_range(file.name, where.offset, where.size)
                found = decode_bytes(data, dtype=where.dtype, shape=where.shape, codec=where.codec)
            except (EOFError, OSError, ValueError) as error:
                raise AssertionError(f"{what} is not where its row says ({where}): {error}") from error
            assert _close(found, tensor, dtype), f"{what} is not where its row says ({where}): other numbers are there"

    def _check_texts(self, store: Store, written: Sequence[WrittenFile], samples: Sequence[EncodedSample]) -> None:
        rows = _rows(written)
        names = {tuple(sorted(row.texts)) for _, row in rows}
        assert names in ({()}, {("caption", "id")}), f"rows say where {names} lie: all say it of both, or none of any"
        for (file, row), sample in zip(rows, samples, strict=True):
            for name, where in row.texts.items():
                what = f"the {name} of {row.key} in {file.name} is not where its row says ({where})"
                try:
                    data = store.read_range(file.name, where.offset, where.size)
                    found = decode_text(data, name=name, form=where.form, key=row.key)
                except (EOFError, OSError, ValueError, KeyError) as error:
                    raise AssertionError(f"{what}: {error!r}") from error
                assert found == getattr(sample, name), f"{what}: {found!r} is there"

    def _check_reader(self, store: Store, written: Sequence[WrittenFile], samples: Sequence[EncodedSample]) -> None:
        module, left = exporting.open_exporter(self.exporter), iter(samples)
        for file in written:
            read = list(module.read_file(store, file.name))
            assert len(read) == len(file.rows), f"read_file gives {len(read)} rows of {file.name}, not {len(file.rows)}"
            for row, (id, tensors) in zip(file.rows, read, strict=True):
                assert id == next(left).id, f"read_file gives the id {id!r} for {row.key}"
                for name, where in row.tensors.items():
                    assert name in tensors, f"read_file gives no {name} of {row.key}"
                    data = store.read_range(file.name, where.offset, where.size)
                    found = decode_bytes(data, dtype=where.dtype, shape=where.shape, codec=where.codec)
                    assert same_bytes(tensors[name], found), (
                        f"read_file gives another {name} of {row.key} than lies where its row says"
                    )

    def _check_samples(
        self,
        kind: Kind,
        store: Store,
        written: Sequence[WrittenFile],
        samples: Sequence[EncodedSample],
        columns: Mapping[str, str] | None = None,
    ) -> None:
        module, dtype = exporting.open_exporter(self.exporter), exporting.dtype_of(kind.options)
        how = {"workload": kind.workload, "train_fps": TRAIN_FPS, "columns": columns or {}}
        back: list[EncodedSample] = [one for file in written for one in module.read_samples(store, file, **how)]
        assert len(back) == len(samples), f"read_samples gives {len(back)} samples of {len(samples)}"
        for found, sample in zip(back, samples, strict=True):
            for field in ("key", "id", "file_name", "caption", "clip", "columns"):
                was, now = getattr(sample, field), getattr(found, field)
                assert was == now, f"read_samples gives the {field} {now!r}, it was {was!r}"
            assert set(found.tensors) == set(sample.tensors), f"read_samples gives the tensors {sorted(found.tensors)}"
            for name, tensor in sample.tensors.items():
                assert _close(found.tensors[name], tensor, dtype), f"read_samples gives another {name} of {sample.key}"


def _is_of_unit(name: str, unit: str) -> bool:
    match = UNIT_FILE.fullmatch(PurePosixPath(name).name)
    return match is not None and match["unit"] == unit


def _files(root: Path) -> list[str]:
    """All below a folder."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _visible(root: Path) -> list[str]:
    """Without those that a store has under temporary names."""
    return [name for name in _files(root) if not name.startswith(".tmp/")]


def _contents(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in _files(root)}


def _names(written: Sequence[WrittenFile]) -> list[str]:
    return [file.name for file in written]


def _rows(written: Sequence[WrittenFile]) -> list[tuple[WrittenFile, WrittenRow]]:
    return [(file, row) for file in written for row in file.rows]


def _without(sample: EncodedSample, names: Sequence[str]) -> EncodedSample:
    return replace(sample, tensors={name: one for name, one in sample.tensors.items() if name not in names})


def _close(found: Tensor, expected: Tensor, dtype: str) -> bool:
    """Whether numbers are those expected, but for what the dtype rounds."""
    relative, absolute = _TOLERANCES[dtype]
    if dtype_name(found.dtype) != dtype or found.shape != expected.shape:
        return False
    return torch.allclose(found.float(), expected.float(), rtol=relative, atol=absolute)


def _write_dataset(root: Path, num_videos: int) -> None:
    """Small videos of moving noise, each with a caption, in the merged layout."""
    import av

    (root / "videos").mkdir(parents=True)
    rows = []
    for number in range(num_videos):
        name = f"clip {number}.mp4"
        random = torch.Generator().manual_seed(number)
        picture = torch.randint(0, 256, (6, 8, 3), generator=random, dtype=torch.uint8)
        frames = picture.repeat_interleave(8, 0).repeat_interleave(8, 1)
        with av.open(str(root / "videos" / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for shift in range(8):
                shifted = frames.roll(2 * shift, 1).contiguous().numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(shifted, format="rgb24")))
            container.mux(stream.encode())
        rows.append({"path": name, "cap": f"Video {number} of Zo\u00eb."})
    (root / "videos2caption.json").write_text(json.dumps(rows))


def _make_model(folder: Path, workload: str) -> None:
    from streamprep.testing.tiny_model import make_tiny_model

    make_tiny_model(folder, variant="2.1-i2v" if workload == "i2v" else "2.1-t2v")
