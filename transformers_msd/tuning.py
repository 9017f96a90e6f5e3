"""Measuring what rounds cost, by running them."""

import copy
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_msd.costs.rounds import Costs
from transformers_msd.costs.settling import LEAST_PASSES, LEAST_ROUND, uncertainty
from transformers_msd.costs.sizing import Sizing
from transformers_msd.drafters import assistant_for
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.drafters.model import ModelDrafter
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.drafters.ngrams import NgramDrafter
from transformers_msd.drafters.wrapped import Ungated
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.trees.tree import TokenTree, TreeConfig


# Batch sizes, and the trees that are measured with each.
SIZES = {1: (2, 4, 8, 16, 32, 64), 4: (4, 16, 64), 16: (4, 16, 64)}
SHALLOW, DEEP = 2, 6
NUM_ROUNDS, NUM_PASSES, MAX_PASSES = 12, LEAST_PASSES, 24
# What is measured is stored when no ratio to a plain step is further off than this share of it.
TOLERANCE = 0.05
NEVER_SAID = 2**31 - 1  # as EOS token: no answer ends early


class _EnoughRounds(Exception):
    """Ends a call in which `NUM_ROUNDS` rounds have begun, however many tokens they emitted."""


class _Whole(Sizing):
    """Asks the device what the rounds of a measured pair ask, and keeps the trees as they are."""

    def __init__(self) -> None:
        super().__init__(Costs(step=1.0, num_nodes=[1], rounds=[1.0], level=0.0, depth=0))

    def goes_on(self, probabilities: list[float], frontier: list[float], depth: int, most: int, further: int) -> bool:
        super().goes_on(probabilities, frontier, depth, most, further)
        return True

    def choose(self, probabilities: list[float], depth: int, most: int) -> tuple[int, float]:
        rate = super().choose(probabilities, depth, most)[1]
        return min(most, max(len(probabilities), 1)), rate


class _Timed(Ungated):
    """Notes when each round of a call begins, and ends the call by [`_EnoughRounds`]."""

    def __init__(self, assistant: Any) -> None:
        super().__init__(assistant)
        self.times: list[float] = []

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        candidates = super().candidate_generator(target, inputs)
        candidates.sizing = _Whole()  # what was measured before must not change what is measured
        draft = candidates.draft

        def timed(committed: Committed) -> TokenTree:
            committed.lengths.tolist()  # waits for the device
            self.times.append(time.perf_counter())
            if len(self.times) == NUM_ROUNDS:
                raise _EnoughRounds
            return draft(committed)

        candidates.draft = timed
        return candidates


def num_calls(batch_size: int) -> int:
    """Count the calls that [`measure_costs`] makes at the most."""
    return len(_shapes(batch_size)) * (1 + MAX_PASSES)


