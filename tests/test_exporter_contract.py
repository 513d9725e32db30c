"""Does `ExporterContract` notice what can be wrong with an exporter? Each of its tests does, with its own words.

`moments_exporter`, which keeps the contract (`tests/exporters/test_every_exporter.py`), is made wrong in one way after
the other.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch._inductor.test_operators  # noqa: F401 - twice is an error, and pytester forgets what a run has imported

from streamprep.testing import ExporterContract

pytest_plugins = ["pytester"]

PREAMBLE = """
import time, uuid
from dataclasses import replace
from {base} import *
import {base} as right

class Wrong(right.{writer}):
    def __init__(self, *arguments, **how):
        super().__init__(*arguments, **how)
        self.store = arguments[0]

def open_shard(store, name, **how):
    return Wrong({arguments})

def change(self, **of_location):
    files = super(Wrong, self).close()
    def changed(row):
        def moved(place):
            return replace(place, **{{what: of(place) for what, of in of_location.items()}})
        return replace(row, tensors={{name: moved(place) for name, place in row.tensors.items()}})
    return [replace(file, rows=tuple(map(changed, file.rows))) for file in files]
"""
MOMENTS = PREAMBLE.format(
    base="moments_exporter", writer="MomentsWriter", arguments="store, name, how['samples_per_file']"
)
FASTVIDEO = "from exporters.fastvideo import *\nimport exporters.fastvideo as right\nfrom dataclasses import replace\n"

TEXTS = (
    FASTVIDEO
    + """
class Wrong(right.FastVideoWriter):
    def close(self):
        return [replace(file, rows=tuple(map(change, file.rows))) for file in super().close()]

def open_shard(*arguments, **how):
    writer = right.open_shard(*arguments, **how)
    writer.__class__ = Wrong
    return writer

def change(row):
    return replace(row, texts=CHANGED)
