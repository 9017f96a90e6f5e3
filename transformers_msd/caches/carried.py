"""What a drafter leaves in the cache that a call returns, for the call that goes on from it."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache


@dataclass
class _Carried:
    keys: torch.Tensor
    length: int
    state: Any


def carry(cache: Cache, state: Any) -> None:
    """Let a drafter's state travel with the cache that the call returns."""
    cache._speculative_state = _Carried(cache.layers[0].keys, int(cache.get_seq_length()), state)


def take_carried(cache: Cache) -> Any | None:
    """Take the drafter's state off a cache; `None` when there is none or the cache has changed since."""
    carried = vars(cache).pop("_speculative_state", None)
    if carried is None or cache.get_seq_length() != carried.length or cache.layers[0].keys is not carried.keys:
        return None
    return carried.state
