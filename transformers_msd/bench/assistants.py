"""Assistants that draft with another: one times its phases, one simulates how often it is right."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from transformers_msd.committed import Committed
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.target import Target
from transformers_msd.tree import TokenTree


PHASES = ("draft", "verify", "commit")


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class PhaseTimer:
    """
    Drafts with another assistant, and notes when each phase of a round begins and how long it takes.

    The device is waited for after each, so a call takes longer than it does without.

    Args:
        assistant ([`TreeAssistant`]):
            What drafts.
    """

    def __init__(self, assistant: Any) -> None:
        self.assistant = assistant
        self.tree_config = assistant.tree_config
        # Of the last call: phase, start, seconds.
        self.notes: list[tuple[str, float, float]] = []

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        self.notes = []
        candidates = self.assistant.candidate_generator(target, inputs)
        device = target.model.device
        # Both live for one call.
        candidates.draft = self._timed("draft", candidates.draft, device)
        target.forward_tree = self._timed("verify", target.forward_tree, device)
        target.commit = self._timed("commit", target.commit, device)
        return candidates

    def _timed(self, phase: str, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(device)
            self.notes.append((phase, start, time.perf_counter() - start))
            return result

        return timed

    def seconds_since(self, start: float) -> dict[str, float]:
        """Sum up the phases that began after a time."""
        return {
            phase: sum(note[2] for note in self.notes if note[0] == phase and note[1] >= start) for phase in PHASES
        }


class Simulated:
    """
    Lets another assistant draft, so that all of its time is paid, and puts a chain in the place of its tree, of the
    same size and depth, that goes on as the call is known to go on.

    Args:
        assistant ([`TreeAssistant`]):
            What drafts.
        probability (`float`):
            Probability that a node of the chain, given that its parent is right, is right.
    """

    def __init__(self, assistant: Any, probability: float) -> None:
        self.assistant = assistant
        self.probability = probability
        self.tree_config = replace(assistant.tree_config, gate=False)
        # Tokens that the next call is taken to generate, of shape `(batch_size, num_steps)`. In half precision a
        # near-tie may fall the other way in a tree: what the call itself said then is the better guess for the next.
        self.continuation = torch.zeros(0, 0, dtype=torch.long)
        # Of the errors in the next call.
        self.seed = 0

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "SimulatedCandidateGenerator":
        candidates = self.assistant.candidate_generator(target, inputs)
        candidates.sizing = None
        return SimulatedCandidateGenerator(self, candidates, target)


class SimulatedCandidateGenerator(TreeCandidateGenerator):
    def __init__(self, assistant: Simulated, candidates: TreeCandidateGenerator, target: Target) -> None:
        self.candidates = candidates
        self.vocab_size = target.model.config.get_text_config().vocab_size
        device = target.model.device
        self.continuation = assistant.continuation.to(device)
        # All on the device beforehand: a round waits for nothing that it would not wait for otherwise.
        batch_size, num_steps = self.continuation.shape
        generator = torch.Generator().manual_seed(assistant.seed)
        luck = torch.rand(num_steps, batch_size, assistant.tree_config.depth, generator=generator)
        self.is_right = (luck < assistant.probability).to(device)
        self.num_rounds = 0
        self.num_emitted: torch.Tensor | None = None

    def draft(self, committed: Committed) -> TokenTree:
        tree = self.candidates.draft(committed)
        # The first rows are the prompt's, behind which one token was emitted.
        self.num_emitted = (
            torch.ones_like(committed.lengths) if self.num_emitted is None else self.num_emitted + committed.lengths
        )
        places = self.num_emitted[:, None] + torch.arange(tree.depth, device=committed.lengths.device)
        last = self.continuation.shape[1] - 1
        truth = self.continuation.gather(1, places.clamp(max=last))
        is_right = self.is_right[self.num_rounds % len(self.is_right), :, : tree.depth] & (places <= last)
        chain = torch.where(is_right, truth, (truth + 1) % self.vocab_size)
        self.num_rounds += 1
        nodes = torch.arange(tree.num_nodes, device=places.device).expand_as(tree.token_ids)
        return TokenTree(
            token_ids=torch.cat([tree.token_ids[:, :1], chain, tree.token_ids[:, tree.depth + 1 :]], dim=1),
            parents=torch.where(nodes <= tree.depth, nodes - 1, -1),
            scores=tree.scores,
            depth=tree.depth,
        )
