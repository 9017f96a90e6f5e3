"""What a drafter leaves in the cache that a call returns, for the call that goes on from it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from transformers import Cache, PreTrainedModel


class Owner:
    """
    Tells to whom a state belongs, and keeps nothing alive: models where they are, and what reads with them.

    Args:
        models (`Sequence[PreTrainedModel]`):
            Models that the state was made with.
        views (`tuple[Any, ...]`, *optional*):
            What else must be equal.
    """

    def __init__(self, models: Sequence[PreTrainedModel], views: tuple[Any, ...] = ()) -> None:
        self._models = [
            (ref(model), [(parameter.device, parameter.dtype) for parameter in model.parameters()]) for model in models
        ]
        self._views = views

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Owner):
            return NotImplemented
        # Two references to models that are gone are two.
        is_gone = any(model() is None for model, _ in self._models)
        return not is_gone and self._models == other._models and self._views == other._views

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        return self


@dataclass
class _Carried:
    """A state, and what the cache looked like that it belongs to. A copy has its own tensors, a file has no state."""

    keys: torch.Tensor | None = None
    version: int | None = None
    length: int = 0
    state: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Carried":
        keys = copy.deepcopy(self.keys, memo)
        return _Carried(keys, _version_of(keys), self.length, copy.deepcopy(self.state, memo))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Carried, ()


def _version_of(keys: torch.Tensor) -> int | None:
    """How often a tensor was written to, if it counts that."""
    return None if keys.is_inference() else keys._version


def _keys_of(cache: Cache) -> torch.Tensor:
    """Return the keys of the first layer that has any: others have a state."""
    return next(layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None)


def carry(cache: Cache, state: Any) -> None:
    """Let a drafter's state travel with the cache that the call returns."""
    keys = _keys_of(cache)
    cache._speculative_state = _Carried(keys, _version_of(keys), int(cache.get_seq_length()), state)


def take_carried(cache: Cache) -> Any | None:
    """Take the drafter's state off a cache; `None` when there is none or the cache has changed since."""
    carried = vars(cache).pop("_speculative_state", None)
    if carried is None or cache.get_seq_length() != carried.length:
        return None
    keys = _keys_of(cache)
    return carried.state if keys is carried.keys and _version_of(keys) == carried.version else None
