"""Keys and values that grow: what the layers of a cache are made of while rows of a tree come and go."""

from typing import Any

import torch
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from transformers_msd.traits.windows import Window
from transformers_msd.trees.host import keep_rows


# Columns to spare, and layers that share a tensor: what is copied at a time where these columns run out.
SPARE_COLUMNS = 256
LAYERS_PER_BLOCK = 8


def first_column(layer: DynamicLayer | StaticLayer) -> int:
    """Return the first column that a layer of a cache holds: earlier ones are seen no more."""
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.cumulative_length - layer.keys.shape[2]
    if type(layer) is StaticSlidingWindowLayer:
        return max(layer.cumulative_length_int - layer.max_cache_len, 0)
    return 0


def holds_rows(layer: Any) -> bool:
    """Tell whether a layer of a cache holds rows of its own, and neither those of another layer nor a state alone."""
    return getattr(layer, "keys", None) is not None and layer.is_initialized


class Block:
    """Keys and values of some layers, with columns to spare: rows are added and moved without copying the others."""

    def __init__(
        self, layers: list[DynamicLayer | StaticLayer], num_columns: int, first: int, window: Window | None
    ) -> None:
        # The first column that is held, and what the layers see.
        self.first, self.window = first, window
        # Of each layer `(batch_size, num_heads, num_columns - first, head_dim)`.
        self.keys, self.values = [], []
        for layer in layers:
            held = slice(first - first_column(layer), num_columns - first_column(layer))
            self.keys.append(layer.keys[:, :, held])
            self.values.append(layer.values[:, :, held])
        self._widen(num_columns)

    def _widen(self, num_columns: int) -> None:
        """Copy all rows into tensors of more than so many columns, those before the first one among them."""
        self._tensors = [_stack(tensors, num_columns - self.first) for tensors in (self.keys, self.values)]
        self.keys, self.values = (list(tensor) for tensor in self._tensors)

    def reserve(self, num_columns: int) -> None:
        """Have at least so many columns."""
        if num_columns - self.first > self.keys[0].shape[2]:
            self._widen(num_columns)

    def forget(self, first: int, num_columns: int) -> None:
        """Drop all columns before the first one to hold."""
        held = slice(first - self.first, num_columns - self.first)
        self.keys, self.values = ([rows[:, :, held] for rows in tensors] for tensors in (self.keys, self.values))
        self.first = first
        self._widen(num_columns)

    def keep_sequences(self, kept: list[bool]) -> None:
        """Copy the sequences that stay."""
        self._tensors = [keep_rows(tensor, kept, dim=1) for tensor in self._tensors]
        self.keys, self.values = (list(tensor) for tensor in self._tensors)

    def move(self, sources: torch.Tensor, places: torch.Tensor) -> None:
        """Copy columns `sources` `(batch_size, num_rows)` to `places`, of the same shape."""
        if self.first:
            sources, places = sources - self.first, places - self.first
        for tensor in self._tensors:
            own = (rows.to(tensor.device) for rows in (sources, places))
            if len(sources) == 1:
                source, place = (rows[0] for rows in own)
                tensor.index_copy_(3, place, tensor.index_select(3, source))
                continue
            shape = (*tensor.shape[:3], sources.shape[1], tensor.shape[4])
            source, place = (rows[:, None, :, None].expand(shape) for rows in own)
            tensor.scatter_(3, place, tensor.gather(3, source))


def _stack(tensors: list[torch.Tensor], num_columns: int) -> torch.Tensor:
    """Copy tensors `(batch_size, num_heads, n, head_dim)` into one, with more than `num_columns` columns each."""
    batch_size, num_heads, width, head_dim = tensors[0].shape
    stacked = tensors[0].new_empty(len(tensors), batch_size, num_heads, num_columns + SPARE_COLUMNS, head_dim)
    for index, tensor in enumerate(tensors):
        stacked[index, :, :, :width] = tensor
    return stacked


class GrowingLayer(DynamicLayer):
    """A layer of a [`Block`]."""

    is_of_room = True

    def __init__(self, block: Block, index: int, layer: DynamicLayer | StaticLayer, length: int) -> None:
        self.block = block
        self.length = length
        self.device = layer.device
        self._index = index
        self.is_initialized = True

    @property
    def first(self) -> int:
        return self.block.first

    @property
    def keys(self) -> torch.Tensor:
        return self.block.keys[self._index].narrow(2, 0, self.length - self.first)

    @property
    def values(self) -> torch.Tensor:
        return self.block.values[self._index].narrow(2, 0, self.length - self.first)

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, num_rows = self.length - self.first, key_states.shape[2]
        self.length += num_rows
        self.block.reserve(self.length)
        keys, values = self.block.keys[self._index], self.block.values[self._index]
        keys.narrow(2, start, num_rows).copy_(key_states)
        values.narrow(2, start, num_rows).copy_(value_states)
        return keys.narrow(2, 0, start + num_rows), values.narrow(2, 0, start + num_rows)


class GrowingHybridLayer(GrowingLayer, LinearAttentionLayer):
    """A layer of a [`Block`] with states besides: those of the layer that it stands for."""

    def __init__(self, block: Block, index: int, layer: DynamicLayer, length: int) -> None:
        vars(self).update({name: vars(layer)[name] for name in vars(LinearAttentionLayer())})
        super().__init__(block, index, layer, length)
