"""Which rows come when: all in a new order every epoch, or MSD's ramp from text to rows with pictures."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def visual_probability(progress: float) -> float:
    """
    Return the probability of drawing a row with pictures after a fraction of the training.

    It is 0 in the first half and rises linearly to 1 at the end (MSD, arXiv 2505.14260).
    """
    return min(max(2 * progress - 1, 0.0), 1.0)


class EpochSampler(Sampler[int]):
    """
    Draws rows in an order that follows from the seed and the epoch alone, as many as fill whole steps.

    A step that is not full would hold other rows with other numbers of processes.

    Args:
        num_rows (`int`):
            Rows there are in an epoch.
        rows_per_step (`int`):
            Rows of an optimizer step, over all processes. Fewer rows than that make a step of their own.
        seed (`int`, *optional*, defaults to 0):
            Seed of all draws.
    """

    def __init__(self, num_rows: int, rows_per_step: int, seed: int = 0) -> None:
        self.num_rows = num_rows - num_rows % rows_per_step or num_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def generator(self) -> torch.Generator:
        """Make the generator of the epoch."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)


class ShuffledSampler(EpochSampler):
    """Draws all rows of an epoch in a new order."""

    def __init__(self, num_rows: int, rows_per_step: int, seed: int = 0) -> None:
        super().__init__(num_rows, rows_per_step, seed)
        self._all_rows = num_rows

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._all_rows, generator=self.generator())[: len(self)].tolist()


class RampSampler(EpochSampler):
    """
    Draws each row from the text rows or the rows with pictures, by a coin that turns towards the pictures.

    An epoch is as long as the shorter of the two lists, both of them shuffled.

    Args:
        text_rows (`list[int]`):
            Indices of the rows without pictures.
        visual_rows (`list[int]`):
            Indices of the rows with pictures.
        num_draws (`int`):
            Rows drawn in the whole training.
        rows_per_step (`int`, *optional*, defaults to 1):
            Rows of an optimizer step, over all processes.
        seed (`int`, *optional*, defaults to 0):
            Seed of all draws.
    """

    def __init__(
        self, text_rows: list[int], visual_rows: list[int], num_draws: int, rows_per_step: int = 1, seed: int = 0
    ) -> None:
        super().__init__(min(len(text_rows), len(visual_rows)), rows_per_step, seed)
        self.text_rows = text_rows
        self.visual_rows = visual_rows
        self.num_draws = num_draws

    def __iter__(self) -> Iterator[int]:
        generator = self.generator()
        coins = torch.rand(len(self), generator=generator).tolist()
        text_order = torch.randperm(len(self.text_rows), generator=generator).tolist()
        visual_order = torch.randperm(len(self.visual_rows), generator=generator).tolist()
        for i, coin in enumerate(coins):
            progress = (self.epoch * len(self) + i + 1) / self.num_draws
            is_visual = coin < visual_probability(progress)
            yield self.visual_rows[visual_order[i]] if is_visual else self.text_rows[text_order[i]]