"""
)


def of_writer(code: str) -> str:
    """A mutant whose writer has another method."""
    body = "\n".join(f"    {line}" for line in code.strip().splitlines())
    head, _, tail = MOMENTS.partition("\ndef open_shard")
    return f"{head}\n{body}\n\ndef open_shard{tail}"


MUTANTS = [
    # --- what the module says
    ("the_module_says_what_it_can_hold", "that one is streamprep's own", MOMENTS + "FOLDER = '_streamprep/records'"),
    ("the_module_says_what_it_can_hold", "must be a folder in the output", MOMENTS + "FOLDER = '../mine'"),
    ("the_module_says_what_it_can_hold", "must be a tuple of texts", MOMENTS + "OPTIONS = {'latent_dtype': 'float32'}"),
    ("the_module_says_what_it_can_hold", "readers know only", MOMENTS + "OPTIONS = {'latent_dtype': ('float64',)}"),
    ("the_module_says_what_it_can_hold", "must be a tuple of some of", MOMENTS + "WORKLOADS = ('t2v', 'v2v')"),
    (
        "the_module_says_what_it_can_hold",
        "cannot hold these: never",
        MOMENTS + "def contract_problem(contract):\n    return 'never'",
    ),
    (
        "options_that_it_does_not_know_are_refused",
        "is taken, though OPTIONS is",
        MOMENTS + "OPTIONS = {'latent_dtype': ('float32', 'nonsense')}",
    ),
    # --- what is visible, and when
    (
        "nothing_is_visible_before_close",
        "can be seen before close",
        of_writer("def write(self, sample):\n    self.store.put(f'{FOLDER}/early.bin', b'', step='data')"),
    ),
    (
        "nothing_is_visible_before_close",
        "close gave .* is there",
        of_writer("def close(self):\n    return super().close()[1:]"),
    ),
    (
        "nothing_is_visible_before_close",
        "files that are not published are left",
        of_writer("def __exit__(self, *_):\n    self.store.new_file().__enter__()"),
    ),
    (
        "an_error_inside_publishes_nothing",
        "after an error inside",
        of_writer("def __exit__(self, *_):\n    self.close()"),
    ),
    (
        "an_error_inside_publishes_nothing",
        "__exit__ must not return true",
        of_writer("def __exit__(self, *error):\n    super().__exit__(*error)\n    return True"),
    ),
    (
        "leaving_without_close_publishes_nothing",
        "nobody called close",
        of_writer("def __exit__(self, *error):\n    self.close() if error[0] is None else super().__exit__(*error)"),
    ),
    (
        "no_samples_make_no_files",
        "of no samples it made",
        of_writer("def close(self):\n    self._finish_file()\n    return self._files.publish()"),
    ),
    (
        "an_error_of_the_store_is_raised",
        "close did not raise that",
        of_writer("def close(self):\n    try:\n        return super().close()\n    except OSError:\n        return []"),
    ),
    (
        "an_error_of_the_store_is_raised",
        "could never delete it",
        of_writer(
            "def close(self):\n    self.store.put(f'{FOLDER}/notes.txt', b'', step='data')\n    return super().close()"
        ),
    ),
    (
        "a_bucket_will_do",
        "unsupported operand",
        of_writer(
            "def close(self):\n    (self.store.local_path() / FOLDER).mkdir(exist_ok=True)\n    return super().close()"
        ),
    ),
    (
        "a_bucket_will_do",
        "a folder and a bucket got other bytes|rows that differ",
        of_writer(
            "def write(self, sample):\n"
            "    super().write(sample if self.store.local_path() else replace(sample, id='other'))"
        ),
    ),
    # --- files
    (
        "files_are_called_as_finalize_expects",
        "could never delete it",
        MOMENTS
        + "def open_shard(store, name, **how):\n    return Wrong(store, f'part-{name}', how['samples_per_file'])",
    ),
    (
        "files_are_called_as_finalize_expects",
        "is not in FOLDER",
        MOMENTS + "FOLDER = 'other'",
    ),
    (
        "files_are_called_as_finalize_expects",
        "does not carry its sha256",
        of_writer("def close(self):\n    return [replace(file, sha256='0' * 64) for file in super().close()]"),
    ),
    (
        "sizes_and_digests_are_true",
        "close gave",
        of_writer("def close(self):\n    return [replace(file, size_bytes=1) for file in super().close()]"),
    ),
    (
        "the_same_samples_give_the_same_bytes",
        "the same samples gave",
        of_writer("def write(self, sample):\n    super().write(replace(sample, id=uuid.uuid4().hex))"),
    ),
    (
        "bytes_do_not_depend_on_the_clock",
        "there is a time in them",
        of_writer("def write(self, sample):\n    super().write(replace(sample, id=str(int(time.time() / 2))))"),
    ),
    # --- rows
    (
        "every_sample_is_one_row_in_order",
        "rows .* of samples",
        of_writer("def write(self, sample):\n    self._samples.insert(0, sample)"),
    ),
    (
        "every_sample_is_one_row_in_order",
        "rows .* of samples",
        of_writer("def write(self, sample):\n    super().write(sample)\n    super().write(sample)"),
    ),
    (
        "every_sample_is_one_row_in_order",
        "has bucket all",
        of_writer(
            "def close(self):\n"
            "    return [replace(f, rows=tuple(replace(r, bucket='all') for r in f.rows)) for f in super().close()]"
        ),
    ),
    (
        "a_file_has_no_more_rows_than_it_may",
        "files have",
        of_writer("def write(self, sample):\n    self._samples.append(sample)"),
    ),
    (
        "rows_can_be_recorded",
        "refused by the record",
        of_writer("def close(self):\n    return change(self, offset=lambda one: -one.offset)"),
    ),
    (
        "rows_can_be_recorded",
        "comes back",
        of_writer("def close(self):\n    return change(self, shape=lambda one: list(one.shape))"),
    ),
    (
        "every_tensor_lies_where_its_row_says",
        "is not where its row says .* other numbers are there",
        of_writer("def close(self):\n    return change(self, offset=lambda one: one.offset - 4)"),
    ),
    (
        "every_tensor_lies_where_its_row_says",
        "is not where its row says",
        of_writer("def close(self):\n    return change(self, size=lambda one: 10**9)"),
    ),
    (
        "every_tensor_lies_where_its_row_says",
        "has shape",
        of_writer("def close(self):\n    return change(self, shape=lambda one: one.shape[::-1])"),
    ),
    (
        "every_tensor_lies_where_its_row_says",
        "not float32 as the options say",
        of_writer("def close(self):\n    return change(self, dtype=lambda one: 'float16')"),
    ),
    (
        "every_tensor_lies_where_its_row_says",
        "other numbers are there",
        of_writer(
            "def write(self, sample):\n"
            "    super().write(replace(sample, tensors={n: t.half() for n, t in sample.tensors.items()}))"
        ),
    ),
    (
        "every_tensor_lies_where_its_row_says",
        r"has the tensors \[.*\], not",
        of_writer(
            "def write(self, sample):\n"
            "    super().write(replace(sample, tensors={'vae_latent': sample.tensors['vae_latent']}))"
        ),
    ),
    (
        "ids_and_captions_lie_where_their_rows_say",
        "of both, or none of any",
        TEXTS.replace("CHANGED", "{'id': row.texts['id']}"),
    ),
    (
        "ids_and_captions_lie_where_their_rows_say",
        "is not where its row says .* is there",
        TEXTS.replace("CHANGED", "{'id': row.texts['caption'], 'caption': row.texts['id']}"),
    ),
    (
        "ids_and_captions_lie_where_their_rows_say",
        "is not where its row says .*Error",
        TEXTS.replace("CHANGED", "{name: replace(where, form='json') for name, where in row.texts.items()}"),
    ),
    (
        "its_own_reader_gives_the_rows",
        "gives the id",
        MOMENTS + "def read_file(store, name):\n    yield from reversed(list(right.read_file(store, name)))",
    ),
    (
        "its_own_reader_gives_the_rows",
        "rows of .*, not",
        MOMENTS + "def read_file(store, name):\n    yield next(right.read_file(store, name))",
    ),
    (
        "its_own_reader_gives_the_rows",
        "gives another",
        MOMENTS + "def read_file(store, name):\n"
        "    yield from ((id, {n: -t for n, t in tensors.items()}) for id, tensors in right.read_file(store, name))",
    ),
    (
        "odd_keys_and_captions_come_through",
        "gives the id .*'Zo\\?",
        of_writer(
            "def write(self, sample):\n"
            "    super().write(replace(sample, id=sample.id.encode('ascii', 'replace').decode()))"
        ),
    ),
    (
        "odd_keys_and_captions_come_through",
        "rows .* of samples",
        of_writer("def write(self, sample):\n    super().write(replace(sample, key=sample.key.lower()))"),
    ),
    (
        "odd_keys_and_captions_come_through",
        "gives the caption",
        FASTVIDEO + "def read_samples(*arguments, **how):\n"
        "    yield from (replace(s, caption=s.caption.strip()) for s in right.read_samples(*arguments, **how))",
    ),
    (
        "captions_of_one_clip_are_a_row_each",
        "a caption has no row",
        of_writer("def write(self, sample):\n    '@' in sample.key or super().write(sample)"),
    ),
    (
        "tensors_of_every_dtype_are_taken",
        "BFloat16",
        of_writer(
            "def write(self, sample):\n    super().write(sample)\n    [t.numpy() for t in sample.tensors.values()]"
        ),
    ),
    (
        "samples_are_left_as_they_are",
        "was changed while it was written",
        of_writer("def write(self, sample):\n    super().write(sample)\n    sample.tensors['vae_latent'].mul_(2)"),
    ),
    (
        "a_model_without_image_features_will_do",
        "clip_feature",
        MOMENTS + "def open_shard(store, name, *, workload, **how):\n"
        "    writer = Wrong(store, name, how['samples_per_file'])\n"
        "    if workload == 'i2v':\n"
        "        write = writer.write\n"
        "        writer.write = lambda sample: (sample.tensors['clip_feature'], write(sample))\n"
        "    return writer",
    ),
    (
        "further_columns_are_taken",
        "gives the columns",
        FASTVIDEO + "def read_samples(*arguments, **how):\n"
        "    yield from (replace(s, columns={}) for s in right.read_samples(*arguments, **how))",
    ),
    (
        "samples_come_back_as_they_were",
        "gives the clip",
        FASTVIDEO + "def read_samples(*arguments, **how):\n"
        "    yield from (replace(s, clip=s.clip and replace(s.clip, source_fps=16.0))"
        " for s in right.read_samples(*arguments, **how))\nWORKLOADS = ('t2v', 'i2v')",
    ),
    # --- the whole
    (
        "the_command_encodes_what_verify_finds_good",
        "the exporter wrong:open_shard has a mistake: what it says of the files of unit 000000 could not be read back",
        of_writer("def close(self):\n    return change(self, offset=lambda one: -one.offset)")
        + "\nWORKLOADS = ('t2v',)",
    ),
    (
        "the_command_encodes_what_verify_finds_good",
        "two processes wrote the same rows in other bytes",
        FASTVIDEO + "import os\ndef open_shard(*arguments, contract, **how):\n"
        "    return right.open_shard(*arguments, contract={**contract, 'pid': os.getpid()}, **how)\n"
        "WORKLOADS = ('t2v',)",
    ),
]
TESTS = {name.removeprefix("test_") for name in vars(ExporterContract) if name.startswith("test_")}


@pytest.mark.parametrize(
    ("test", "message", "code"),
    [
        pytest.param(*mutant, id=f"{mutant[0]}-{number}", marks=[pytest.mark.slow] if "command" in mutant[0] else [])
        for number, mutant in enumerate(MUTANTS)
    ],
)
def test_a_wrong_exporter_is_caught_by_the_right_test(
    test: str, message: str, code: str, pytester: pytest.Pytester
) -> None:
    """In all kinds of rows that it writes."""
    pytester.makepyfile(
        wrong=code,
        test_wrong="""
        from streamprep.testing import ExporterContract

        class TestWrong(ExporterContract):
            exporter = "wrong:open_shard"
        """,
    )
    run = pytester.inline_run("-p", "no:cacheprovider", "-k", f"test_{test}")
    passed, _, failed = run.listoutcomes()
    assert failed and not passed
    for report in failed:
        said = report.longrepr.reprcrash.message  # type: ignore[union-attr]
        assert re.search(message, said, flags=re.DOTALL), said


def test_every_test_of_the_contract_catches_something() -> None:
    assert {test for test, _, _ in MUTANTS} == TESTS
    assert len(TESTS) >= 20


def test_the_exporter_of_the_readme_keeps_the_contract(repo_root: Path, pytester: pytest.Pytester) -> None:
    readme = (repo_root / "README.md").read_text()
    blocks = dict(re.findall(r"```python\n# (\w+)\.py.*?\n(.*?)```", readme, flags=re.DOTALL))
    assert set(blocks) == {"my_exporter", "test_my_exporter"}
    pytester.makepyfile(**blocks)
    run = pytester.inline_run("-p", "no:cacheprovider", "-k", "not command")
    passed, skipped, failed = map(len, run.listoutcomes())
    assert (skipped, failed) == (0, 0) and passed > 30


def test_it_can_be_imported_without_pytest() -> None:
    code = "import sys; from streamprep.testing import ExporterContract as _; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
