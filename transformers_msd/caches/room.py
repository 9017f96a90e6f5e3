"""Rows of a tree behind a key-value cache, and keeping only the accepted ones."""

import copy
from collections.abc import Sequence
from itertools import compress, groupby
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from transformers_msd.caches.blocks import (
    LAYERS_PER_BLOCK,
    SPARE_COLUMNS,
    Block,
    GrowingHybridLayer,
    GrowingLayer,
    first_column,
    holds_rows,
)
from transformers_msd.traits.windows import Window
from transformers_msd.trees.host import keep_rows
from transformers_msd.trees.masks import tree_attention_mask


# Layers of caches that are more than the rows they hold: they are put back as they were.
_KEPT_LAYERS = (StaticLayer, StaticSlidingWindowLayer, DynamicSlidingWindowLayer)


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
        windows (`Sequence[Window | None]`, *optional*):
            What each layer sees; all columns by default.
    """

    def __init__(
        self,
        cache: Cache,
        lengths: torch.Tensor,
        host_lengths: list[int],
        is_real: torch.Tensor | None = None,
        windows: Sequence[Window | None] = (),
    ) -> None:
        self.cache = cache
        self.lengths = lengths
        self.host_lengths = host_lengths
        # Columns before the unsettled rows.
        self.num_columns = max(host_lengths)
        self.is_real = is_real
        self._windows = dict(enumerate(windows))
        # Static ones take the new rows in the end: who made them may rely on their tensors.
        self._own_layers = {index: layer for index, layer in enumerate(cache.layers) if type(layer) in _KEPT_LAYERS}
        for index, layer in enumerate(cache.layers):
            if type(layer) is LinearAttentionAndFullAttentionLayer:
                # Its states, and none of its rows.
                self._own_layers[index] = copy.copy(layer)
                vars(self._own_layers[index]).update(keys=None, values=None, is_initialized=False)

    @property
    def is_even(self) -> bool:
        """Whether no sequence is shorter than the cache, told on the host."""
        return min(self.host_lengths) == self.num_columns

    @property
    def is_in_place(self) -> bool:
        """Whether unsettled rows lie right behind the settled ones of their own sequence."""
        return self.is_even

    def mask(self, visible: torch.Tensor, dtype: torch.dtype, window: Window | None = None) -> torch.Tensor:
        """
        Let the next forward add rows behind the settled ones.

        Args:
            visible (`torch.Tensor` of shape `(batch_size, num_rows, num_unsettled)`):
                Which of the rows that are not settled, the new ones last, each new row sees: its path, itself last.
            dtype (`torch.dtype`):
                Dtype of the model.
            window ([`Window`], *optional*):
                What the layers see that the mask is for; all by default.

        Returns:
            `torch.Tensor` of shape `(batch_size, 1, num_rows, num_held + num_unsettled)`: Additive mask, for the
            columns that these layers hold.
        """
        visible = visible.to(self.lengths.device)
        first = self._first.get(window, 0)
        if self.is_real is None and window is None and self.is_even:
            return tree_attention_mask(self.num_columns - first, visible, dtype)
        places = torch.arange(first, self.num_columns, device=self.lengths.device)
        columns = places < self.lengths[:, None]
        if self.is_real is not None:
            is_real = self.is_real[:, first : self.num_columns]
            columns[:, : is_real.shape[1]] &= is_real
        columns = columns[:, None]
        if window is not None:
            seen, near = window.sees(places, visible, self.lengths, self._padding)
            columns, visible = columns & seen, visible & near
        return tree_attention_mask(columns, visible, dtype)

    def place(self, num_rows: int) -> None:
        """Let a forward that needs no mask add so many rows behind the settled ones."""

    @property
    def _padding(self) -> torch.Tensor:
        """Columns before the first token of each sequence, of shape `(batch_size,)`."""
        if self.is_real is None:
            return torch.zeros_like(self.lengths)
        return (self.is_real.cumsum(-1) == 0).sum(-1)

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
        self.lengths, self.host_lengths = keep_rows(self.lengths, kept), list(compress(self.host_lengths, kept))
        if self.is_real is not None:
            self.is_real = keep_rows(self.is_real, kept)
        for block in self._blocks:
            block.keep_sequences(kept)

    def leave(self, num_columns: int | None = None, trims: bool = True) -> None:
        """
        Make the cache again what Transformers made it, wherever the call has come to.

        Args:
            num_columns (`int`, *optional*):
                Columns to keep at most, of those that are settled in every sequence; by default all that are settled
                in any.
            trims (`bool`, *optional*, defaults to `True`):
                Whether layers that see a window drop what no later row will see.
        """
        num_columns = self.num_columns if num_columns is None else min(num_columns, *self.host_lengths)
        for index, layer in enumerate(self.cache.layers):
            if not getattr(layer, "is_of_room", False):
                continue  # it was not replaced
            restored = self._own_layers.get(index) or DynamicLayer()
            start = max(int(restored.get_seq_length()), layer.first)
            if type(restored) is DynamicSlidingWindowLayer:
                start, restored = layer.first, DynamicSlidingWindowLayer(restored.sliding_window)
                restored.record_past = not trims
            if start < num_columns or not restored.is_initialized:
                rows = slice(start - layer.first, num_columns - layer.first)
                restored.update(layer.keys[:, :, rows], layer.values[:, :, rows])
            if type(restored) is DynamicSlidingWindowLayer:
                restored.record_past, restored.cumulative_length = self._own_layers[index].record_past, num_columns
            elif type(restored) is StaticSlidingWindowLayer:
                restored.cumulative_length_int = num_columns  # what lay before its window was left out
            self.cache.layers[index] = restored

    def open(self) -> None:
        """Replace the layers. Whatever ends this, [`Room.leave`] puts them back."""
        self._blocks: list[Block] = []
        layers = self.cache.layers
        self._find_first()

        def shape(index: int) -> list[Any]:
            layer = layers[index]
            if not holds_rows(layer):
                return []  # it shares the rows of another layer
            tensors = [(rows.device, rows.dtype, rows.shape) for rows in (layer.keys, layer.values)]
            return [self._windows.get(index), *tensors]

        for key, group in groupby(range(len(layers)), shape):
            indices = list(group) if key else []
            for start in range(0, len(indices), LAYERS_PER_BLOCK):
                part = indices[start : start + LAYERS_PER_BLOCK]
                window = self._windows.get(part[0])
                block = Block([layers[index] for index in part], self.num_columns, self._first.get(window, 0), window)
                self._blocks.append(block)
                for place, index in enumerate(part):
                    is_hybrid = isinstance(layers[index], LinearAttentionAndFullAttentionLayer)
                    make_layer = GrowingHybridLayer if is_hybrid else GrowingLayer
                    layers[index] = make_layer(block, place, layers[index], self.num_columns)

    def _find_first(self) -> None:
        """Find the first column that is held by all layers that see as far."""
        self._first: dict[Window | None, int] = {}
        for index, layer in enumerate(self.cache.layers):
            if holds_rows(layer):
                window = self._windows.get(index)
                self._first[window] = max(self._first.get(window, 0), first_column(layer))

    def _forget(self) -> None:
        """Drop columns that no window reaches any more, many at once."""
        is_trimmed = {self._windows.get(index) for index, layer in self._own_layers.items() if layer.is_sliding}
        for window in is_trimmed - {None}:
            first = min(self.host_lengths) - window.size
            if first - self._first[window] < SPARE_COLUMNS:
                continue
            self._first[window] = first
            for block in self._blocks:
                if block.window == window:
                    block.forget(first, self.num_columns)

    def _move(self, rows: torch.Tensor, places: torch.Tensor) -> None:
        sources = rows + self.num_columns
        for block in self._blocks:
            block.move(sources, places)

    def _cut(self) -> None:
        for layer in self.cache.layers:
            if isinstance(layer, GrowingLayer):
                layer.length = self.num_columns
        self._forget()
