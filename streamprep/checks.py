"""Limits of what flags may be: each refuses a value by the name of its flag, with `UserError`."""

from __future__ import annotations

from streamprep.errors import UserError


def local_folder(**fields: str | None) -> None:
    """Refuse URLs."""
    for name, value in fields.items():
        if value is not None and "://" in value:
            raise UserError(f"--{name.replace('_', '-')} must be a local folder, got {value}")


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def at_least(limit: float, **fields: float) -> None:
    """Refuse what is less, or no number."""
    for name, value in fields.items():
        if not value >= limit:  # NaN is not
            raise UserError(f"--{name.replace('_', '-')} must be at least {limit}, got {value}")


def at_most(limit: float, **fields: float) -> None:
    """Refuse what is more, or no number."""
    for name, value in fields.items():
        if not value <= limit:
            raise UserError(f"--{name.replace('_', '-')} must be at most {limit}, got {value}")


def above_zero(**fields: float) -> None:
    """Refuse zero and less, infinity, and what is no number."""
    for name, value in fields.items():
        if not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
