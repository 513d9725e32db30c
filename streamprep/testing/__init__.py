"""Tests that a third party runs against its plugin.

In a test module of its own, which `pytest` then runs as it does any other::

    from streamprep.testing import ExporterContract

    class TestMyExporter(ExporterContract):
        exporter = "my_package.my_module:open_shard"

Nothing here needs pytest but to be run by it.
"""

from streamprep.testing.exporter_contract import ExporterContract, Kind

__all__ = ["ExporterContract", "Kind"]
