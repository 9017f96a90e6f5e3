"""Rows of a tree behind a key-value cache, and keeping only the accepted ones."""

from itertools import compress, groupby
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from transformers_msd.trees.masks import tree_attention_mask


# Columns to spare, and layers that share a tensor: what is copied at a time where these columns run out.
SPARE_COLUMNS = 256
LAYERS_PER_BLOCK = 8


class Room:
    """
    A cache behind its prompt: rows that are settled and, behind them, rows of a tree, which are added and moved in
    place.

    Args:
        cache (`Cache`):
            The cache after the prompt. Its layers are replaced from [`Room.open`] to [`Room.leave`].
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            Columns of each sequence that are settled, padding of the prompt included.
        host_lengths (`list[int]`):
            The same where the device need not be asked.
        is_real (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*):
            Whether the columns of the prompt hold tokens; all of them do by default.
    """

    def __init__(
        self, cache: Cache, lengths: torch.Tensor, host_lengths: list[int], is_real: torch.Tensor | None = None
    ) -> None:
        self.cache = cache
        self.lengths = lengths
        self.host_lengths = host_lengths
        # Columns before the unsettled rows.
        self.num_columns = max(host_lengths)
        self.is_real = is_real
        # They take the new rows in the end: who made them may rely on their tensors.
        self._static_layers = {index: layer for index, layer in enumerate(cache.layers) if type(layer) is StaticLayer}

    @property
    def is_even(self) -> bool:
        """Whether no sequence is shorter than the cache, told on the host."""
        return min(self.host_lengths) == self.num_columns

    @property
    def is_in_place(self) -> bool:
        """Whether unsettled rows lie right behind the settled ones of their own sequence."""
        return self.is_even

    def mask(self, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """
        Let the next forward add rows behind the settled ones.

        Args:
            visible (`torch.Tensor` of shape `(batch_size, num_rows, num_unsettled)`):
                Which of the rows that are not settled, the new ones last, each new row sees.
            dtype (`torch.dtype`):
                Dtype of the model.

        Returns:
            `torch.Tensor` of shape `(batch_size, 1, num_rows, num_columns + num_unsettled)`: Additive mask.
        """
        visible = visible.to(self.lengths.device)
        columns = torch.arange(self.num_columns, device=self.lengths.device) < self.lengths[:, None]
        if self.is_real is not None:
            num_real = self.is_real.shape[1]
            columns[:, :num_real] &= self.is_real[:, : self.num_columns]
        return tree_attention_mask(columns, visible, dtype)

    def settle(self, rows: torch.Tensor | None, lengths: torch.Tensor, host_lengths: list[int]) -> None:
        """
        Keep some of the unsettled rows, and drop all others.

        Args:
            rows (`torch.Tensor` of shape `(batch_size, num_rows)`):
                Which to move behind the settled rows, in this order; `None` where they already lie there.
            lengths (`torch.Tensor` of shape `(batch_size,)`):
                Columns that each sequence has then; what else was moved is overwritten later.
            host_lengths (`list[int]`):
                The same where the device need not be asked.
        """
        if rows is not None:
            places = self.lengths[:, None] + torch.arange(rows.shape[1], device=self.lengths.device)
            self._move(rows, places)
        self.lengths, self.host_lengths, self.num_columns = lengths, host_lengths, max(host_lengths)
        self._cut()

    def extend(self, counts: torch.Tensor, host_counts: list[int], rows: torch.Tensor | None = None) -> None:
        """
        Keep some more rows, and drop all others that are not settled.

        Args:
            counts (`torch.Tensor` of shape `(batch_size,)`):
                How many of each sequence.
            host_counts (`list[int]`):
                The same where the device need not be asked.
            rows (`torch.Tensor` of shape `(batch_size, num_rows)`, *optional*):
                Which of the unsettled rows, fillers behind them; the first ones by default.
        """
        counts = counts.to(self.lengths.device)
        if rows is None and not self.is_in_place:
            rows = torch.arange(max(host_counts), device=counts.device).expand(len(counts), -1)
        host_lengths = [before + new for before, new in zip(self.host_lengths, host_counts, strict=True)]
        self.settle(rows, self.lengths + counts, host_lengths)

    def keep_sequences(self, kept: list[bool]) -> None:
        """Drop sequences; `kept` tells of each whether it stays. Unsettled rows of the others stay where they are."""
        self.lengths, self.host_lengths = self.lengths[kept], list(compress(self.host_lengths, kept))
        if self.is_real is not None:
            self.is_real = self.is_real[kept]
        for block in self._blocks:
            block.keep_sequences(kept)

    def leave(self, num_columns: int | None = None) -> None:
        """
        Make the cache again what Transformers made it, wherever the call has come to.

        Args:
            num_columns (`int`, *optional*):
                Columns to keep at most, of those that are settled in every sequence; by default all that are settled
                in any.
        """
        num_columns = self.num_columns if num_columns is None else min(num_columns, *self.host_lengths)
        for index, layer in enumerate(self.cache.layers):
            if type(layer) in (DynamicLayer, StaticLayer):
                continue  # it was not replaced
            restored = self._static_layers.get(index) or DynamicLayer()
            num_held = int(restored.get_seq_length())
            restored.update(*(rows[:, :, num_held:num_columns] for rows in (layer.keys, layer.values)))
            self.cache.layers[index] = restored

    def open(self) -> None:
        """Replace the layers. Whatever ends this, [`Room.leave`] puts them back."""
        self._blocks: list[_Block] = []
        layers = self.cache.layers

        def shape(index: int) -> list[tuple[Any, ...]]:
            layer = layers[index]
            if not layer.is_initialized:
                return []  # it shares the rows of another layer
            return [(rows.device, rows.dtype, rows.shape) for rows in (layer.keys, layer.values)]

        for key, group in groupby(range(len(layers)), shape):
            indices = list(group) if key else []
            for start in range(0, len(indices), LAYERS_PER_BLOCK):
                part = indices[start : start + LAYERS_PER_BLOCK]
                block = _Block([layers[index] for index in part], self.num_columns)
                self._blocks.append(block)
                for place, index in enumerate(part):
                    layers[index] = _GrowingLayer(block, place, layers[index], self.num_columns)

    def _move(self, rows: torch.Tensor, places: torch.Tensor) -> None:
        for block in self._blocks:
            block.move(rows + self.num_columns, places)

    def _cut(self) -> None:
        for layer in self.cache.layers:
            if isinstance(layer, _GrowingLayer):
                layer.length = self.num_columns


class _Block:
    """Keys and values of some layers, with columns to spare: rows are added and moved without copying the others."""

    def __init__(self, layers: list[DynamicLayer | StaticLayer], num_columns: int) -> None:
        # Of each layer `(batch_size, num_heads, num_columns, head_dim)`.
        self.keys = [layer.keys[:, :, :num_columns] for layer in layers]
        self.values = [layer.values[:, :, :num_columns] for layer in layers]
        self._widen(num_columns)

    def _widen(self, num_columns: int) -> None:
        """Copy all rows into tensors of more than so many columns."""
        self._tensors = [_stack(self.keys, num_columns), _stack(self.values, num_columns)]
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


class _GrowingLayer(DynamicLayer):
    """A layer of a `_Block`."""

    def __init__(self, block: _Block, index: int, layer: DynamicLayer | StaticLayer, length: int) -> None:
        self.block = block
        self.length = length
        self.device = layer.device
        self._index = index
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor:
        return self.block.keys[self._index].narrow(2, 0, self.length)

    @property
    def values(self) -> torch.Tensor:
        return self.block.values[self._index].narrow(2, 0, self.length)

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, num_rows = self.length, key_states.shape[2]
        self.length += num_rows
        self.block.reserve(self.length)
        self.block.keys[self._index].narrow(2, start, num_rows).copy_(key_states)
        self.block.values[self._index].narrow(2, start, num_rows).copy_(value_states)
        return self.keys, self.values
