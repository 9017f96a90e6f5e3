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
from transformers_msd.costs.sizing import Sizing
from transformers_msd.drafters import assistant_for
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.drafters.model import ModelDrafter
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.drafters.wrapped import Ungated
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.trees.tree import TokenTree, TreeConfig


# Batch sizes, and the trees that are measured with each; single prompts choose their trees by these.
SIZES = {1: (2, 4, 8, 16, 32, 64), 4: (4, 16, 64), 16: (4, 16, 64)}
SHALLOW, DEEP = 2, 6
NUM_ROUNDS, NUM_PASSES = 12, 4
NEVER_SAID = 2**31 - 1  # as EOS token: no answer ends early


class _EnoughRounds(Exception):
    """Ends a call in which `NUM_ROUNDS` rounds have begun, however many tokens they emitted."""


class _Nothing:
    """Drafts nothing: every round is a plain step."""

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        return _NothingGenerator()


class _NothingGenerator(TreeCandidateGenerator):
    def draft(self, committed: Committed) -> TokenTree:
        return TokenTree.root(committed.root_token_ids)


class _Whole(Sizing):
    """Asks the device what the rounds of a measured pair ask, and keeps the trees as they are."""

    def __init__(self) -> None:
        super().__init__([Costs(step=1.0, num_nodes=[1], rounds=[1.0], level=0.0, depth=0)])

    def goes_on(self, probabilities: list[float], frontier: list[float], depth: int, most: int) -> bool:
        super().goes_on(probabilities, frontier, depth, most)
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
    """Count the calls that [`measure_costs`] makes."""
    return len(_shapes(batch_size)) * _num_passes(batch_size)


def _shapes(batch_size: int) -> list[tuple[int, int]]:
    """List nodes and depths of the trees that are measured; one without levels is a plain step."""
    sizes = SIZES[batch_size]
    return [(1, 0), *((num_nodes, SHALLOW) for num_nodes in sizes), (sizes[len(sizes) // 2], DEEP)]


def _num_passes(batch_size: int) -> int:
    return 1 + (NUM_PASSES if batch_size == 1 else max(NUM_PASSES // 2, 1))


def measure_costs(
    target: PreTrainedModel,
    assistant: Any,
    prompt_length: int = 256,
    batch_size: int = 1,
    on_call: Callable[[], None] | None = None,
) -> Costs:
    """
    Run rounds with trees of several shapes, and plain steps, on prompts of random tokens.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target.
        assistant ([`MSDDraftModel`] or [`VLMDrafter`]):
            What drafts for it.
        prompt_length (`int`, *optional*, defaults to 256):
            Tokens of each prompt.
        batch_size (`int`, *optional*, defaults to 1):
            Prompts that are answered together, one of `SIZES`.
        on_call (`Callable`, *optional*):
            Called after each of [`num_calls`] calls.

    Raises:
        ValueError: If the assistant can't draft for this target, or a size can't be measured.
    """
    if batch_size not in SIZES:
        raise ValueError(f"`batch_size` must be one of {list(SIZES)}, got {batch_size!r}.")
    if type(prompt_length) is not int or prompt_length < 1:
        raise ValueError(f"`prompt_length` must be a whole number, 1 at least, got {prompt_length!r}.")
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

    sizes, shapes = SIZES[batch_size], _shapes(batch_size)
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    # In turn, so that what else the machine does slows all of them; the first pass warms up.
    for number in range(_num_passes(batch_size)):
        for num_nodes, depth in shapes:
            if depth:
                # Wide enough to fill the tree.
                top_k = max(config.top_k, num_nodes // depth + 1, int(num_nodes**0.5) + 1)
                drafter.tree_config = TreeConfig(num_nodes, depth, top_k, config.min_probability, config.gate)
            timed = _Timed(drafter if depth else _Nothing())
            length = 1 + NUM_ROUNDS * (depth + 1)  # never reached: the call ends before
            with suppress(_EnoughRounds):
                target.generate(
                    ids, max_new_tokens=length, do_sample=False, eos_token_id=NEVER_SAID, assistant_model=timed
                )
            if number:
                # The first round pays for what is made once.
                seconds[num_nodes, depth] += [end - start for start, end in pairwise(timed.times[1:])]
            if on_call is not None:
                on_call()
    step, *rounds, deep = (median(values) for values in seconds.values())
    level = max((deep - rounds[len(sizes) // 2]) / (DEEP - SHALLOW), 0.0)
    # Measured times are noisy; a larger tree is never cheaper.
    for i in range(1, len(rounds)):
        rounds[i] = max(rounds[i], rounds[i - 1])
    return Costs(step, list(sizes), rounds, level, SHALLOW, batch_size)
