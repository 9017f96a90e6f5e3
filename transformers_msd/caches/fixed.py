"""Caches whose tensors never change their shapes, so that forwards on them can be compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from transformers_msd.caches.blocks import first_column, holds_rows
from transformers_msd.caches.room import Room
from transformers_msd.traits.windows import Window


# Columns at least; where they run out, there are twice as many.
FIXED_COLUMNS = 512


class FixedRoom(Room):
    """
    A room whose tensors never change their shapes, so that the forwards on it can be compiled: rows of each sequence
    stand right behind its own settled rows, and all columns take part in attention, the unused ones masked.

    Args:
        buffers (`dict`):
            Tensors of earlier rooms, to be used again; new ones are added. Rooms that are in use at the same time must
            not share them.
        run (`Callable`):
            Calls a function, compiled: gets it, a key for the shapes of its inputs, and these.
    """

    def __init__(
        self,
        cache: Cache,
        lengths: torch.Tensor,
        host_lengths: list[int],
        is_real: torch.Tensor | None = None,
        windows: Sequence[Window | None] = (),
        *,
        buffers: dict[Any, torch.Tensor],
        run: Callable[..., Any],
    ) -> None:
        self._buffers, self._run = buffers, run
        super().__init__(cache, lengths, host_lengths, is_real, windows)

    def reserve(self, num_rows: int) -> None:
        """Have room for so many rows behind the settled ones."""
        if self.num_columns + num_rows > self.width:
            self.open(num_rows)

    def mask(self, visible: torch.Tensor, dtype: torch.dtype, window: Window | None = None) -> torch.Tensor:
        visible = visible.to(self.lengths.device)
        num_rows, num_unsettled = visible.shape[1:]
        self.reserve(num_unsettled)
        self.starts.copy_(self.lengths + (num_unsettled - num_rows))
        is_open = None if self._is_open is None else self._is_open[:, None]
        if window is not None:
            places = torch.arange(self.width, device=self.lengths.device)
            seen, near = window.sees(places, visible, self.lengths, self._padding)
            is_open, visible = seen if is_open is None else seen & is_open, visible & near
        return fixed_attention_mask(self.lengths, visible, self.width, dtype, is_open)

    def place(self, num_rows: int) -> None:
        self.reserve(num_rows)
        self.starts.copy_(self.lengths)

    def open(self, num_rows: int = 0) -> None:
        # Columns, used or not.
        self.width = FIXED_COLUMNS
        while self.width < self.num_columns + max(num_rows, 1):
            self.width *= 2
        batch_size, device = len(self.lengths), self.lengths.device
        self.starts = self._buffer("starts", (batch_size,), torch.long, device)
        self._is_open = None
        if self.is_real is not None:
            # Columns behind the prompt are told by the lengths alone.
            self._is_open = torch.ones(batch_size, self.width, dtype=torch.bool, device=device)
            self._is_open[:, : self.is_real.shape[1]] = self.is_real
        self._tensors: list[torch.Tensor] = []
        for index, layer in enumerate(self.cache.layers):
            if not holds_rows(layer):
                continue  # it shares the rows of another layer
            tensors = []
            num_held = layer.keys.shape[2] if isinstance(layer, _FixedLayer) else self.num_columns
            first = first_column(layer)
            for name in ("keys", "values"):
                rows = getattr(layer, name)[:, :, : num_held - first]
                shape = (*rows.shape[:2], self.width, rows.shape[3])
                tensors.append(self._buffer((index, name), shape, rows.dtype, rows.device))
                tensors[-1].zero_()  # masked columns count, too, if an earlier call left NaN there
                tensors[-1][:, :, first:num_held] = rows
            self._tensors += tensors
            self.cache.layers[index] = _FixedLayer(*tensors, self.starts)

    def _buffer(self, name: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = (name, shape, dtype, device)
        if key not in self._buffers:
            with torch.inference_mode(False):  # calls in any mode use it
                self._buffers[key] = torch.empty(shape, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(self._buffers[key])
        return self._buffers[key]

    def _move(self, rows: torch.Tensor, places: torch.Tensor) -> None:
        sources = self.lengths[:, None] + rows.to(self.lengths.device)
        self._run(_move_columns, (id(self._buffers), self.width, rows.shape), self._tensors, sources, places)

    @property
    def is_in_place(self) -> bool:
        return True

    def _cut(self) -> None:
        pass  # what lies behind the settled rows is masked


def fixed_attention_mask(
    lengths: torch.Tensor,
    visible: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    is_open: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Make the additive mask of rows in a [`FixedRoom`].

    Args:
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            Settled columns of each sequence.
        visible (`torch.Tensor` of shape `(batch_size, num_rows, num_unsettled)`):
            Which of the rows behind them each row sees.
        width (`int`):
            Columns of the room.
        dtype (`torch.dtype`):
            Dtype of the model.
        is_open (`torch.Tensor` of shape `(batch_size, num_rows or 1, width)`, *optional*):
            Whether each row sees a settled column: it may be padding, or too far away.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, num_rows, width)`.
    """
    num_unsettled = visible.shape[2]
    behind = torch.arange(width, device=lengths.device) - lengths[:, None]  # (batch, width)
    settled = (behind < 0)[:, None]
    if is_open is not None:
        settled = settled & is_open
    place = behind.clamp(0, num_unsettled - 1)[:, None].expand(-1, visible.shape[1], -1)
    unsettled = visible.gather(2, place) & ((behind >= 0) & (behind < num_unsettled))[:, None]
    seen = settled | unsettled
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class _FixedLayer(StaticLayer):
    """A layer of a [`FixedRoom`]: rows are written where each sequence has come to."""

    is_of_room, first = True, 0

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values, self.starts = keys, values, starts
        self.device = keys.device
        self.is_initialized = True

    def get_seq_length(self) -> torch.Tensor:
        return self.starts.max()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places = self.starts.to(self.device)[:, None] + torch.arange(key_states.shape[2], device=self.device)
        batch = torch.arange(len(places), device=self.device)[:, None]
        # Not `scatter_`, for which inductor copies the whole tensor.
        # Under autocast states come in its dtype.
        self.keys[batch, :, places] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[batch, :, places] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys, self.values


def _move_columns(tensors: list[torch.Tensor], sources: torch.Tensor, places: torch.Tensor) -> None:
    """Copy columns `(batch_size, num_rows)` of tensors `(batch_size, num_heads, width, head_dim)` to other places."""
    for tensor in tensors:
        source, place = sources.to(tensor.device), places.to(tensor.device)
        batch = torch.arange(len(tensor), device=tensor.device)[:, None]
        tensor[batch, :, place] = tensor[batch, :, source]
