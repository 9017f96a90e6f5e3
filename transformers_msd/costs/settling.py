"""When a ratio that is measured pass after pass is settled, and when it can't be."""

from collections.abc import Sequence
from math import inf, sqrt
from statistics import median, quantiles


# Below it, no median is called settled.
LEAST_PASSES = 4
# A round has a forward of the target in it, as a plain step has. What is measured far below one is noise.
LEAST_ROUND = 0.8


def uncertainty(values: Sequence[float]) -> float:
    """
    Tell how far the median of a figure may be off: the interquartile range of its values in single passes, over the
    square root of their number, as a share of the median. That is about one standard error.

    Args:
        values (`Sequence[float]`):
            The figure in each pass, above 0.

    Returns:
        `float`: The share; infinite for fewer than two passes.
    """
    if len(values) < 2:
        return inf
    first, _, third = quantiles(values, n=4, method="inclusive")
    return (third - first) / sqrt(len(values)) / median(values)
