from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streamprep import plugins, sources
from streamprep.errors import UserError
from streamprep.sources import folder, list_dataset

GROUP = "streamprep.sources"

PLUGIN = """
from streamprep.sources import _files

def read_samples(tree, options):
    listing = _files.Listing(tree)
    listing.add("a.mp4", file_name="a.mp4", captions=["from a plugin"])
    return listing
"""


@pytest.fixture
def installed_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution with the source ``mine``, as pip would install it."""
    site, module = tmp_path / "site", "streamprep_test_plugin"
    metadata = site / "streamprep_test_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{module}.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: streamprep-test-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[streamprep.sources]\nmine = {module}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, module, raising=False)
    return module


def test_every_file_of_the_package_is_a_plugin() -> None:
    files = {path.stem for path in Path(sources.__path__[0]).glob("*.py") if not path.stem.startswith("_")}
    assert files <= set(plugins.names(GROUP))
    assert plugins.names(GROUP) == sorted(plugins.names(GROUP))
    assert plugins.load(GROUP, "folder") is folder


@pytest.mark.parametrize("group", plugins.GROUPS)
def test_every_plugin_has_its_groups_function(group: str) -> None:
    for name in plugins.names(group):
        assert callable(getattr(plugins.load(group, name), plugins.GROUPS[group][1]))


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no source 'nothing'; one of folder, .*merged, .*raw"):
        plugins.load(GROUP, "nothing")
    with pytest.raises(UserError, match=r"no source '_files'; one of"):
        plugins.load(GROUP, "_files")


@pytest.mark.parametrize(
    ("entry", "name", "words"),
    [
        ("folder = streamprep_test_plugin", "folder", "is called folder, as one of streamprep's own"),
        ("mine = streamprep_test_plugin:missing", "mine", "cannot load 'mine', entry point .*:missing: "),
        ("mine = not_installed", "mine", "cannot load 'mine', entry point not_installed: No module named"),
    ],
)
def test_an_entry_point_that_cannot_be_taken_is_refused(
    installed_plugin: str, tmp_path: Path, entry: str, name: str, words: str
) -> None:
    (path,) = tmp_path.glob("site/*/entry_points.txt")
    path.write_text(f"[streamprep.sources]\n{entry}\n")
    with pytest.raises(UserError, match=words):
        plugins.load(GROUP, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not_installed:read_samples", r"No module named 'not_installed'; is its folder in PYTHONPATH\?"),
        ("./mine.py:read_samples", r"cannot load './mine.py:read_samples'"),
    ],
)
def test_what_cannot_be_imported_is_said_so(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plugins.load(GROUP, name)


def test_module_and_function_name_anything_importable(make_dataset: Callable[..., Path], installed_plugin: str) -> None:
    listing = list_dataset(make_dataset("folder", {"a.mp4": ""}), f"{installed_plugin}:read_samples")
    assert [sample.captions for sample in listing.samples] == [("from a plugin",)]


@pytest.mark.parametrize("name", ["streamprep_no_such_module:f", "json:no_such_function", "json:", ":f"])
def test_what_cannot_be_imported_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"cannot load '{name}': "):
        plugins.load(GROUP, name)


def test_an_installed_plugin_is_found(make_dataset: Callable[..., Path], installed_plugin: str) -> None:
    assert "mine" in plugins.names(GROUP)
    assert plugins.load(GROUP, "mine").__name__ == installed_plugin
    listing = list_dataset(make_dataset("folder", {"a.mp4": ""}), "mine")
    assert [sample.captions for sample in listing.samples] == [("from a plugin",)]


@pytest.mark.parametrize("foreign", ["exporters/__init__.py", "exporters.py"])
def test_a_foreign_package_called_exporters_is_refused_by_its_place(
    repo_root: Path, tmp_path: Path, foreign: str
) -> None:
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).touch()
    code = "from streamprep import plugins; plugins.names('streamprep.exporters')"
    refused = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{repo_root}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 1
    found = (tmp_path / foreign).parent
    assert f"UserError: the package 'exporters' found at {found} is not streamprep's: uninstall or" in refused.stderr
