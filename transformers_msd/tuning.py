"""Measuring what rounds cost, by running them."""

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_msd.costs import Costs
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.target import Committed, Target
from transformers_msd.tree import TokenTree, TreeConfig


SIZES = (2, 4, 8, 16, 32, 64)
SHALLOW, DEEP = 2, 6
NUM_ROUNDS = 12


class _Timed:
    """An assistant that drafts with another, in trees of one shape, and notes when each round begins."""

    def __init__(self, assistant: Any, tree_config: TreeConfig) -> None:
        self.assistant = assistant
        self.tree_config = tree_config
        self.times: list[float] = []

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "_TimedGenerator":
        own = self.assistant.candidate_generator(target, inputs)
        own.sizing = None  # what was measured before must not change what is measured
        return _TimedGenerator(own, self.times)


class _TimedGenerator(TreeCandidateGenerator):
    def __init__(self, generator: TreeCandidateGenerator, times: list[float]) -> None:
        self.generator = generator
        self.times = times

    def draft(self, committed: Committed) -> TokenTree:
        committed.lengths.tolist()  # waits for the device
        self.times.append(time.perf_counter())
        return self.generator.draft(committed)


def measure_costs(target: PreTrainedModel, assistant: Any, prompt_length: int = 256) -> Costs:
    """
    Run rounds with trees of several shapes, and plain steps, on a prompt of random tokens.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target.
        assistant ([`MSDDraftModel`] or [`VLMDrafter`]):
            What drafts for it. Its settings are as before in the end.
        prompt_length (`int`, *optional*, defaults to 256):
            Tokens of the prompt.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = min(target.config.get_text_config().vocab_size, 1000)
    ids = torch.randint(3, vocab_size, (1, prompt_length), generator=generator).to(target.device)
    config = assistant.tree_config

    def seconds(num_nodes: int, depth: int) -> float:
        # Wide enough to fill the tree.
        top_k = max(config.top_k, num_nodes // depth + 1, int(num_nodes**0.5) + 1)
        assistant.tree_config = replace(config, num_nodes=num_nodes, depth=depth, top_k=top_k, gate=False)
        timed = _Timed(assistant, assistant.tree_config)
        length = NUM_ROUNDS * (depth + 1)
        target.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False, assistant_model=timed)
        return median(b - a for a, b in zip(timed.times[1:NUM_ROUNDS], timed.times[2:NUM_ROUNDS], strict=False))

    try:
        seconds(8, SHALLOW)  # warm up
        rounds = [seconds(num_nodes, SHALLOW) for num_nodes in SIZES]
        level = (seconds(SIZES[3], DEEP) - seconds(SIZES[3], SHALLOW)) / (DEEP - SHALLOW)
    finally:
        assistant.tree_config = config
    steps = []
    for length in (NUM_ROUNDS, 4 * NUM_ROUNDS, NUM_ROUNDS, 4 * NUM_ROUNDS):
        start = time.perf_counter()
        target.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False).tolist()
        steps.append(time.perf_counter() - start)
    step = (steps[3] - steps[2]) / (3 * NUM_ROUNDS)
    # Measured times are noisy; a larger tree is never cheaper.
    for i in range(1, len(rounds)):
        rounds[i] = max(rounds[i], rounds[i - 1])
    return Costs(step, list(SIZES), rounds, max(level, 0.0), SHALLOW)
