"""Finding sources, filters, encoders and exporters by name.

Ours are files of a package (``streamprep/sources/merged.py`` is the source ``merged``); other distributions add theirs
by an entry point of the group of that package's name; and ``package.module:function`` names anything importable, with
what else its module says of itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from streamprep.errors import UserError

GROUPS = {
    "streamprep.sources": ("streamprep.sources", "read_samples"),
    "streamprep.filters": ("streamprep.filters", "make_filter"),
    "streamprep.encoders": ("streamprep.encoders", "load_encoder"),
    "streamprep.exporters": ("exporters", "open_shard"),
}
"""Entry-point group -> the package with ours, and the function a plugin's module must have."""


def names(group: str) -> list[str]:
    """What can be loaded by a bare name."""
    package, _ = GROUPS[group]
    return sorted({*_names_of_ours(package), *(point.name for point in entry_points(group=group))})


def _names_of_ours(package: str) -> list[str]:
    found = pkgutil.iter_modules(_import_ours(package).__path__)
    return [info.name for info in found if not info.name.startswith("_")]


def load(group: str, name: str) -> Any:
    """A plugin: its module, or anything else that has the group's function.

    Raises:
        UserError: if there is no such plugin, with those there are.
    """
    package, function = GROUPS[group]
    if ":" in name:
        module, attribute = _import_attribute(name)
        return SimpleNamespace(**vars(module) | {function: attribute})
    package_names = _names_of_ours(package)
    others = [point for point in entry_points(group=group) if point.name == name]
    if name in package_names and others:
        raise UserError(
            f"{others[0].value} (entry point of {group}) is called {name}, as one of streamprep's own: give it another "
            "name"
        )
    if name not in names(group):
        raise UserError(f"no {group.rpartition('.')[2].removesuffix('s')} {name!r}; one of {', '.join(names(group))}")
    for point in others:
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise UserError(f"cannot load {name!r}, entry point {point.value}: {error}") from error
    return importlib.import_module(f"{package}.{name}")


def _import_attribute(name: str) -> tuple[ModuleType, Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        return module, getattr(module, attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"cannot load {name!r}: {error}; is its folder in PYTHONPATH?") from error
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"cannot load {name!r}: {error}") from error


def _import_ours(package: str) -> ModuleType:
    """Import one of our plugin packages, and make sure that it is ours: others on PyPI have the name ``exporters``."""
    module = importlib.import_module(package)
    here = Path(__file__).parent
    found = Path(module.__file__ or "").parent
    if found not in (here / package.rpartition(".")[2], here.parent / package):
        raise UserError(f"the package {package!r} found at {found} is not streamprep's: uninstall or rename that one")
    return module
