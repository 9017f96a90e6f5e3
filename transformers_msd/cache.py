"""Room for a tree behind a key-value cache, and keeping only its accepted rows. No other file knows cache layouts."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


# Columns to spare, and layers that share a tensor: what is copied at a time where these columns run out.
SPARE_COLUMNS = 256
LAYERS_PER_ROOM = 8


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


class _Room:
    """Keys and values of some layers, with columns to spare: rows are added and moved without copying the others."""

    def __init__(self, layers: list[DynamicLayer]) -> None:
        self._tensors: list[torch.Tensor] = []
        self.keys, self.values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self._widen(layers[0].get_seq_length())

    def _widen(self, num_columns: int) -> None:
        """Copy all rows into tensors of more than so many columns."""
        self._tensors = [_stack(self.keys, num_columns), _stack(self.values, num_columns)]
        # Of each layer `(batch_size, num_heads, num_columns, head_dim)`.
        self.keys, self.values = (list(tensor) for tensor in self._tensors)

    def reserve(self, num_columns: int) -> None:
        """Have at least so many columns."""
        if num_columns > self.keys[0].shape[2]:
            self._widen(num_columns)

    def keep_sequences(self, kept: list[bool]) -> None:
        """Copy the sequences that stay."""
        self._tensors = [tensor[:, kept] for tensor in self._tensors]
        self.keys, self.values = (list(tensor) for tensor in self._tensors)

    def move(self, sources: torch.Tensor, places: torch.Tensor) -> None:
        """Copy columns `sources` `(batch_size, num_rows)` to `places`, of the same shape."""
        for tensor in self._tensors:
            shape = (*tensor.shape[:3], sources.shape[1], tensor.shape[4])
            source, place = (rows.to(tensor.device)[:, None, :, None].expand(shape) for rows in (sources, places))
            tensor.scatter_(3, place, tensor.gather(3, source))


def _stack(tensors: list[torch.Tensor], num_columns: int) -> torch.Tensor:
    """Copy tensors `(batch_size, num_heads, n, head_dim)` into one, with more than `num_columns` columns each."""
    batch_size, num_heads, width, head_dim = tensors[0].shape
    stacked = tensors[0].new_empty(len(tensors), batch_size, num_heads, num_columns + SPARE_COLUMNS, head_dim)
    for index, tensor in enumerate(tensors):
        stacked[index, :, :, :width] = tensor
    return stacked


class _RoomyLayer(DynamicLayer):
    """A layer of a `_Room`."""

    def __init__(self, room: _Room, index: int, layer: DynamicLayer) -> None:
        self.room = room
        self.length = layer.get_seq_length()
        self.dtype, self.device = layer.dtype, layer.device
        self._index = index
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor:
        return self.room.keys[self._index].narrow(2, 0, self.length)

    @property
    def values(self) -> torch.Tensor:
        return self.room.values[self._index].narrow(2, 0, self.length)

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, num_rows = self.length, key_states.shape[2]
        self.length += num_rows
        self.room.reserve(self.length)
        self.room.keys[self._index].narrow(2, start, num_rows).copy_(key_states)
        self.room.values[self._index].narrow(2, start, num_rows).copy_(value_states)
        return self.keys, self.values


def make_room(cache: Cache) -> None:
    """Let the layers of a cache, after the prefill, add and move rows in place."""

    def shape(index: int) -> tuple[Any, ...]:
        layer = cache.layers[index]
        if not layer.is_initialized or type(layer) is not DynamicLayer:
            return ()  # it shares the rows of another layer, or has room
        return layer.device, layer.dtype, layer.keys.shape, layer.values.shape

    for key, group in groupby(range(len(cache.layers)), shape):
        indices = list(group) if key else []
        for start in range(0, len(indices), LAYERS_PER_ROOM):
            part = indices[start : start + LAYERS_PER_ROOM]
            room = _Room([cache.layers[index] for index in part])
            for place, index in enumerate(part):
                cache.layers[index] = _RoomyLayer(room, place, cache.layers[index])


def leave_room(cache: Cache) -> None:
    """Make a cache again what Transformers made it."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, _RoomyLayer):
            cache.layers[index] = DynamicLayer()
            cache.layers[index].update(layer.keys, layer.values)


def keep_rows(
    cache: Cache, past_length: int, lengths: torch.Tensor, rows: torch.Tensor | None, new_length: int
) -> None:
    """
    Move some of the newest rows of a cache with room behind the rows that stand, and drop all others.

    Args:
        cache (`Cache`):
            Cache whose columns from `past_length` on hold the newest rows.
        past_length (`int`):
            Columns before the newest rows.
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            Rows that stand in each sequence, packed to the left.
        rows (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Which of the newest rows to move there, in this order; `None` where they already lie there. What lies
            behind the last row that a sequence really keeps is overwritten later.
        new_length (`int`):
            Columns to keep.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, _RoomyLayer)]
    if rows is not None:
        places = lengths[:, None] + torch.arange(rows.shape[1], device=lengths.device)
        for room in dict.fromkeys(layer.room for layer in layers):
            room.move(rows + past_length, places)
    for layer in layers:
        layer.length = new_length


def keep_sequences(cache: Cache, kept: list[bool]) -> None:
    """Drop sequences of a cache with room; `kept` tells of each whether it stays."""
    for room in dict.fromkeys(layer.room for layer in cache.layers if isinstance(layer, _RoomyLayer)):
        room.keep_sequences(kept)


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
