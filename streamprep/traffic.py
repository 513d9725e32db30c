"""What jobs in processes of their own ask of buckets, for the process that counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from streamprep.storage import Store, StoreStats

T = TypeVar("T")

Traffic = tuple[StoreStats, ...]
"""What was asked of each of some stores."""


def with_traffic(
    work: Callable[..., T], stores: Sequence[Store], counting: int, *arguments: Any
) -> tuple[T, Traffic | None]:
    """Call a function, and tell what it has asked of stores, unless the process that counts has seen it by itself.

    Args:
        work: The function.
        stores: Those that its arguments use, sent along with them: copies that have been asked nothing before.
        counting: The process that counts.
        arguments: For the function.
    """
    result = work(*arguments)
    return result, None if os.getpid() == counting else tuple(store.stats for store in stores)


def add_traffic(stores: Sequence[Store], traffic: Traffic | None) -> None:
    """Count what another process has asked."""
    for store, more in zip(stores, traffic or (), strict=traffic is not None):
        store.stats.add(more)
