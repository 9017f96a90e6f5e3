"""What rounds cost."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


# Tokens whose arithmetic takes as long as reading the weights does: assumed, where it was not measured.
TOKENS_BESIDE_WEIGHTS = {"cpu": 20, "cuda": 256}


@dataclass(frozen=True)
class Costs:
    """
    Seconds of rounds with batches of one size.

    Args:
        step (`float`):
            A step of plain decoding.
        num_nodes (`list[int]`):
            Sizes of trees that were measured, ascending.
        rounds (`list[float]`):
            Rounds with trees of these sizes, grown in `depth` levels.
        level (`float`):
            A further level of a tree.
        depth (`int`):
            Levels of the measured trees.
        batch_size (`int`, *optional*, defaults to 1):
            Prompts that were answered together.
        uncertainty (`float`, *optional*):
            Share by which the ratios of rounds to the step may be off; None where it was not noted.
    """

    step: float
    num_nodes: list[int]
    rounds: list[float]
    level: float
    depth: int
    batch_size: int = 1
    uncertainty: float | None = None

    def round(self, num_nodes: int, depth: int) -> float:
        """Seconds of a round with a tree of this size, linear between the sizes that were measured and beyond them."""
        return _linear(num_nodes, self.num_nodes, self.rounds) + (depth - self.depth) * self.level


def round_cost(measured: Sequence[Costs], batch_size: int, num_nodes: int, depth: int) -> float:
    """
    Tell what a round costs in plain steps of the same batch.

    Args:
        measured (`Sequence[Costs]`):
            What was measured with several batch sizes, ascending; times are linear between them and beyond.
        batch_size (`int`):
            Rows of the batch.
        num_nodes (`int`):
            Nodes of each tree.
        depth (`int`):
            Levels of the trees.
    """
    sizes = [costs.batch_size for costs in measured]
    seconds = _linear(batch_size, sizes, [costs.round(num_nodes, depth) for costs in measured])
    return seconds / _linear(batch_size, sizes, [costs.step for costs in measured])


def batch_growth(batch_size: int, num_nodes: int, device_type: str) -> float:
    """
    Tell how many times as many plain steps a tree costs a forward with a batch as it does with one prompt, if the
    time of a forward grows with its tokens and is twice that of one token at `TOKENS_BESIDE_WEIGHTS`.
    """
    beside = TOKENS_BESIDE_WEIGHTS.get(device_type, TOKENS_BESIDE_WEIGHTS["cuda"])
    with_one, with_batch = ((beside + size * num_nodes) / (beside + size) for size in (1, batch_size))
    return with_batch / with_one


def _linear(x: int, xs: list[int], ys: list[float]) -> float:
    """Draw a line through the two known points that are next to `x`, or level through the only one."""
    if len(xs) == 1:
        return ys[0]
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