def _shapes(batch_size: int, shallow: int = SHALLOW, deep: int = DEEP) -> list[tuple[int, int]]:
    """List nodes and depths of the trees that are measured; one without levels is a plain step."""
    sizes = SIZES[batch_size]
    return [(1, 0), *((num_nodes, shallow) for num_nodes in sizes), (sizes[len(sizes) // 2], deep)]


def measure_costs(
    target: PreTrainedModel,
    assistant: Any,
    prompt_length: int = 256,
    batch_size: int = 1,
    on_call: Callable[[], None] | None = None,
    tolerance: float = TOLERANCE,
) -> Costs:
    """
    Run rounds with trees of several shapes, and plain steps, on prompts of random tokens, in passes of all of them in
    turn, until every round is settled as a ratio to the plain step: after 4 passes at the least, the interquartile
    range of the ratio in single passes, over the square root of their number, is at most `tolerance` of its median.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target.
        assistant ([`MSDDraftModel`], [`Eagle3DraftModel`], [`BlockDraftModel`] or [`VLMDrafter`]):
            What drafts for it.
        prompt_length (`int`, *optional*, defaults to 256):
            Tokens of each prompt.
        batch_size (`int`, *optional*, defaults to 1):
            Prompts that are answered together, one of `SIZES`.
        on_call (`Callable`, *optional*):
            Called after each of [`num_calls`] calls.
        tolerance (`float`, *optional*, defaults to 0.05):
            Share by which ratios may be uncertain.

    Raises:
        ValueError: If the assistant can't draft for this target, a size can't be measured, or ratios are not settled
            after 24 passes, or a round takes far less than a plain step, which has no forward less.
    """
    if batch_size not in SIZES:
        raise ValueError(f"`batch_size` must be one of {list(SIZES)}, got {batch_size!r}.")
    if type(prompt_length) is not int or prompt_length < 1:
        raise ValueError(f"`prompt_length` must be a whole number, 1 at least, got {prompt_length!r}.")
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be a share above 0, got {tolerance!r}. 0.05 is 5 %.")
    found = assistant_for(assistant)
    if not isinstance(found, MSDDrafter | ModelDrafter):
        raise ValueError(
            f"`assistant` must be an `MSDDraftModel` or `VLMDrafter`, got {type(assistant).__name__}. Wrap a model in "
            "`VLMDrafter`, and measure what a `StaticRuntime` wraps."
        )
    generator = torch.Generator().manual_seed(0)
    vocab_size = min(target.config.get_text_config().vocab_size, 1000)
    ids = torch.randint(3, vocab_size, (batch_size, prompt_length), generator=generator).to(target.device)
    drafter = copy.copy(found)  # the caller's keeps its tree
    drafter.check_target(target, {"input_ids": ids})
    config = drafter.tree_config

    most = next((model.most_levels for model in drafter.models if isinstance(model, FeatureDraftModel)), None)
    shallow, deep = (depth if most is None else min(depth, most) for depth in (SHALLOW, DEEP))
    sizes, shapes = SIZES[batch_size], list(dict.fromkeys(_shapes(batch_size, shallow, deep)))
    # Of each pass.
    seconds: dict[tuple[int, int], list[list[float]]] = {shape: [] for shape in shapes}
    # In turn, so that what else the machine does slows all of them; the first pass warms up.
    for number in range(1 + MAX_PASSES):
        for num_nodes, depth in shapes:
            if depth:
                # Wide enough to fill the tree.
                top_k = max(config.top_k, num_nodes // depth + 1, int(num_nodes**0.5) + 1)
                drafter.tree_config = TreeConfig(num_nodes, depth, top_k, config.min_probability, config.gate)
            timed = _Timed(drafter if depth else NgramDrafter())  # which drafts nothing where n-grams are off
            length = 1 + NUM_ROUNDS * (depth + 1)  # never reached: the call ends before
            with suppress(_EnoughRounds):
                target.generate(
                    ids, max_new_tokens=length, do_sample=False, eos_token_id=NEVER_SAID, assistant_model=timed
                )
            if number:
                # The first round pays for what is made once.
                seconds[num_nodes, depth].append([end - start for start, end in pairwise(timed.times[1:])])
            if on_call is not None:
                on_call()
        if number >= NUM_PASSES and _spread(seconds) <= tolerance and _least_ratio(seconds) >= LEAST_ROUND:
            break
    else:
        raise ValueError(_what_was_seen(seconds, batch_size, tolerance))
    step, *rounds = map(_median, seconds.values())
    of_deep = rounds.pop() if deep > shallow else rounds[len(sizes) // 2]
    level = max((of_deep - rounds[len(sizes) // 2]) / max(deep - shallow, 1), 0.0)
    # Measured times are noisy; a larger tree is never cheaper.
    for i in range(1, len(rounds)):
        rounds[i] = max(rounds[i], rounds[i - 1])
    return Costs(step, list(sizes), rounds, level, shallow, batch_size, _spread(seconds))


def _median(passes: list[list[float]]) -> float:
    return median(value for values in passes for value in values)


def _ratios(seconds: dict[tuple[int, int], list[list[float]]]) -> dict[tuple[int, int], list[float]]:
    """Divide rounds of each shape by the plain step of the same pass."""
    (_, steps), *rounds = seconds.items()
    return {
        shape: [median(own) / median(step) for own, step in zip(passes, steps, strict=True)]
        for shape, passes in rounds
    }


def _spread(seconds: dict[tuple[int, int], list[list[float]]]) -> float:
    """Return the uncertainty of the ratio that is least settled."""
    return max(map(uncertainty, _ratios(seconds).values()))


def _least_ratio(seconds: dict[tuple[int, int], list[list[float]]]) -> float:
    return min(map(median, _ratios(seconds).values()))


def _what_was_seen(seconds: dict[tuple[int, int], list[list[float]]], batch_size: int, tolerance: float) -> str:
    """Say why what was measured is of no use, and what to do."""
    found = _ratios(seconds)
    shape = max(found, key=lambda shape: uncertainty(found[shape]))
    ratios = found[shape]
    seen = (
        f"a round of {shape[0]} nodes in {shape[1]} levels took {min(ratios):.2f} to {max(ratios):.2f} plain steps, "
        f"its median uncertain by {uncertainty(ratios):.1%}"
    )
    if (least := _least_ratio(seconds)) < LEAST_ROUND:
        seen = f"a round took {least:.2f} plain steps, which can't be, as a forward of the target is in both"
    prompts = "one prompt" if batch_size == 1 else f"{batch_size} prompts"
    return (
        f"Rounds with {prompts} at a time must be settled to {tolerance:.1%}, got in {len(ratios)} passes: {seen}. "
        "Measure again with nothing else running, or take more uncertain costs by a larger `tolerance`. Nothing was "
        "stored."
    )
