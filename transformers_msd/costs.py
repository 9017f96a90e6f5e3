"""What rounds cost, and the trees that pay most by it: numbers only, no model."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


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
    """

    step: float
    num_nodes: list[int]
    rounds: list[float]
    level: float
    depth: int
    batch_size: int = 1

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


def _linear(x: int, xs: list[int], ys: list[float]) -> float:
    """Draw a line through the two known points that are next to `x`, or level through the only one."""
    if len(xs) == 1:
        return ys[0]
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


class Sizing:
    """
    Chooses depth and size of the trees of one call, so that the most tokens are expected for each second.

    The tokens expected of a tree are 1 and the sum of the probabilities that the draft gives to its paths, scaled by
    how these turned out so far.

    Args:
        measured (`Sequence[Costs]`):
            What rounds cost: with one prompt, and with larger batches.
    """

    # Tokens by which the scale is held at 1 in the beginning.
    PRIOR = 8.0

    def __init__(self, measured: Sequence[Costs]) -> None:
        self.measured = measured
        self.costs = measured[0]
        self._expected = self._accepted = self.PRIOR
        # Of the last tree: tokens expected, and its depth.
        self._last, self._depth = 0.0, 0

    def observe(self, num_accepted: int) -> None:
        """Learn how many tokens were accepted since the last tree; more than it was deep were not drafted."""
        if num_accepted <= self._depth:
            self._expected += self._last
            self._accepted += num_accepted
        self._last, self._depth = 0.0, 0

    def choose(self, probabilities: list[float], depth: int, most: int) -> tuple[int, float]:
        """
        Choose how many nodes to keep.

        Args:
            probabilities (`list[float]`):
                Probabilities of the paths to all candidates, descending.
            depth (`int`):
                Levels grown.
            most (`int`):
                Most nodes to keep, the root not among them.

        Returns:
            Their number, and the tokens expected for each second.
        """
        scale = self._accepted / self._expected
        best, best_rate, total = 1, 0.0, 0.0
        for number, probability in enumerate(probabilities[:most], 1):
            total += probability
            rate = (1 + scale * total) / self.costs.round(number + 1, depth)
            if rate > best_rate:
                best, best_rate = number, rate
        return best, best_rate

    def goes_on(self, probabilities: list[float], frontier: list[float], depth: int, most: int) -> bool:
        """Tell whether a further level could pay: the nodes to expand pass on what they have at the most."""
        number, rate = self.choose(probabilities, depth, most)
        scale = self._accepted / self._expected
        total = 1 + scale * (sum(probabilities[:number]) + sum(frontier))
        return total / self.costs.round(min(number + len(frontier), most) + 1, depth + 1) > rate

    def settle(self, probabilities: list[float], depth: int, most: int) -> int:
        """Choose how many nodes to keep of a grown tree, and remember what is expected of it."""
        number, _ = self.choose(probabilities, depth, most)
        self._last, self._depth = sum(probabilities[:number]), depth
        return number
