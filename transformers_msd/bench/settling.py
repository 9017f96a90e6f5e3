"""When a comparison has been measured often enough."""

import time

from transformers_msd.bench.measure import Runs
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.bench.summary import pass_ratios
from transformers_msd.costs.settling import LEAST_PASSES, uncertainty


TOLERANCE = 0.02


class Settling:
    """
    Ends the passes of one comparison: when every ratio to plain `generate` is settled, or when time is up.

    A ratio is settled when the interquartile range of its values in single passes, over the square root of their
    number, is at most `TOLERANCE` of their median, and there are `LEAST_PASSES` of them at least.

    Args:
        arguments ([`BenchArguments`]):
            Settings of the benchmark: a fixed number of passes, or a limit.
    """

    def __init__(self, arguments: BenchArguments) -> None:
        self.most = arguments.repeats or arguments.max_passes
        self._is_fixed = arguments.repeats is not None
        self._minutes = arguments.time_limit
        self._start = time.perf_counter()

    def is_enough(self, results: list[Runs]) -> bool:
        """Tell whether the last pass may be the last."""
        if self._minutes is not None and time.perf_counter() - self._start >= 60 * self._minutes:
            return True
        return not self._is_fixed and not unsettled(results)


def unsettled(results: list[Runs]) -> list[str]:
    """
    Name the methods with a ratio that is not settled.

    Args:
        results (`list[Runs]`):
            Runs of all methods, those of plain `generate` first.
    """
    plain = results[0]
    is_short = len(plain.passes) < LEAST_PASSES
    return [
        runs.method.name
        for runs in results[1:]
        if is_short or any(uncertainty(ratios) > TOLERANCE for ratios in pass_ratios(runs, plain))
    ]
