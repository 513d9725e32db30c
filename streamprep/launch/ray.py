"""One Ray actor for each GPU of a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from streamprep.config import LaunchSettings
from streamprep.errors import UserError


def launch_on_ray(config: LaunchSettings, arguments: Sequence[str]) -> int:
    """Not there yet."""
    raise UserError("--launcher ray is being built")
