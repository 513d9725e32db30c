"""`streamprep verify` of a bucket: copies in the spool, whose trouble it is, and which object to delete."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import HfApi
from jobs import FLAGS
from object_stores import Faulty, NewBucket
from servers import Server
from servers.faults import Answer

from streamprep import canonical, job
from streamprep.cli import main
from streamprep.job import open_job
from streamprep.storage import NamedFile, NotWhole, SpoolError, Store, open_spool, open_store, whole_file
from streamprep.verify import verify_job

if TYPE_CHECKING:
    from forks import Forks
    from jobs import EncodeJob

pytest_plugins = ["jobs", "object_stores"]


@pytest.fixture
def out(undisturbed: Callable[[Path], EncodeJob], shards: Path, moto_server: Server, new_bucket: NewBucket) -> Store:
    """A finished job in a bucket."""
    here, there = undisturbed(shards).job.store, open_store(f"{new_bucket(moto_server)}/out")
    for entry in here.walk():
        if not entry.path.startswith(job.NO_RESULT):
            there.put(entry.path, here.read(entry.path), step="data")
    return there


def file_of(out: Store, unit: str) -> str:
    record = open_job(out).record(unit)
    assert record is not None
    return record.files[0].name


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_copies_go_to_the_spool_that_is_asked_for(
    out: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They went to the folder for temporary files, whatever --spool-dir said."""
    (tmp_path / "no-folder").write_bytes(b"")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no-folder"))
    assert main(["verify", out.url, "--spool-dir", str(tmp_path / "spool")]) == 0
    assert capsys.readouterr().out.endswith(": 0 problems\n")
    assert (tmp_path / "spool").is_dir() and not files_in(tmp_path / "spool")


def test_no_room_for_a_copy_is_this_machines_trouble(
    out: Store, mount_small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Files were called UNREAD, and the bucket one that does not give what is asked of it."""
    disk = mount_small_disk(1)
    (disk / "filler").write_bytes(bytes(2**20 - 4096))
    assert main(["verify", out.url, "--spool-dir", str(disk)]) == 1
    said = capsys.readouterr()
    assert f"no copy of {out.url}/{file_of(out, '000000')} can be kept here: only 4.1 kB are free" in said.err
    assert "with more room in the spool folder (--spool-dir), the same command will do" in said.err
    assert "UNREAD" not in said.out and "WRONG" not in said.out


def test_so_is_a_copy_that_cannot_be_written_to_its_end(
    out: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert main(["verify", out.url, "--spool-dir", str(tmp_path / "spool")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr()
    assert "can be kept here: File too large" in said.err
    assert "UNREAD" not in said.out and "WRONG" not in said.out
    assert not files_in(tmp_path / "spool")


def test_so_is_a_spool_that_cannot_be(out: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SpoolError, match="can be kept here: a file stands where a folder is needed"):
        verify_job(open_job(out), spool=open_spool(str(tmp_path / "file")))


@pytest.mark.slow
def test_what_the_bucket_does_not_give_is_unread_as_ever(
    out: Store, moto_server: Server, faulty: Faulty, capsys: pytest.CaptureFixture[str]
) -> None:
    name = file_of(out, "000000")
    _, proxy = faulty(moto_server)
    proxy.inject(f"^GET .*{name}", Answer(403))
    assert main(["verify", out.url]) == 1
    output = capsys.readouterr().out
    assert f"UNREAD {out.url}/{name}: it was refused" in output
    assert "WRONG" not in output and "delete" not in output


def test_an_object_to_delete_is_named_in_full(out: Store, capsys: pytest.CaptureFixture[str]) -> None:
    name = file_of(out, "000001")
    out.put(name, out.read(name)[:-1], step="data")
    record = f"{out.url}/{job.RECORDS}/000001.json"
    assert main(["verify", out.url]) == 1
    *_, advice, path = capsys.readouterr().out.splitlines()
    assert advice == "to mend what is wrong, delete what follows, then run the same `streamprep encode` again:"
    assert path == f"  {record} (aws s3 rm {record})"
    out.put(f"{job.RECORDS}/000001.json", b"junk", step="record")
    assert main(["status", out.url]) == 2
    assert f"{record}: cannot be read: " in (said := capsys.readouterr().err)
    assert f"; delete {record} (aws s3 rm {record}), then run the same `streamprep encode` again" in said


def test_a_copy_is_whole_and_does_not_stay(out: Store, tmp_path: Path) -> None:
    name = file_of(out, "000000")
    data, spool = out.read(name), open_spool(str(tmp_path))
    with whole_file(out, NamedFile(name, canonical.bytes_digest(data)), scratch=spool) as (store, here):
        assert store.read(here) == data
        assert [path.name for path in files_in(tmp_path)] == [here]
    assert not files_in(tmp_path)
    with (
        pytest.raises(NotWhole, match=r"is damaged: its sha256 is [0-9a-f]{64}, the record says 0a;"),
        whole_file(out, NamedFile(name, "0a"), scratch=spool),
    ):
        pass
    assert not files_in(tmp_path)
    with pytest.raises(FileNotFoundError), whole_file(out, NamedFile("no such file", "0a"), scratch=spool):
        pass


def test_trouble_of_who_works_with_a_copy_keeps_its_name(out: Store, tmp_path: Path) -> None:
    name = file_of(out, "000000")
    file = NamedFile(name, canonical.bytes_digest(out.read(name)))
    with pytest.raises(OSError, match="mine") as raised, whole_file(out, file, scratch=open_spool(str(tmp_path))):
        raise OSError("mine")
    assert not isinstance(raised.value, SpoolError)


@pytest.mark.slow
def test_embeddings_lost_on_the_hub_are_written_and_published_again(
    undisturbed: Callable[[Path], EncodeJob],
    shards: Path,
    model: Path,
    forks: Forks,
    fake_hf_server: Server,
    new_bucket: NewBucket,
    tmp_path: Path,
) -> None:
    """And verify leaves nothing there that would have to be published."""
    url, whole = new_bucket(fake_hf_server), undisturbed(shards)
    environment = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    environment |= {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "caches")}
    current = whole.job
    assert current.plan.unconditional is not None
    HfApi().upload_folder(
        repo_id=url.removeprefix("hf://datasets/"),
        repo_type="dataset",
        folder_path=whole.out,
        path_in_repo="out",
        ignore_patterns=[f"{folder}/*" for folder in job.NO_RESULT] + [current.plan.unconditional],
    )
    found = forks.run("verify", f"{url}/out", environment=environment)
    assert found.code == 1 and f"WRONG {current.plan.unconditional}: missing" in found.output
    assert not list(tmp_path.rglob("base.json"))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    command = ("encode", shards, f"{url}/out", "--model-path", model, "--serial", *flags)
    assert (done := forks.run(*command, environment=environment)).code == 0, done.output
    assert not list(tmp_path.rglob("base.json"))
    found = forks.run("verify", f"{url}/out", environment=environment)
    assert found.code == 0 and found.output.endswith(": 0 problems\n"), found.output
