"""The README cannot drift from the program: its commands parse, its tables are complete."""

import dataclasses
import re
import shlex

import pytest

from streamprep import cli, config, crashpoints, errors, plan, plugins
from streamprep.filters import black, static
from streamprep.sources import _files


@pytest.fixture(scope="module")
def readme(repo_root):
    return (repo_root / "README.md").read_text()


def test_every_streamprep_command_of_the_readme_parses(readme):
    blocks = re.findall(r"```console\n(.*?)```", readme, flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    commands = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ streamprep ")]
    assert len(commands) >= 4
    for command in commands:
        _, verb, *arguments = shlex.split(command, comments=True)
        cli.parse(verb, arguments)


def test_every_verb_is_in_the_readme(readme):
    for verb in cli.VERBS:
        assert re.search(rf"`?streamprep {verb}\b", readme) or f"`{verb}`" in readme, verb


@pytest.mark.parametrize(
    "settings", [config.PackConfig, config.PlanConfig, config.RunConfig, config.EncodeConfig, config.ConvertConfig]
)
def test_every_flag_is_in_the_readme(readme, settings):
    positional = {"dataset", "shards", "out", "source"}
    for field in dataclasses.fields(settings):
        if field.name not in positional:
            assert f"`--{field.name.replace('_', '-')}`" in readme, field.name


def test_defaults_in_the_readme_are_the_programs(readme):
    shown = dict(re.findall(r"^\| `--([a-z-]+)` \| `?([^|`]*?)`? \|", readme, flags=re.MULTILINE))
    assert len(shown) >= 20
    for field in dataclasses.fields(config.EncodeSettings):
        flag = field.name.replace("_", "-")
        if flag in shown and field.default is not dataclasses.MISSING:
            assert shown[flag] in _as_shown(field.default), flag


def _as_shown(default):
    if default in (None, ()):
        return ("none", "all")
    if isinstance(default, bool):
        return ("on",) if default else ("off",)
    return (str(default) or '""', f"{default:g}" if isinstance(default, float) else "")


def test_every_reason_is_in_the_readme(readme):
    for reason in (*errors.BAD_REASONS, *plan.DROP_REASONS):
        assert f"`{reason}`" in readme, reason


def test_every_skip_reason_is_in_the_readme_as_the_program_explains_it(readme):
    for reason, meaning in _files.SKIP_REASONS.items():
        assert f"| `{reason}` | {meaning} |" in readme, reason


def test_every_layout_is_in_the_readme(readme):
    for layout in plugins.names("streamprep.sources"):
        assert f"| `{layout}` |" in readme, layout


def test_every_exporter_is_in_the_readme(readme):
    for exporter in plugins.names("streamprep.exporters"):
        assert f"| `{exporter}` | `{plugins.load('streamprep.exporters', exporter).FOLDER}/" in readme, exporter


def test_every_filter_is_in_the_readme_with_its_defaults(readme):
    for name in plugins.names("streamprep.filters"):
        assert f"| `{name.replace('_', '-')}" in readme, name
    for module in (black, static):
        settings = ",".join(f"{name}={value:g}" for name, value in module._DEFAULTS.items())
        assert f":{settings}`" in readme
        assert f":{settings}`" in module.__doc__


def test_every_crash_point_is_named_where_it_is_documented():
    documented = crashpoints.__doc__ or ""
    assert crashpoints.VARIABLE in documented
    assert len(set(crashpoints.POINTS)) == len(crashpoints.POINTS)
