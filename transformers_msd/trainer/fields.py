"""Fields of settings, checked by the types that they are declared with."""

import math
from collections.abc import Iterable
from dataclasses import fields
from inspect import get_annotations
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
    # Not `field.type`, which parsers of arguments overwrite.
    types = {name: kind for each in reversed(type(settings).__mro__) for name, kind in get_annotations(each).items()}
    for name in names or [field.name for field in fields(settings)]:
        value, expected = getattr(settings, name), types[name]
        if not _fits(value, expected):
            said = expected.__name__ if isinstance(expected, type) else expected
            raise ValueError(f"`{name}` must be a finite value of type `{said}`, got {value!r}.")


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
