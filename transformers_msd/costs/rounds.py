"""What rounds cost."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


# Assumed where it was not measured: tokens whose arithmetic takes as long as reading the weights does, and what a
# forward over so many tokens costs on a CPU beside one over a single token.
TOKENS_BESIDE_WEIGHTS = 256
CPU_FORWARD = ([1, 2, 4, 8, 16, 24], [1.0, 1.5, 1.5, 1.65, 2.0, 2.25])


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


def costs_of_batch(measured: Sequence[Costs], batch_size: int) -> Costs:
    """Tell what rounds with a batch of some size cost, as [`round_cost`] does, for all trees, in plain steps."""
    num_nodes = sorted({number for costs in measured for number in costs.num_nodes})
    depth = measured[0].depth
    rounds = [round_cost(measured, batch_size, number, depth) for number in num_nodes]
    level = round_cost(measured, batch_size, num_nodes[0], depth + 1) - rounds[0]
    return Costs(step=1.0, num_nodes=num_nodes, rounds=rounds, level=level, depth=depth, batch_size=batch_size)


def assumed_costs(draft: float, level: float, device_type: str, batch_size: int = 1) -> Costs:
    """
    Tell what rounds are taken to cost, in plain steps, where it was not measured.

    Args:
        draft (`float`):
            What drafting costs before the first level.
        level (`float`):
            A level of a tree.
        device_type (`str`):
            Where the target runs.
        batch_size (`int`, *optional*, defaults to 1):
            Prompts that are answered together.
    """
    num_nodes = CPU_FORWARD[0]
    step = forward_cost(batch_size, device_type)
    rounds = [draft + forward_cost(batch_size * number, device_type) / step for number in num_nodes]
    return Costs(step=1.0, num_nodes=num_nodes, rounds=rounds, level=level, depth=0, batch_size=batch_size)


def forward_cost(num_tokens: int, device_type: str) -> float:
    """
    Tell what a forward over so many tokens costs beside one over a single token, where it was not measured.

    On a CPU, between what was measured on two of a Llama of 135 million parameters in float32, and level from 2 tokens
    to 4, of which 2 and 3 cost more than 4 do; elsewhere as if arithmetic took as long as reading the weights does at
    `TOKENS_BESIDE_WEIGHTS` tokens.
    """
    if device_type == "cpu":
        return _linear(num_tokens, *CPU_FORWARD)
    return (TOKENS_BESIDE_WEIGHTS + num_tokens) / (TOKENS_BESIDE_WEIGHTS + 1)


def with_full_fours(num_rows: int, batch_size: int, device_type: str) -> int:
    """
    Tell how many rows a forward over so many is fastest with: a CPU multiplies large float32 matrices by four of them
    at a time, and takes longer for three or seven than for one more.
    """
    return num_rows + (device_type == "cpu" and batch_size == 1 and num_rows % 4 == 3)


def _linear(x: int, xs: list[int], ys: list[float]) -> float:
    """Draw a line through the two known points that are next to `x`, or level through the only one."""
    if len(xs) == 1:
        return ys[0]
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
