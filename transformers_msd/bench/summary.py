"""Figures of a method from its runs."""

from statistics import median
from typing import Any

from transformers_msd.bench.measure import Runs, split_of
from transformers_msd.costs.settling import LEAST_ROUND
from transformers_msd.trainer.metrics import AcceptanceLength


def summarize(
    runs: Runs, plain: Runs, compiled_plain: Runs | None = None, floor_seconds: float | None = None
) -> dict[str, Any]:
    """
    Sum up what a method did with all batches.

    Rates and times are medians over the passes, ratios those of these medians; the range of a ratio is that of the
    ratios within single passes.

    Args:
        runs ([`Runs`]):
            Runs of the method.
        plain ([`Runs`]):
            Those of plain `generate`.
        compiled_plain ([`Runs`], *optional*):
            Those of plain `generate`, compiled.
        floor_seconds (`float`, *optional*):
            Least time of a step of the target.
    """
    method, last = runs.method, runs.passes[-1]
    lengths = [row for run in last for row in run.lengths if row]
    tau = acceptance_length(lengths)
    seconds, plain_seconds = _round_seconds(runs), _round_seconds(plain)
    compiled_seconds = [] if compiled_plain is None else _round_seconds(compiled_plain)
    floors = [] if floor_seconds is None else [floor_seconds] * len(seconds)
    cost, compiled_cost = _ratio(seconds, plain_seconds), _ratio(seconds, compiled_seconds)
    # What decodes on a cache of its own kind has plain steps of its own, too.
    own_cost = cost if method.has_plain_forwards else compiled_cost
    peaks = [run.peak_memory for batch_runs in runs.passes for run in batch_runs]
    return {
        "name": method.name,
        "is_simulated": method.simulated is not None,
        "num_tokens": sum(run.num_tokens for run in last),
        "num_rounds": sum(run.num_rounds for run in last),
        "num_plain_steps": sum(run.num_plain_steps for run in last),
        "acceptance_length": tau,
        "acceptance_by_depth": acceptance_by_depth(lengths),
        "round_seconds": _median(seconds),
        "round_seconds_range": _range(seconds),
        "round_cost": cost,
        "round_cost_range": _range(_ratios(seconds, plain_seconds)),
        "compiled_round_cost": compiled_cost,
        "compiled_round_cost_range": _range(_ratios(seconds, compiled_seconds)),
        "num_floors": _ratio(seconds, floors),
        "num_floors_range": _range(_ratios(seconds, floors)),
        "is_too_noisy": own_cost is not None and own_cost < LEAST_ROUND / _num_rows(plain),
        "warm_up_seconds": sum(run.seconds for run in runs.warm_up),
        "num_captures": method.num_captures,
        "split_seconds": split_of(runs.split),
        "first_token_seconds": median(
            sum(run.seconds - run.decode_seconds for run in own) / len(own) for own in runs.passes
        ),
        "decode": _rates(_decode_rates(runs), _decode_rates(plain)),
        "end_to_end": _rates(_end_to_end_rates(runs), _end_to_end_rates(plain)),
        # What a runtime keeps from the first calls on is not seen in later ones.
        "peak_memory": None if None in peaks else max(peaks) + sum(run.kept_memory for run in runs.warm_up),
    }


def pass_ratios(runs: Runs, plain: Runs) -> list[list[float]]:
    """
    List what a method is compared with plain by, in each pass: decoding, end to end, and rounds where there are some.

    Args:
        runs ([`Runs`]):
            Runs of the method.
        plain ([`Runs`]):
            Those of plain `generate`, of as many passes.
    """
    kinds = (_decode_rates, _end_to_end_rates, _round_seconds)
    return [ratios for kind in kinds if (ratios := _ratios(kind(runs), kind(plain)))]


def _ratios(values: list[float], units: list[float]) -> list[float]:
    """Divide figures of passes, where both have them."""
    return [own / unit for own, unit in zip(values, units, strict=True)] if values and units else []


def _ratio(values: list[float], units: list[float]) -> float | None:
    return median(values) / median(units) if values and units else None


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _range(values: list[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def _num_rows(plain: Runs) -> int:
    """
    Count the rows of the largest batch: by so much a plain step of all may cost more than one of the last row, which
    rounds go on with when the others have ended.
    """
    return max(len(run.tokens) for run in plain.passes[-1])


def acceptance_length(lengths: list[list[int]]) -> float | None:
    """Return τ, None without a round."""
    if not lengths:
        return None
    return AcceptanceLength(keep_in_memory=True).compute(predictions=lengths)["acceptance_length"]


def acceptance_by_depth(lengths: list[list[int]]) -> list[float]:
    """Share of the rounds that emitted more than 1 token, more than 2, and so on."""
    rounds = [length for row in lengths for length in row]
    return [sum(length > depth for length in rounds) / len(rounds) for depth in range(1, max(rounds, default=1))]


def _round_seconds(runs: Runs) -> list[float]:
    """Mean time of a round in each pass, the first of each run left out: it starts the draft, too."""
    seconds = []
    for own in runs.passes:
        num_rounds = sum(max(run.num_rounds - 1, 0) for run in own)
        if num_rounds == 0:
            return []
        seconds.append(sum(run.later_seconds for run in own) / num_rounds)
    return seconds


def _decode_rates(runs: Runs) -> list[float]:
    return [sum(run.num_decoded for run in own) / sum(run.decode_seconds for run in own) for own in runs.passes]


def _end_to_end_rates(runs: Runs) -> list[float]:
    return [sum(run.num_tokens for run in own) / sum(run.seconds for run in own) for own in runs.passes]


def _rates(rates: list[float], plain_rates: list[float]) -> dict[str, Any]:
    """Compare tokens per second of the passes with plain's."""
    return {
        "tokens_per_second": median(rates),
        "passes": rates,
        "speedup": median(rates) / median(plain_rates),
        "speedup_range": _range(_ratios(rates, plain_rates)),
    }
