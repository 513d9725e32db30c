"""Filters: rules that leave samples out, one module for each, and each off unless ``--filters`` asks for it.

A filter's module has ``make_filter(argument)``, which gets what stands after the filter's name and a colon. What it
returns is a `SampleFilter`, a `FrameFilter` or both; a `SurveyFilter` sees all samples first. Filters are asked in the
order they are given in, after all other rules; the first that excludes a sample is the reason, ``filter:NAME``.

A filter's answers must follow from its argument and what it is shown: a unit is planned anew whenever it is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from streamprep import plugins
from streamprep.errors import UserError
from streamprep.held_out import HeldOut
from streamprep.shards import ShardSample

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = "streamprep.filters"


@runtime_checkable
class SampleFilter(Protocol):
    """Decides from the shard's index, while planning."""

    def excludes(self, sample: ShardSample) -> str | None:
        """Why a sample is left out; None if it is not."""


@runtime_checkable
class SurveyFilter(SampleFilter, Protocol):
    """Has to see all samples before it can decide about one."""

    def survey(self, samples: Iterable[ShardSample]) -> None:
        """Look at all samples, in the order of the shards, which the rules and the filters before this one leave.

        It is called before any `excludes`; what an earlier call saw is to be forgotten.
        """


@runtime_checkable
class FrameFilter(Protocol):
    """Decides from the decoded frames, before they are encoded."""

    def excludes_frames(self, frames: Tensor) -> str | None:
        """Why a clip is left out, from (T, C, H, W) uint8 RGB on the CPU; None if it is not."""


class Filters:
    """The filters that are asked for, in their order.

    Args:
        asked: ``NAME``, ``NAME:ARGUMENT``, ``MODULE:FUNCTION`` or ``MODULE:FUNCTION:ARGUMENT``.

        held_out: Who is left for validation, of those that all filters leave.

    Raises:
        UserError: if there is no such filter, or it cannot take its argument.
    """

    def __init__(self, asked: Sequence[str] = (), held_out: HeldOut | None = None) -> None:
        self._filters = [_open(one) for one in asked]
        self._held_out = held_out

    @property
    def frame_filters(self) -> list[str]:
        """The names of those that look at frames."""
        return [name for name, one in self._filters if isinstance(one, FrameFilter)]

    def survey(self, samples_left_by: Callable[[Filters], Iterable[ShardSample]]) -> None:
        """Let those see all samples that must.

        Args:
            samples_left_by: Some of the filters -> all samples, in the order of the shards, that they leave.
        """
        for number, (_, one) in enumerate(self._filters):
            if isinstance(one, SurveyFilter):
                earlier = Filters()
                earlier._filters = self._filters[:number]
                one.survey(samples_left_by(earlier))
        if self._held_out is not None and self._held_out.number is not None:
            all_filters = Filters()
            all_filters._filters = self._filters
            self._held_out.survey(samples_left_by(all_filters))

    def excludes(self, sample: ShardSample) -> tuple[str, str] | None:
        """(reason, message) of the first that leaves a sample out, None if all let it pass."""
        for name, one in self._filters:
            if isinstance(one, SampleFilter) and (message := one.excludes(sample)) is not None:
                return f"filter:{name}", message
        return None

    def holds_out(self, sample: ShardSample) -> bool:
        """Whether a sample that all filters let pass is for validation."""
        return self._held_out is not None and self._held_out.holds_out(sample.key)

    def excludes_frames(self, frames: Tensor) -> tuple[str, str] | None:
        """(reason, message) of the first that leaves a clip out, None if all let it pass."""
        for name, one in self._filters:
            if isinstance(one, FrameFilter) and (message := one.excludes_frames(frames)) is not None:
                return f"filter:{name}", message
        return None


def _open(asked: str) -> tuple[str, Any]:
    name, plugin, argument = _split(asked)
    try:
        one = plugins.load(_GROUP, plugin).make_filter(argument)
    except UserError as error:
        raise UserError(f"--filters {asked}: {error}") from error
    if not isinstance(one, (SampleFilter, FrameFilter)):
        raise UserError(f"--filters {asked}: it has neither `excludes` nor `excludes_frames`: see CONTRIBUTING.md")
    return name, one


def _split(asked: str) -> tuple[str, str, str]:
    """(what a person calls it, the plugin's name, the argument)."""
    name, _, argument = asked.partition(":")
    known = plugins.names(_GROUP)
    for plugin in (name, name.replace("-", "_")):
        if plugin in known:
            return plugin.replace("_", "-"), plugin, argument
    function, _, argument = argument.partition(":")
    if not function.isidentifier():
        shown = ", ".join(plugin.replace("_", "-") for plugin in known)
        raise UserError(f"--filters {asked}: no filter {name!r}; one of {shown}, or MODULE:FUNCTION")
    return f"{name}:{function}", f"{name}:{function}", argument
