"""Starting ranks: `local` on this machine, `ray` on a cluster. torchrun and Slurm start theirs by themselves.

Every rank is the same command; what it is to do, it finds on the board and in the records. So a launcher only starts
processes, starts those that die again, and knows when that is of no use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from streamprep.config import PlanConfig
from streamprep.ranks import this_rank
from streamprep.settings import LaunchSettings, RankSettings


def wants_launching(config: object) -> TypeGuard[RankSettings]:
    """Whether a command is to run in several processes that nobody has started yet."""
    if not isinstance(config, RankSettings) or isinstance(config, PlanConfig) or this_rank().launched:
        return False
    return _is_for_ray(config) or config.nproc != "1"


def launch(config: RankSettings, arguments: Sequence[str]) -> int:
    """Run a command in as many processes as it asks for.

    Args:
        config: What it asks for.
        arguments: Its command line, the verb first.

    Returns:
        Its exit code.

    Raises:
        UserError: before anything is started.
    """
    if _is_for_ray(config):
        from streamprep.launch.ray import launch_on_ray

        return launch_on_ray(config, arguments)
    from streamprep.launch.local import launch_locally

    return launch_locally(config, arguments)


def _is_for_ray(config: RankSettings) -> TypeGuard[LaunchSettings]:
    return isinstance(config, LaunchSettings) and config.launcher == "ray"
