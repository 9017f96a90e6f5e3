"""The trees that pay most by what rounds cost."""

from collections.abc import Sequence
from itertools import compress

from transformers_msd.costs.rounds import Costs


class Sizing:
    """
    Chooses depth and size of the trees of one call, so that the most tokens are expected for each second.

    The tokens expected of a tree are 1 and the sum of the probabilities that the draft gives to its paths, scaled by
    how these turned out so far. The trees of a batch have one size, by what is likely in the mean of its prompts.

    Args:
        costs ([`Costs`]):
            What rounds cost, with batches of the size that there is.
    """

    # Tokens by which the scale is held at 1 in the beginning.
    PRIOR = 8.0

    def __init__(self, costs: Costs) -> None:
        self.follow(costs)
        # Of the prompts of the batch, whether each still counts.
        self.going_on = [True]
        self._expected = self._accepted = self.PRIOR
        # Of the last tree: tokens expected, and its depth.
        self._last, self._depth = 0.0, 0
        self._planned: int | None = None

    def follow(self, costs: Costs) -> None:
        """Take what rounds cost from now on."""
        self.costs = costs
        # Of rounds without a level, by the nodes of their trees.
        self._rounds: list[float] = []

    def _round(self, num_nodes: int, depth: int) -> float:
        """What a round costs, looked up once for each number of nodes."""
        while len(self._rounds) <= num_nodes:
            self._rounds.append(self.costs.round(len(self._rounds), 0))
        return self._rounds[num_nodes] + depth * self.costs.level

    def observe(self, num_accepted: Sequence[int], going_on: list[bool]) -> None:
        """
        Learn how the last trees turned out, and which prompts are left.

        Args:
            num_accepted (`Sequence[int]`):
                Tokens that each prompt accepted; more than the trees were deep were not drafted.
            going_on (`list[bool]`):
                Whether each has not ended; what has is padded, and tells nothing.
        """
        self.going_on = going_on if any(going_on) else [True] * len(going_on)
        drafted = [number for number in compress(num_accepted, going_on) if number <= self._depth]
        if drafted:
            self._expected += self._last
            self._accepted += sum(drafted) / len(drafted)
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
            rate = (1 + scale * total) / self._round(number + 1, depth)
            if rate > best_rate:
                best, best_rate = number, rate
        return best, best_rate

    def goes_on(self, probabilities: list[float], frontier: list[float], depth: int, most: int, further: int) -> bool:
        """
        Tell whether further levels could pay. A few nodes may not where many do: all numbers of levels are tried, each
        of which is taken to pass on the share that those before have passed on.

        Args:
            probabilities (`list[float]`):
                Probabilities of the paths to all candidates, descending.
            frontier (`list[float]`):
                Those of the nodes to expand.
            depth (`int`):
                Levels grown.
            most (`int`):
                Most nodes to keep, the root not among them.
            further (`int`):
                Most levels to come.
        """
        kept, rate = self.choose(probabilities, depth, most)
        scale = self._accepted / self._expected
        # With several prompts nodes cost as much as levels do, and where all of them don't pay the likeliest one may.
        for width in (len(frontier), *([1] if self.costs.batch_size > 1 else [])):
            number, total, passed = kept, 1 + scale * sum(probabilities[:kept]), sum(frontier[:width])
            share = min(passed, 1.0) ** (1 / depth)
            for level in range(1, further + 1):
                passed *= share
                total += scale * passed
                number += width
                if total / self._round(min(number, most) + 1, depth + level) > rate:
                    return True
        return False

    def width(self, probabilities: list[float], frontier: list[float], depth: int, most: int) -> int:
        """
        Tell how many nodes to expand: those of which a child could be kept, were it as likely as the node itself.

        Args:
            As [`Sizing.goes_on`] has them.
        """
        _, rate = self.choose(probabilities, depth, most)
        cost = (self._round(most + 1, 0) - self._round(2, 0)) / max(most - 1, 1)  # of a further node
        least = rate * cost * self._expected / self._accepted
        if len(probabilities) >= most:
            least = max(least, probabilities[most - 1])
        return max(sum(path > least for path in frontier), 1)

    def settle(self, probabilities: list[float], depth: int, most: int) -> int:
        """Choose how many nodes to keep of a grown tree, and remember what is expected of it."""
        number, _ = self.choose(probabilities, depth, most)
        self._last, self._depth = sum(probabilities[:number]), depth
        return number

    def plan(self, most: int) -> int:
        """Tell how many levels to grow of a tree that is looked at only when it is grown, `most` at most."""
        return most if self._planned is None else min(self._planned, most)

    def settle_whole(self, levels: list[list[float]], width: int, most: int) -> int:
        """
        Choose how many nodes to keep of such a tree, and plan the next: as many levels as would have been grown of
        this one, level by level, and twice as many where all of them paid.

        Args:
            levels (`list[list[float]]`):
                Probabilities of the paths to the candidates of each level.
            width (`int`):
                Most nodes of a level that were expanded.
            most (`int`):
                Most nodes to keep, the root not among them.
        """
        paths: list[float] = []
        self._planned = 2 * len(levels)
        for depth, level in enumerate(levels, 1):
            frontier = sorted(level, reverse=True)[:width]
            paths = sorted(paths + level, reverse=True)
            further = max(len(levels) - depth, 1)
            if depth < self._planned and not self.goes_on(paths, frontier, depth, most, further):
                self._planned = depth
        return self.settle(paths, len(levels), most)
