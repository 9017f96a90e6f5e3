"""MSD's curriculum: text first, then ever more pictures."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def visual_probability(progress: float) -> float:
    """
    Return the probability of drawing a row with pictures after a fraction of the training.

    It is 0 in the first half and rises linearly to 1 at the end (MSD, arXiv 2505.14260).
    """
    return min(max(2 * progress - 1, 0.0), 1.0)


class RampSampler(Sampler[int]):
    """
    Draw each row from the text rows or the rows with pictures, by a coin that turns towards the pictures.

    An epoch is as long as the shorter of the two lists, both of them shuffled. All draws follow from the seed and
    the epoch.

    Args:
        text_rows (`list[int]`):
            Indices of the rows without pictures.
        visual_rows (`list[int]`):
            Indices of the rows with pictures.
        num_draws (`int`):
            Rows drawn in the whole training.
        seed (`int`, *optional*, defaults to 0):
            Seed of all draws.
    """

    def __init__(self, text_rows: list[int], visual_rows: list[int], num_draws: int, seed: int = 0):
        self.text_rows = text_rows
        self.visual_rows = visual_rows
        self.num_draws = num_draws
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return min(len(self.text_rows), len(self.visual_rows))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        coins = torch.rand(len(self), generator=generator).tolist()
        text_order = torch.randperm(len(self.text_rows), generator=generator).tolist()
        visual_order = torch.randperm(len(self.visual_rows), generator=generator).tolist()
        for i, coin in enumerate(coins):
            progress = (self.epoch * len(self) + i + 1) / self.num_draws
            is_visual = coin < visual_probability(progress)
            yield self.visual_rows[visual_order[i]] if is_visual else self.text_rows[text_order[i]]
