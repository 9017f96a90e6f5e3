"""Fields of settings, checked by the types that they are declared with."""

import math
from collections.abc import Iterable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin


def check_types(settings: Any, names: Iterable[str] | None = None) -> None:
    """
    Raise a `ValueError` for fields whose values are not of their type, or numbers that are not finite.

    Args:
        settings (`Any`):
            A dataclass of settings.
        names (`Iterable[str]`, *optional*):
            Fields to look at, all by default.
    """
    names = None if names is None else set(names)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if (names is None or field.name in names) and not _fits(value, field.type):
            expected = field.type.__name__ if isinstance(field.type, type) else field.type
            raise ValueError(f"`{field.name}` must be a finite value of type `{expected}`, got {value!r}.")


def check_least(settings: Any, **least: float) -> None:
    """Raise a `ValueError` for fields whose numbers, where they are set, are smaller than they may be."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ValueError(f"`{name}` must be at least {bound}, got {value}.")


def _fits(value: Any, expected: Any) -> bool:
    kind, inner = get_origin(expected), get_args(expected)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict)
    if expected in (None, NoneType):
        return value is None
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, expected) and (expected is not int or not isinstance(value, bool))
