"""What layers keep in place of rows, recurrent states and those of convolutions: a copy to go back to."""

from collections.abc import Iterator

import torch
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from transformers_msd.trees.host import keep_rows, to_device


class States:
    """
    The states of a cache as they were when it stood still, row by row: no rejected token can be taken out of them.

    Args:
        cache (`Cache`):
            The cache, whose layers go on writing into their own tensors.
    """

    def __init__(self, cache: Cache) -> None:
        self._layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        self._kept = [states[place].clone() for states, place in self._places()]

    def _places(self) -> Iterator[tuple[dict[int, torch.Tensor], int]]:
        for layer in self._layers:
            for states in (layer.conv_states, layer.recurrent_states):
                yield from ((states, place) for place, tensor in states.items() if tensor is not None)

    def settle(self, stand: list[bool]) -> None:
        """Keep the states of the sequences that `stand`, and put those of all others back."""
        rows = None if all(stand) or not any(stand) else to_device(stand, self._kept[0].device)
        for (states, place), kept in zip(self._places(), self._kept, strict=True):
            if any(stand):
                kept.copy_(states[place] if rows is None else _choose(rows, states[place], kept))
            if not all(stand):
                states[place].copy_(kept)

    def take(self, others: "States", taken: list[bool]) -> None:
        """Put other states in the place of those of some sequences, here and in the cache."""
        rows = to_device(taken, self._kept[0].device)
        for (states, place), kept, other in zip(self._places(), self._kept, others._kept, strict=True):
            kept.copy_(_choose(rows, other, kept))
            states[place].copy_(_choose(rows, other, states[place]))

    def keep_sequences(self, kept: list[bool]) -> None:
        """Drop sequences of the copy; `kept` tells of each whether it stays."""
        self._kept = [keep_rows(tensor, kept) for tensor in self._kept]

    def drop_from_cache(self, kept: list[bool]) -> None:
        """Drop sequences of the cache."""
        for states, place in list(self._places()):
            states[place] = keep_rows(states[place], kept)


def _choose(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Take the marked rows of one tensor and the others of another, without asking the device."""
    return torch.where(rows.to(first.device).view(-1, *[1] * (first.ndim - 1)), first, second)
