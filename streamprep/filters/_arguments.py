"""What stands after a filter's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamprep.errors import UserError
from streamprep.shards import ShardSample


class RangeFilter:
    """Leaves out samples of which a number lies outside a range, or is not known.

    Args:
        argument: ``A..B``, both included, ``A..`` or ``..B``.
        value: The number of a sample.
        what: It is, for the message.
        unit: It has, for the message.

    Raises:
        UserError: if the argument is no range.
    """

    def __init__(
        self, argument: str, value: Callable[[Mapping[str, Any]], float], *, what: str, unit: str = ""
    ) -> None:
        self._argument, self._value, self._what, self._unit = argument, value, what, unit
        self._lowest, self._highest = parse_range(argument)

    def excludes(self, sample: ShardSample) -> str | None:
        """By the sample's metadata alone."""
        try:
            value = self._value(sample.metadata)
        except KeyError:  # packing could not read its header
            return f"its {self._what} is not known"
        if self._lowest <= value <= self._highest:
            return None
        return f"its {self._what} is {value:g}{self._unit}, {self._argument} is asked for"


def parse_range(argument: str) -> tuple[float, float]:
    """``2..10``, ``2..`` or ``..10``, as (lowest, highest).

    Raises:
        UserError: if it is none.
    """
    low, dots, high = argument.partition("..")
    try:
        lowest, highest = float(low or 0), float(high or "inf")
    except ValueError:
        dots = ""
        lowest = highest = 0.0
    if not dots or not (low or high) or not 0 <= lowest <= highest:
        raise UserError(f"a range is needed, as 2..10, 2.. or ..10, got {argument!r}")
    return lowest, highest


def parse_settings(argument: str, defaults: Mapping[str, float]) -> dict[str, float]:
    """``name=number,...``, each of them optional.

    Raises:
        UserError: if it is none, or of other names.
    """
    settings = dict(defaults)
    for entry in argument.split(",") if argument else ():
        name, _, value = entry.strip().partition("=")
        try:
            if name not in defaults:
                raise ValueError(name)
            settings[name] = float(value)
        except ValueError:
            form = ",".join(f"{name}={value:g}" for name, value in defaults.items())
            raise UserError(f"settings are needed, any of {form} (these are the defaults), got {entry!r}") from None
    return settings


def check_share(settings: Mapping[str, float], *names: str) -> None:
    """Refuse what is no share.

    Raises:
        UserError: naming it.
    """
    for name in names:
        if not 0 <= settings[name] <= 1:
            raise UserError(f"{name} must be in 0..1, got {settings[name]:g}")


def check_level(settings: Mapping[str, float]) -> int:
    """The ``level``, of 0 to 255.

    Raises:
        UserError: if it is another number.
    """
    level = settings["level"]
    if not 0 <= level <= 255 or level != int(level):
        raise UserError(f"level must be a whole number in 0..255, got {level:g}")
    return int(level)


def refuse(argument: str) -> None:
    """For filters that take no argument.

    Raises:
        UserError: if there is one.
    """
    if argument:
        raise UserError(f"it takes no argument, got {argument!r}")
