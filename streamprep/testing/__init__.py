"""Tests that a third party runs against its plugin.

In a test module of its own, which `pytest` then runs as it does any other::

    from streamprep.testing import ExporterContract

    class TestMyExporter(ExporterContract):
        exporter = "my_package.my_module:open_shard"

Nothing here needs pytest but to be run by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamprep.testing.exporter_contract import ExporterContract, Kind

__all__ = ["ExporterContract", "Kind"]


def __getattr__(name: str) -> Any:
    """Import the contract when it is asked for: `tiny_model` is used where its libraries are not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streamprep.testing import exporter_contract

    return getattr(exporter_contract, name)
