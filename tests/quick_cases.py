"""Which of a test's cases run with ``make test``."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *, quick: Container[Any]) -> list[Any]:
    """Parameters of a test, of which all but a few run only with ``make test-slow``: other tests have like cases."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
