"""Run by ``pytest`` where this package is installed."""

from __future__ import annotations

from streamprep.testing import ExporterContract


class TestFinetrainers(ExporterContract):
    exporter = "finetrainers"
