"""Room for a tree behind a key-value cache, and keeping only its accepted rows. No other file knows cache layouts."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


def check_cache(cache: Cache) -> None:
    """Raise a `ValueError` unless single rows can be taken out of a cache."""
    layer_types = {type(layer) for layer in cache.layers}
    if cache.layer_class_to_replicate is not None:
        layer_types.add(cache.layer_class_to_replicate)
    unsupported = sorted(layer_type.__name__ for layer_type in layer_types if layer_type is not DynamicLayer)
    if type(cache) is not DynamicCache or unsupported or cache.offloading:
        raise ValueError(
            "Drafting needs a `DynamicCache` of full-attention layers that stays on its device, got "
            f"{type(cache).__name__}{f' with layers {unsupported}' if unsupported else ''}"
            f"{' with offloading' if cache.offloading else ''}. Static, sliding-window, recurrent, quantised and "
            "offloaded caches can't take back rejected rows: drop `cache_implementation` and `past_key_values`, or "
            "generate without `assistant_model`."
        )


def keep_rows(
    cache: Cache,
    past_length: int,
    lengths: torch.Tensor,
    rows: torch.Tensor,
    new_length: int,
    starts_with_first: bool = True,
) -> None:
    """
    Move some of the newest rows of a cache behind the rows that stand, and drop all others.

    Args:
        cache (`Cache`):
            Cache whose columns from `past_length` on hold the newest rows.
        past_length (`int`):
            Columns before the newest rows.
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            Rows that stand in each sequence, packed to the left.
        rows (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Which of the newest rows to move there, in this order. What lies behind the last row that a sequence
            really keeps is overwritten later.
        new_length (`int`):
            Columns to keep.
        starts_with_first (`bool`, *optional*, defaults to `True`):
            Whether the first of `rows` is the first of the newest rows, as a root is.
    """
    places = lengths[:, None] + torch.arange(rows.shape[1], device=lengths.device)
    sources, places = (rows + past_length)[:, None, :, None], places[:, None, :, None]  # (batch, 1, num_rows, 1)
    # The root of a batch of one already lies where it belongs.
    in_place = rows.shape[0] == 1 and new_length <= past_length + starts_with_first
    for layer in cache.layers:
        if not in_place:
            sources, places = sources.to(layer.keys.device), places.to(layer.keys.device)
            shape = (-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            source, place = sources.expand(shape), places.expand(shape)
            # The newest rows were just concatenated: nobody else holds these tensors.
            layer.keys.scatter_(2, place, layer.keys.gather(2, source))
            layer.values.scatter_(2, place, layer.values.gather(2, source))
        layer.keys = layer.keys[:, :, :new_length]
        layer.values = layer.values[:, :, :new_length]


@dataclass
class _Carried:
    keys: torch.Tensor
    length: int
    state: Any


def carry(cache: Cache, state: Any) -> None:
    """Let a drafter's state travel with the cache that the call returns."""
    cache._speculative_state = _Carried(cache.layers[0].keys, cache.get_seq_length(), state)


def take_carried(cache: Cache) -> Any | None:
    """Take the drafter's state off a cache; `None` when there is none or the cache has changed since."""
    carried = vars(cache).pop("_speculative_state", None)
    if carried is None or cache.get_seq_length() != carried.length or cache.layers[0].keys is not carried.keys:
        return None
    return carried.state
